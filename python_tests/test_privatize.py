"""privatize, clip_reduce and the filter: against NumPy's padding, a dense matrix and the formula written out."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from cases import TENSOR_CASES
from tolerances import KERNEL_F32, KS_ACCEPT

from lalora_kernels import functional, native, reference

KEY = bytes(reversed(range(32)))
TAPS = np.array([1, 4, 6, 4, 1]) / 16
PADDINGS = ["symmetric", "reflect"]


def numpy_smooth(t: torch.Tensor, dim: int, padding: str) -> np.ndarray:
    """The filter by numpy.pad and numpy.convolve."""
    return np.apply_along_axis(
        lambda line: np.convolve(np.pad(line, 2, mode=padding), TAPS, mode="valid"), dim, t.double().numpy()
    )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 17, 300, 5000])
def test_smooth_is_numpys(length, padding, backend):
    for shape, dim in (((length, 3), 0), ((2, length), 1)):
        t = torch.randn(shape)
        got = functional.smooth(t, dim, padding, backend=backend)
        torch.testing.assert_close(
            got.double(), torch.from_numpy(numpy_smooth(t, dim, padding)), rtol=KERNEL_F32, atol=KERNEL_F32
        )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("length", [1, 2, 4, 5, 31])
def test_smooth_is_a_matrix_of_unit_gain(length, padding, isa):
    matrix = native.smooth(torch.eye(length), 0, padding)
    torch.testing.assert_close(matrix.sum(1), torch.ones(length), rtol=0, atol=KERNEL_F32)
    t = torch.randn(length, 6)
    torch.testing.assert_close(native.smooth(t, 0, padding), matrix @ t, rtol=KERNEL_F32, atol=KERNEL_F32)
    if padding == "symmetric":  # neither does any feature gain weight: the matrix is doubly stochastic
        torch.testing.assert_close(matrix.sum(0), torch.ones(length), rtol=0, atol=KERNEL_F32)


def test_white_noise_keeps_70_of_256_of_its_variance(backend):
    noise = functional.chacha20_normal(100_000, key=KEY, release=4, tensor_index=1, backend=backend).view(4, -1)
    inside = functional.smooth(noise, 1, backend=backend)[:, 2:-2].double()
    assert inside.var().item() == pytest.approx(70 / 256, rel=0.03)  # one standard error is 0.6 %
    assert inside.std().item() == pytest.approx(0.5229, rel=0.015)


def release_inputs(N: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [shape for shape, _ in TENSOR_CASES]
    G = [torch.randn(N, *s, generator=generator) for s in shapes]
    S = [torch.randn(s, generator=generator) for s in shapes]
    weights = torch.rand(len(shapes), N, generator=generator)
    dims = [dim for _, dim in TENSOR_CASES]
    stream = dict(key=KEY, release=5 << 33 | 7, tensor_index=[3 * l + 1 for l in range(len(shapes))])
    return G, S, weights, shapes, dict(stream, smooth_dim=dims)


def run(backend, G, S, weights, shapes, dtype=torch.float32, **kwargs):
    out = [torch.full(s, float("nan"), dtype=dtype) for s in shapes]
    functional.privatize(G, S, weights, out, backend=backend, **kwargs)
    return out


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def close(got, want) -> None:
    for l, (g, w) in enumerate(zip(got, want, strict=True)):
        assert torch.isfinite(g).all(), f"{TENSOR_CASES[l]}: unwritten"
        error = (g.double() - w.double()).norm()
        size = w.double().norm() + w.numel() ** 0.5  # the terms are of order 1, and may cancel
        assert error <= KERNEL_F32 * size, f"{TENSOR_CASES[l]}: {error / size}"


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("noise_std", [0.0, 0.8])
@pytest.mark.parametrize("N", [0, 1, 6])
def test_privatize_is_the_reference(N, noise_std, padding, isa):
    """All tensors in one call, with every combination of G and S present."""
    G, S, weights, shapes, kwargs = release_inputs(N)
    kwargs.update(noise_std=noise_std, divisor=3.7, padding=padding)
    for g, s in ((G, S), (G, [None] * len(S)), ([None] * len(G), S), ([None] * len(G), [None] * len(S))):
        got = run("cpp", g, s, weights, shapes, **kwargs)
        kwargs64 = dict(kwargs, noise_std=0.0)
        want = run("reference", double(g), double(s), weights.double(), shapes, torch.float64, **kwargs64)
        if noise_std:
            want = [w + noise_std * x for w, x in zip(want, released_noise(padding), strict=True)]
        close(got, want)


@lru_cache
def released_noise(padding):
    """The reference's noise alone, filtered and divided, at noise_std 1: the operation is linear."""
    _, _, weights, shapes, kwargs = release_inputs(0)
    none = [None] * len(shapes)
    kwargs.update(noise_std=1.0, divisor=3.7, padding=padding)
    return run("reference", none, none, weights, shapes, torch.float64, **kwargs)


def test_privatize_is_the_formula(isa):
    """Clip, sum, noise, filter, divide: written out with NumPy's filter."""
    G = [torch.randn(5, 40, 4), torch.randn(5, 4, 50)]
    weights = torch.tensor([[0.5, 1.0, 0.0, 0.25, 1.0]]).expand(2, 5)  # one row for both: stride 0
    out = [torch.empty(40, 4), torch.empty(4, 50)]
    stream = dict(noise_std=0.6, key=KEY, release=2, tensor_index=[0, 9])
    native.privatize(G, [None, None], weights, out, **stream, smooth_dim=[0, 1], divisor=8.0)
    for l, dim in enumerate((0, 1)):
        total = sum(w * g for w, g in zip(weights[l].tolist(), G[l], strict=True))
        noise = native.chacha20_normal(total.numel(), key=KEY, release=2, tensor_index=[0, 9][l]).view(total.shape)
        want = numpy_smooth(total + 0.6 * noise, dim, "symmetric") / 8.0
        np.testing.assert_allclose(out[l].double().numpy(), want, rtol=0, atol=KERNEL_F32)


def test_masked_samples_are_not_read(backend):
    G, S, weights, shapes, kwargs = release_inputs(4)
    kwargs.update(noise_std=0.5, divisor=2.0)
    weights[:, 2] = 0.0
    clean = run(backend, G, S, weights, shapes, **kwargs)
    for bad in (float("nan"), float("inf")):
        for g in G:
            g[2] = bad
        assert all(torch.equal(a, b) for a, b in zip(run(backend, G, S, weights, shapes, **kwargs), clean, strict=True))


def test_physical_batches_add_up(isa):
    """Two physical batches through clip_reduce, then one release, equal the unsplit batch."""
    G, _, weights, shapes, kwargs = release_inputs(6)
    kwargs.update(noise_std=1.1, divisor=6.0)
    none = [None] * len(G)
    whole = run("cpp", G, none, weights, shapes, **kwargs)
    S = [torch.zeros(s) for s in shapes]
    functional.clip_reduce([g[:2] for g in G], weights[:, :2], S)
    functional.clip_reduce([g[2:5] for g in G], weights[:, 2:5], S)
    close(run("cpp", [g[5:] for g in G], S, weights[:, 5:], shapes, **kwargs), whole)
    functional.clip_reduce([g[5:] for g in G], weights[:, 5:], S)
    close(run("cpp", none, S, weights, shapes, **kwargs), whole)


def test_clip_reduce_is_the_reference(isa):
    G, S, weights, _, _ = release_inputs(5)
    weights[3, 1] = 0.0
    want = double(S)
    reference.clip_reduce(double(G), weights.double(), want)
    got = [s.clone() for s in S]
    native.clip_reduce(G, weights, got)
    close(got, want)
    unchanged = [s.clone() for s in S]
    native.clip_reduce([g[:0] for g in G], weights[:, :0], unchanged)
    assert all(torch.equal(a, b) for a, b in zip(unchanged, S, strict=True))


def test_views_and_strides(isa):
    """Gradients as views into one workspace, transposed outputs and sums, S that is out."""
    G, S, weights, shapes, kwargs = release_inputs(3)
    kwargs.update(noise_std=0.4, divisor=1.5)
    want = run("cpp", G, S, weights, shapes, **kwargs)
    workspace = torch.cat([g.reshape(3, -1) for g in G], 1)
    sizes = [g[0].numel() for g in G]
    views = [w.view(3, *s) for w, s in zip(workspace.split(sizes, 1), shapes, strict=True)]
    got = run("cpp", views, S, weights.T.contiguous().T, shapes, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    flipped = [g.transpose(1, -1).contiguous().transpose(1, -1) if g.dim() > 2 else g for g in G]
    out = [torch.empty(s[::-1]).permute([*range(len(s))][::-1]) for s in shapes]
    turned = [s.permute([*range(s.dim())][::-1]).contiguous().permute([*range(s.dim())][::-1]) for s in S]
    native.privatize(flipped, turned, weights, out, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
    in_place = [s.clone() for s in S]
    native.privatize(G, in_place, weights, in_place, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(in_place, want, strict=True))


def test_results_do_not_depend_on_the_number_of_threads(isa, threads):
    G, S, weights, shapes, kwargs = release_inputs(3)
    kwargs.update(noise_std=0.4, divisor=1.5)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(run("cpp", G, S, weights, shapes, **kwargs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_empty_batch_is_noised(backend):
    """N = 0 and nothing summed before: the stream itself, in std and in every value."""
    out = [torch.empty(300, 40)]
    functional.privatize(
        [torch.empty(0, 300, 40)], [None], torch.empty(1, 0), out, noise_std=2.0, key=KEY, release=1, tensor_index=[6],
        smooth_dim=[None], divisor=4.0, backend=backend,
    )  # fmt: skip
    noise = functional.chacha20_normal(12_000, key=KEY, release=1, tensor_index=6, backend=backend).view(300, 40)
    torch.testing.assert_close(out[0], noise / 2, rtol=KERNEL_F32, atol=0)
    from scipy import stats

    assert stats.kstest(out[0].flatten().double().numpy() * 2, "norm").pvalue > KS_ACCEPT


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(key=None), "needs a key"),
        (dict(key=b"123"), "32 bytes"),
        (dict(noise_std=-1.0), "noise_std"),
        (dict(noise_std=float("nan")), "noise_std"),
        (dict(divisor=0.0), "divisor"),
        (dict(release=2**64), "64 bits"),
        (dict(tensor_index=[0, 0]), "share their noise"),
        (dict(tensor_index=[0, 2**32]), "32 bits"),
        (dict(padding="same"), "padding"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_bad_arguments(change, message, backend):
    good = dict(noise_std=1.0, key=KEY, release=0, tensor_index=[0, 1], smooth_dim=[0, 1], divisor=1.0)
    out = [torch.zeros(6, 2), torch.zeros(2, 6)]
    with pytest.raises(ValueError, match=message):
        functional.privatize([None, None], out, torch.zeros(2, 0), out, **{**good, **change}, backend=backend)


def test_bad_tensors():
    out = [torch.zeros(6, 2)]
    kwargs = dict(noise_std=0.0, key=None, release=0, tensor_index=[0], smooth_dim=[0], divisor=1.0)
    with pytest.raises(ValueError, match=r"G\[0\] has shape"):
        native.privatize([torch.zeros(3, 5, 2)], [None], torch.zeros(1, 3), out, **kwargs)
    with pytest.raises(ValueError, match="weights"):
        native.privatize([torch.zeros(3, 6, 2)], [None], torch.zeros(2, 3), out, **kwargs)
    with pytest.raises(TypeError, match=r"S\[0\]"):
        native.privatize([None], [out[0].double()], torch.zeros(1, 0), out, **kwargs)
    with pytest.raises(ValueError, match="entries in G"):
        native.privatize([], [None], torch.zeros(1, 0), out, **kwargs)
    with pytest.raises(ValueError, match="no axis"):
        native.privatize([None], [None], torch.zeros(1, 0), out, **{**kwargs, "smooth_dim": [2]})

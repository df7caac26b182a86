"""One record moves a release by no more than C, whatever it holds; the noise is sigma C, and nothing else is."""

import copy
import math
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tolerances import FALSE_ALARM, KERNEL_F32, KS_REJECT, PER_SAMPLE_F32, SENSITIVITY_F32
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lalora_kernels import functional
from lalora_kernels.nn import LoRAConv2d, LoRAEmbedding, LoRALinear
from lalora_kernels.privacy.checks import single_sample_gradients
from lalora_kernels.privacy.clipping import clip_weights
from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.privacy.nonfinite import NonfiniteCount

KEY = bytes(range(7, 39))
TOKENS = 5


class Net(nn.Module):
    """Adapters of all kinds, LayerNorm, a head and an embedding that is read in two places; its loss is linear in the
    output, so that each record's gradient has the scale that the record says."""

    def __init__(self):
        super().__init__()
        self.embedding, self.again = nn.Embedding(TOKENS, 6), nn.Embedding(TOKENS, 6)
        self.again.weight = self.embedding.weight
        self.words = LoRAEmbedding(TOKENS, 6, r=2, lora_alpha=3)
        self.conv = LoRAConv2d(6, 6, (1, 3), padding="same", r=2, lora_alpha=3)
        self.fc1 = LoRALinear.from_linear(nn.Linear(6, 5), r=2, lora_alpha=4)
        self.norm = nn.LayerNorm(5)
        self.fc2 = LoRALinear.from_linear(nn.Linear(5, 4), r=3, lora_alpha=3)
        self.head = nn.Linear(4, 3)

    def forward(self, x, ids):
        words = self.embedding(ids) + self.again(ids.flip(1)) + self.words(ids)
        near = self.conv((x + words).transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        return self.head(self.fc2(self.norm(self.fc1(near))) + x[..., :4])


def net(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    model = Net()
    for layer in (model.words, model.conv, model.fc1, model.fc2):
        nn.init.normal_(layer.lora_B)
    for part in (model.embedding, model.norm, model.head):
        part.requires_grad_(True)
    return model.to(dtype).train()


def clipped_sum(records, *, model=None, dtype=torch.float32, reduction="mean", noise_multiplier=0.0, least=6, **kwargs):
    """The sum before division that one private step of ``make_private`` over all ``records`` releases, float64 (P,)."""
    model = net(dtype) if model is None else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    private, loader = make_private(
        model, optimizer, DataLoader(TensorDataset(*records), batch_size=1), sample_rate=1.0, smoothing=None,
        noise=NoiseSource.fixed(KEY), loss_reduction=reduction, noise_multiplier=noise_multiplier, check=False,
        **kwargs,
    )  # fmt: skip
    with mock.patch.object(functional, "privatize", wraps=functional.privatize) as spy, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # records that are not finite
        for x, ids, u in loader.steps(1):
            loss = (model(x, ids) * u).sum()
            (loss / len(x) if reduction == "mean" else loss).backward()
            private.step()
    ((_, _, _, out), _) = spy.call_args
    private.detach()
    assert spy.call_count == 1 and len(out) >= least
    return private.expected_batch_size * torch.cat([t.double().flatten() for t in out])


SPECIAL = {"none": None, "zero": 0.0, "nan": math.nan, "inf": math.inf}


@st.composite
def neighbours(draw):
    """(records, index of the one that changes, another record for it, settings)."""
    T, N = draw(st.sampled_from([1, 3, 9])), draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    exponents = st.sampled_from([-30, -12, -4, -1, 0, 1, 4, 12, 30])
    rows = []
    for _ in range(N + 1):
        x, u = (torch.randn(T, width, generator=generator) for width in (6, 3))
        for t in (x, u):
            t *= 10.0 ** draw(exponents)
            if draw(st.integers(0, 3)) == 0:  # one position far above the others
                t[0] *= 1e4
            special = SPECIAL[draw(st.sampled_from(["none", "none", "none", *SPECIAL]))]
            if special == 0.0:
                t.zero_()
            elif special is not None:
                t[-1, 1] = special
        rows.append((x, torch.randint(0, TOKENS, (T,), generator=generator), u))
    records = tuple(torch.stack(column) for column in zip(*rows))
    options = {
        "clipping": draw(st.sampled_from(["flat", "per_layer", "automatic"])),
        "max_grad_norm": 10.0 ** draw(st.integers(-4, 4)),
        "method": draw(st.sampled_from(["la-lora", "dp-lora"])),
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        "physical_batch_size": draw(st.sampled_from([None, 1, 2])),
    }
    return records, draw(st.integers(0, N - 1)), options


def check_neighbours(records, i, options, **kwargs):
    """Remove, add (which is remove, seen from the other side), replace, and the norm of one record alone."""
    C, dtype = options["max_grad_norm"], kwargs["dtype"]
    records = tuple(t.to(dtype) if t.is_floating_point() else t for t in records)
    *before, other = range(len(records[0]))
    without = [k for k in before if k != i]
    total, less, replaced, alone = (
        clipped_sum(tuple(t[rows] for t in records), **options, **kwargs)
        for rows in (before, without, [*without, other], [i])
    )
    assert torch.isfinite(total).all()
    bound = C * (1 + SENSITIVITY_F32)
    assert (total - less).norm() <= bound
    assert (replaced - less).norm() <= bound
    assert (total - replaced).norm() <= 2 * bound
    assert alone.norm() <= bound


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(case=neighbours())
def test_one_record_changes_the_sum_by_at_most_C_float32(case, backend):
    check_neighbours(*case, dtype=torch.float32, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(case=neighbours())
def test_one_record_changes_the_sum_by_at_most_C_bfloat16(case, backend):
    check_neighbours(*case, dtype=torch.bfloat16, backend=backend)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(case=neighbours())
def test_one_record_changes_the_sum_by_at_most_C_float64(case):
    check_neighbours(*case, dtype=torch.float64)


@pytest.mark.parametrize("max_norm", [1e-9, 1e-6, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("exponent", [-36, -20, 0, 20, 28, 30, 32, 34, 36, 37])
def test_one_sample_adds_at_most_max_norm_to_the_fused_sum(exponent, max_norm, backend):
    """The kernels alone, to the ends of float32, where a factor may no longer be a normal number."""
    generator = torch.Generator().manual_seed(exponent)
    for scale in (1.0, 64.0, 4096.0):
        dy, x, h = (torch.randn(1, 3, k, generator=generator) for k in (8, 6, 2))
        B = torch.randn(8, 2, generator=generator)
        _, S_B, _, S_A, _ = functional.sample_grad_clip(
            dy * 10.0**exponent, B, 1.0, h=h, x=x, max_norm=max_norm, grad_scale=scale, backend=backend
        )
        for S in (S_B, S_A):
            assert S.double().norm() <= max_norm * (1 + SENSITIVITY_F32)
            if 0 <= exponent <= 20 and max_norm <= 1e-3:
                assert S.double().norm() >= max_norm * (1 - SENSITIVITY_F32)


def test_the_bound_is_reached():
    """Large gradients are clipped to C and not below it, so that the tests above test something."""
    generator = torch.Generator().manual_seed(1)
    records = (
        torch.randn(3, 4, 6, generator=generator), torch.zeros(3, 4, dtype=torch.long),
        1e3 * torch.randn(3, 4, 3, generator=generator),
    )  # fmt: skip
    for clipping in ("flat", "per_layer", "automatic"):
        alone = clipped_sum(tuple(t[:1] for t in records), clipping=clipping, max_grad_norm=0.5)
        assert 0.5 * (1 - 1e-3) <= alone.norm() <= 0.5 * (1 + SENSITIVITY_F32)


class Beside(nn.Module):
    """Two layers that a record enters apart. Called at once they clip on the way, in pieces once all is known."""

    def __init__(self, pieces):
        super().__init__()
        self.pieces = pieces
        self.one, self.two = LoRALinear(6, 5, r=2, lora_alpha=3), LoRALinear(6, 5, r=2, lora_alpha=3)
        for layer in (self.one, self.two):
            nn.init.normal_(layer.lora_B)

    def forward(self, x, u):
        return sum(torch.cat([f(part) for part in t.split(-(-t.shape[1] // self.pieces), 1)], 1)
                   for f, t in ((self.one, x), (self.two, u)))  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "backend, dtype", [("reference", torch.float64), ("reference", torch.float32), ("cpp", torch.float32)]
)
def test_per_layer_leaves_out_the_tensors_that_are_not_finite_whenever_it_clips(bad, backend, dtype):
    """A record whose gradient is not finite in layer two trains layer one: in one pass over dy and in two, and for
    single backwards in float64, tensor by tensor."""
    generator = torch.Generator().manual_seed(2)
    x, u = (torch.randn(5, 4, 6, generator=generator, dtype=dtype) for _ in range(2))
    u[3, 1, 2] = bad
    w = torch.randn(5, 4, 5, generator=generator, dtype=dtype)
    C, found = 0.8, []
    for pieces in (1, 2):
        torch.manual_seed(1)
        model = Beside(pieces).to(dtype)
        wide = copy.deepcopy(model).double()
        with mock.patch.object(functional, "sample_grad_clip", wraps=functional.sample_grad_clip) as one_pass:
            found.append(clipped_sum((x, u, w), model=model, clipping="per_layer", max_grad_norm=C, method="dp-lora",
                                     backend=backend, least=4))  # fmt: skip
        assert one_pass.call_count == (2 if pieces == 1 else 0)
    grads = single_sample_gradients(
        wide, (x.double(), u.double(), w.double()), lambda m, b: (m(b[0], b[1]) * b[2]).sum()
    )
    want = []
    for name, g in grads.items():
        kept = [i for i in range(5) if g[i].isfinite().all()]
        assert kept == ([0, 1, 2, 3, 4] if name.startswith("one") else [0, 1, 2, 4])
        want.append(sum(min(1.0, C / 2 / float(g[i].norm())) * g[i] for i in kept).flatten())
    for got in found:
        assert (got - torch.cat(want)).norm() <= PER_SAMPLE_F32 * torch.cat(want).norm()


def test_a_record_that_one_tensor_leaves_out_counts_once():
    sq = torch.tensor([[4.0, 1.0, math.inf], [math.nan, 1.0, 1.0], [math.inf, 1.0, 1.0]], dtype=torch.float64)
    options = dict(max_grad_norm=math.sqrt(3), grad_scale=1.0, dtype=torch.float64)
    weights, bad = clip_weights(sq, clipping="per_layer", valid=3, **options)
    assert weights.tolist() == [[0.5, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]] and bad == 2
    weights, bad = clip_weights(sq, clipping="per_layer", valid=2, **options)
    assert weights[:, 2].eq(0).all() and weights[0, 0] == 0.5 and bad == 1
    for clipping in ("flat", "automatic"):
        weights, bad = clip_weights(sq, clipping=clipping, valid=3, **options)
        assert weights[:, [0, 2]].eq(0).all() and weights[:, 1].gt(0).all() and bad == 2
    with pytest.warns(UserWarning, match="2 record.*with clipping='per_layer' of those tensors' sums alone"):
        NonfiniteCount().add(bad)


# ---------------------------------------------------------------- noise


class Wide(nn.Module):
    """Two adapters, large enough for many draws a step."""

    def __init__(self, width: int = 1500, r: int = 8):
        super().__init__()
        self.fc1 = LoRALinear.from_linear(nn.Linear(3, width), r=r)
        self.fc2 = LoRALinear.from_linear(nn.Linear(width, 2), r=r)

    def forward(self, x):
        return self.fc2(self.fc1(x))


def noise_steps(steps, noise=None, state=None, **kwargs):
    """([{name: released * b}] of steps whose batches are empty, the optimizer's state): noise alone."""
    model = Wide()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    data = DataLoader(TensorDataset(torch.ones(10, 3), torch.zeros(10, dtype=torch.long)), batch_size=1)
    kwargs = {"smoothing": None, "method": "dp-lora", "noise_multiplier": 1.0, **kwargs}
    private, loader = make_private(model, optimizer, data, sample_rate=1e-9, noise=noise, check=False, **kwargs)
    if state is not None:
        private.load_state_dict(state)
    drawn = []
    for x, y in loader.steps(steps):
        nn.functional.cross_entropy(model(x), y).backward()
        private.step()
        drawn.append({s.name: s.released.double() * private.expected_batch_size for s in private.engine.active})
        private.zero_grad()
    return drawn, private.state_dict()


@pytest.mark.parametrize("sigma, C", [(0.31, 2.0), (1.0, 1.0), (7.5, 1e-3)])
def test_the_noise_is_sigma_C_at_three_levels_of_significance(sigma, C):
    """KS on many parts: of a true normal, as many parts fail each level as the level says. Two thirds and one and a
    half of the deviation fail outright."""
    drawn, _ = noise_steps(2, NoiseSource.fixed(KEY), noise_multiplier=sigma, max_grad_norm=C)
    values = torch.cat([t.flatten() for step in drawn for t in step.values()]).numpy() / (sigma * C)
    parts = values[: len(values) // 200 * 200].reshape(200, -1)
    assert parts.shape[1] > 150
    p = np.array([stats.kstest(part, "norm").pvalue for part in parts])
    for level in (0.1, 0.05, 0.01):
        assert stats.binomtest(int((p < level).sum()), len(p), level).pvalue > FALSE_ALARM
    assert stats.kstest(values, "norm").pvalue > 0.01
    for wrong in (2 / 3, 1.5):
        assert stats.kstest(values * wrong, "norm").pvalue < KS_REJECT


def test_noise_is_independent_between_tensors_steps_ranks_and_resumed_runs():
    first, state = noise_steps(2, NoiseSource.fixed(KEY))
    second, _ = noise_steps(2, NoiseSource.fixed(KEY), state)  # the same key: only the release number tells them apart
    columns = {}
    for run, steps in enumerate((first, second)):
        for k, step in enumerate(steps):
            for name, t in step.items():
                rows = t if name.endswith("lora_A") else t.t()  # one row for each rank
                columns |= {(run, k, name, rank): row for rank, row in enumerate(rows) if len(row) > 1000}
    assert len(columns) == 4 * 2 * 8
    rho = np.corrcoef(np.stack([c.numpy()[:1500] for c in columns.values()]))
    off = rho[np.triu_indices(len(rho), 1)]
    assert np.abs(off).max() < stats.norm.isf(FALSE_ALARM / 2 / len(off)) / math.sqrt(1500)
    assert stats.kstest(off * math.sqrt(1500), "norm").pvalue > 0.01


def test_no_block_of_the_key_stream_is_used_twice_in_a_million_draws():
    """Four elements are one 64-byte block of ChaCha20. Over tensors, steps, resumed runs and other clients, none
    comes back; a fixed key that is not resumed shows that the search would find it."""

    def blocks(drawn):
        kept = [t.flatten()[: t.numel() // 4 * 4].float().reshape(-1, 4) for step in drawn for t in step.values()]
        return torch.cat(kept).contiguous().numpy().view("V16").ravel()

    fixed, state = noise_steps(11, NoiseSource.fixed(KEY))
    resumed, _ = noise_steps(11, NoiseSource.fixed(KEY), state)
    secret, state = noise_steps(10)
    fresh, _ = noise_steps(11, None, state)
    assert sum(t.numel() for run in (fixed, resumed, secret, fresh) for step in run for t in step.values()) > 10**6
    used = np.concatenate([blocks(run) for run in (fixed, resumed, secret, fresh)])
    assert len(np.unique(used)) == len(used) > 240_000
    again, _ = noise_steps(1, NoiseSource.fixed(KEY))
    assert np.isin(blocks(again), used).all()


def test_noise_and_sums_are_float32_where_parameters_are_bfloat16():
    """Three hundred equal records, one at a time: a bfloat16 sum would stop growing at 256 of them. The noise is the
    float32 stream, rounded once, after everything."""
    records = (
        torch.full((300, 1, 6), 0.5, dtype=torch.bfloat16), torch.zeros(300, 1, dtype=torch.long),
        torch.full((300, 1, 3), 1e-3, dtype=torch.bfloat16),
    )  # fmt: skip
    one = clipped_sum(tuple(t[:1] for t in records), dtype=torch.bfloat16, max_grad_norm=10.0)
    assert 0 < one.norm() < 10.0
    many = clipped_sum(records, dtype=torch.bfloat16, max_grad_norm=10.0, physical_batch_size=1)
    assert (many - 300 * one).norm() <= KERNEL_F32 * 300 * one.norm() * 10  # 300 roundings of 6e-8, all to one side
    sigma = 2.0
    noisy = clipped_sum(
        records, dtype=torch.bfloat16, max_grad_norm=10.0, physical_batch_size=1, noise_multiplier=sigma
    )
    trained = [(name, p) for name, p in net(torch.bfloat16).named_parameters() if p.requires_grad or ".lora_" in name]
    expected = sigma * 10.0 * torch.cat([
        functional.chacha20_normal(p.numel(), key=KEY, release=0, tensor_index=index).double()
        for index, (name, p) in enumerate(trained)
        if not name.endswith("_A")
    ])  # fmt: skip
    torch.testing.assert_close(noisy - many, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# ---------------------------------------------------------------- smoothing


def dense(length: int) -> np.ndarray:
    """The filter as a matrix: NumPy's symmetric padding of a unit vector, then the five taps."""
    rows = [
        np.convolve(np.pad(e, 2, mode="symmetric"), np.array([1, 4, 6, 4, 1]) / 16, "valid") for e in np.eye(length)
    ]
    return np.stack(rows, 1)


def test_the_smoothed_release_is_the_dense_matrix_times_the_plain_one():
    """Same key, so the same noise: what the filter does is linear, and comes after the noise."""
    (plain,), _ = noise_steps(1, NoiseSource.fixed(KEY), noise_multiplier=1.3)
    (smooth,), _ = noise_steps(1, NoiseSource.fixed(KEY), noise_multiplier=1.3, smoothing="binomial5")
    assert plain.keys() == smooth.keys() and len(plain) == 4
    for name, t in plain.items():
        want = t.numpy() @ dense(t.shape[1]).T if name.endswith("lora_A") else dense(t.shape[0]) @ t.numpy()
        np.testing.assert_allclose(smooth[name].numpy(), want, rtol=0, atol=KERNEL_F32 * t.abs().max().item())


@pytest.mark.parametrize("shape, dim", [((1500, 8), 0), ((8, 1500), 1), ((3, 2), 1), ((1, 4), 0)])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_release_of_nothing_is_the_filter_of_the_noise(shape, dim, backend):
    """Post-processing is all that smoothing is: for a zero sum the same words give smooth(noise) / b."""
    stream = {"key": KEY, "release": 5, "tensor_index": 2}
    noise = functional.chacha20_normal(shape[0] * shape[1], **stream, backend=backend).view(shape)
    out = [torch.empty(shape)]
    functional.privatize(
        [None], [torch.zeros(shape)], torch.zeros(1, 0), out, noise_std=0.75, key=KEY, release=5, tensor_index=[2],
        smooth_dim=[dim], divisor=4.0, backend=backend,
    )  # fmt: skip
    want = functional.smooth(0.75 * noise, dim, backend=backend) / 4.0
    torch.testing.assert_close(out[0], want, rtol=0, atol=2.0**-22)  # both in float32, at most a fused rounding apart

"""Every backend against the reference evaluated in float64, on every case of cases.py."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from cases import F32, GRAD_CASES, GradCase, grad_inputs
from tolerances import BFLOAT16_ROUNDED, KERNEL_F32, KERNEL_SQ, SENSITIVITY_F32

from lalora_kernels import dispatch, functional, native, reference

SCALING = 0.75


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, what
    assert torch.isfinite(got).all(), f"{what}: unwritten or not finite"
    error, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    assert error <= tolerance * size, f"{what}: {error / max(size, 1e-300):.2e} relative to the norm"


def compare(case: GradCase, got, want) -> None:
    dz = KERNEL_F32 if case.dtype == F32 else BFLOAT16_ROUNDED
    for name, g, w, tolerance in zip(
        ("dz", "B", "sq_B", "A", "sq_A"), got, want, (dz, KERNEL_F32, KERNEL_SQ, KERNEL_F32, KERNEL_SQ), strict=True
    ):
        assert (g is None) == (w is None), name
        if g is not None:
            close(g, w, tolerance, f"{case} {name}")


def wide(inputs: dict) -> dict:
    return {k: v.double() for k, v in inputs.items()}


def split(inputs: dict, *factors: str) -> tuple[tuple, dict]:
    return (inputs["dy"], inputs["B"], SCALING), {k: inputs[k] for k in factors}


def test_reference_is_autograd():
    """The oracle itself: gradients of single samples by autograd, in float64."""
    inputs = wide(grad_inputs(GradCase(3, 5, 7, 6, 2)))
    A = torch.randn(2, 6, dtype=torch.float64)
    inputs["h"] = inputs["x"] @ A.T
    dz, g_b, sq_b, g_a, sq_a = reference.sample_grad(*split(inputs)[0], h=inputs["h"], x=inputs["x"])
    for i in range(3):
        a, b, x = A.clone().requires_grad_(), inputs["B"].clone().requires_grad_(), inputs["x"][i].requires_grad_()
        y = SCALING * (x @ a.T) @ b.T
        grad_a, grad_b, grad_x = torch.autograd.grad((y * inputs["dy"][i]).sum(), (a, b, x))
        torch.testing.assert_close(g_a[i], grad_a)
        torch.testing.assert_close(g_b[i], grad_b)
        torch.testing.assert_close(dz[i] @ A, grad_x)
        torch.testing.assert_close(sq_a[i], grad_a.square().sum())
        torch.testing.assert_close(sq_b[i], grad_b.square().sum())


@pytest.mark.parametrize("case", GRAD_CASES, ids=str)
def test_sample_grad(case, isa):
    inputs = grad_inputs(case)
    for asked, need_dz in (("h", False), ("x", False), ("h", True), ("x", True), ("hx", True), ("", True)):
        args, kwargs = split(inputs, *asked)
        args64, kwargs64 = split(wide(inputs), *asked)
        got = native.sample_grad(*args, **kwargs, need_dz=need_dz)
        assert all(t is None or t.dtype == F32 for t in (got[1], got[3]))
        assert got[0] is None or got[0].dtype == case.dtype
        compare(case, got, reference.sample_grad(*args64, **kwargs64, need_dz=need_dz))


@pytest.mark.parametrize("case", GRAD_CASES, ids=str)
def test_sample_grad_clip(case, isa):
    inputs = grad_inputs(case)
    typical = SCALING * max(case.T * case.m * case.r, 1) ** 0.5
    bound = dict(max_norm=0.7 * typical, grad_scale=1.5, valid=max(case.N - 1, 0))
    for asked in ("h", "x", "hx", ""):
        args, kwargs = split(inputs, *asked)
        args64, kwargs64 = split(wide(inputs), *asked)
        for need_dz in (True, False):
            got = native.sample_grad_clip(*args, **kwargs, **bound, need_dz=need_dz)
            compare(case, got, reference.sample_grad_clip(*args64, **kwargs64, **bound, need_dz=need_dz))


OUTPUT_CASES = [GradCase(3, 7, 11, 13, 5), GradCase(2, 65, 97, 31, 8), GradCase(2, 0, 5, 4, 3)]


@pytest.mark.parametrize("case", OUTPUT_CASES, ids=str)
def test_outputs_are_written_added_to_and_returned(case, isa):
    """G_B and G_A given, also as views into a workspace; accumulate; S_B and S_A added to."""
    inputs = grad_inputs(case)
    (dy, B, s), factors = split(inputs, "h", "x")
    _, g_b, _, g_a, _ = native.sample_grad(dy, B, s, **factors)
    for offset in (0, 7):
        size_b, size_a = case.m * case.r, case.r * case.n
        workspace = torch.full((case.N, size_b + size_a + offset), 3.0)
        G_B = workspace[:, :size_b].view(case.N, case.m, case.r)
        G_A = workspace[:, size_b : size_b + size_a].view(case.N, case.r, case.n)
        out = native.sample_grad(dy, B, s, **factors, G_B=G_B, G_A=G_A)
        assert out[1] is G_B and out[3] is G_A
        assert torch.equal(G_B, g_b) and torch.equal(G_A, g_a)
        assert (workspace[:, size_b + size_a :] == 3.0).all()
        _, _, sq_b, _, sq_a = native.sample_grad(dy, B, s, **factors, G_B=G_B, G_A=G_A, accumulate=True)
        close(G_B, 2 * g_b, KERNEL_F32, "accumulated G_B")
        close(G_A, 2 * g_a, KERNEL_F32, "accumulated G_A")
        close(sq_b, (2 * g_b.double()).square().flatten(1).sum(1), KERNEL_SQ, "sq_B of the sum")
        close(sq_a, (2 * g_a.double()).square().flatten(1).sum(1), KERNEL_SQ, "sq_A of the sum")
    transposed = torch.zeros(case.N, case.r, case.m).transpose(1, 2)
    assert torch.equal(native.sample_grad(dy, B, s, **factors, G_B=transposed)[1], g_b)
    S_B, S_A = torch.ones(case.m, case.r), torch.ones(case.n, case.r).T
    _, out_b, _, out_a, _ = native.sample_grad_clip(dy, B, s, **factors, max_norm=1e9, S_B=S_B, S_A=S_A)
    assert out_b is S_B and out_a is S_A
    close(S_B, 1 + g_b.sum(0), KERNEL_F32, "S_B")
    close(S_A, 1 + g_a.sum(0), KERNEL_F32, "S_A")


def test_a_factor_whose_gradient_was_not_given_starts_from_zero(isa, monkeypatch):
    """Accumulating into one of two: fresh memory, here of NaN, holds nothing to add to."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype: empty(*size, dtype=dtype).fill_(torch.nan))
    inputs = grad_inputs(GradCase(3, 5, 7, 11, 4))
    for name, size in (("G_B", (3, 7, 4)), ("G_A", (3, 4, 11))):
        args, kwargs = split(inputs, "h", "x")
        got = native.sample_grad(*args, **kwargs, **{name: torch.ones(size)}, accumulate=True)
        args, kwargs = split(wide(inputs), "h", "x")
        given = {name: torch.ones(size, dtype=torch.float64)}
        compare(GradCase(3, 5, 7, 11, 4), got, reference.sample_grad(*args, **kwargs, **given, accumulate=True))


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_without_features_of_dy_nothing_is_read(dtype, isa):
    """The kernels' scratch still holds the call before."""
    case = GradCase(2, 3, 0, 5, 4, dtype)
    inputs, before = grad_inputs(case), grad_inputs(GradCase(4, 9, 33, 20, 4, dtype))
    for asked in ("h", "x", "hx", ""):
        for need_dz in (True, False):
            for op, kwargs in (("sample_grad", {}), ("sample_grad_clip", {"max_norm": 1.0})):
                getattr(native, op)(*split(before)[0], h=before["h"], x=before["x"], **kwargs)
                args, given = split(inputs, *asked)
                got = getattr(native, op)(*args, **given, **kwargs, need_dz=need_dz)
                args, given = split(wide(inputs), *asked)
                compare(case, got, getattr(reference, op)(*args, **given, **kwargs, need_dz=need_dz))
    args, given = split(inputs, "x")
    ones = torch.ones(2, 4, 5)
    assert native.sample_grad(*args, **given, G_A=ones, accumulate=True)[4].tolist() == [20.0, 20.0]
    assert native.sample_grad_clip(*args, **given, max_norm=1.0, S_A=ones[0])[3].eq(1).all() and ones.eq(1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_record_contributes_nothing_and_spoils_no_other(bad, backend):
    case = GradCase(4, 6, 33, 18, 8)
    inputs = grad_inputs(case)
    for name in ("dy", "h", "x"):
        spoiled = {k: v.clone() for k, v in inputs.items()}
        spoiled[name][1, 2, 3] = bad
        keep = [0, 2, 3]
        good = {k: v[keep] if k != "B" else v for k, v in inputs.items()}
        for factor in {"dy": ("h", "x"), "h": ("h",), "x": ("x",)}[name]:
            args, kwargs = split(spoiled, factor)
            got = functional.sample_grad(*args, **kwargs, backend=backend)
            want = functional.sample_grad(*split(good, factor)[0], **split(good, factor)[1], backend=backend)
            which = 1 if factor == "h" else 3
            assert torch.equal(got[which][keep], want[which]) and torch.equal(got[which + 1][keep], want[which + 1])
            assert not torch.isfinite(got[which + 1][1])
            got = functional.sample_grad_clip(*args, **kwargs, max_norm=2.0, backend=backend)
            want = functional.sample_grad_clip(
                *split(good, factor)[0], **split(good, factor)[1], max_norm=2.0, backend=backend
            )
            assert torch.equal(got[which], want[which])


@pytest.mark.parametrize("wrong, message", [
    ({"max_norm": 0.0}, "max_norm must be positive, got 0.0"),
    ({"max_norm": float("nan")}, "max_norm must be positive, got nan"),
    ({"max_norm": 1.0, "grad_scale": 0.0}, "grad_scale must be positive and finite, got 0.0"),
    ({"max_norm": 1.0, "grad_scale": float("inf")}, "grad_scale must be positive and finite, got inf"),
    ({"max_norm": 1.0, "valid": -1}, "valid is between 0 and the 4 samples, got -1"),
    ({"max_norm": 1.0, "valid": 5}, "valid is between 0 and the 4 samples, got 5"),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_bound_that_bounds_nothing_is_refused(backend, wrong, message):
    args, kwargs = split(grad_inputs(GradCase(4, 5, 7, 6, 2)), "h", "x")
    with pytest.raises(ValueError, match=f"sample_grad_clip: {message}"):
        functional.sample_grad_clip(*args, **kwargs, **wrong, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), 10**400])
def test_a_scaling_that_is_not_finite_is_refused(backend, scaling):
    (dy, B, _), kwargs = split(grad_inputs(GradCase(4, 5, 7, 6, 2)), "h", "x")
    with pytest.raises(ValueError, match="sample_grad: scaling must be finite"):
        functional.sample_grad(dy, B, scaling, **kwargs, backend=backend)
    with pytest.raises(ValueError, match="sample_grad_clip: scaling must be finite"):
        functional.sample_grad_clip(dy, B, scaling, **kwargs, max_norm=1.0, backend=backend)
    whole = functional.sample_grad(dy, B, 2**64, **kwargs, backend=backend)  # which torch does not take
    assert all(map(torch.equal, whole, functional.sample_grad(dy, B, 2.0**64, **kwargs, backend=backend)))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("valid", [None, 0, 3, 4])
@pytest.mark.parametrize("bound", [1e-3, 1e6])
def test_what_is_left_out_of_the_public_call_is_the_plain_case(backend, valid, bound):
    """dz is returned, gradients are as they stand, and every sample counts up to ``valid``."""
    args, kwargs = split(grad_inputs(GradCase(4, 5, 7, 6, 2)), "h", "x")
    kwargs["backend"] = backend
    dz, S_B, sq_B, S_A, sq_A = functional.sample_grad_clip(*args, **kwargs, max_norm=bound, valid=valid)
    grads = functional.sample_grad(*args, **kwargs)
    close(dz, grads[0], KERNEL_F32, "dz")
    for S, G, sq in ((S_B, *grads[1:3]), (S_A, *grads[3:])):
        clipped = (bound / sq.sqrt()).clamp(max=1.0).to(G.dtype).view(-1, 1, 1) * G
        close(S, clipped[:valid].sum(0), KERNEL_F32, f"S of {valid}")


@pytest.mark.parametrize("magnitude", [1e-15, 1e-4, 1e4, 1e15])
def test_one_record_moves_the_clipped_sum_by_at_most_the_bound(magnitude, isa):
    """Also where the square of a gradient overflows float32 (its norm is taken in float64)."""
    inputs = grad_inputs(GradCase(6, 5, 40, 24, 8))
    inputs["dy"] *= magnitude
    inputs["h"] *= magnitude
    inputs["x"] *= max(magnitude, 1.0)
    args, kwargs = split(inputs, "h", "x")
    _, whole_b, sq_b, whole_a, sq_a = native.sample_grad_clip(*args, **kwargs, max_norm=0.5)
    assert torch.isfinite(sq_b).all() and torch.isfinite(sq_a).all() and (sq_b > 0).all()
    for i in range(6):
        rest = {k: v if k == "B" else torch.cat([v[:i], v[i + 1 :]]) for k, v in inputs.items()}
        args, kwargs = split(rest, "h", "x")
        _, part_b, _, part_a, _ = native.sample_grad_clip(*args, **kwargs, max_norm=0.5)
        for whole, part in ((whole_b, part_b), (whole_a, part_a)):
            assert (whole.double() - part.double()).norm() <= 0.5 * (1 + SENSITIVITY_F32)


THREAD_CASES = [GradCase(5, 70, 1100, 900, 8), GradCase(1, 33, 3000, 64, 4), GradCase(40, 1, 50, 60, 16)]


@pytest.mark.parametrize("case", THREAD_CASES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(case, isa, threads):
    inputs = grad_inputs(case)
    args, kwargs = split(inputs, "h", "x")
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append([*native.sample_grad(*args, **kwargs), *native.sample_grad_clip(*args, **kwargs, max_norm=1.0)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_two_python_threads_at_once(isa):
    """The kernels release the GIL, and their scratch memory is a thread's own."""
    cases = [GradCase(4, 40, 300, 200, 8), GradCase(2, 130, 500, 100, 16)]
    inputs = [grad_inputs(c, seed) for seed, c in enumerate(cases)]
    alone = [native.sample_grad_clip(*split(i)[0], h=i["h"], x=i["x"], max_norm=1.0) for i in inputs]
    failures = []

    def work(k: int) -> None:
        for _ in range(20):
            i = inputs[k]
            got = native.sample_grad_clip(*split(i)[0], h=i["h"], x=i["x"], max_norm=1.0)
            if not all(torch.equal(a, b) for a, b in zip(got, alone[k], strict=True)):
                failures.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    [w.start() for w in workers]
    [w.join() for w in workers]
    assert not failures


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dy=torch.zeros(2, 3)), "dy"),
        (dict(B=torch.zeros(5, 2)), "do not fit"),
        (dict(h=torch.zeros(2, 3, 3)), "h has shape"),
        (dict(h=torch.zeros(1, 3, 2)), "h has shape"),
        (dict(x=torch.zeros(2, 4, 5)), "x has shape"),
        (dict(G_B=torch.zeros(2, 4, 3)), "G_B has shape"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    good = dict(dy=torch.zeros(2, 3, 4), B=torch.zeros(4, 2), h=torch.zeros(2, 3, 2), x=torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=message):
        native.sample_grad(**{**good, **change}, scaling=1.0)


def test_wrong_dtypes():
    with pytest.raises(TypeError, match="float64"):
        native.sample_grad(torch.zeros(2, 3, 4).double(), torch.zeros(4, 2), 1.0)
    with pytest.raises(TypeError, match="G_B"):
        native.sample_grad(
            torch.zeros(1, 1, 4), torch.zeros(4, 2), 1.0, h=torch.zeros(1, 1, 2), G_B=torch.zeros(1, 4, 2).double()
        )


def test_dispatch_order(monkeypatch):
    like = torch.zeros(1)
    monkeypatch.delenv("LALORA_BACKEND", raising=False)
    assert dispatch.get("sample_grad", like) is native.sample_grad
    assert dispatch.get("sample_grad", like.bfloat16()) is native.sample_grad
    assert dispatch.get("sample_grad", like.double()) is reference.sample_grad
    monkeypatch.setenv("LALORA_BACKEND", "reference")
    assert dispatch.get("sample_grad", like) is reference.sample_grad
    with dispatch.use_backend("cpp"):
        assert dispatch.get("sample_grad", like) is native.sample_grad
        assert dispatch.get("sample_grad", like, "reference") is reference.sample_grad
    assert dispatch.get("sample_grad", like) is reference.sample_grad


def test_dispatch_never_falls_back(monkeypatch):
    like = torch.zeros(1)
    with pytest.raises(dispatch.BackendError, match="float32, bfloat16, not float64"):
        dispatch.get("sample_grad", like.double(), "cpp")
    with pytest.raises(dispatch.BackendError, match="runs on cuda"):
        dispatch.get("sample_grad", like, "triton")
    with pytest.raises(dispatch.BackendError, match="unknown backend 'cppp'"):
        dispatch.get("sample_grad", like, "cppp")
    with pytest.raises(dispatch.BackendError, match="does not have"):
        dispatch.get("no_such_op", like, "reference")
    monkeypatch.setenv("LALORA_BACKEND", "cpp")
    with pytest.raises(dispatch.BackendError, match="not float64"):
        functional.smooth(like.double(), 0)
    monkeypatch.delenv("LALORA_BACKEND")
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setitem(sys.modules, "lalora_kernels._C", None)
    monkeypatch.delattr("lalora_kernels._C", raising=False)
    with pytest.raises(dispatch.BackendError, match="pip install"):
        functional.smooth(like, 0)
    torch.testing.assert_close(functional.smooth(like, 0, backend="reference"), like)


def test_explain_names_a_backend_for_every_operation():
    table = dispatch.explain(("cpu",))
    assert set(table) == set(dispatch.OPS)
    for row in table.values():
        assert {"reference", "cpp"} <= set(row["available"])
        assert row["cpu", F32] == "cpp" and row["cpu", torch.float64] == "reference"


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.parametrize("name", [n for n, supported in native.require().isas() if supported])
def test_the_environment_forces_an_instruction_set(name):
    done = run_python("from lalora_kernels import native; print(native.require().isa())", LALORA_CPU_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_an_unknown_instruction_set_is_an_error():
    done = run_python(
        "import torch; from lalora_kernels import functional; functional.smooth(torch.zeros(5), 0)",
        LALORA_CPU_ISA="avx1024",
    )
    assert done.returncode and "avx1024" in done.stderr

"""What every GPU kernel is asked, whoever runs it: Triton's interpreter, the emulated machine, or a card.

``ops`` is a backend module; inputs are made on the CPU, moved to ``device``, and what comes back is compared with the
reference evaluated in float64 on the CPU.
"""

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from cases import TENSOR_CASES, GradCase, grad_inputs
from tolerances import (
    BFLOAT16_ROUNDED,
    FLOAT16_ROUNDED,
    GRADIENT_OF_HALVES,
    KERNEL_F32,
    KERNEL_SQ,
    NORMAL_GPU,
    SENSITIVITY_F32,
)

from lalora_kernels import reference

KEY = bytes(range(3, 35))
SCALING = 0.75
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Target:
    ops: ModuleType
    device: str
    bfloat16: float = BFLOAT16_ROUNDED  # of one rounding


def relative(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, what
    got = got.cpu().double()
    assert torch.isfinite(got).all(), f"{what}: unwritten or not finite"
    error, size = (got - want.double()).norm().item(), want.double().norm().item()
    assert error <= tolerance * size, f"{what}: {error / max(size, 1e-300):.2e} relative to the norm"


def compare(target: Target, dtype: torch.dtype, got, want, what: str = "") -> None:
    dz = {F32: KERNEL_F32, BF16: target.bfloat16, F16: FLOAT16_ROUNDED}[dtype]
    a = GRADIENT_OF_HALVES if dtype == BF16 else KERNEL_F32
    tolerances = (dz, KERNEL_F32, KERNEL_SQ, a, max(2 * a, KERNEL_SQ))
    for name, g, w, tolerance in zip(("dz", "B", "sq_B", "A", "sq_A"), got, want, tolerances, strict=True):
        assert (g is None) == (w is None), f"{what} {name}"
        if g is not None:
            relative(g, w, tolerance, f"{what} {name}")


def call(target: Target, op: str, inputs: dict, asked: str, **kwargs):
    """(what the target's kernel gives, what the reference gives in float64)."""
    moved = {k: t.to(target.device) for k, t in inputs.items()}
    wide = {k: t.double() for k, t in inputs.items()}
    got = getattr(target.ops, op)(moved["dy"], moved["B"], SCALING, **{k: moved[k] for k in asked}, **kwargs)
    want = getattr(reference, op)(wide["dy"], wide["B"], SCALING, **{k: wide[k] for k in asked}, **kwargs)
    return got, want


def check_sample_grad(target: Target, case: GradCase, asked=("h", "x", "hx", "")) -> None:
    inputs = grad_inputs(case)
    for factors in asked:
        for need_dz in (True, False) if factors else (True,):
            got, want = call(target, "sample_grad", inputs, factors, need_dz=need_dz)
            assert got[0] is None or got[0].dtype == case.dtype
            assert all(g is None or g.dtype == F32 for g in (got[1], got[3]))
            compare(target, case.dtype, got, want, f"{case} {factors}")


def check_sample_grad_clip(target: Target, case: GradCase, asked=("h", "x", "hx")) -> None:
    inputs = grad_inputs(case)
    typical = SCALING * max(case.T * case.m * case.r, 1) ** 0.5
    bound = dict(max_norm=0.7 * typical, grad_scale=1.5, valid=max(case.N - 1, 0))
    for factors in asked:
        for need_dz in (True, False) if factors == "h" else (True,):
            got, want = call(target, "sample_grad_clip", inputs, factors, need_dz=need_dz, **bound)
            compare(target, case.dtype, got, want, f"{case} {factors}")


def check_outputs(target: Target, case: GradCase, op: str = "sample_grad") -> None:
    """Outputs given, as views into a workspace and with gaps; accumulation."""
    t = {k: v.to(target.device) for k, v in grad_inputs(case).items()}
    factors = {"h": t["h"], "x": t["x"]}
    if op == "sample_grad_clip":
        _, s_b, _, s_a, _ = target.ops.sample_grad_clip(t["dy"], t["B"], SCALING, **factors, max_norm=1e9)
        S_B, S_A = torch.ones(case.m, case.r, device=target.device), torch.ones(case.n, case.r, device=target.device).T
        got = target.ops.sample_grad_clip(t["dy"], t["B"], SCALING, **factors, max_norm=1e9, S_B=S_B, S_A=S_A)
        assert got[1] is S_B and got[3] is S_A
        relative(S_B, 1 + s_b.cpu(), KERNEL_F32, "S_B")
        relative(S_A, 1 + s_a.cpu(), KERNEL_F32, "S_A")
        return
    _, g_b, _, g_a, _ = target.ops.sample_grad(t["dy"], t["B"], SCALING, **factors)
    size_b, size_a = case.m * case.r, case.r * case.n
    workspace = torch.full((case.N, size_b + size_a + 7), 3.0, device=target.device)
    G_B = workspace[:, :size_b].view(case.N, case.m, case.r)
    G_A = workspace[:, size_b : size_b + size_a].view(case.N, case.r, case.n)
    got = target.ops.sample_grad(t["dy"], t["B"], SCALING, **factors, G_B=G_B, G_A=G_A)
    assert got[1] is G_B and got[3] is G_A
    assert torch.equal(G_B, g_b) and torch.equal(G_A, g_a), "a workspace changes the result"
    assert (workspace[:, size_b + size_a :] == 3.0).all(), "written past the end"
    got = target.ops.sample_grad(t["dy"], t["B"], SCALING, **factors, G_B=G_B, G_A=G_A, accumulate=True)
    for G, g, sq in ((G_B, g_b, got[2]), (G_A, g_a, got[4])):
        relative(G, 2 * g.cpu(), KERNEL_F32, "accumulated")
        relative(sq, (2 * g.cpu().double()).square().flatten(1).sum(1), KERNEL_SQ, "norm of the sum")
    gaps = torch.zeros(case.N, case.r, case.m, device=target.device).transpose(1, 2)
    assert torch.equal(target.ops.sample_grad(t["dy"], t["B"], SCALING, h=t["h"], G_B=gaps)[1], g_b)


def check_scales(target: Target, case: GradCase, op: str) -> None:
    """Gradients of every size that float32 holds have their norm, and are clipped to the bound."""
    inputs = grad_inputs(replace(case, dtype=F32))
    for scale in (1e-30, 1e-4, 1e4, 1e30):
        # Each of the three factors takes a third, so that no product leaves float32 on the way.
        third = scale ** (1 / 3)
        scaled = {k: t * third for k, t in inputs.items()}
        kwargs = {} if op == "sample_grad" else dict(max_norm=1.0)
        for factors in ("h", "x"):
            got, want = call(target, op, scaled, factors, **kwargs)
            compare(target, F32, got, want, f"scale {scale:g}")
            if op == "sample_grad_clip":
                S = got[1] if factors == "h" else got[3]
                assert S.norm().item() <= case.N * (1 + SENSITIVITY_F32)


def check_bad_record(target: Target, case: GradCase, op: str, bad: float) -> None:
    """A record that is not finite spoils its own outputs; to a sum it adds nothing."""
    inputs = grad_inputs(case)
    inputs["dy"] = inputs["dy"].clone()
    inputs["dy"][1, 0, 0] = bad
    for factors in ("h", "x"):
        kwargs = {} if op == "sample_grad" else dict(max_norm=1e3)
        got, _ = call(target, op, inputs, factors, **kwargs)
        others = [i for i in range(case.N) if i != 1]
        kept = {k: t if k == "B" else t[others] for k, t in inputs.items()}
        want = call(target, op, kept, factors, **kwargs)[1]
        assert not torch.isfinite((got[2] if factors == "h" else got[4])[1])
        per_record = (0, 1, 2, 3, 4) if op == "sample_grad" else (0, 2, 4)
        rest = [None if g is None else g[others] if i in per_record else g for i, g in enumerate(got)]
        compare(target, case.dtype, rest, want, f"{bad} in a record")


def release_inputs(N: int, cases=TENSOR_CASES, seed: int = 0) -> tuple[list, list, torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(seed)
    G = [torch.randn(N, *s, generator=generator) for s, _ in cases]
    S = [torch.randn(s, generator=generator) for s, _ in cases]
    weights = torch.rand(len(cases), N, generator=generator)
    stream = dict(key=KEY, release=5 << 33 | 7, tensor_index=[3 * l + 1 for l in range(len(cases))])
    return G, S, weights, dict(stream, smooth_dim=[d for _, d in cases])


def release(target: Target, G, S, weights, cases, **kwargs) -> list[torch.Tensor]:
    out = [torch.full(s, float("nan"), device=target.device) for s, _ in cases]
    moved = [[None if t is None else t.to(target.device) for t in ts] for ts in (G, S)]
    target.ops.privatize(*moved, weights.to(target.device), out, **kwargs)
    return [o.cpu() for o in out]


def check_privatize(target: Target, N: int, noise_std: float, padding: str, cases=TENSOR_CASES, parts="gs") -> None:
    """``parts``: which of G and S are present."""
    G, S, weights, kwargs = release_inputs(N, cases)
    kwargs.update(noise_std=noise_std, divisor=3.7, padding=padding)
    G = G if "g" in parts else [None] * len(G)
    S = S if "s" in parts else [None] * len(S)
    got = release(target, G, S, weights, cases, **kwargs)
    want = [torch.empty(s, dtype=torch.float64) for s, _ in cases]
    double = [[None if t is None else t.double() for t in ts] for ts in (G, S)]
    reference.privatize(*double, weights.double(), want, **kwargs)
    for (shape, dim), g, w in zip(cases, got, want, strict=True):
        assert torch.isfinite(g).all(), f"{shape} {dim}: unwritten"
        # The terms are of order 1, and may cancel.
        error, size = (g.double() - w).norm(), w.norm() + w.numel() ** 0.5
        assert error <= KERNEL_F32 * size, f"{shape} along {dim}: {error / size:.2e}"


def check_masked_samples(target: Target, cases=TENSOR_CASES) -> None:
    G, S, weights, kwargs = release_inputs(3, cases)
    kwargs.update(noise_std=0.0, divisor=2.0)
    weights[:, 1] = 0.0
    clean = release(target, G, S, weights, cases, **kwargs)
    for g, bad in zip(G, [float("nan"), float("inf")] * len(G), strict=False):
        g[1] = bad
    assert all(map(torch.equal, release(target, G, S, weights, cases, **kwargs), clean)), "a masked sample was read"


def check_clip_reduce(target: Target, N: int, cases=TENSOR_CASES) -> None:
    G, S, weights, _ = release_inputs(N, cases)
    weights[3, :1] = 0.0
    want = [s.double() for s in S]
    reference.clip_reduce([g.double() for g in G], weights.double(), want)
    got = [s.to(target.device, copy=True) for s in S]
    row = weights.to(target.device)
    target.ops.clip_reduce([g.to(target.device) for g in G], row.T.contiguous().T, got)
    for (shape, _), g, w in zip(cases, got, want, strict=True):
        relative(g, w, KERNEL_F32, f"clip_reduce {shape}")


def check_layouts(target: Target, cases=TENSOR_CASES) -> None:
    """Gradients as views into one workspace, outputs with other strides, S that is out, one row of weights for all."""
    G, S, weights, kwargs = release_inputs(3, cases)
    kwargs.update(noise_std=0.0, divisor=1.5)
    weights = weights[:1].expand(len(G), 3)
    want = release(target, G, S, weights.contiguous(), cases, **kwargs)
    workspace = torch.cat([g.reshape(3, -1) for g in G], 1).to(target.device)
    views = [w.view(3, *s) for w, (s, _) in zip(workspace.split([g[0].numel() for g in G], 1), cases, strict=True)]
    on = [s.to(target.device, copy=True) for s in S]
    out = [torch.empty(s[::-1], device=target.device).permute([*range(len(s))][::-1]) for s, _ in cases]
    row = weights[:1].to(target.device).expand(len(G), 3)
    target.ops.privatize(views, on, row, out, **kwargs)
    assert all(torch.equal(o.cpu(), w) for o, w in zip(out, want, strict=True)), "strides change the result"
    target.ops.privatize(views, on, row, on, **kwargs)
    assert all(torch.equal(o.cpu(), w) for o, w in zip(on, want, strict=True)), "S that is out changes the result"


def check_smooth(target: Target, cases=TENSOR_CASES) -> None:
    generator = torch.Generator().manual_seed(1)
    for shape, dim in cases:
        if dim is not None:
            t = torch.randn(shape, generator=generator)
            for padding in ("symmetric", "reflect"):
                got = target.ops.smooth(t.to(target.device), dim, padding)
                relative(got, reference.smooth(t.double(), dim, padding), KERNEL_F32, f"{shape} {dim} {padding}")


WORD_RANGES = ((0, 3), (5, 300), (2**31 - 20, 41), (2**32 - 41, 41))
NORMAL_RANGES = ((0, 1), (0, 1500), (3, 70), (2**34 - 1001, 1001), (2**33 + 5, 130), (7, 0))


def check_words(target: Target) -> None:
    for start, blocks in WORD_RANGES:
        for nonce in ((1, 2, 3), (2**32 - 1,) * 3):
            got = target.ops.chacha20_words(KEY, nonce, start, blocks, device=target.device)
            assert torch.equal(got.cpu(), reference.chacha20_words(KEY, nonce, start, blocks)), (start, blocks, nonce)


def check_normals(target: Target) -> None:
    for start, count in NORMAL_RANGES:
        for number in (1, 2**64 - 1):
            stream = dict(key=KEY, release=number, tensor_index=number % 7919, start=start)
            got = target.ops.chacha20_normal(count, **stream, device=target.device)
            want = reference.chacha20_normal(count, **stream, dtype=torch.float64)
            assert got.dtype == F32 and got.shape == (count,)
            torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=NORMAL_GPU)


def check_repeats(target: Target, case: GradCase, op: str, times: int = 2, between=lambda: None, **kwargs) -> None:
    """The same bits at every run."""
    inputs = grad_inputs(case)
    kwargs.update({} if op == "sample_grad" else dict(max_norm=3.0))
    first = call(target, op, inputs, "hx", **kwargs)[0]
    for _ in range(times - 1):
        between()
        again = call(target, op, inputs, "hx", **kwargs)[0]
        assert all(a is None or torch.equal(a, b) for a, b in zip(first, again, strict=True)), "bits differ"

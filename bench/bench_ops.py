"""Each operation against the best composition of PyTorch calls, and against the machine's limits."""

import baselines
import pytest
import torch
from harness import GEMM, copying, gemm, reading

from lalora_kernels import functional, reference

# (N, T, m = n, r)
SHAPES = [
    (16, 128, 768, 8),
    (16, 128, 768, 16),
    (16, 196, 1024, 16),
    (16, 128, 3072, 16),
    (8, 512, 4096, 16),
    (4, 2048, 4096, 64),
]
# float32 sums of up to 2,048 products against float64
TOLERANCE = 2e-6
# a composition in bfloat16 rounds its gradient to 8 bits; ours is float32, but for a dz that is rounded
BFLOAT16 = 1e-2
HALF_SHAPES = [(16, 128, 768, 16), (8, 512, 4096, 16)]
SCALING, KEY, N = 0.5, bytes(range(32)), 16
NORMALS = 1 << 24

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
factors = pytest.mark.parametrize("factor", ["B", "A"])


class Inputs:
    """One layer's operands; ``work`` is (bytes that must cross once, operations)."""

    def __init__(self, shape: tuple[int, int, int, int], factor: str, dtype: torch.dtype = torch.float32):
        N, T, m, r = shape
        torch.manual_seed(0)
        self.dy, self.B = torch.randn(N, T, m, dtype=dtype), torch.randn(m, r, dtype=dtype)
        self.h = torch.randn(N, T, r, dtype=dtype) if factor == "B" else None
        self.x = torch.randn(N, T, m, dtype=dtype) if factor == "A" else None
        self.G = torch.empty((N, m, r) if factor == "B" else (N, r, m))
        read = sum(t.numel() for t in (self.dy, self.B, self.h, self.x) if t is not None)
        self.read_bytes, self.G_bytes = dtype.itemsize * read, 4 * self.G.numel()
        self.dz_bytes, self.flops = dtype.itemsize * N * T * r, 4 * N * T * m * r

    def limits(self, race, moved: int) -> dict:
        """The roofline's two sides as contenders, in the same rounds."""
        race.facts(bytes=moved, flops=self.flops, read_bytes=self.read_bytes, gemm_flops=2 * GEMM**3)
        return {"read": reading(self.read_bytes), "gemm": gemm()}


def _sample_grad(race, i: Inputs, factor: str, tolerance: float) -> tuple:
    """Ours, and the compositions, all checked."""
    out = {"G_B": i.G} if factor == "B" else {"G_A": i.G}

    def ours():
        return functional.sample_grad(i.dy, i.B, SCALING, h=i.h, x=i.x, **out)

    others = baselines.sample_grad(i.dy, i.B, SCALING, i.h, i.x)
    want = reference.sample_grad(i.dy.double(), i.B.double(), SCALING, **_wide(i))
    got = ours()
    k = 1 if factor == "B" else 3
    race.check("ours", got[0], want[0], tolerance)
    race.check("ours", got[k], want[k], TOLERANCE)  # whatever the inputs' dtype
    race.check("ours", got[k + 1], want[k + 1], TOLERANCE)
    for name, f in others.items():
        z, G, norm = f()
        race.check(name, z, want[0], tolerance)
        race.check(name, G, want[k], tolerance)
        race.check(name, norm.double().square(), want[k + 1], 4 * tolerance)
    return ours, others


@shapes
@factors
def bench_sample_grad(race, shape, factor):
    i = Inputs(shape, factor)
    ours, others = _sample_grad(race, i, factor, TOLERANCE)
    race.facts(op="sample_grad", factor=factor, shape=shape)
    race.run(ours, {**others, **i.limits(race, i.read_bytes + i.G_bytes + i.dz_bytes)})


@pytest.mark.parametrize("shape", HALF_SHAPES, ids=lambda s: "x".join(map(str, s)))
@factors
def bench_sample_grad_bfloat16(race, shape, factor):
    i = Inputs(shape, factor, torch.bfloat16)
    ours, others = _sample_grad(race, i, factor, BFLOAT16)
    race.facts(op="sample_grad, bfloat16", factor=factor, shape=shape, bytes=i.read_bytes + i.G_bytes + i.dz_bytes)
    race.facts(flops=i.flops, read_bytes=i.read_bytes, gemm_flops=2 * GEMM**3)
    race.run(ours, {**others, "read": reading(i.read_bytes), "gemm": gemm(torch.bfloat16)})


@shapes
@factors
def bench_sample_grad_clip(race, shape, factor):
    i = Inputs(shape, factor)
    exact = reference.sample_grad(i.dy.double(), i.B.double(), SCALING, **_wide(i))
    bound = float((exact[2] if factor == "B" else exact[4]).sqrt().median())  # so that half the samples are clipped
    S = torch.zeros(i.G.shape[1:])
    out = {"S_B": S} if factor == "B" else {"S_A": S}

    def ours():
        return functional.sample_grad_clip(i.dy, i.B, SCALING, max_norm=bound, h=i.h, x=i.x, **out)

    others = baselines.sample_grad_clip(i.dy, i.B, SCALING, i.h, i.x, bound)
    want = reference.sample_grad_clip(i.dy.double(), i.B.double(), SCALING, max_norm=bound, **_wide(i))
    S_want = want[1] if factor == "B" else want[3]
    race.check("ours", ours()[0], want[0], TOLERANCE)
    race.check("ours", S, S_want, TOLERANCE)
    for name, f in others.items():
        race.check(name, f()[1], S_want, TOLERANCE)
    race.facts(op="sample_grad_clip", factor=factor, shape=shape)
    race.run(ours, {**others, **i.limits(race, i.read_bytes + i.dz_bytes)})


def _wide(i: Inputs) -> dict:
    return {k: None if t is None else t.double() for k, t in (("h", i.h), ("x", i.x))}


def _layers(widths: list[int], layers: int, r: int, factor: str) -> list[tuple[int, int]]:
    return [(w, r) if factor == "B" else (r, w) for _ in range(layers) for w in widths]


# Features of the active factor of each adapted layer: m for B, n for A.
MODELS = {
    "RoBERTa-base q,v r=8": {"B": [768] * 2, "A": [768] * 2, "layers": 12, "r": 8},
    "ViT-B all-linear r=16": {"B": [768] * 4 + [3072, 768], "A": [768] * 5 + [3072], "layers": 12, "r": 16},
    "Llama-7B q,v r=16": {"B": [4096] * 2, "A": [4096] * 2, "layers": 32, "r": 16},
}
models = pytest.mark.parametrize("model", MODELS)


class Workspace:
    """The per-sample gradients of one step and everything that a release needs."""

    def __init__(self, model: str, factor: str):
        torch.manual_seed(0)
        m = MODELS[model]
        shapes = _layers(m[factor], m["layers"], m["r"], factor)
        self.dim = 0 if factor == "B" else 1
        self.G = [torch.randn(N, *s) for s in shapes]
        self.weights = torch.rand(N).expand(len(shapes), N)
        self.out = [torch.zeros(s) for s in shapes]
        self.bytes = 4 * sum(g.numel() for g in self.G)
        self.out_bytes = self.bytes // N

    def release(self, noise_std: float = 1.0, backend: str | None = None) -> None:
        L = len(self.G)
        functional.privatize(
            self.G,
            [None] * L,
            self.weights,
            self.out,
            noise_std=noise_std,
            key=KEY,
            release=1,
            tensor_index=range(L),
            smooth_dim=[self.dim] * L,
            divisor=float(N),
            backend=backend,
        )


def _flat(tensors) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@models
@factors
def bench_privatize(race, model, factor):
    w = Workspace(model, factor)
    w.release(backend="reference")
    want = _flat(w.out)
    w.release()
    race.check("ours", _flat(w.out), want, TOLERANCE)
    w.release(noise_std=0.0, backend="reference")
    want = _flat(w.out)
    for name, f in baselines.privatize(w.G, w.weights, w.dim, 0.0, float(N)).items():
        race.check(name, _flat(f()), want, TOLERANCE)
    race.facts(op="privatize", factor=factor, model=model, bytes=w.bytes + w.out_bytes, copy_bytes=2 * w.bytes)
    others = baselines.privatize(w.G, w.weights, w.dim, 1.0, float(N))
    race.run(w.release, {**others, "copy": copying(w.bytes)})


@models
def bench_clip_reduce(race, model):
    w = Workspace(model, "B")
    want = _flat([torch.einsum("n,nab->ab", w.weights[0].double(), g.double()) for g in w.G])
    functional.clip_reduce(w.G, w.weights, w.out)
    race.check("ours", _flat(w.out), want, TOLERANCE)
    others = baselines.clip_reduce(w.G, w.weights)
    for name, f in others.items():
        race.check(name, _flat(f()), want, TOLERANCE)
    race.facts(op="clip_reduce", model=model, bytes=w.bytes + 2 * w.out_bytes, read_bytes=w.bytes)
    race.run(lambda: functional.clip_reduce(w.G, w.weights, w.out), {**others, "read": reading(w.bytes)})


def bench_chacha20_normal(race):
    stream = dict(key=KEY, release=1, tensor_index=0)
    got = functional.chacha20_normal(NORMALS, **stream)
    some = 1 << 16
    for start in (0, NORMALS - some):
        want = reference.chacha20_normal(some, start=start, dtype=torch.float64, **stream)
        race.check("ours", got[start : start + some], want, TOLERANCE)
    if abs(float(got.double().var()) - 1.0) > 6 * (2 / NORMALS) ** 0.5:
        race.fail("the variance of the normals is not 1: not timed")
    race.facts(op="chacha20_normal", count=NORMALS)
    others = {
        "torch.randn": lambda: torch.randn(NORMALS),
        "Opacus secure_mode": baselines.opacus_secure_normal(NORMALS),
    }
    race.run(lambda: functional.chacha20_normal(NORMALS, **stream), others)

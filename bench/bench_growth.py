"""What privacy adds to a step (per-sample gradients, clipping, release) as one size grows by 2, 4 and 8."""

import pytest
import torch
from harness import relative_error
from memory import allocations

from lalora_kernels import functional, reference
from lalora_kernels.privacy.clipping import clip_weights

BASE = {"N": 8, "T": 128, "r": 8, "layers": 4}
TIMES = (1, 2, 4, 8)
FEATURES, CLIP, KEY = 768, 1.0, bytes(range(32))
TOLERANCE = 1e-5


class Private:
    """One factor's share of a step for ``layers`` equal layers; dy and h (or x) are given."""

    def __init__(self, factor: str, N: int, T: int, r: int, layers: int):
        torch.manual_seed(0)
        self.shape = (FEATURES, r) if factor == "B" else (r, FEATURES)
        self.name, self.dim, self.N, self.layers = factor, 0 if factor == "B" else 1, N, layers
        self.dy, self.B = torch.randn(N, T, FEATURES), torch.randn(FEATURES, r)
        self.kept = {"h": torch.randn(N, T, r)} if factor == "B" else {"x": torch.randn(N, T, FEATURES)}
        self.G = [torch.empty(N, *self.shape) for _ in range(layers)]
        self.out = [torch.empty(self.shape) for _ in range(layers)]

    def __call__(self) -> None:
        squares = []
        for G in self.G:
            result = functional.sample_grad(self.dy, self.B, 1.0, **self.kept, **{f"G_{self.name}": G})
            squares.append(result[2] if self.name == "B" else result[4])
        weights, _ = clip_weights(
            torch.stack(squares), clipping="flat", max_grad_norm=CLIP, grad_scale=1.0, valid=self.N
        )
        functional.privatize(
            self.G,
            [None] * self.layers,
            weights,
            self.out,
            noise_std=1.0,
            key=KEY,
            release=1,
            tensor_index=range(self.layers),
            smooth_dim=[self.dim] * self.layers,
            divisor=float(self.N),
        )

    def error(self) -> float:
        """The per-sample gradients against the reference in float64."""
        self()
        kept = {k: v.double() for k, v in self.kept.items()}
        want = reference.sample_grad(self.dy.double(), self.B.double(), 1.0, **kept)
        return relative_error(self.G[-1], want[1] if self.name == "B" else want[3])

    def gradient_bytes(self) -> int:
        """What torch allocates for the per-sample gradients of one layer."""
        return allocations(lambda: functional.sample_grad(self.dy, self.B, 1.0, need_dz=False, **self.kept))[0]


@pytest.mark.parametrize("size", BASE)
@pytest.mark.parametrize("factor", ["B", "A"])
def bench_growth(race, factor, size):
    grown = {k: Private(factor, **{**BASE, size: BASE[size] * k}) for k in TIMES}
    for k, private in grown.items():
        if not private.error() <= TOLERANCE:
            race.fail(f"x{k}: the per-sample gradients are wrong: not timed")
    wanted = {k: 4 * p.N * p.shape[0] * p.shape[1] for k, p in grown.items()}
    race.facts(size=size, factor=factor, base=BASE, features=FEATURES, gradient_bytes_wanted=wanted)
    race.facts(gradient_bytes={k: p.gradient_bytes() for k, p in grown.items()})
    race.run(grown[1], {f"x{k}": grown[k] for k in TIMES[1:]})

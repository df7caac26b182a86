"""Shapes and layouts that every backend is tested on: rows may be added, none weakened."""

from dataclasses import dataclass

import torch
from torch import Tensor

F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class GradCase:
    """One call of sample_grad: x (N,T,n), dy (N,T,m), B (m,r)."""

    N: int
    T: int
    m: int
    n: int
    r: int
    dtype: torch.dtype = F32
    layout: str = "contiguous"

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.N}x{self.T}-m{self.m}-n{self.n}-r{self.r}-{name}-{self.layout}"


GRAD_CASES = [
    # one of everything, and nothing
    GradCase(1, 1, 1, 1, 1),
    GradCase(0, 5, 8, 6, 2),
    GradCase(3, 0, 8, 6, 2),
    GradCase(0, 0, 1, 1, 1),
    # feature axes below the filter's width and below every vector's
    *[GradCase(2, 3, k, k, 2) for k in (1, 2, 3, 4, 5)],
    # T = 1: pooled inputs
    GradCase(5, 1, 13, 7, 4),
    GradCase(33, 1, 65, 48, 8),
    # primes and tails of every block: vectors, tiles, time blocks, feature blocks
    GradCase(3, 7, 11, 13, 5),
    GradCase(2, 63, 47, 49, 7),
    GradCase(2, 64, 48, 96, 8),
    GradCase(2, 65, 97, 31, 9),
    GradCase(1, 67, 1031, 1033, 3),
    GradCase(17, 5, 61, 59, 16),
    GradCase(1, 130, 2053, 1025, 4),
    GradCase(3, 129, 769, 257, 12),
    # ranks
    *[GradCase(2, 9, 53, 37, r) for r in (1, 2, 3, 6, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256)],
    # layouts and dtypes
    *[
        GradCase(3, 19, 41, 35, 6, dtype, layout)
        for dtype in (F32, BF16)
        for layout in ("contiguous", "transposed", "sliced", "strided", "expanded")
    ],
    GradCase(2, 70, 1100, 1030, 8, BF16),
    GradCase(4, 16, 32, 48, 8, F32, "strided"),
]


def laid_out(t: Tensor, layout: str) -> Tensor:
    """A tensor of t's shape, dtype and, but for "expanded", values, that lies differently in memory."""
    if layout == "contiguous" or not t.numel():
        return t
    if layout == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":  # rows inside a longer row, from an odd offset
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), float("nan"), dtype=t.dtype)
        wide[..., 3 : 3 + t.shape[-1]] = t
        return wide[..., 3 : 3 + t.shape[-1]]
    if layout == "strided":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    if layout == "expanded":  # what the backward of a sum hands over
        return t[..., :1].expand(t.shape)
    raise ValueError(layout)


def grad_inputs(case: GradCase, seed: int = 0) -> dict[str, Tensor]:
    """dy, B, h, x of a case."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return laid_out(torch.randn(shape, generator=generator).to(case.dtype), case.layout)

    return {
        "dy": make(case.N, case.T, case.m),
        "B": make(case.m, case.r),
        "h": make(case.N, case.T, case.r),
        "x": make(case.N, case.T, case.n),
    }


# (shape, smooth_dim) of tensors of one release.
TENSOR_CASES: list[tuple[tuple[int, ...], int | None]] = [
    *[((k, 3), 0) for k in (1, 2, 3, 4, 5, 6)],
    *[((3, k), 1) for k in (1, 2, 3, 4, 5, 6)],
    ((16, 768), 1),
    ((768, 16), 0),
    ((7, 1021), 1),
    ((1021, 7), 0),
    ((1, 9001), 1),
    ((9001, 1), 0),
    ((3, 4099), 1),
    ((40, 600), 0),
    ((2100, 5), 1),
    ((11, 13), None),
    ((4097,), None),
    ((10007,), None),
    ((2, 3, 5), None),
    ((4, 6, 5), 1),
    ((0, 4), 0),
    ((4, 0), 1),
    ((), None),
]

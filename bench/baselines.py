"""What a PyTorch user would write in place of each operation, in every variant worth trying; the best one counts."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]).view(1, 1, 5) / 16


def _outer(left: Tensor, right: Tensor, how: str, buffer: Tensor) -> Tensor:
    """sum_t left[i,t] right[i,t]^T: (N,T,a), (N,T,b) -> (N,a,b); ``buffer`` holds N a b elements."""
    N, _, a = left.shape
    b = right.shape[2]
    if how == "bmm":
        return torch.bmm(left.mT, right, out=buffer.view(N, a, b))
    if how == "bmm, swapped":
        return torch.bmm(right.mT, left, out=buffer.view(N, b, a)).mT
    return torch.einsum("nta,ntb->nab", left, right)


ORDERS = ("bmm", "bmm, swapped", "einsum")


def sample_grad(dy: Tensor, B: Tensor, scaling: float, h: Tensor | None, x: Tensor | None) -> dict[str, Callable]:
    """name -> function of nothing that returns (dz, G, norm (N,)); G into memory that is kept from call to call."""
    N, r, features = dy.shape[0], B.shape[1], (dy if x is None else x).shape[2]
    buffer = dy.new_empty(N * r * features)

    def composed(how: str):
        dz = (dy @ B).mul_(scaling)
        G = _outer(dy, scaling * h, how, buffer) if x is None else _outer(dz, x, how, buffer)
        return dz, G, torch.linalg.vector_norm(G, dim=(1, 2), dtype=torch.float32)

    return {how: lambda how=how: composed(how) for how in ORDERS}


def sample_grad_clip(
    dy: Tensor, B: Tensor, scaling: float, h: Tensor | None, x: Tensor | None, max_norm: float
) -> dict[str, Callable]:
    """name -> function of nothing that returns (dz, S)."""

    def clipped(gradient: Callable, reduce: Callable):
        dz, G, norm = gradient()
        return dz, reduce((max_norm / norm).clamp(max=1.0), G)

    return {
        f"{how}, {kind}": lambda f=f, reduce=reduce: clipped(f, reduce)
        for how, f in sample_grad(dy, B, scaling, h, x).items()
        for kind, reduce in REDUCTIONS.items()
    }


def _einsum(weights: Tensor, G: Tensor) -> Tensor:
    return torch.einsum("n,nab->ab", weights, G)


def _matmul(weights: Tensor, G: Tensor) -> Tensor:
    return (weights @ G.reshape(len(G), -1)).view(G.shape[1:])


REDUCTIONS = {"einsum": _einsum, "matmul": _matmul}


def clip_reduce(G: Sequence[Tensor], weights: Tensor) -> dict[str, Callable]:
    """name -> function of nothing that returns the weighted sums."""
    return {
        kind: lambda reduce=reduce: [reduce(w, g) for w, g in zip(weights, G)] for kind, reduce in REDUCTIONS.items()
    }


def smooth(t: Tensor, dim: int) -> Tensor:
    """The 5-tap filter by conv1d, symmetric padding; t (a,b)."""
    rows = t if dim == 1 else t.t()
    padded = torch.cat((rows[:, :2].flip(1), rows, rows[:, -2:].flip(1)), 1)
    rows = F.conv1d(padded.unsqueeze(1), KERNEL.to(t.device)).squeeze(1)
    return rows if dim == 1 else rows.t()


def privatize(
    G: Sequence[Tensor], weights: Tensor, dim: int, noise_std: float, divisor: float
) -> dict[str, Callable[[], list[Tensor]]]:
    """name -> function of nothing that returns the released gradients. The noise is torch.randn's: not secure."""

    def release(reduce: Callable) -> list[Tensor]:
        out = []
        for w, g in zip(weights, G):
            total = reduce(w, g)
            total = total + noise_std * torch.randn_like(total)
            out.append(smooth(total, dim) / divisor)
        return out

    return {kind: lambda reduce=reduce: release(reduce) for kind, reduce in REDUCTIONS.items()}


def opacus_secure_normal(count: int) -> Callable[[], Tensor]:
    """Opacus' ``secure_mode`` noise: a sum of four normals (and one thrown away), from torch's generator."""
    from opacus.optimizers.optimizer import _generate_noise

    like = torch.empty(count)
    return lambda: _generate_noise(1.0, like, None, True)

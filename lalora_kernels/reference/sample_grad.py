"""Per-sample gradients of one LoRA layer."""

import torch
from torch import Tensor


def _per_sample(rows: Tensor, columns: Tensor, out: Tensor | None, accumulate: bool) -> tuple[Tensor, Tensor]:
    """(N,T,a), (N,T,b) -> G (N,a,b) = rows^T columns for each sample, and its squared norms (N,), float64."""
    G = torch.matmul(rows.transpose(1, 2), columns)
    if out is not None:
        G = out.add_(G) if accumulate else out.copy_(G)
    return G, G.to(torch.float64).square().flatten(1).sum(1)


def sample_grad(
    dy: Tensor,
    B: Tensor,
    scaling: float,
    *,
    h: Tensor | None = None,
    x: Tensor | None = None,
    need_dz: bool = True,
    G_B: Tensor | None = None,
    G_A: Tensor | None = None,
    accumulate: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dz = scaling * dy B, and each sample's gradient of the active factors.

    dy (N,T,m), B (m,r); ``h`` (N,T,r) asks for G_B[i] = scaling * dy_i^T h_i (N,m,r); ``x`` (N,T,n) asks for
    G_A[i] = dz_i^T x_i (N,r,n). ``G_B`` and ``G_A``, where given, are written (added to, with ``accumulate``).
    Returns (dz, G_B, sq_B, G_A, sq_A), with None for what was not asked; sq is ||G[i]||^2, float64 (N,), of the
    gradient as it stands after accumulation. Products are taken in float32 for half-precision inputs and in
    float64 for float64; dz has dy's dtype.
    """
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dy_w = dy.to(wide)
    g_b = g_a = sq_b = sq_a = None
    dz = scaling * torch.matmul(dy_w, B.to(wide)) if need_dz or x is not None else None
    if h is not None:
        g_b, sq_b = _per_sample(scaling * dy_w, h.to(wide), G_B, accumulate)
    if x is not None and dz is not None:
        g_a, sq_a = _per_sample(dz, x.to(wide), G_A, accumulate)
    return (dz.to(dy.dtype) if need_dz and dz is not None else None), g_b, sq_b, g_a, sq_a

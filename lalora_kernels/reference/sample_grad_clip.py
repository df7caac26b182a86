"""Per-sample gradients of one LoRA layer, each tensor clipped to its own bound, summed."""

import torch
from torch import Tensor

from lalora_kernels.reference.clip_reduce import weighted_sum
from lalora_kernels.reference.sample_grad import sample_grad

# A factor below this is no longer a normal float32 with room to spare, so that rounding it would break the bound: such
# a sample contributes nothing, like one that is not finite.
SMALLEST_FACTOR = 1e-36


def clip_factor(sq: Tensor, max_norm: float, grad_scale: float) -> Tensor:
    """grad_scale * min(1, max_norm / (grad_scale ||G||)) from squared norms, float64.

    0 where a norm is not finite, or so large that its factor falls below ``SMALLEST_FACTOR``.
    """
    norm = grad_scale * sq.sqrt()
    factor = (max_norm / norm).clamp(max=1.0) * grad_scale
    return torch.where(norm.isfinite() & (factor >= SMALLEST_FACTOR), factor, 0.0)


def sample_grad_clip(
    dy: Tensor,
    B: Tensor,
    scaling: float,
    *,
    max_norm: float,
    grad_scale: float = 1.0,
    valid: int | None = None,
    h: Tensor | None = None,
    x: Tensor | None = None,
    need_dz: bool = True,
    S_B: Tensor | None = None,
    S_A: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As ``sample_grad``, but S_f += Sum_i c_i G_f[i], c_i = grad_scale * min(1, max_norm / (grad_scale ||G_f[i]||)).

    ``valid``: samples from this index on are placeholders and contribute nothing (default: all are valid).
    ``S_B`` (m,r) and ``S_A`` (r,n) are added to in place and created where None.
    Returns (dz, S_B, sq_B, S_A, sq_A); sq is the squared norm before clipping and before grad_scale, float64 (N,).
    """
    dz, g_b, sq_b, g_a, sq_a = sample_grad(dy, B, scaling, h=h, x=x, need_dz=need_dz)

    def reduce(G: Tensor | None, sq: Tensor | None, S: Tensor | None) -> Tensor | None:
        if G is None or sq is None:
            return None
        c = clip_factor(sq, max_norm, grad_scale)
        c[valid if valid is not None else len(c) :].zero_()
        total = weighted_sum(G, c)
        return total if S is None else S.add_(total)

    return dz, reduce(g_b, sq_b, S_B), sq_b, reduce(g_a, sq_a, S_A), sq_a

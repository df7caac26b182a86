"""Clip factors from squared norms."""

import math

import torch
from torch import Tensor

from lalora_kernels.reference.sample_grad_clip import SMALLEST_FACTOR

CLIPPING = ("flat", "per_layer", "automatic")
GAMMA = 0.01  # AUTO-S, 2206.07136


def tensor_bound(clipping: str, max_grad_norm: float, tensors: int) -> float:
    """The bound of one tensor's clipped gradient: C, or C / sqrt(L) of L active tensors when clipping per layer."""
    return max_grad_norm / math.sqrt(max(tensors, 1)) if clipping == "per_layer" else max_grad_norm


def clip_weights(
    sq: Tensor,
    *,
    clipping: str,
    max_grad_norm: float,
    grad_scale: float,
    valid: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Weights (L,N) by which G is multiplied before it is summed, and the number of non-finite samples.

    ``sq`` (L,N) float64: squared norms of L tensors' per-sample gradients, which stand ``grad_scale`` times too small
    (the user's loss is a mean over that many records). A weight is ``grad_scale`` min(1, C / norm of what was meant),
    so min(``grad_scale``, C / norm of what stands there). It is 0 for placeholders (index >= ``valid``) and where a
    norm is not finite: a sample's own, which leaves it out of every tensor, or per layer the tensor's, which leaves it
    out of that one, as the one-pass kernel does, which knows no other. It counts as non-finite either way. ||sum of a
    sample's weighted tensors|| <= C (1 + 1e-6) in every mode. The count is a tensor, so that nothing waits for the
    device.
    """
    L, N = sq.shape
    per_layer = clipping == "per_layer"
    norm = (sq if per_layer else sq.sum(0, keepdim=True)).sqrt()  # (L,N) per layer, else (1,N)
    bound = tensor_bound(clipping, max_grad_norm, L)
    if clipping == "automatic":
        weights = grad_scale * bound / (grad_scale * norm + GAMMA)
    else:
        weights = (bound / norm).clamp(max=grad_scale)
    kept = weights >= SMALLEST_FACTOR  # no NaN is; and an infinite norm gives 0
    whole = kept.all(0) if per_layer else kept
    if valid < N:
        real = torch.arange(N, device=sq.device) < valid
        kept, whole = kept & real, whole | ~real
    weights = torch.where(kept, weights, 0.0).to(dtype)
    return weights.expand(L, N), N - whole.sum()

"""Weighted sums of per-sample gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(G: Tensor, weights: Tensor) -> Tensor:
    """Sum_i weights[i] G[i] over (N, ...); a sample of weight zero is left out, whatever it holds (0 * Inf is NaN)."""
    w = weights.to(G.dtype).view(-1, *[1] * (G.dim() - 1))
    return torch.where(w == 0, torch.zeros((), dtype=G.dtype, device=G.device), w * G).sum(0)


def clip_reduce(G: Sequence[Tensor], weights: Tensor, out: Sequence[Tensor]) -> None:
    """out[l] += Sum_i weights[l, i] G[l][i] for every tensor l, in place.

    G[l] (N, *shape_l), weights (L, N), out[l] shape_l. Samples whose weight is 0 are not read.
    """
    for g, w, o in zip(G, weights, out, strict=True):
        o.add_(weighted_sum(g, w))

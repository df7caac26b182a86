"""Clipped sum, noise, smoothing and division: one release of one step, every tensor in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lalora_kernels.reference.chacha20_normal import each_streams_start
from lalora_kernels.reference.clip_reduce import weighted_sum

TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def pad_index(length: int, padding: str, device: torch.device | str = "cpu") -> Tensor:
    """Source index of positions -2 .. length+1 under NumPy's ``symmetric`` or ``reflect`` padding; any length >= 1."""
    i = torch.arange(-2, length + 2, device=device)
    if padding == "symmetric":
        i = i % (2 * length)
        return torch.where(i < length, i, 2 * length - 1 - i)
    if padding == "reflect":
        if length == 1:
            return torch.zeros_like(i)
        period = 2 * length - 2
        i = i % period
        return torch.where(i < length, i, period - i)
    raise ValueError(f"padding is 'symmetric' or 'reflect', got {padding!r}")


def smooth(t: Tensor, dim: int, padding: str = "symmetric") -> Tensor:
    """The 5-tap binomial low-pass filter [1,4,6,4,1]/16 along ``dim``; same shape and dtype.

    DC gain 1; white noise keeps 70/256 of its variance away from the edges.
    """
    length = t.shape[dim]
    if t.numel() == 0:
        return t.clone()
    padded = t.index_select(dim, pad_index(length, padding, t.device))
    return sum((w * padded.narrow(dim, k, length) for k, w in enumerate(TAPS)), start=torch.zeros_like(t))


def privatize(
    G: Sequence[Tensor | None],
    S: Sequence[Tensor | None],
    weights: Tensor,
    out: Sequence[Tensor],
    *,
    noise_std: float,
    key: bytes | None,
    release: int,
    tensor_index: Sequence[int],
    smooth_dim: Sequence[int | None],
    divisor: float,
    padding: str = "symmetric",
) -> None:
    """out[l] = smooth(S[l] + Sum_i weights[l, i] G[l][i] + noise_std * xi_l) / divisor for every tensor l.

    G[l] (N, *shape_l) or None, S[l] shape_l or None, weights (L, N), out[l] shape_l, written. ``smooth_dim[l]`` is the
    feature axis (0 for lora_B (m,r), 1 for lora_A (r,n)) or None: not smoothed. xi_l is the stream
    (key, release, tensor_index[l]) over the flattened tensor; ``key`` may be None only where noise_std is 0.
    Samples whose weight is 0 are not read.
    """
    if noise_std and key is None:
        raise ValueError("privatize: noise_std > 0 needs a key")
    noise = None
    if noise_std and key is not None and out:
        counts = [o.numel() for o in out]
        noise = each_streams_start(counts, key=key, release=release, tensor_index=tensor_index, device=out[0].device)
    for l, (o, g, s, dim) in enumerate(zip(out, G, S, smooth_dim)):
        total = torch.zeros_like(o) if s is None else s.to(o.dtype)
        if g is not None:
            total = total + weighted_sum(g, weights[l])
        if noise is not None:
            total = total + noise_std * next(noise).to(o.dtype).view(o.shape)
        if dim is not None:
            total = smooth(total, dim, padding)
        o.copy_(total / divisor)

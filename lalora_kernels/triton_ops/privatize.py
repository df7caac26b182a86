"""Clipped sum, noise, filter and division of all tensors of a release in one launch. ``clip_reduce`` is a case."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lalora_kernels.gpu import refuse_capture
from lalora_kernels.reference.chacha20_normal import MASK
from lalora_kernels.segments import FIELDS as _FIELDS
from lalora_kernels.segments import Release
from lalora_kernels.triton_ops.chacha20_normal import STREAM, noise_tile, stream_args
from lalora_kernels.triton_ops.common import chip, inline, pick

FIELDS = tl.constexpr(_FIELDS)
# (elements a tile, samples in flight, warps); the first is the default.
CONFIGS = ((1024, 4, 4), (1024, 8, 4), (2048, 4, 8))


@inline
def _tap(pos, length, k: tl.constexpr, REFLECT: tl.constexpr):
    """Where position pos + k lies under NumPy's symmetric or reflect padding, less pos; any length >= 1."""
    period = tl.maximum(2 * length - 2, 1) if REFLECT else 2 * length
    i = (pos + k + 2 * period) % period  # 2 periods are at least 2, whatever the length
    mirrored = (2 * length - 2 - i) if REFLECT else (2 * length - 1 - i)
    return tl.where(i < length, i, mirrored) - pos


@triton.jit(do_not_specialize=("N", *STREAM))
def privatize_kernel(
    table, tiles, weights, w_row, w_step, N, noise_std, factor, k0, k1, k2, k3, k4, k5, k6, k7, n1, n2,
    NOISE: tl.constexpr, SMOOTH: tl.constexpr, REFLECT: tl.constexpr, ALIGNED: tl.constexpr,
    P: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """One tile: P elements of one tensor, of which ``halo`` at either end are computed for the filter's sake alone."""
    i_l = tl.load(tiles + tl.program_id(0))
    row = table + i_l.to(tl.int64) * FIELDS
    a_g, s_g, a_s, a_o = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    numel, halo, first = tl.load(row + 4).to(tl.int32), tl.load(row + 7).to(tl.int32), tl.load(row + 8).to(tl.int32)
    p_g, p_s = a_g.to(tl.pointer_type(tl.float32)), a_s.to(tl.pointer_type(tl.float32))
    p_o = a_o.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        p_g, p_s, p_o = tl.multiple_of(p_g, 16), tl.multiple_of(p_s, 16), tl.multiple_of(p_o, 16)
        s_g, numel = tl.multiple_of(s_g, 4), tl.multiple_of(numel, 4)
    halo = tl.multiple_of(halo, 4)

    begin = (tl.program_id(0) - first) * (P - 2 * halo) - halo
    o_p = tl.arange(0, P)
    o_e = begin + o_p
    inside = (o_e >= 0) & (o_e < numel)
    end_s = tl.multiple_of(tl.where(a_s != 0, numel, 0), 4 if ALIGNED else 1)
    b_t = tl.load(p_s + o_e, mask=(o_e >= 0) & (o_e < end_s), other=0.0)  # [P]
    p_w = weights + i_l.to(tl.int64) * w_row
    samples = tl.where(a_g != 0, N, 0)
    for i_n in range(0, samples, U):
        o_n = i_n + tl.arange(0, U)
        b_w = tl.load(p_w + o_n * w_step, mask=o_n < samples, other=0.0)  # [U]
        # A sample of weight 0 is not read: whatever it holds, NaN too, stays out.
        m_g = (b_w != 0.0)[:, None] & inside[None, :]
        b_g = tl.load(p_g + o_n.to(tl.int64)[:, None] * s_g + o_e[None, :], mask=m_g, other=0.0)  # [U, P]
        b_t += tl.sum(b_w[:, None] * b_g, 0)
    if NOISE:
        counter = (begin // 4 + tl.arange(0, P // 4)).to(tl.uint32)
        n0 = tl.load(row + 9).to(tl.int32)
        b_t += noise_std * noise_tile(counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2)
    m_o = inside
    if SMOOTH:
        m_o = inside & (o_p >= halo) & (o_p < P - halo)
        if tl.load(row + 10) != 0:
            length, inner = tl.load(row + 5).to(tl.int32), tl.load(row + 6).to(tl.int32)
            pos = (tl.maximum(o_e, 0) // inner) % length
            b_f = 0.375 * b_t
            for k in tl.static_range(-2, 3):
                if k != 0:
                    o_k = tl.where(m_o, o_p + _tap(pos, length, k, REFLECT) * inner, o_p)
                    b_f += (0.25 if k * k == 1 else 0.0625) * tl.gather(b_t, o_k, 0)
            b_t = b_f
    tl.store(p_o + o_e, factor * b_t, mask=m_o)


def launch(
    release: Release, noise_std: float, factor: float, stream: Sequence[int], reflect: bool, autotune: bool = True
) -> None:
    def run(config):
        tile, unroll, warps = config
        table = release.table(tile)
        if not len(table.tiles):
            return
        warps = max(warps, min(table.tile // 256, 16))
        privatize_kernel[(len(table.tiles),)](
            table.rows, table.tiles, release.weights, *release.strides, release.N, noise_std, factor, *stream,
            NOISE=noise_std != 0, SMOOTH=table.smooth, REFLECT=reflect, ALIGNED=table.aligned, P=table.tile, U=unroll,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip

    with torch.cuda.device_of(release.weights):
        in_place = any(row[2] == row[3] for row in release.rows)  # timing it would add to the sums again
        if in_place or not autotune:
            config = CONFIGS[0]
        else:
            size = sum(row[4] for row in release.rows)
            config = pick(("privatize", chip(release.device), release.N, len(release.rows), size), CONFIGS, run)
        run(config)
    release.finish()


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
    """See ``lalora_kernels.reference.privatize``. Tensors are float32, of fewer than 2^31 elements each."""
    if padding not in ("symmetric", "reflect"):
        raise ValueError(f"padding is 'symmetric' or 'reflect', got {padding!r}")
    if noise_std and key is None:
        raise ValueError("privatize: noise_std > 0 needs a key")
    if not out:
        return
    if noise_std:
        refuse_capture("privatize", out[0].device)
    stream = stream_args(key, (0, release & MASK, release >> 32)) if noise_std else [0] * 11
    del stream[8]  # the tensor's index stands in the table
    tensors = Release("privatize", G, S, weights, out, tensor_index, smooth_dim)
    launch(tensors, noise_std, 1.0 / divisor, stream, padding == "reflect")


def smooth(t: Tensor, dim: int, padding: str = "symmetric") -> Tensor:
    """See ``lalora_kernels.reference.smooth``. float32."""
    out = torch.empty(t.shape, dtype=torch.float32, device=t.device)
    privatize(
        [None], [t], None, [out], noise_std=0.0, key=None, release=0, tensor_index=[0], smooth_dim=[dim], divisor=1.0,
        padding=padding,
    )  # fmt: skip
    return out

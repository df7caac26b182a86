"""Per-sample gradients of one LoRA layer, dz and squared norms from one pass over dy (and one over x, for A).

A gradient is thin: G[f, r] = sum_t wide[t, f] thin[t, r], with (wide, thin) = (dy, h) for B and (x, dz) for A. A
program takes one sample, BF features and a span of T. Sums that cross programs (dz over the features, G over the spans)
go through float32 partial results, added in a fixed order: no atomics, so results repeat bit for bit.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lalora_kernels.gpu import gradient_out, layer_inputs
from lalora_kernels.triton_ops.common import autotunes, cdiv, chip, dot, inline, next_power_of_2, pick, precision

HALF = torch.float16
FINISH = 1024  # elements a program of the finishing kernels


class Config(NamedTuple):
    features: int  # BF
    positions: int  # BT
    warps: int
    stages: int


@inline
def fma_thin(b_w, b_h, b_g, PRECISION: tl.constexpr):
    """b_g [BF, RB] += b_w [BT, BF]^T b_h [BT, RB]. A float32 b_h beside a half-precision b_w (dz beside x) goes through
    the matrix units as a sum of two halves, so that it keeps 16 bits of mantissa (bfloat16) or 22 (float16)."""
    b_wt = tl.trans(b_w)
    if b_w.dtype == b_h.dtype:
        b_g = dot(b_wt, b_h, b_g, PRECISION)
    elif b_w.dtype == tl.bfloat16:
        b_hi = b_h.to(tl.bfloat16)
        b_g = dot(b_wt, b_hi, b_g, PRECISION)
        b_g = dot(b_wt, (b_h - b_hi.to(tl.float32)).to(tl.bfloat16), b_g, PRECISION)
    else:
        # float16 has not float32's range: a power of two brings the tile's largest value to 2^14.
        top = tl.max(tl.max(tl.abs(b_h), 1), 0).to(tl.int32, bitcast=True) >> 23
        top = tl.minimum(tl.maximum(top, 15), 254)
        b_s = b_h * ((268 - top) << 23).to(tl.float32, bitcast=True)
        b_hi = b_s.to(tl.float16)
        b_p = dot(b_wt, b_hi, tl.zeros_like(b_g), PRECISION)
        b_p = dot(b_wt, (b_s - b_hi.to(tl.float32)).to(tl.float16), b_p, PRECISION)
        b_g += b_p * ((top - 14) << 23).to(tl.float32, bitcast=True)
    return b_g


@triton.jit
def sample_grad_kernel(
    wide, thin, factor, dz, G, sq, scale, T, F, R, span,
    w_n, w_t, w_f, h_n, h_t, h_r, b_f, b_r, z_tile, z_n, g_split, g_n, g_f, g_r,
    WANT_G: tl.constexpr, WANT_Z: tl.constexpr, ACCUMULATE: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, RB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (N, spans of T, feature tiles). dz[tile] gets the tile's share of wide @ factor, G[span] the span's sum."""
    i_n, i_s, i_f = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    t0 = i_s * span
    t1 = tl.minimum(t0 + span, T)
    o_f, o_r, o_t = i_f * BF + tl.arange(0, BF), tl.arange(0, RB), tl.arange(0, BT)
    m_f, m_r = o_f < F, o_r < R
    p_w = wide + i_n * w_n + t0.to(tl.int64) * w_t
    p_h = thin + i_n * h_n + t0.to(tl.int64) * h_t
    p_z = dz + i_f.to(tl.int64) * z_tile + i_n * z_n + t0.to(tl.int64) * R
    o_w = o_t[:, None] * w_t + o_f[None, :] * w_f
    o_h = o_t[:, None] * h_t + o_r[None, :] * h_r
    if WANT_Z:
        m_b = m_f[:, None] & m_r[None, :]
        b_b = tl.load(factor + o_f[:, None] * b_f + o_r[None, :] * b_r, mask=m_b, other=0.0)  # [BF, RB]
    b_g = tl.zeros([BF, RB], dtype=tl.float32)
    for i_t in tl.range(t0, t1, BT, num_stages=STAGES):
        m_t = i_t + o_t < t1
        b_w = tl.load(p_w + o_w, mask=m_t[:, None] & m_f[None, :], other=0.0)  # [BT, BF]
        if WANT_G:
            b_h = tl.load(p_h + o_h, mask=m_t[:, None] & m_r[None, :], other=0.0)  # [BT, RB]
            b_g = fma_thin(b_w, b_h, b_g, PRECISION)
        if WANT_Z:
            b_z = dot(b_w, b_b, tl.zeros([BT, RB], dtype=tl.float32), PRECISION)
            p_zt = p_z + (i_t - t0).to(tl.int64) * R + o_t[:, None] * R + o_r[None, :]
            tl.store(p_zt, (scale * b_z).to(dz.dtype.element_ty), mask=m_t[:, None] & m_r[None, :])
        p_w += BT * tl.cast(w_t, tl.int64)
        p_h += BT * tl.cast(h_t, tl.int64)
    if WANT_G:
        p_g = G + i_s.to(tl.int64) * g_split + i_n * g_n + (o_f[:, None] * g_f + o_r[None, :] * g_r)
        m_g = m_f[:, None] & m_r[None, :]
        b_g *= scale
        if ACCUMULATE:
            b_g += tl.load(p_g, mask=m_g, other=0.0)
        tl.store(p_g, b_g, mask=m_g)
        if not SPLIT:
            b_q = b_g.to(tl.float64)
            tl.store(sq + i_n * tl.num_programs(2) + i_f, tl.sum(tl.sum(b_q * b_q, 1), 0))


@triton.jit
def add_up_kernel(
    partial, weights, out, sq, size, pieces, p_k, p_n, o_n,
    WEIGHTED: tl.constexpr, ACCUMULATE: tl.constexpr, SQUARE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid (N, chunks): out = sum over k of (weights[k]) partial[k], and the chunk's share of its squared norm."""
    i_n, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_e = i_c * C + tl.arange(0, C)
    m_e = o_e < size
    b_o = tl.zeros([C], dtype=tl.float32)
    p_p = partial + i_n * p_n + o_e
    for i_k in range(0, pieces):
        if WEIGHTED:
            w = tl.load(weights + i_k)
            b_o += w * tl.load(p_p, mask=o_e < tl.where(w != 0.0, size, 0), other=0.0)  # weight 0: not read
        else:
            b_o += tl.load(p_p, mask=m_e, other=0.0)
        p_p += tl.cast(p_k, tl.int64)
    if ACCUMULATE:
        b_o += tl.load(out + i_n * o_n + o_e, mask=m_e, other=0.0)
    tl.store(out + i_n * o_n + o_e, b_o, mask=m_e)
    if SQUARE:
        b_q = b_o.to(tl.float64)
        tl.store(sq + i_n * tl.num_programs(1) + i_c, tl.sum(b_q * b_q, 0))


@triton.jit
def finish_kernel(
    dz_partial, dz, dz_wide, size, tiles, sq_partial, sq, parts, z_programs,
    WANT_Z: tl.constexpr, WANT_WIDE: tl.constexpr, WANT_Q: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Programs below ``z_programs`` add up dz over the feature tiles; the others, one a sample, the squared norm."""
    i_p = tl.program_id(0)
    if (WANT_Z or WANT_WIDE) and i_p < z_programs:
        o_e = i_p.to(tl.int64) * C + tl.arange(0, C)
        m_e = o_e < size
        b_z = tl.zeros([C], dtype=tl.float32)
        for i_f in range(0, tiles, TILES):  # all of one turn's loads are under way at once
            o_f = i_f + tl.arange(0, TILES)
            p_z = dz_partial + o_f.to(tl.int64)[:, None] * size + o_e[None, :]
            b_z += tl.sum(tl.load(p_z, mask=(o_f < tiles)[:, None] & m_e[None, :], other=0.0), 0)
        if WANT_Z:
            tl.store(dz + o_e, b_z.to(dz.dtype.element_ty), mask=m_e)
        if WANT_WIDE:
            tl.store(dz_wide + o_e, b_z, mask=m_e)
    elif WANT_Q:
        i_n = (i_p - z_programs).to(tl.int64)
        b_q = tl.zeros([PARTS], dtype=tl.float64)
        for i_k in range(0, parts, PARTS):
            o_k = i_k + tl.arange(0, PARTS)
            b_q += tl.load(sq_partial + i_n * parts + o_k, mask=o_k < parts, other=0.0)
        tl.store(sq + i_n, tl.sum(b_q, 0))


@triton.jit
def dz_kernel(
    dy, factor, dz, second, scale, rows, T, F, R, span, w_n, w_t, w_f, b_f, b_r, z_split,
    TWICE: tl.constexpr, PRECISION: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, RB: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, spans of F): dz[span] = scale * dy @ factor over the N T rows; no gradient. ``second``: the same
    once more in another dtype."""
    i_t, i_s = tl.program_id(0), tl.program_id(1)
    f0 = i_s * span
    f1 = tl.minimum(f0 + span, F)
    o_t, o_f, o_r = i_t.to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BF), tl.arange(0, RB)
    m_t, m_r = o_t < rows, o_r < R
    p_w = dy + f0 * tl.cast(w_f, tl.int64)
    o_w = ((o_t // T) * w_n + (o_t % T) * w_t)[:, None] + o_f[None, :] * w_f
    p_b = factor + f0 * tl.cast(b_f, tl.int64)
    o_b = o_f[:, None] * b_f + o_r[None, :] * b_r
    b_z = tl.zeros([BT, RB], dtype=tl.float32)
    for i_f in tl.range(f0, f1, BF, num_stages=STAGES):
        m_f = i_f + o_f < f1
        b_w = tl.load(p_w + o_w, mask=m_t[:, None] & m_f[None, :], other=0.0)  # [BT, BF]
        b_b = tl.load(p_b + o_b, mask=m_f[:, None] & m_r[None, :], other=0.0)  # [BF, RB]
        b_z = dot(b_w, b_b, b_z, PRECISION)
        p_w += BF * tl.cast(w_f, tl.int64)
        p_b += BF * tl.cast(b_f, tl.int64)
    b_z *= scale
    o_z = i_s.to(tl.int64) * z_split + o_t[:, None] * R + o_r[None, :]
    m_z = m_t[:, None] & m_r[None, :]
    tl.store(dz + o_z, b_z.to(dz.dtype.element_ty), mask=m_z)
    if TWICE:
        tl.store(second + o_z, b_z.to(second.dtype.element_ty), mask=m_z)


# ---------------------------------------------------------------- launchers: what they decide is cached, as the host's
# time for a layer is of the order of the card's.


@cache
def rank_block(r: int) -> int:
    return max(16, next_power_of_2(r))


@cache
def configs(chip_arch: int, itemsize: int, rb: int, two_sums: bool = False) -> tuple[Config, ...]:
    """The first is the default. ``two_sums``: the float16 case of ``fma_thin``, which holds twice the registers."""
    if itemsize == 4:
        features, positions = max(32, min(128, 2048 // rb)), 32 if rb < 256 else 16
        stages = 3 if chip_arch >= 90 else 2
        return (
            Config(features, positions, 8, stages),
            Config(features, positions, 4, 2),
            Config(max(16, features // 2), positions, 4, 2),
        )
    features = max(64, min(256, (8192 if two_sums or chip_arch < 90 else 16384) // rb))
    # From rank 64 on a multiprocessor of sm_90 holds one program: a third stage keeps as much under way as two would.
    stages = 3 if chip_arch < 90 or (64 <= rb < 256 and not two_sums) else 2
    return (
        Config(features, 64 if chip_arch >= 90 else 32, 8, stages),
        Config(features, 64, 4, stages),
        Config(max(64, features // 2), 64, 4, stages),
        Config(max(64, features // 2), 128, 8, stages),
    )


@cache
def pinned(chip_arch: int, itemsize: int, rb: int, kind: str, programs: int, multiprocessors: int) -> int:
    """Which of ``configs`` is the default, ``programs`` being what the first makes: measured on sm_90 at rank 16."""
    if itemsize == 4 or rb > 16 or chip_arch < 90:
        return 0
    if programs < 1.5 * multiprocessors:
        return 2
    return 1 if kind == "B" else 0


@cache
def spans(multiprocessors: int, programs: int, length: int, block: int, fill: float) -> tuple[int, int]:
    """(pieces, length of one): how a sum of ``length`` is cut where ``programs`` are fewer than ``fill`` times the
    multiprocessors. At most two programs a multiprocessor come of it, so that none is left for a turn of its own."""
    pieces = 1
    if 0 < programs < fill * multiprocessors:
        pieces = max(1, min(2 * multiprocessors // programs, length // (2 * block), 16))
    span = max(1, cdiv(cdiv(length, pieces), block)) * block
    return max(1, cdiv(length, span)), span


# What a cut costs: of G its size in memory twice over, of dz, which is thin, next to nothing.
FILL_G, FILL_DZ = 0.75, 2.0


def finish(
    z_partial: Tensor | None, dz: Tensor | None, dz_wide: Tensor | None, sq_partial, sq: Tensor | None, parts: int = 1
) -> None:
    """Add up dz over z_partial's first axis and squared norms over their ``parts``; None: nothing to add."""
    like = dz if dz_wide is None else dz_wide
    size = 0 if z_partial is None else like.numel()
    # Few elements in many programs, which load all tiles at once; many in programs that are long enough.
    c = 256 if size <= 256 * FINISH else FINISH
    blocks, samples = cdiv(size, c), 0 if sq is None else len(sq)
    if not blocks + samples:
        return
    # What a kernel will not touch is any tensor.
    z, q, q_partial = sq if z_partial is None else z_partial, sq, sq_partial
    if sq is None:
        q = q_partial = z
    finish_kernel[(blocks + samples,)](
        z, z if dz is None else dz, z if dz_wide is None else dz_wide, size, len(z), q_partial, q, parts, blocks,
        WANT_Z=blocks > 0 and dz is not None, WANT_WIDE=blocks > 0 and dz_wide is not None, WANT_Q=samples > 0,
        C=c, TILES=min(4 * FINISH // c, next_power_of_2(len(z))), PARTS=128,
    )  # fmt: skip


def thin_gradient(
    config: Config, wide: Tensor, thin: Tensor, scale: float, G: Tensor, accumulate: bool,
    factor: Tensor | None = None, dz: Tensor | None = None, dz_wide: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """G (N, F, R), a sample without gaps in any order of axes; dz and its float32 copy, where given; squared norms."""
    (N, T, F), R, device = wide.shape, thin.shape[2], wide.device
    tiles = cdiv(F, config.features)
    pieces, span = spans(chip(device).multiprocessors, N * tiles, T, config.positions, FILL_G)
    split, want_z = pieces > 1, dz is not None or dz_wide is not None
    z_partial, z_out = None, wide
    if want_z and tiles == 1 and (dz is None or dz_wide is None):
        z_out = dz if dz_wide is None else dz_wide
    elif want_z:
        z_out = z_partial = torch.empty(tiles, N, T, R, dtype=torch.float32, device=device)
    g_out, strides = G, (0, *G.stride())
    if split:
        strides = (N * F * R, F * R, *strides[2:])
        g_out = torch.empty(pieces * N * F * R, dtype=torch.float32, device=device)
    parts = cdiv(F * R, FINISH) if split else tiles
    sq = torch.empty(N, dtype=torch.float64, device=device)
    sq_partial = sq if parts == 1 else torch.empty(N * parts, dtype=torch.float64, device=device)
    factor, b = (wide, (0, 0)) if factor is None else (factor, factor.stride())
    sample_grad_kernel[(N, pieces, tiles)](
        wide, thin, factor, z_out, g_out, sq_partial, scale, T, F, R, span,
        *wide.stride(), *thin.stride(), *b, N * T * R, T * R, *strides,
        WANT_G=True, WANT_Z=want_z, ACCUMULATE=accumulate and not split, SPLIT=split, PRECISION=precision(wide.dtype),
        BF=config.features, BT=config.positions, RB=rank_block(R), STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    if split:
        add_up_kernel[(N, parts)](
            g_out, sq_partial, G, sq_partial, F * R, pieces, N * F * R, F * R, G.stride(0),
            WEIGHTED=False, ACCUMULATE=accumulate, SQUARE=True, C=FINISH,
        )  # fmt: skip
    finish(z_partial, dz, dz_wide, sq_partial, None if parts == 1 else sq, parts)
    return sq


def rows_dz(config: Config, dy: Tensor, B: Tensor, scale: float, dz: Tensor | None, dz_wide: Tensor | None) -> None:
    """dz = scale * dy @ B (N, T, R) into dz, dz_wide or both."""
    (N, T, F), R = dy.shape, B.shape[1]
    blocks = cdiv(N * T, config.positions)
    pieces, span = spans(chip(dy.device).multiprocessors, blocks, F, config.features, FILL_DZ)
    partial, out, second = None, dz if dz_wide is None else dz_wide, dz if dz is not None else dz_wide
    if pieces > 1:
        out = second = partial = torch.empty(pieces, N, T, R, dtype=torch.float32, device=dy.device)
    dz_kernel[(blocks, pieces)](
        dy, B, out, second, scale, N * T, T, F, R, span, *dy.stride(), *B.stride(), N * T * R, TWICE=out is not second,
        PRECISION=precision(dy.dtype), BF=config.features, BT=config.positions, RB=rank_block(R), STAGES=config.stages,
        num_warps=config.warps,
    )  # fmt: skip
    if partial is not None:
        finish(partial, dz, dz_wide, None, None)


def _gradient(kind: str, given: Tensor | None, accumulate: bool, wide: Tensor, thin: Tensor, scale: float, *dz):
    """(gradient, squared norms) of factor ``kind``, the block sizes chosen; ``dz``: factor, dz and dz_wide."""
    (N, T, F), r = wide.shape, thin.shape[2]
    out = gradient_out("sample_grad", f"G_{kind}", given, (N, F, r) if kind == "B" else (N, r, F), wide.device)
    G = out if kind == "B" else out.transpose(1, 2)
    if out.numel():
        rb, itemsize = rank_block(r), wide.element_size()
        card = chip(wide.device)
        choices = configs(card.arch, itemsize, rb, kind == "A" and wide.dtype == HALF)
        if kind == "A" and itemsize == 2 and rb >= 256:
            choices = Config(32, 32, 8, 2), *choices  # dz in two halves fills the registers
        programs = N * cdiv(F, choices[0].features)
        config = choices[pinned(card.arch, itemsize, rb, kind, programs, card.multiprocessors)]
        if autotunes():
            key = ("sample_grad", kind, card, wide.dtype, N, T, F, r, *(z is None for z in dz))
            scratch = torch.empty_like(G)
            config = pick(key, (config, *choices), lambda c: thin_gradient(c, wide, thin, scale, scratch, False, *dz))
        sq = thin_gradient(config, wide, thin, scale, G, accumulate and given is not None, *dz)
    else:
        sq = torch.zeros(N, dtype=torch.float64, device=wide.device)
    return (out if given is None or out is given else given.copy_(out)), sq


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
    """See ``lalora_kernels.reference.sample_grad``. Gradients are float32."""
    dtype = dy.dtype
    dy, B, h, x = layer_inputs("sample_grad", dy, B, h, x)
    (N, T, m), r = dy.shape, B.shape[1]
    # dz in float32 is what x is multiplied by, whatever dz is returned in.
    dz_wide = dz = None
    if x is not None or (need_dz and dtype == torch.float32):
        dz_wide = torch.empty(N, T, r, dtype=torch.float32, device=dy.device)
    if need_dz and dtype != torch.float32:
        dz = torch.empty(N, T, r, dtype=dtype, device=dy.device)
    want_z = (dz is not None or dz_wide is not None) and N * T > 0
    if want_z and not m:
        for z in (dz, dz_wide):
            if z is not None:
                z.zero_()
        want_z = False
    g_b = sq_b = g_a = sq_a = None
    with torch.cuda.device_of(dy):
        if h is not None:
            g_b, sq_b = _gradient("B", G_B, accumulate, dy, h, scaling, *((B, dz, dz_wide) if want_z else ()))
        elif want_z:
            choices = configs(chip(dy.device).arch, dy.element_size(), rank_block(r))
            config = choices[0]
            if autotunes():
                key = ("dz", chip(dy.device), dy.dtype, N, T, m, r, dz is None, dz_wide is None)
                config = pick(key, choices, lambda c: rows_dz(c, dy, B, scaling, dz, dz_wide))
            rows_dz(config, dy, B, scaling, dz, dz_wide)
        if x is not None:
            g_a, sq_a = _gradient("A", G_A, accumulate, x, dz_wide, 1.0)
    return (dz_wide if dtype == torch.float32 else dz) if need_dz else None, g_b, sq_b, g_a, sq_a

"""Per-sample gradients of one layer, each clipped to its own bound, summed.

Where a sample's gradient fits one program's registers it never leaves them: the program takes every P-th sample, adds
what it clips to its own sum, and P sums are added up in a fixed order. A larger gradient goes through ``sample_grad``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lalora_kernels.gpu import layer_inputs, sums
from lalora_kernels.reference.sample_grad_clip import SMALLEST_FACTOR, clip_factor
from lalora_kernels.triton_ops.common import cdiv, chip, dot, next_power_of_2, precision
from lalora_kernels.triton_ops.sample_grad import (
    FINISH,
    add_up_kernel,
    configs,
    fma_thin,
    rank_block,
    rows_dz,
    sample_grad,
)

SMALLEST = tl.constexpr(SMALLEST_FACTOR)
FITS = 8192  # values of a gradient that 8 warps hold without spilling
FITS_FLOAT32 = 2048


@triton.jit
def sample_grad_clip_kernel(
    wide, thin, factor, dz, S, sq, scale, max_norm, grad_scale, N, valid, T, F, R,
    w_n, w_t, w_f, h_n, h_t, h_r, b_f, b_r, s_p, s_f, s_r,
    WANT_Z: tl.constexpr, PRECISION: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, RB: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """S[program] = sum of c_i G_i over its samples; dz = scale * wide @ factor in full, as all features are here."""
    o_f, o_r, o_t = tl.arange(0, BF), tl.arange(0, RB), tl.arange(0, BT)
    m_f, m_r = o_f < F, o_r < R
    o_w = o_t[:, None] * w_t + o_f[None, :] * w_f
    o_h = o_t[:, None] * h_t + o_r[None, :] * h_r
    if WANT_Z:
        m_b = m_f[:, None] & m_r[None, :]
        b_b = tl.load(factor + o_f[:, None] * b_f + o_r[None, :] * b_r, mask=m_b, other=0.0)  # [BF, RB]
    p_s = S + tl.program_id(0).to(tl.int64) * s_p + (o_f[:, None] * s_f + o_r[None, :] * s_r)
    m_s = m_f[:, None] & m_r[None, :]
    for i_n in range(tl.program_id(0), N, tl.num_programs(0)):
        n = tl.cast(i_n, tl.int64)
        p_w, p_h, p_z = wide + n * w_n, thin + n * h_n, dz + n * T * R
        b_g = tl.zeros([BF, RB], dtype=tl.float32)
        for i_t in tl.range(0, T, BT, num_stages=STAGES):
            m_t = i_t + o_t < T
            b_w = tl.load(p_w + o_w, mask=m_t[:, None] & m_f[None, :], other=0.0)  # [BT, BF]
            b_h = tl.load(p_h + o_h, mask=m_t[:, None] & m_r[None, :], other=0.0)  # [BT, RB]
            b_g = fma_thin(b_w, b_h, b_g, PRECISION)
            if WANT_Z:
                b_z = dot(b_w, b_b, tl.zeros([BT, RB], dtype=tl.float32), PRECISION)
                m_z = m_t[:, None] & m_r[None, :]
                tl.store(p_z + (i_t + o_t)[:, None] * R + o_r[None, :], (scale * b_z).to(dz.dtype.element_ty), mask=m_z)
            p_w += BT * tl.cast(w_t, tl.int64)
            p_h += BT * tl.cast(h_t, tl.int64)
        b_g *= scale
        b_q = b_g.to(tl.float64)
        q = tl.sum(tl.sum(b_q * b_q, 1), 0)
        tl.store(sq + n, q)
        norm = grad_scale * tl.sqrt(q)
        c = tl.where(norm > max_norm, max_norm / tl.where(norm > max_norm, norm, 1.0), 1.0) * grad_scale
        # Not NaN or Inf (norm - norm would be contracted with the product above, and is not 0 then), and a factor that
        # float32 can hold.
        safe = (norm < float("inf")) & (c >= SMALLEST)
        c = tl.where(safe, c, 0.0).to(tl.float32)
        c = tl.where(i_n < valid, c, 0.0)
        b_g = tl.where(c != 0.0, c * b_g, 0.0)  # 0 * Inf must not leak
        if i_n != tl.program_id(0):
            b_g += tl.load(p_s, mask=m_s, other=0.0)
        tl.store(p_s, b_g, mask=m_s)
        tl.debug_barrier()  # the sum is read again in another layout


def _add_up(partial: Tensor, weights: Tensor | None, S: Tensor) -> None:
    """S += sum over k of (weights[k]) partial[k]; both of one layout without gaps."""
    size = S.numel()
    add_up_kernel[(1, cdiv(size, FINISH))](
        partial, partial if weights is None else weights, S, S, size, partial.shape[0], size, 0, 0,
        WEIGHTED=weights is not None, ACCUMULATE=True, SQUARE=False, C=FINISH,
    )  # fmt: skip


def _fits(features: int, r: int, itemsize: int) -> bool:
    block = max(64, next_power_of_2(features)) * rank_block(r)
    return 0 < features and block <= (FITS_FLOAT32 if itemsize == 4 else FITS)


def _fused(wide, thin, factor, dz, scale: float, max_norm: float, grad_scale: float, valid: int, S: Tensor) -> Tensor:
    """S (F, R), a view without gaps, is added to; squared norms."""
    (N, T, F), R, device = wide.shape, thin.shape[2], wide.device
    features, rb = max(64, next_power_of_2(F)), rank_block(R)
    half, arch = wide.element_size() == 2, chip(device).arch
    programs = min(N, 2 * chip(device).multiprocessors)
    sq = torch.empty(N, dtype=torch.float64, device=device)
    partial = torch.empty_strided((programs, F, R), (F * R, *S.stride()), dtype=torch.float32, device=device)
    factor, b = (wide, (0, 0)) if factor is None else (factor, factor.stride())
    sample_grad_clip_kernel[(programs,)](
        wide, thin, factor, wide if dz is None else dz, partial, sq, scale, max_norm, grad_scale, N, valid, T, F, R,
        *wide.stride(), *thin.stride(), *b, *partial.stride(),
        WANT_Z=dz is not None, PRECISION=precision(wide.dtype),
        BF=features, BT=64 if half and arch >= 90 else 32, RB=rb, STAGES=2,
        num_warps=8 if features * rb > 2048 or not half else 4,
    )  # fmt: skip
    _add_up(partial, None, S)
    return sq


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
    """See ``lalora_kernels.reference.sample_grad_clip``. Sums are float32."""
    op, dtype = "sample_grad_clip", dy.dtype
    dy, B, h, x = layer_inputs(op, dy, B, h, x)
    (N, T, m), r, device = dy.shape, B.shape[1], dy.device
    n, itemsize = 0 if x is None else x.shape[2], dy.element_size()
    totals, targets = [None, None], [None, None]
    for k, (given, like, name, shape) in enumerate(((S_B, h, "S_B", (m, r)), (S_A, x, "S_A", (r, n)))):
        if like is not None:
            totals[k], targets[k] = sums(op, given, name, shape, device)
    fused = N > 0 and (h is None or _fits(m, r, itemsize)) and (x is None or _fits(n, r, itemsize))
    dz, squares = None, [None, None]
    with torch.cuda.device_of(dy):
        if not fused:
            dz, g_b, squares[0], g_a, squares[1] = sample_grad(dy, B, scaling, h=h, x=x, need_dz=need_dz)
            for G, sq, target in zip((g_b, g_a), squares, targets):
                if G is not None and G.numel():
                    c = clip_factor(sq, max_norm, grad_scale)
                    c[valid if valid is not None else N :].zero_()
                    _add_up(G, c.to(torch.float32), target)
        else:
            limits = scaling, max_norm, grad_scale, N if valid is None else valid
            if need_dz or x is not None:
                dz = torch.empty(N, T, r, dtype=dtype if x is None else torch.float32, device=device)
            if h is not None:
                squares[0] = _fused(dy, h, None if dz is None else B, dz, *limits, targets[0])
            elif dz is not None:
                rows_dz(configs(chip(device).arch, itemsize, rank_block(r))[0], dy, B, scaling, dz, None)
            if x is not None:
                squares[1] = _fused(x, dz, None, None, 1.0, *limits[1:], targets[1].t())
    for S, target in zip(totals, targets):
        if S is not None and S.data_ptr() != target.data_ptr():
            S.copy_(target)
    return (dz.to(dtype) if need_dz else None), totals[0], squares[0], totals[1], squares[1]

"""ChaCha20 (RFC 8439) in registers, and the normals made of it. The C++ counterpart is csrc/chacha20.h."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lalora_kernels.gpu import DTYPES, refuse_capture
from lalora_kernels.reference.chacha20_normal import MASK, MAX_ELEMENTS, key_words
from lalora_kernels.triton_ops.common import cdiv, inline, signed

BLOCK = 256  # blocks of ChaCha20 a program


@inline
def _add(a, b):
    return tl.add(a, b, sanitize_overflow=False)


@inline
def _quarter_round(a, b, c, d):
    a = _add(a, b)
    d = d ^ a
    d = (d << 16) | (d >> 16)
    c = _add(c, d)
    b = b ^ c
    b = (b << 12) | (b >> 20)
    a = _add(a, b)
    d = d ^ a
    d = (d << 8) | (d >> 24)
    c = _add(c, d)
    b = b ^ c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@inline
def chacha20_block(counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2):
    """The 16 words of the blocks numbered ``counter``, a uint32 tensor; key and nonce are int32 bit patterns."""
    zero = counter ^ counter
    i4, i5 = zero | k0.to(tl.uint32, bitcast=True), zero | k1.to(tl.uint32, bitcast=True)
    i6, i7 = zero | k2.to(tl.uint32, bitcast=True), zero | k3.to(tl.uint32, bitcast=True)
    i8, i9 = zero | k4.to(tl.uint32, bitcast=True), zero | k5.to(tl.uint32, bitcast=True)
    i10, i11 = zero | k6.to(tl.uint32, bitcast=True), zero | k7.to(tl.uint32, bitcast=True)
    i13, i14 = zero | n0.to(tl.uint32, bitcast=True), zero | n1.to(tl.uint32, bitcast=True)
    i15 = zero | n2.to(tl.uint32, bitcast=True)
    x0, x1, x2, x3 = zero | 0x61707865, zero | 0x3320646E, zero | 0x79622D32, zero | 0x6B206574
    x4, x5, x6, x7, x8, x9, x10, x11 = i4, i5, i6, i7, i8, i9, i10, i11
    x12, x13, x14, x15 = counter, i13, i14, i15
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    x0, x1 = _add(x0, zero | 0x61707865), _add(x1, zero | 0x3320646E)
    x2, x3 = _add(x2, zero | 0x79622D32), _add(x3, zero | 0x6B206574)
    x4, x5, x6, x7 = _add(x4, i4), _add(x5, i5), _add(x6, i6), _add(x7, i7)
    x8, x9, x10, x11 = _add(x8, i8), _add(x9, i9), _add(x10, i10), _add(x11, i11)
    x12, x13, x14, x15 = _add(x12, counter), _add(x13, i13), _add(x14, i14), _add(x15, i15)
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@inline
def _minus_log(w):
    """-log(u), u = (w + 1/2) 2^-32. Above one half, u in float32 has lost the digits of 1 - u: ~w is converted instead.

    Minimax polynomial of log(1 + f) on [sqrt(1/2), sqrt 2], relative error 3.2e-8.
    """
    i = w.to(tl.int32, bitcast=True)
    upper = i >> 31  # all ones where u >= 1/2
    v = ((i ^ upper).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    bits = v.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23  # v = 2^e (1 + f)
    f_low = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    e_high = (0x3E95F619 - bits) >> 31  # -1 where v > 1 - sqrt(1/2): 1 - v = 2^e_high (1 + f)
    f_high = tl.where(e_high != 0, 1.0 - 2.0 * v, -v)
    f = tl.where(upper != 0, f_high, f_low)
    k = tl.where(upper != 0, e_high, e).to(tl.float32)
    p = f * 0.08700434863567352 - 0.14267486333847046
    p = p * f + 0.14914768934249878
    p = p * f - 0.1657758504152298
    p = p * f + 0.19963063299655914
    p = p * f - 0.2500133812427521
    p = p * f + 0.3333390951156616
    q = (p * f - 0.5) * (f * f) + f
    return (k * -0.693145751953125) - (k * 1.42860677e-6 + q)


@inline
def _sin_turn(w):
    """sin(2 pi (w + 1/2) 2^-32 + pi/4), folded to [-pi/2, pi/2] on the integer, so that no digit is lost."""
    a = _add(w, 0x20000000).to(tl.int32, bitcast=True)
    outside = (a ^ (a << 1)) >> 31
    z = ((a ^ (outside & 0x7FFFFFFF)).to(tl.float32) + 0.5) * 4.656612873077393e-10
    z2 = z * z
    p = z2 * 0.0772201269865036 - 0.5980451703071594
    p = p * z2 + 2.5500314235687256
    p = p * z2 - 5.1677069664001465
    p = p * z2 + 3.141592502593994
    return p * z


@inline
def _normal(w0, w1, w2, w3):
    """Four words to one normal. cos t + sin t = sqrt 2 sin(t + pi/4), so each Box-Muller pair takes one sine."""
    return tl.sqrt(_minus_log(w0)) * _sin_turn(w1) + tl.sqrt(_minus_log(w2)) * _sin_turn(w3)


@inline
def noise_tile(counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2):
    """(C,) block numbers -> (4 C,) normals, in the order of the stream."""
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = chacha20_block(
        counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2
    )
    even = tl.interleave(_normal(x0, x1, x2, x3), _normal(x8, x9, x10, x11))
    odd = tl.interleave(_normal(x4, x5, x6, x7), _normal(x12, x13, x14, x15))
    return tl.interleave(even, odd)


STREAM = ("k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "n0", "n1", "n2")


@triton.jit(do_not_specialize=(*STREAM, "first", "offset"))
def chacha20_normal_kernel(
    out, first, offset, count, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2, C: tl.constexpr
):  # fmt: skip
    """out[e] = element 4 first + offset + e; ``first`` is the int32 pattern of a block number, 0 <= offset < 4."""
    i_c = tl.program_id(0).to(tl.int64) * C
    counter = _add((i_c + tl.arange(0, C)).to(tl.uint32), first.to(tl.uint32, bitcast=True))
    b_z = noise_tile(counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2)  # [4C]
    o_e = 4 * i_c + tl.arange(0, 4 * C)
    if offset == 0:  # a branch of its own, so that its stores stay 16 bytes wide
        tl.store(out + o_e, b_z.to(out.dtype.element_ty), mask=o_e < count)
    else:
        tl.store(out + (o_e - offset), b_z.to(out.dtype.element_ty), mask=(o_e >= offset) & (o_e - offset < count))


@triton.jit(do_not_specialize=(*STREAM, "first"))
def chacha20_words_kernel(out, first, blocks, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2, C: tl.constexpr):
    """out (blocks, 16) int64, each value in [0, 2^32)."""
    o_c = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    counter = _add(o_c.to(tl.uint32), first.to(tl.uint32, bitcast=True))
    words = chacha20_block(counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, n2)
    for k in tl.static_range(16):
        tl.store(out + 16 * o_c + k, words[k].to(tl.int64), mask=o_c < blocks)


def stream_args(key: bytes, nonce: tuple[int, int, int]) -> list[int]:
    return [signed(w) for w in (*key_words(key), *nonce)]


def chacha20_normal(
    count: int,
    *,
    key: bytes,
    release: int,
    tensor_index: int,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
) -> Tensor:
    """See ``lalora_kernels.reference.chacha20_normal``. Evaluated in float32, to 1e-5; rounded to ``dtype``."""
    if count < 0 or start < 0 or start + count > MAX_ELEMENTS:
        raise ValueError(f"elements {start}..{start + count} lie outside a noise stream of {MAX_ELEMENTS}")
    if dtype not in DTYPES:
        raise TypeError(f"chacha20_normal: backend 'triton' makes {', '.join(map(str, DTYPES))}, not {dtype}")
    out = torch.empty(count, dtype=dtype, device=device)
    refuse_capture("chacha20_normal", out.device)
    first, offset = start // 4, start % 4
    blocks = -(-(start + count) // 4) - first
    stream = stream_args(key, (tensor_index, release & MASK, release >> 32))
    if count:
        with torch.cuda.device_of(out):
            chacha20_normal_kernel[(cdiv(blocks, BLOCK),)](
                out, signed(first), offset, count, *stream, C=BLOCK, enable_fp_fusion=True
            )
    return out


def chacha20_words(
    key: bytes, nonce: tuple[int, int, int], start: int, blocks: int, device: torch.device | str = "cuda"
) -> Tensor:
    """See ``lalora_kernels.reference.chacha20_words``."""
    if start < 0 or blocks < 0 or start + blocks > 1 << 32:
        raise ValueError(f"ChaCha20's block counter has 32 bits; blocks {start}..{start + blocks} do not fit")
    out = torch.empty(blocks, 16, dtype=torch.int64, device=device)
    stream = stream_args(key, nonce)
    if blocks:
        with torch.cuda.device_of(out):
            chacha20_words_kernel[(cdiv(blocks, BLOCK),)](out, signed(start), blocks, *stream, C=BLOCK)
    return out

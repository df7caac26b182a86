"""CPU backend "cpp": checks, allocates outputs, hands pointers to ``lalora_kernels._C``.

Signatures and meaning are the reference's. float32 and bfloat16 inputs of any strides, float32
accumulation, squared norms in float64, gradients and sums always float32. Results do not depend on the number of
threads, bit for bit, except under ``torch.set_flush_denormal(True)``: that is a setting of one thread, and the others
keep their subnormals. ``LALORA_CPU_ISA`` = avx512bf16, avx512, avx2 or baseline forces an instruction set.
"""

import math
import os
from collections.abc import Sequence
from types import ModuleType

import torch  # before _C: both then share torch's OpenMP runtime
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_NOT_ASKED = (0, 0, 0, 0, 0)
MAX_ELEMENTS = 4 << 32  # of one noise stream: a 32-bit block counter, 4 elements a block
_module: ModuleType | None = None


def require() -> ModuleType:
    """The compiled module, loaded at the first call. Raises ImportError saying how to build it."""
    global _module
    if _module is None:
        try:
            from lalora_kernels import _C  # type: ignore[attr-defined]  # compiled
        except ImportError as error:
            raise ImportError(
                f"lalora_kernels._C is not built for this Python ({error}); install a C++17 compiler (apt install g++) "
                f"and run `pip install .` in the source folder, or ask for backend='reference'"
            ) from error
        forced = os.environ.get("LALORA_CPU_ISA")
        if forced:
            try:
                _C.set_isa(forced)
            except ValueError as error:
                raise ImportError(f"LALORA_CPU_ISA={forced}: {error}") from None
        _module = _C
    return _module


def _refuse(op: str, name: str, t: Tensor, shape: Sequence[int] | None, dtype: torch.dtype | None) -> None:
    if not t.is_cpu:
        raise ValueError(f"{op}: {name} is on {t.device}, backend 'cpp' takes CPU tensors")
    if t.dtype not in _DTYPES or (dtype is not None and t.dtype != dtype):
        raise TypeError(f"{op}: {name} is {t.dtype}, expected {dtype or 'torch.float32 or torch.bfloat16'}")
    if shape is not None and t.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}")


def written(op: str, name: str, t: Tensor) -> None:
    """Refuse to write where two elements share one place in memory."""
    if any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride())):
        raise ValueError(f"{op}: {name} of shape {tuple(t.shape)} is expanded and cannot be written; clone() it")


def _is_float32(t: Tensor, shape: Sequence[int]) -> bool:
    return t.is_cpu and t.dtype is torch.float32 and t.shape == shape


def _dtype(op: str, name: str, t: Tensor) -> int:
    code = _DTYPES.get(t.dtype)
    if code is None or not t.is_cpu:
        _refuse(op, name, t, None, None)
    return code  # type: ignore[return-value]  # refused where it is None


def _batch(op: str, name: str, t: Tensor, N: int, T: int, features: int | None = None) -> tuple:
    shape = t.shape
    if len(shape) != 3 or shape[0] != N or shape[1] != T or features not in (None, shape[2]):
        raise ValueError(f"{op}: {name} has shape {tuple(shape)}, expected ({N}, {T}, {features or 'features'})")
    return (t.data_ptr(), *t.stride(), _dtype(op, name, t))


def _shapes(
    op: str, dy: Tensor, B: Tensor, h: Tensor | None, x: Tensor | None
) -> tuple[tuple[int, int, int, int, int], tuple[tuple, ...]]:
    """((N, T, m, n, r), (dy, B, h, x) as the bindings take them). Without features of dy T is 0: nothing is added up,
    and the kernels, whose loops over m write dz, leave none to be read."""
    if dy.dim() != 3 or B.dim() != 2 or B.shape[0] != dy.shape[2] or B.shape[1] < 1:
        raise ValueError(
            f"{op}: dy {tuple(dy.shape)} and B {tuple(B.shape)} do not fit; expected dy (N, T, m) and B (m, r), r >= 1"
        )
    N, T, m = dy.shape
    r = B.shape[1]
    args = (
        (dy.data_ptr(), *dy.stride(), _dtype(op, "dy", dy)),
        (B.data_ptr(), *B.stride(), _dtype(op, "B", B)),
        _NOT_ASKED if h is None else _batch(op, "h", h, N, T, r),
        _NOT_ASKED if x is None else _batch(op, "x", x, N, T),
    )
    return (N, T if m else 0, m, 0 if x is None else x.shape[2], r), args


def _empty_or_zeros(shape: tuple[int, ...], any_zero: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype) if any_zero else torch.empty(shape, dtype=dtype)


def _per_sample_out(
    op: str, name: str, given: Tensor | None, shape: tuple[int, int, int], adds: bool
) -> tuple[Tensor, Tensor]:
    """(what the kernel writes, or adds to, and what the caller gets); the first is a copy where samples are not
    contiguous."""
    if given is None:
        out = _empty_or_zeros(shape, adds)
        return out, out
    if not _is_float32(given, shape):
        _refuse(op, name, given, shape, torch.float32)
    if given.is_contiguous():
        return given, given
    written(op, name, given)
    return (given if given.stride(2) == 1 and given.stride(1) == shape[2] else given.contiguous()), given


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


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
    """See ``lalora_kernels.reference.sample_grad``."""
    (N, _, m, n, r), args = shape, args = _shapes("sample_grad", dy, B, h, x)
    dz = _empty_or_zeros((N, dy.shape[1], r), not m, dy.dtype) if need_dz else None
    # One flag for both factors: where nothing is given there is nothing to add to, and where one is the other is zero.
    adds = accumulate and (G_B is not None or G_A is not None)
    g_b = g_a = out_b = out_a = sq_b = sq_a = None
    if h is not None:
        g_b, out_b = _per_sample_out("sample_grad", "G_B", G_B, (N, m, r), adds)
        sq_b = torch.empty(N, dtype=torch.float64)
    if x is not None:
        g_a, out_a = _per_sample_out("sample_grad", "G_A", G_A, (N, r, n), adds)
        sq_a = torch.empty(N, dtype=torch.float64)
    require().sample_grad(
        shape,
        scaling,
        *args,
        _ptr(dz),
        _ptr(sq_b),
        _ptr(sq_a),
        _ptr(g_b),
        0 if g_b is None else g_b.stride(0),
        _ptr(g_a),
        0 if g_a is None else g_a.stride(0),
        adds,
        torch.get_num_threads(),
    )
    for made, given in ((g_b, out_b), (g_a, out_a)):
        if made is not given and made is not None and given is not None:
            given.copy_(made)
    return dz, out_b, sq_b, out_a, sq_a


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
    """See ``lalora_kernels.reference.sample_grad_clip``."""
    (N, _, m, n, r), args = shape, args = _shapes("sample_grad_clip", dy, B, h, x)
    dz = _empty_or_zeros((N, dy.shape[1], r), not m, dy.dtype) if need_dz else None
    sums: list[Tensor | None] = [None, None]
    squares: list[Tensor | None] = [None, None]
    for k, (given, source, name, size) in enumerate(((S_B, h, "S_B", (m, r)), (S_A, x, "S_A", (r, n)))):
        if source is None:
            continue
        squares[k] = torch.empty(N, dtype=torch.float64)
        if given is None:
            sums[k] = torch.zeros(size, dtype=torch.float32)
        else:
            _refuse("sample_grad_clip", name, given, size, torch.float32)
            written("sample_grad_clip", name, given)
            sums[k] = given.contiguous()
    require().sample_grad_clip(
        shape,
        scaling,
        *args,
        _ptr(dz),
        *map(_ptr, squares),
        *map(_ptr, sums),
        max_norm,
        grad_scale,
        N if valid is None else valid,
        torch.get_num_threads(),
    )
    for k, given in enumerate((S_B, S_A)):
        made = sums[k]
        if made is not None and given is not None and made is not given:
            sums[k] = given.copy_(made)
    return dz, sums[0], squares[0], sums[1], squares[1]


def _lines(op: str, l: int, t: Tensor, dim: int | None) -> tuple[int, int, int]:
    """(outer, length, inner) of a contiguous tensor with the filter along ``dim``."""
    if dim is None:
        return 1, 1, t.numel()
    shape = t.shape
    if len(shape) == 2 and 0 <= dim < 2:
        return (1, shape[0], shape[1]) if dim == 0 else (shape[0], shape[1], 1)
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"{op}: smooth_dim[{l}] = {dim} is no axis of a tensor of shape {tuple(shape)}")
    dim %= len(shape)
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


def _weights(op: str, weights: Tensor | None, L: int) -> Tensor:
    if weights is None or weights.dim() != 2 or weights.shape[0] != L:
        raise ValueError(f"{op}: weights must have shape ({L}, N)")
    if not weights.is_cpu:
        raise ValueError(f"{op}: weights are on {weights.device}, backend 'cpp' takes CPU tensors")
    return weights.to(torch.float32)


def _release(
    op: str,
    G: Sequence[Tensor | None],
    S: Sequence[Tensor | None],
    weights: Tensor | None,
    out: Sequence[Tensor],
    noise_std: float,
    key: bytes | None,
    release: int,
    tensor_index: Sequence[int],
    smooth_dim: Sequence[int | None],
    divisor: float,
    padding: str,
) -> None:
    """``privatize`` over one table of tensors; see there."""
    L = len(out)
    for name, given in (("G", G), ("S", S), ("tensor_index", tensor_index), ("smooth_dim", smooth_dim)):
        if len(given) != L:
            raise ValueError(f"{op}: {len(given)} entries in {name} for {L} tensors in out")
    N = w_row = w_step = w_data = 0
    if any(g is not None for g in G):
        weights = _weights(op, weights, L)
        N, w_row, w_step, w_data = weights.shape[1], 4 * weights.stride(0), weights.stride(1), weights.data_ptr()
    rows, keep, copies = [], [], []
    for l, (o, g, s, dim) in enumerate(zip(out, G, S, smooth_dim)):
        shape = o.shape
        if not _is_float32(o, shape):
            _refuse(op, f"out[{l}]", o, None, torch.float32)
        target = o
        if not o.is_contiguous():
            written(op, f"out[{l}]", o)
            target = o.contiguous()
            copies.append((o, target))
        g_data = g_step = s_data = 0
        if g is not None:
            if not _is_float32(g, (N, *shape)):
                _refuse(op, f"G[{l}]", g, (N, *shape), torch.float32)
            if not g.is_contiguous() and not (N and g[0].is_contiguous()):
                g = g.contiguous()
                keep.append(g)
            g_data, g_step = g.data_ptr(), g.stride(0)
        if s is not None:
            s = target if s is o else s
            if not _is_float32(s, shape):
                _refuse(op, f"S[{l}]", s, shape, torch.float32)
            s_data = s.data_ptr()
            # The filter reads neighbours of what it writes.
            if not s.is_contiguous() or (dim is not None and s_data == target.data_ptr()):
                s = s.clone(memory_format=torch.contiguous_format)
                keep.append(s)
                s_data = s.data_ptr()
        lines = _lines(op, l, o, dim)
        w = w_data + l * w_row
        rows.append((g_data, g_step, s_data, target.data_ptr(), *lines, w, w_step, tensor_index[l], dim is not None))
    threads = torch.get_num_threads()
    require().privatize(rows, N, noise_std, key or b"", release, divisor, padding == "reflect", threads)
    for o, target in copies:
        o.copy_(target)


def clip_reduce(G: Sequence[Tensor], weights: Tensor, out: Sequence[Tensor]) -> None:
    """See ``lalora_kernels.reference.clip_reduce``."""
    L = len(out)
    _release("clip_reduce", G, out, weights, out, 0.0, None, 0, [0] * L, [None] * L, 1.0, "symmetric")


def _check_key(key: bytes) -> None:
    if len(key) != 32:
        raise ValueError(f"a ChaCha20 key has 32 bytes, got {len(key)}")


def _check_padding(padding: str) -> None:
    if padding not in ("symmetric", "reflect"):
        raise ValueError(f"padding is 'symmetric' or 'reflect', got {padding!r}")


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
    """See ``lalora_kernels.reference.privatize``. Tensors are float32."""
    _check_padding(padding)
    if noise_std:
        if key is None:
            raise ValueError("privatize: noise_std > 0 needs a key")
        _check_key(key)
        for l, o in enumerate(out):
            if o.numel() > MAX_ELEMENTS:
                raise ValueError(f"privatize: out[{l}] has {o.numel()} elements, a noise stream has {MAX_ELEMENTS}")
    _release("privatize", G, S, weights, out, noise_std, key, release, tensor_index, smooth_dim, divisor, padding)


def smooth(t: Tensor, dim: int, padding: str = "symmetric") -> Tensor:
    """See ``lalora_kernels.reference.smooth``. float32."""
    _check_padding(padding)
    out = torch.empty(t.shape, dtype=torch.float32)
    _release("smooth", [None], [t], None, [out], 0.0, None, 0, [0], [dim], 1.0, padding)
    return out


def chacha20_normal(
    count: int,
    *,
    key: bytes,
    release: int,
    tensor_index: int,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """See ``lalora_kernels.reference.chacha20_normal``. Evaluated in float32, to 1e-6; rounded to ``dtype``."""
    _check_key(key)
    if count < 0 or start < 0 or start + count > MAX_ELEMENTS:
        raise ValueError(f"elements {start}..{start + count} lie outside a noise stream of {MAX_ELEMENTS}")
    if torch.device(device).type != "cpu" or dtype not in _DTYPES:
        raise TypeError(f"chacha20_normal: backend 'cpp' makes float32 or bfloat16 on the CPU, not {dtype} on {device}")
    out = torch.empty(count, dtype=torch.float32)
    require().chacha20_normal(out.data_ptr(), start, count, key, release, tensor_index, torch.get_num_threads())
    return out.to(dtype)


def chacha20_words(
    key: bytes, nonce: tuple[int, int, int], start: int, blocks: int, device: torch.device | str = "cpu"
) -> Tensor:
    """See ``lalora_kernels.reference.chacha20_words``."""
    _check_key(key)
    if start < 0 or blocks < 0 or start + blocks > 1 << 32:
        raise ValueError(f"ChaCha20's block counter has 32 bits; blocks {start}..{start + blocks} do not fit")
    if torch.device(device).type != "cpu":
        raise TypeError(f"chacha20_words: backend 'cpp' makes CPU tensors, not {device}")
    out = torch.empty(blocks, 16, dtype=torch.int64)
    require().chacha20_words(out.data_ptr(), key, tuple(w & 0xFFFFFFFF for w in nonce), start, blocks)
    return out

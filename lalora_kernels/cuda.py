"""GPU backend "cuda": checks, allocates outputs, hands device pointers to ``lalora_kernels._cuda``.

Signatures and meaning are the reference's. Everything runs on torch's current stream; nothing waits
for the device. ``sample_grad`` and ``sample_grad_clip`` need thread-block clusters (sm_90) and a rank of at most 64.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lalora_kernels.gpu import gradient_out, layer_inputs, refuse_capture, sums
from lalora_kernels.reference.chacha20_normal import MAX_ELEMENTS
from lalora_kernels.segments import Release

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TILE = 2048  # elements: two vectors of four a thread
_module: ModuleType | None = None
_plans: dict[tuple, Any] = {}


def require() -> ModuleType:
    """The compiled module, loaded at the first call. Raises ImportError saying how to build it."""
    global _module
    if _module is None:
        try:
            from lalora_kernels import _cuda  # type: ignore[attr-defined]  # compiled
        except ImportError as error:
            raise ImportError(
                f"lalora_kernels._cuda is not built for this Python ({error}); install the CUDA toolkit (nvcc) and run "
                f"`pip install .` in the source folder, or take backend 'triton'"
            ) from error
        _module = _cuda
    return _module


@contextmanager
def _place(t: Tensor) -> Iterator[tuple[int, int]]:
    """(device, stream) of a launch, which makes the device current; afterwards it is the caller's again."""
    with torch.cuda.device_of(t):
        if t.device.type != "cuda":
            yield 0, 0  # the emulated machine of the tests
        else:
            # torch.cuda.current_stream makes an object around this number, at the price of a launch.
            yield t.device.index, torch._C._cuda_getCurrentRawStream(t.device.index)


def _pointers(release: Release) -> tuple[tuple, tuple]:
    table = release.table(_TILE)
    tiles = (table.rows.data_ptr(), table.tiles.data_ptr(), len(table.tiles), table.tile, table.aligned, table.smooth)
    return tiles, (release.weights.data_ptr(), *release.strides, release.N)


def clip_reduce(G: Sequence[Tensor], weights: Tensor, out: Sequence[Tensor]) -> None:
    """See ``lalora_kernels.reference.clip_reduce``. Tensors are float32, of fewer than 2^31 elements each."""
    if not out:
        return
    L = len(out)
    release = Release("clip_reduce", G, out, weights, out, [0] * L, [None] * L)
    with _place(out[0]) as place:
        require().clip_reduce(*_pointers(release), *place)
    release.finish()


def privatize(
    G: Sequence[Tensor | None],
    S: Sequence[Tensor | None],
    weights: Tensor | None,
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
    """See ``lalora_kernels.reference.privatize``. Tensors are float32, of fewer than 2^31 elements each, and of at most
    2^28 along an axis that is filtered."""
    if padding not in ("symmetric", "reflect"):
        raise ValueError(f"padding is 'symmetric' or 'reflect', got {padding!r}")
    if noise_std and key is None:
        raise ValueError("privatize: noise_std > 0 needs a key")
    if not out:
        return
    if noise_std:
        refuse_capture("privatize", out[0].device)
    tensors = Release("privatize", G, S, weights, out, tensor_index, smooth_dim)
    stream = noise_std, key or b"", release if noise_std else 0
    with _place(out[0]) as place:
        require().privatize(*_pointers(tensors), *stream, divisor, padding == "reflect", *place)
    tensors.finish()


def smooth(t: Tensor, dim: int, padding: str = "symmetric") -> Tensor:
    """See ``lalora_kernels.reference.smooth``. float32."""
    out = torch.empty(t.shape, dtype=torch.float32, device=t.device)
    privatize(
        [None], [t], None, [out], noise_std=0.0, key=None, release=0, tensor_index=[0], smooth_dim=[dim], divisor=1.0,
        padding=padding,
    )  # fmt: skip
    return out


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
    if dtype not in _DTYPES:
        raise TypeError(f"chacha20_normal: backend 'cuda' makes {', '.join(map(str, _DTYPES))}, not {dtype}")
    out = torch.empty(count, dtype=torch.float32, device=device)
    refuse_capture("chacha20_normal", out.device)
    with _place(out) as place:
        require().chacha20_normal(out.data_ptr(), start, count, key, release, tensor_index, *place)
    return out.to(dtype)


def chacha20_words(
    key: bytes, nonce: tuple[int, int, int], start: int, blocks: int, device: torch.device | str = "cuda"
) -> Tensor:
    """See ``lalora_kernels.reference.chacha20_words``."""
    if start < 0 or blocks < 0 or start + blocks > 1 << 32:
        raise ValueError(f"ChaCha20's block counter has 32 bits; blocks {start}..{start + blocks} do not fit")
    out = torch.empty(blocks, 16, dtype=torch.int64, device=device)
    with _place(out) as place:
        require().chacha20_words(out.data_ptr(), key, tuple(w & 0xFFFFFFFF for w in nonce), start, blocks, *place)
    return out


def _rows(t: Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), t.stride(0), t.stride(1)


def _inputs(
    op: str, dy: Tensor, B: Tensor, h: Tensor | None, x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The kernel reads rows of features without gaps, any distance apart."""
    rows: list[Any] = [
        t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
        for t in layer_inputs(op, dy, B, h, x)
    ]
    dy, B, h, x = rows
    return dy, B.contiguous(), h, x


def _planned(
    op: str, factor: str, dy: Tensor, B: Tensor, other: Tensor, scaling: float, dz: Tensor | None, sq: Tensor,
    index: int,
) -> tuple[Any, Any]:  # fmt: skip
    """(one factor's gradient as the kernel is told of it, how it is launched); ``other``: h of B, x of A."""
    (N, T, m), r = dy.shape, B.shape[1]
    n = other.shape[2] if factor == "A" else 0
    grad = require().LayerGrad(
        (N, T, m, n, r), _DTYPES[dy.dtype], scaling, factor, _rows(dy), _rows(other), B.data_ptr(),
        0 if dz is None else dz.data_ptr(), sq.data_ptr(),
    )  # fmt: skip
    key = (op, N, T, m, n, r, dy.dtype, factor, dz is None, index)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 4096:  # Poisson batches of texts of any length have ever new shapes
            _plans.clear()
        plan = _plans[key] = getattr(require(), f"plan_{op}")(grad, index)
    return grad, plan


def _product(dy: Tensor, B: Tensor, scaling: float) -> Tensor:
    """dz alone is a plain product, which is torch's; rounded once."""
    N, T, m = dy.shape
    rows = dy.reshape(N * T, m)
    dz = torch.addmm(rows.new_empty(()), rows, B, beta=0, alpha=scaling)
    return dz.view(N, T, B.shape[1])


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
    """See ``lalora_kernels.reference.sample_grad``. Gradients are float32; needs sm_90.

    With both factors active dy is read twice, once for each.
    """
    op, dtype = "sample_grad", dy.dtype
    dy, B, h, x = _inputs(op, dy, B, h, x)
    (N, T, m), r, device = dy.shape, B.shape[1], dy.device
    unwritten = need_dz
    dz = torch.empty(N, T, r, dtype=dy.dtype, device=device) if need_dz and (h is not None or x is not None) else None
    results: list[Tensor | None] = []
    for factor, given, other in (("B", G_B, h), ("A", G_A, x)):
        if other is None:
            results += [None, None]
            continue
        shape = (N, m, r) if factor == "B" else (N, r, other.shape[2])
        out = gradient_out(op, f"G_{factor}", given, shape, device)
        sq = torch.empty(N, dtype=torch.float64, device=device)
        if out.numel():
            with _place(dy) as place:
                grad, plan = _planned(op, factor, dy, B, other, scaling, dz if unwritten else None, sq, place[0])
                require().sample_grad(
                    grad, plan, out.data_ptr(), out.stride(0), accumulate and given is not None, *place
                )
            unwritten = False
        else:
            sq.zero_()
        results += [out if given is None or out is given else given.copy_(out), sq]
    if unwritten:
        dz = _product(dy, B, scaling)
    g_b, sq_b, g_a, sq_a = results
    return (dz if dz is None else dz.to(dtype)), g_b, sq_b, g_a, sq_a


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
    """See ``lalora_kernels.reference.sample_grad_clip``. Sums are float32; needs h or x, and sm_90.

    With both factors active dy is read twice, once for each.
    """
    op, dtype = "sample_grad_clip", dy.dtype
    if h is None and x is None:
        raise ValueError(f"{op}: backend 'cuda' needs h or x; sample_grad gives dz alone")
    dy, B, h, x = _inputs(op, dy, B, h, x)
    (N, T, m), r, device = dy.shape, B.shape[1], dy.device
    unwritten = need_dz
    dz = torch.empty(N, T, r, dtype=dy.dtype, device=device) if need_dz else None
    results: list[Tensor | None] = []
    for factor, given, other in (("B", S_B, h), ("A", S_A, x)):
        if other is None:
            results += [None, None]
            continue
        features = m if factor == "B" else other.shape[2]
        S, target = sums(op, given, f"S_{factor}", (m, r) if factor == "B" else (r, features), device)
        sq = torch.zeros(N, dtype=torch.float64, device=device)
        if N and features and m:
            with _place(dy) as place:
                grad, plan = _planned(op, factor, dy, B, other, scaling, dz if unwritten else None, sq, place[0])
                partial = torch.empty(plan.clusters, features * r, dtype=torch.float32, device=device)
                require().sample_grad_clip(
                    grad, plan, max_norm, grad_scale, N if valid is None else valid, target.data_ptr(),
                    partial.data_ptr(), *place,
                )  # fmt: skip
            unwritten = False
        if target.data_ptr() != S.data_ptr():
            S.copy_(target)
        results += [S, sq]
    if unwritten:
        dz = _product(dy, B, scaling)
    S_B, sq_b, S_A, sq_a = results
    return (dz if dz is None else dz.to(dtype)), S_B, sq_b, S_A, sq_a

"""What the Triton kernels share: the chip's size, the choice of a configuration, the product of two tiles."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# A function that kernels call. The interpreter needs no decorator there, and with one takes 4 ms a call.
inline = (lambda fn: fn) if INTERPRET else triton.jit


@inline
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, float32. NumPy, which interprets, has no bfloat16."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


class Chip(NamedTuple):
    arch: int  # compute capability as one number, 90 for 9.0
    multiprocessors: int


assumed: Chip | None = None  # what ahead-of-time compilation pretends to have


@cache
def _chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip(80, 4)  # the interpreter
    props = torch.cuda.get_device_properties(device)
    return Chip(80 if torch.version.hip else 10 * props.major + props.minor, props.multi_processor_count)


def chip(device: torch.device) -> Chip:
    return assumed or _chip(device)


def _check(op: str, name: str, t: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    if t.device != like.device:
        raise ValueError(f"{op}: {name} is on {t.device}, expected {like.device}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} is {t.dtype}, expected {', '.join(map(str, DTYPES))}")
    if t.shape != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}")
    # Inside a tile (at most 256 positions, all features) offsets are 32 bits wide.
    return t if 256 * t.stride(-2) + t.shape[-1] * t.stride(-1) < 1 << 31 else t.contiguous()


def layer_inputs(op: str, dy: Tensor, B: Tensor, h: Tensor | None, x: Tensor | None) -> list[Tensor | None]:
    """Checked, and of one dtype: float32 where theirs differ, as the reference computes in float32 at least."""
    if dy.dim() != 3 or B.dim() != 2 or B.shape[0] != dy.shape[2] or B.shape[1] < 1:
        raise ValueError(
            f"{op}: dy {tuple(dy.shape)} and B {tuple(B.shape)} do not fit; expected dy (N, T, m) and B (m, r), r >= 1"
        )
    N, T, m = dy.shape
    r = B.shape[1]
    given = [_check(op, "dy", dy, dy, (N, T, m)), _check(op, "B", B, dy, (m, r))]
    given.append(None if h is None else _check(op, "h", h, dy, (N, T, r)))
    given.append(None if x is None else _check(op, "x", x, dy, (N, T, x.shape[-1])))
    dtypes = {t.dtype for t in given if t is not None}
    return given if len(dtypes) == 1 else [None if t is None else t.float() for t in given]


def gradient_out(op: str, name: str, given: Tensor | None, shape: tuple[int, int, int], device) -> Tensor:
    """What a kernel writes: ``given``, or a copy where one of its samples has gaps."""
    if given is None:
        return torch.empty(shape, dtype=torch.float32, device=device)
    if given.dtype != torch.float32 or given.device != device or given.shape != shape:
        raise ValueError(
            f"{op}: {name} is {given.dtype} {tuple(given.shape)} on {given.device}, expected torch.float32 {shape} "
            f"on {device}"
        )
    return given if given.stride(2) == 1 and given.stride(1) == shape[2] else given.contiguous()


def signed(word: int) -> int:
    """A 32-bit word as Triton's int32 argument: whatever its value, the kernel's signature stays the same."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


_tuned: dict[tuple, object] = {}


def pick(key: tuple, configs: Sequence, run: Callable[[object], None]):
    """configs[0], the pinned default; with LALORA_TRITON_AUTOTUNE=1 the fastest, timed once per key.

    ``run`` launches with a configuration and scratch outputs. Timing waits for the device, so it is off by default
    and while a CUDA graph is captured. A configuration that the chip cannot hold is passed over.
    """
    if INTERPRET or os.environ.get("LALORA_TRITON_AUTOTUNE", "0") != "1" or torch.cuda.is_current_stream_capturing():
        return configs[0]
    if key not in _tuned:
        times = {}
        for config in configs:
            try:
                times[config] = triton.testing.do_bench(lambda c=config: run(c), warmup=5, rep=20, return_mode="median")
            except triton.runtime.errors.OutOfResources:
                continue
        _tuned[key] = min(times, key=times.get) if times else configs[0]
    return _tuned[key]

"""What the Triton kernels share: the chip's size, the choice of a configuration, the product of two tiles."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


# A function that kernels call. The interpreter needs no decorator there, and with one takes 4 ms a call.
inline = (lambda fn: fn) if INTERPRET else triton.jit


@inline
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, float32. NumPy, which interprets, has no bfloat16."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, and its ``next_power_of_2``, take 5 microseconds a call, several a launch."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def precision(dtype: torch.dtype) -> str:
    """Of float32 products: tf32 only where torch's own may be, and never on AMD, whose compiler may not know it."""
    if dtype != torch.float32:
        return "ieee"  # means nothing to these products
    matmul = torch.backends.cuda.matmul
    # Newer torch refuses to read allow_tf32 once somebody has set fp32_precision.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed and not torch.version.hip else "ieee"


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


def signed(word: int) -> int:
    """A 32-bit word as Triton's int32 argument: whatever its value, the kernel's signature stays the same."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


_tuned: dict[tuple, object] = {}


def autotunes() -> bool:
    return os.environ.get("LALORA_TRITON_AUTOTUNE") == "1" and not INTERPRET


def pick(key: tuple, configs: Sequence, run: Callable[[object], None]):
    """configs[0], the pinned default; with LALORA_TRITON_AUTOTUNE=1 the fastest, timed once per key.

    ``run`` launches with a configuration and scratch outputs. Timing waits for the device, so it is off by default
    and while a CUDA graph is captured. A configuration that the chip cannot hold is passed over.
    """
    if not autotunes() or torch.cuda.is_current_stream_capturing():
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

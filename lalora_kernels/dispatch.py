"""Which backend serves an operation: explicit argument > ``use_backend`` > ``LALORA_BACKEND`` > the device's default.

Nothing falls back silently: a backend that was asked for and lacks the operation, device or dtype is an error, and so
is the CPU's default whose compiled module is missing. The reference is the default for float64, by design, and for CUDA
tensors wherever no installed kernel has passed its tests on a card of their family (``gpu.py``).
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from lalora_kernels import gpu

OPS = ("sample_grad", "sample_grad_clip", "clip_reduce", "privatize", "smooth", "chacha20_normal", "chacha20_words")
SMALL, HALF = (torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16, torch.float16)
# backend -> module, devices it serves (None: any), dtypes it serves (None: any)
BACKENDS: dict[str, tuple[str, tuple[str, ...] | None, tuple[torch.dtype, ...] | None]] = {
    "reference": ("lalora_kernels.reference", None, None),
    "cpp": ("lalora_kernels.native", ("cpu",), SMALL),
    "triton": ("lalora_kernels.triton_ops", ("cuda",), HALF),
    "cuda": ("lalora_kernels.cuda", ("cuda",), HALF),
}
_chosen: ContextVar[str | None] = ContextVar("lalora_backend", default=None)
asked = _chosen.get  # the backend that ``use_backend`` names in this thread, or None


class BackendError(RuntimeError):
    """The backend asked for cannot serve this operation here."""


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, of this thread or task, every operation runs on backend ``name`` or raises BackendError."""
    token = _chosen.set(_known(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def _kind(device: torch.device | str) -> str:
    return device.type if isinstance(device, torch.device) else torch.device(device).type  # which takes a microsecond


def _named(backend: str | None) -> str | None:
    return backend or asked() or os.environ.get("LALORA_BACKEND")


def _by_size(op: str, device: torch.device | str, dtype: torch.dtype, backend: str | None) -> bool:
    """Whether nobody named a backend and small work has one of its own; see ``gpu.by_size``."""
    fits = op in gpu.CLUSTERED and dtype in HALF[1:] and _kind(device) == "cuda"
    return fits and not _named(backend) and gpu.serves("cuda", op, device)


def choose(device: torch.device | str, dtype: torch.dtype, backend: str | None = None, op: str = "") -> str:
    """Name of the backend that serves ``dtype`` on ``device``; on a GPU it depends on the operation and the card."""
    if name := _named(backend):
        return _known(name)
    kind = _kind(device)
    if kind == "cuda" and dtype in HALF:
        return gpu.default_backend(op, device)
    return "cpp" if kind == "cpu" and dtype in SMALL else "reference"


def _load(op: str, name: str, device: str, dtype: torch.dtype) -> Callable:
    module, devices, dtypes = BACKENDS[name]
    if devices is not None and device not in devices:
        raise BackendError(f"{op}: backend {name!r} runs on {'/'.join(devices)}, the tensors are on {device}")
    if dtypes is not None and dtype not in dtypes:
        served = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise BackendError(f"{op}: backend {name!r} takes {served}, not {str(dtype).removeprefix('torch.')}")
    try:
        loaded = sys.modules.get(module) or importlib.import_module(module)
        if require := getattr(loaded, "require", None):
            require()  # compiled backends: raises ImportError saying how to build
    except ImportError as error:
        raise BackendError(f"{op}: backend {name!r} is not available here: {error}") from error
    function = getattr(loaded, op, None)
    if function is None:
        raise BackendError(f"{op}: backend {name!r} does not have this operation")
    return function


def get(op: str, like: Tensor | tuple[torch.device | str, torch.dtype], backend: str | None = None) -> Callable:
    """The function that serves ``op`` for tensors like ``like``. Raises BackendError where the choice cannot.

    On a GPU, unless somebody names a backend, a layer's small work goes to one of its own: ``gpu.by_size``.
    """
    device, dtype = (like.device, like.dtype) if isinstance(like, Tensor) else like
    found = _load(op, choose(device, dtype, backend, op), _kind(device), dtype)
    return gpu.by_size(_load(op, "cuda", "cuda", dtype), found) if _by_size(op, device, dtype, backend) else found


def explain(
    devices: tuple[str, ...] = ("cpu", "cuda"), dtypes: tuple[torch.dtype, ...] = SMALL + (torch.float64,)
) -> dict[str, dict[Any, Any]]:
    """op -> {"available": [backend, ...], (device, dtype): the backend chosen now or "error: why"}.

    "triton/cuda": cuda serves small work.
    """
    table: dict[str, dict[Any, Any]] = {op: {"available": []} for op in OPS}
    for op, row in table.items():
        for name, (_, kinds, _) in BACKENDS.items():
            with suppress(BackendError):
                _load(op, name, kinds[0] if kinds else "cpu", torch.float32)
                row["available"].append(gpu.marked(name, op))
        for device in devices:
            for dtype in dtypes:
                row[device, dtype] = choose(device, dtype, op=op)
                if _by_size(op, device, dtype, None):
                    row[device, dtype] += "/cuda"
                try:
                    get(op, (device, dtype))
                except BackendError as error:
                    row[device, dtype] = f"error: {error}"
    return table

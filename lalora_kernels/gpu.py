"""What the GPU backends share: checks of their inputs, and which of their kernels have passed their tests on a card."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lalora_kernels.native import written

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cuda", "triton")  # in order of preference, once proven
# Their kernel of backend "cuda", a thread-block cluster's, holds not every shape.
CLUSTERED = ("sample_grad", "sample_grad_clip")
MAX_SUM = 65_535 * 1024  # elements: a sum over samples takes a block for each 1,024, and a grid has 65,535 along y
_NEEDS = {"cuda": "lalora_kernels._cuda", "triton": "triton"}
_PROVEN = Path(__file__).with_name("proven.json")


@cache
def proven() -> dict[str, dict[str, dict[str, str]]]:
    """backend -> operation -> architecture family -> the committed result of bench/gpu.sh in which its suite passed."""
    return json.loads(_PROVEN.read_text())


def family(device: torch.device | str | None = None) -> str | None:
    """ "sm_90" for compute capability 9.0; on AMD the runtime's name, such as "gfx942"; None without a GPU.

    A device without a number is the current one, and so is None.
    """
    if not torch.cuda.is_available():
        return None
    props = torch.cuda.get_device_properties(device)
    return props.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{props.major}{props.minor}"


@cache
def installed(name: str) -> bool:
    """Whether backend ``name`` is there: wheels hold no CUDA module, and Triton is not on every platform."""
    return find_spec(_NEEDS[name]) is not None


def serves(name: str, op: str, device: torch.device | str) -> bool:
    """Whether backend ``name`` is installed and its kernel has passed its tests on a card like this one."""
    return family(device) in proven().get(name, {}).get(op, {}) and installed(name)


def default_backend(op: str, device: torch.device | str) -> str:
    """What serves ``op`` on this GPU when nobody asks for more: an installed kernel proven on its family, or the
    reference.

    Of ``CLUSTERED`` operations that is what serves all but small work; see ``by_size``.
    """
    return next((name for name in BACKENDS[op in CLUSTERED :] if serves(name, op, device)), "reference")


def by_size(cluster: Callable, otherwise: Callable) -> Callable:
    """``cluster`` for small work, else ``otherwise``."""

    def choose(dy: Tensor, B: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (cluster if small(dy, B, kwargs.get("h"), kwargs.get("x")) else otherwise)(dy, B, *args, **kwargs)

    return choose


def small(dy: Tensor, B: Tensor, h: Tensor | None, x: Tensor | None) -> bool:
    """Whether a layer is so small that the card waits for its host, which one launch from C++ keeps a third as long.

    Measured on an H200: 31 microseconds against 90 (B) and 125 to 160 (A) of Triton's two to four launches, for up to 9
    more of the card in the shapes measured. Half precision, rank 16, features that a cluster holds.
    """
    N, T, m = dy.shape
    wide = m if x is None else max(m, x.shape[2])
    return (
        B.shape[1] <= 16
        and T <= 256
        and N * -(-T // 64) <= 256
        and wide <= 4096
        and N * T * wide <= 1 << 24
        and all(t.element_size() == 2 for t in (dy, B, h, x) if t is not None)
        and not (h is None and x is None)
    )


def marked(name: str, op: str) -> str:
    """A backend's name, with the mark of those that have not passed their tests on a card like this one (or any)."""
    shown = proven().get(name, {}).get(op, {})
    unproven = name in BACKENDS and (not shown if family() is None else family() not in shown)
    return f"{name} (unproven)" if unproven else name


def _check(op: str, name: str, t: Tensor, like: Tensor, shape: Sequence[int], rows: int = 256) -> Tensor:
    if t.device != like.device:
        raise ValueError(f"{op}: {name} is on {t.device}, expected {like.device}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} is {t.dtype}, expected {', '.join(map(str, DTYPES))}")
    if t.shape != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}")
    # Inside a tile (at most 256 positions, all features) offsets are 32 bits wide; so are B's over all its ``rows``.
    return t if rows * t.stride(-2) + t.shape[-1] * t.stride(-1) < 1 << 31 else t.contiguous()


def layer_inputs(op: str, dy: Tensor, B: Tensor, h: Tensor | None, x: Tensor | None) -> list[Tensor | None]:
    """Checked, and of one dtype: float32 where theirs differ, as the reference computes in float32 at least."""
    if dy.dim() != 3 or B.dim() != 2 or B.shape[0] != dy.shape[2] or B.shape[1] < 1:
        raise ValueError(
            f"{op}: dy {tuple(dy.shape)} and B {tuple(B.shape)} do not fit; expected dy (N, T, m) and B (m, r), r >= 1"
        )
    N, T, m = dy.shape
    r = B.shape[1]
    given: list[Tensor | None] = [_check(op, "dy", dy, dy, (N, T, m)), _check(op, "B", B, dy, (m, r), m)]
    given.append(None if h is None else _check(op, "h", h, dy, (N, T, r)))
    given.append(None if x is None else _check(op, "x", x, dy, (N, T, x.shape[-1])))
    dtypes = {t.dtype for t in given if t is not None}
    return given if len(dtypes) == 1 else [None if t is None else t.float() for t in given]


def gradient_out(op: str, name: str, given: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """What a kernel writes: ``given`` (N, rows, columns), or a copy where one of its samples has gaps."""
    if given is None:
        return torch.empty(shape, dtype=torch.float32, device=device)
    if given.dtype != torch.float32:
        raise TypeError(f"{op}: {name} is {given.dtype}, expected torch.float32")
    if given.device != device or given.shape != tuple(shape):
        raise ValueError(f"{op}: {name} is {tuple(given.shape)} on {given.device}, expected {tuple(shape)} on {device}")
    if 0 in given.stride():  # asked first, for it is asked of every layer
        written(op, name, given)
    return given if given.stride(2) == 1 and given.stride(1) == shape[2] else given.contiguous()


def sums(op: str, S: Tensor | None, name: str, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(what the caller gets, what the kernel adds to): ``S`` or zeros, and it or a copy without gaps."""
    if shape[0] * shape[1] > MAX_SUM:
        raise ValueError(
            f"{op}: {name} has {shape[0] * shape[1]} elements; the GPU kernels add up at most {MAX_SUM} of a tensor, "
            f"take backend='reference' or, in training, clipping='flat'"
        )
    S = torch.zeros(shape, dtype=torch.float32, device=device) if S is None else S
    return S, gradient_out(op, name, S.unsqueeze(0), (1, *shape), device)[0]


def refuse_capture(op: str, device: torch.device) -> None:
    """A graph replays its arguments: the second replay would draw the noise of the first, and no epsilon would hold."""
    if device.type != "cuda":
        return
    with torch.cuda.device(device):  # whose current stream the launch takes
        captured = torch.cuda.is_current_stream_capturing()
    if captured:
        raise RuntimeError(
            f"{op}: a captured CUDA graph would use one (key, release) pair at every replay; capture forward, backward "
            f"and clipping, and release outside of the graph"
        )

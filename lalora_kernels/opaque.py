"""The recorders as operators that ``torch.compile`` does not look into.

A recorder changes Python state, which a traced backward must not. While tracing, the autograd Functions call these
operators instead: schemas for the compiler, the same recorder behind a handle. ``token`` is a tensor of the recorder's
that the schema says is changed, so that no call is dropped, merged or moved across another.
"""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_recorders: "weakref.WeakValueDictionary[int, object]" = weakref.WeakValueDictionary()
_handles = itertools.count(1)  # two threads never draw the same number of it


def register(recorder: Any) -> int:
    """A handle by which the operators find ``recorder`` while it lives."""
    handle = next(_handles)
    _recorders[handle] = recorder
    return handle


def _find(handle: int) -> Any:
    recorder = _recorders.get(handle)
    if recorder is None:
        raise RuntimeError("a compiled model outlived its private optimizer; compile it again after make_private")
    return recorder


@torch.library.custom_op("lalora::record_lora", mutates_args=("token",))
def record_lora(
    token: Tensor,
    dy: Tensor,
    B: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    scaling: float,
    need_bias: bool,
    handle: int,
) -> Tensor:
    """``LoRARecorder.record_lora``: dy (..., m), B (m,r) -> dz (..., r)."""
    dz: Tensor = _find(handle).record_lora(dy, B, scaling, h, x, True, need_bias)
    return dz.contiguous()  # as the compiler was told, where positions come first, too


@record_lora.register_fake
def _(
    token: Tensor,
    dy: Tensor,
    B: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    scaling: float,
    need_bias: bool,
    handle: int,
) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], B.shape[1]))


@torch.library.custom_op("lalora::record_embedding", mutates_args=("token",))
def record_embedding(
    token: Tensor, dy: Tensor, B: Tensor, h: Tensor | None, ids: Tensor, scaling: float, handle: int
) -> None:
    """``LoRARecorder.record_embedding``: dy (..., m), B (m,r), h (..., r), ids (...)."""
    _find(handle).record_embedding(dy, B, scaling, h, ids)


@record_embedding.register_fake
def _(token: Tensor, dy: Tensor, B: Tensor, h: Tensor | None, ids: Tensor, scaling: float, handle: int) -> None:
    return None


@torch.library.custom_op("lalora::record", mutates_args=("token",))
def record(token: Tensor, dy: Tensor, x: Tensor | None, handle: int) -> None:
    """``ExtraRecorder.record``."""
    _find(handle).record(dy, x)


@record.register_fake
def _(token: Tensor, dy: Tensor, x: Tensor | None, handle: int) -> None:
    return None


@torch.library.custom_op("lalora::record_scale", mutates_args=("token",))
def record_scale(token: Tensor, dy: Tensor, normalized: Tensor | None, axis: int, handle: int) -> None:
    """``ExtraRecorder.record_scale``."""
    _find(handle).record_scale(dy, normalized, axis)


@record_scale.register_fake
def _(token: Tensor, dy: Tensor, normalized: Tensor | None, axis: int, handle: int) -> None:
    return None


@torch.library.custom_op(
    "lalora::saw",
    mutates_args=("token",),
    schema="(Tensor(a!) token, Tensor[] tensors, SymInt[] ints, float[] floats, str form, str refused, int handle)"
    " -> ()",
)
def saw(
    token: Tensor,
    tensors: list[Tensor],
    ints: list[int],
    floats: list[float],
    form: str,
    refused: str,
    handle: int,
) -> None:
    """``InputCheck.saw``: a forward began, on what privacy/compiled.py's ``Carried`` holds."""
    _find(handle).saw(tensors, ints, floats, form, refused)


@saw.register_fake
def _(
    token: Tensor,
    tensors: list[Tensor],
    ints: list[int],
    floats: list[float],
    form: str,
    refused: str,
    handle: int,
) -> None:
    return None


@torch.library.custom_op("lalora::look", mutates_args=("token",))
def look(token: Tensor, z: Tensor, dz: Tensor, name: str, handle: int) -> None:
    """``ReductionCheck.look``: an output z of the model and its gradient."""
    _find(handle).look(z, dz, name)


@look.register_fake
def _(token: Tensor, z: Tensor, dz: Tensor, name: str, handle: int) -> None:
    return None


@torch.library.custom_op("lalora::ended", mutates_args=("token",))
def ended(token: Tensor, handle: int) -> None:
    """``ReductionCheck.ended``: a forward ended."""
    _find(handle).ended()


@ended.register_fake
def _(token: Tensor, handle: int) -> None:
    return None

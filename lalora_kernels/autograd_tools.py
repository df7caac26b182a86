"""What the autograd Functions share.

A layer is so small a part of a step that what its Python does counts: every call of torch's that changes nothing (a
cast to the dtype that a tensor has, a view of its own shape) takes microseconds, as long as a small kernel.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lalora_kernels import opaque


def rows_of(t: Any) -> Tensor:  # a tensor; what autograd kept for it may be None elsewhere
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


ONCE = (
    "the gradient of a gradient was asked for (create_graph=True: a gradient penalty, a Hessian), and the layers of "
    "lalora_kernels, which keep what one backward takes, have none; leave that term out, or take it by differences"
)


class Refused(torch.autograd.Function):
    """The first ``count`` tensors, which have no gradient; the others are what they were computed from."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(ONCE)


def once_differentiable(backward: Callable) -> Callable:
    """torch's, with an error that says what to do, and not without one where dy is a constant or the gradient of some
    tensors alone is asked for. Where gradients are off, as in every other backward, there is nothing to do."""

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        return Refused.apply(len(found), *(None if t is None else t.detach().requires_grad_() for t in found), *grads)

    return once


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """``function.apply``, past what it does for torch.func's transforms where none is at work."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]  # of torch._C


def traced(recorder: Any) -> tuple:
    """(recorder, None), or while ``torch.compile`` traces what stands for it: (its handle, its token)."""
    if recorder is not None and torch.compiler.is_compiling():
        return recorder.handle, recorder.token
    return recorder, None


def keep(ctx: Any, recorder: Any, token: Tensor | None) -> None:
    """What ``traced`` gave, of which batch this forward is, and whether it is one beside the model's own."""
    ctx.recorder, ctx.token = recorder, token
    if recorder is not None and token is None:
        ctx.batch, ctx.beside = recorder.engine.serial, recorder.engine.beside


def recorder_of(ctx: Any) -> Any:
    """The recorder that ``keep`` was given. Raises RuntimeError where its forward was one of an earlier batch, or one
    beside the model and not for its input."""
    if ctx.batch != ctx.recorder.engine.serial:
        raise RuntimeError(
            f"a backward reached {ctx.recorder.name} in the graph of an earlier batch, whose rows are other records (a "
            f"loss added up over batches, with retain_graph=True?); call backward on the loss of this batch alone, and "
            f"add up loss.item()"
        )
    if ctx.beside:
        ctx.recorder.engine.refuse_part(ctx.recorder.name)
    return ctx.recorder


def low_rank_backward(
    ctx: Any, dy: Tensor, B: Tensor, h: Tensor | None, x: Tensor | None, through_A: bool, need_A: bool, need_B: bool,
    need_bias: bool, dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Any, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dz, dA (r,n), dB (m,r), db (m,) of s (x A^T) B^T + b, for dy (..., m), B (m,r), h = x A^T (..., r), x (..., n).

    dz = s dy B (..., r) where ``through_A`` or A's gradient asks for it. A recorder is given what it needs to make the
    gradients of every sample, and there are no others then. ``dtypes``: of dA and dB.
    """
    if ctx.token is not None:
        return opaque.record_lora(ctx.token, dy, B, h, x, ctx.scaling, need_bias, ctx.recorder), None, None, None
    if ctx.recorder is not None:
        return recorder_of(ctx).record_lora(dy, B, ctx.scaling, h, x, through_A, need_bias), None, None, None
    rows = rows_of(dy)
    dz = ctx.scaling * (rows @ B) if through_A or need_A else None
    dA = (dz.t() @ rows_of(x)).to(dtypes[0]) if need_A else None  # type: ignore[union-attr]  # dz was asked for
    dB = (ctx.scaling * (rows.t() @ rows_of(h))).to(dtypes[1]) if need_B else None
    return dz, dA, dB, rows.sum(0) if need_bias else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, never a view."""
    return shaped(F.linear(rows_of(x), weight, bias), x)


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """A product y (rows, m), in use nowhere else, as (..., m) where x is (..., n).

    F.linear returns a view of its product where x has more than two axes, and autograd forbids changing a Function's
    output in place where that is a view: ReLU(inplace=True) after the layer would raise.
    """
    if x.dim() == 2:
        return y
    shape = [*x.shape[:-1], y.shape[1]]
    # resize_ leaves the elements in order and takes a third of the time, but whatever traces notes y's shape before it.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not y.is_contiguous():
        return torch.ops.aten._unsafe_view(y, shape)
    return y.resize_(shape)

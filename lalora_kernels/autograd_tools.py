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


def rows_of(t: Any) -> Tensor:  # a tensor; what autograd kept for it may be None elsewhere
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def once_differentiable(backward: Callable) -> Callable:
    """torch's, which switches gradients off; where they are off, as in every first backward, there is nothing to do."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

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

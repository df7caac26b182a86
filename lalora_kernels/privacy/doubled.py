"""A block in which every floating-point number is float64, whatever precision the code in it asks for.

The first batch is checked on a copy of the model in float64. A model that says ``.float()`` before its head, or makes a
state by ``torch.zeros``, works in its own precision and would fail there on products of two precisions.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOWER = (torch.float32, torch.float16, torch.bfloat16)
CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class Doubled(TorchFunctionMode):
    """See the module's docstring; of the thread that enters it. A view of bits as another type stays what it is, and so
    does what comes of a tensor in a lower precision, which may be a part of it that the model writes to."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is Tensor.view:
            return func(*args, **named)
        if func in CASTS:
            func = Tensor.double
        args = tuple(_double(a) for a in args)
        named = {key: _double(value) for key, value in named.items()}
        if func is torch.full and "dtype" not in named and isinstance(_filled(args, named), float):
            named["dtype"] = torch.float64  # not afterwards: float64's least number is none of float32's
        out = func(*args, **named)
        made = _lower(out) and not any(map(_lower, (*args, *named.values())))
        return out.double() if made else out


def _lower(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in LOWER


def _double(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in LOWER else argument


def _filled(args: tuple, named: Mapping[str, Any]) -> Any:
    return args[1] if len(args) > 1 else named.get("fill_value")

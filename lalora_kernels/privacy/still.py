"""A block in which random draws are none, for models that draw in eval mode, too: a record alone would be drawn
otherwise than beside others, and a comparison of the two would show that and nothing else."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Stilled(TorchDispatchMode):
    """What torch draws is the same in every row however many there are; what comes of a generator of the code's own
    stays what it is, and so does what is not listed here (``multinomial``), which a comparison then refuses."""

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        out = func(*args, **named)
        still = DRAWS.get(func.overloadpacket)
        if still is None or named.get("generator") is not None:
            return out
        given = {a.name: a.default_value for a in func._schema.arguments} | named
        given |= zip((a.name for a in func._schema.arguments), args)
        return still(out, given)


def _uniform(like: Tensor) -> Tensor:
    """In (0, 1), by the place along the last axis where there are several, in the shape of ``like``."""
    places = torch.zeros((), dtype=torch.float64, device=like.device)
    if like.dim() > 1:
        places = torch.arange(like.shape[-1], dtype=torch.float64, device=like.device)
    return (0.38 + 0.6180339887 * places).frac().clamp(1e-6, 1 - 1e-6).expand(like.shape)


def _gaussian(like: Tensor) -> Tensor:
    return torch.special.ndtri(_uniform(like))


def _bernoulli(out: Tensor, given: dict[str, Any]) -> Tensor:
    """``bernoulli(self)`` has its probabilities there, the others in p."""
    return out.copy_(_uniform(out) < (given["p"] if "p" in given else given["self"]))


def _integers(out: Tensor, given: dict[str, Any]) -> Tensor:
    low, high = given.get("low", given.get("from", 0)), given.get("high", given.get("to"))
    if high is None:  # random_(): any that the type has
        low, high = 0, 1 << 7
    return out.copy_((low + (high - low) * _uniform(out)).floor())


def _dropout(out: tuple[Tensor, Tensor], given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    dropped, mask = out
    if given["train"] is not False:
        mask.copy_(_uniform(dropped) >= given["p"])
        dropped.copy_(given["input"] * mask / (1.0 - given["p"]))
    return dropped, mask


def _normal(out: Tensor, given: dict[str, Any]) -> Tensor:
    return out.copy_(given["mean"] + given["std"] * _gaussian(out))


DRAWS: dict[Any, Callable[[Any, dict[str, Any]], Any]] = {
    aten.rand: lambda out, given: out.copy_(_uniform(out)),
    aten.rand_like: lambda out, given: out.copy_(_uniform(out)),
    aten.uniform_: lambda out, given: out.copy_(given["from"] + (given["to"] - given["from"]) * _uniform(out)),
    aten.randn: lambda out, given: out.copy_(_gaussian(out)),
    aten.randn_like: lambda out, given: out.copy_(_gaussian(out)),
    aten.normal: _normal,
    aten.normal_: _normal,
    aten.bernoulli: _bernoulli,
    aten.bernoulli_: _bernoulli,
    aten.exponential_: lambda out, given: out.copy_(-torch.log1p(-_uniform(out)) / given["lambd"]),
    aten.randint: _integers,
    aten.randint_like: _integers,
    aten.random_: _integers,
    aten.randperm: lambda out, given: out.copy_(torch.arange(len(out), device=out.device).roll(1)),  # moves every row
    aten.native_dropout: _dropout,
}

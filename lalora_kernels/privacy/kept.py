"""What a forward leaves on the model's modules (``self.balance = ...``), beside buffers and parameters.

The loop's loss may read it there, though the model does not return it, and the next forward may go on with it. Of both
the first batch's check would see nothing in the outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lalora_kernels.privacy.own_loss import MIXED, ROWS, RTOL, adds_up, largest
from lalora_kernels.privacy.trees import leaves, tree_map

INTERNAL = frozenset(vars(nn.Module()))  # torch's own attributes of a module
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
Place = tuple[str, str]  # a module's name, and its attribute's


def attributes(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """(its name, module, key, value) of what modules have beside parameters, buffers, children and hooks."""
    for name, module in model.named_modules():
        for key, value in list(vars(module).items()):
            if key not in INTERNAL:
                yield name, module, key, value


class Attributes:
    """Those of a model as it was given, and its hooks."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._hooks = [(held, set(held)) for held in self._hooks_now()]
        self._before = {(name, key): (value, _copied(value)) for name, _, key, value in attributes(model)}
        self._known = self._versions()

    def _versions(self) -> dict[int, int]:
        return {id(t): t._version for value, _ in self._before.values() for t in leaves(value)}

    def _hooks_now(self) -> list[dict]:
        return [vars(module)[kind] for module in self.model.modules() for kind in HOOKS]

    def left(self) -> dict[Place, list[Tensor]]:
        """The floating-point tensors that forwards have put there since, or written to."""
        found = {}
        for name, _, key, value in attributes(self.model):
            new = [t for t in leaves(value) if t.is_floating_point() and self._known.get(id(t)) != t._version]
            if new:
                found[name, key] = new
        return found

    def moved(self) -> bool:
        """Whether anything there is another than before: a tensor, a flag, a number."""
        now = {(name, key): value for name, _, key, value in attributes(self.model)}
        others = now.keys() != self._before.keys()
        return bool(others or self.left() or any(now[at] is not value for at, (value, _) in self._before.items()))

    @torch.no_grad()
    def put_back(self) -> None:
        """Have every module what it had; a list or dict is filled with what was in it. A hook that a forward has put
        there goes (transformers' collect hidden states, noted by a flag: with that put back, they would come twice)."""
        for held, before in self._hooks:
            for key in held.keys() - before:
                del held[key]
        modules = dict(self.model.named_modules())
        for name, _, key, _ in list(attributes(self.model)):
            if (name, key) not in self._before:
                del modules[name].__dict__[key]
        for (name, key), (value, copied) in self._before.items():
            if isinstance(value, Tensor) and self._known[id(value)] != value._version:
                value.copy_(copied)
            elif isinstance(value, list):
                value[:] = copied
            elif isinstance(value, dict) and _items(value) != _items(copied):  # a config's is closed (diffusers)
                value.clear()
                value.update(copied)
            modules[name].__dict__[key] = value
        self._known = self._versions()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value


def _items(held: dict) -> list[tuple[Any, int]]:
    return [(key, id(value)) for key, value in held.items()]


def tied_attributes(left: Sequence[dict[Place, list[Tensor]]]) -> set[Place]:
    """The attributes that are neither a row for each record, of its own, nor a number that is a mean or a sum over
    records: of what a forward left for each of ``LOSS_ORDERS`` of two records, drawn alike for a place. (Of a vector
    that is a mean, a loss may well take the squares.)"""
    return {at for at in set().union(*left) if _tied([found.get(at, []) for found in left])}


def _tied(values: list[list[Tensor]]) -> bool:
    if len({len(v) for v in values}) > 1:
        return True
    return not all(len({t.shape for t in each}) == 1 and (_rows(each) or _number(each)) for each in zip(*values))


def _number(each: tuple[Tensor, ...]) -> bool:
    """Whether it is one that adds up, or the same whoever the records are."""
    return each[0].numel() == 1 and adds_up(each) or all(torch.equal(t, each[0]) for t in each)


def _rows(each: tuple[Tensor, ...]) -> bool:
    """Whether the records lie along the first axis or the second, each with what it has among copies of itself."""
    atol = RTOL * largest(each)
    for axis in range(min(2, each[0].dim())):
        if each[0].shape[axis] % ROWS == 0 and all(
            torch.allclose(t.chunk(ROWS, axis)[i], each[len(MIXED) + r].chunk(ROWS, axis)[i], rtol=RTOL, atol=atol)
            for t, order in zip(each, MIXED)
            for i, r in enumerate(order)
        ):
            return True
    return False


def watch_attributes(model: nn.Module, tied: set[Any]) -> None:
    """From now on a backward from what stands in these attributes raises ValueError; the forward's own does not.

    ``tied``: places, beside names of outputs, which are not meant here.
    """
    for name, key in sorted(at for at in tied if isinstance(at, tuple)):
        held = model.get_submodule(name).__dict__
        if key in held:
            refuse = partial(_refuse, f"{name}.{key}" if name else key)
            held[key] = tree_map(partial(_watched, refuse), held[key])


def _watched(refuse: Callable[[Tensor], NoReturn], t: Tensor) -> Tensor:
    if not t.requires_grad:
        return t
    t = t.view_as(t)  # a node of its own, behind what the model's outputs come from
    t.register_hook(refuse)
    return t


def _refuse(name: str, gradient: Tensor) -> NoReturn:
    raise ValueError(
        f"{name}, which the model's forward keeps there and the loss reads, ties the records of the batch together (a "
        f"balance of experts, a contrast, a mean over the batch's tokens), so one record's gradient depends on the "
        f"other records and clipping cannot bound what one of them changes. Leave it out of the loss, or make it a "
        f"mean or a sum of what each record has alone"
    )

"""Tensors in nested mappings, sequences and named tuples: what loaders yield, and what a model is given and returns."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor


def tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in it: "loss", "aux[0]", "past.keys"; "" where the tree is one."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, (tuple, list)):
        for key, value in zip(getattr(tree, "_fields", range(len(tree))), tree):
            at = f"[{key}]" if isinstance(key, int) else f".{key}" if name else key
            yield from tensors(value, name + at)


def leaves(tree: Any) -> list[Tensor]:
    """Every tensor in it, in the order of ``tensors``."""
    return [t for _, t in tensors(tree)]


def tree_map(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same structure with ``f`` of every tensor, called in the order of ``tensors``; other leaves are kept.

    A mapping stays what it is (a BatchEncoding, a defaultdict), or becomes a dict where it cannot be written to.
    """
    if isinstance(tree, Tensor):
        return f(tree)
    if isinstance(tree, Mapping):
        mapped = {key: tree_map(f, value) for key, value in tree.items()}
        if not isinstance(tree, MutableMapping) or type(tree) is dict:
            return mapped
        twin = copy.copy(tree)
        for key, value in mapped.items():  # not by update(), which transformers' ModelOutput refuses
            twin[key] = value
        return twin
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(f, value) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(tree_map(f, value) for value in tree)
    return tree


def form(tree: Any) -> Any:
    """What a call's arguments are but for their numbers, to be compared: which there are by name, and what the switches
    among them say (True, None, "mlm"); of lists, which may hold a text for each record, that there is one."""
    if isinstance(tree, Mapping):
        return frozenset((key, form(value)) for key, value in tree.items())
    if isinstance(tree, tuple):
        return tuple(form(value) for value in tree)
    return tree if tree is None or isinstance(tree, (bool, str)) else type(tree)


def to_double(tree: Any) -> Any:
    """The same with its floating-point tensors in float64."""
    return tree_map(lambda t: t.double() if t.is_floating_point() else t, tree)


def fresh(t: Tensor) -> Tensor:
    """A copy, which a model may change in place, without what t was computed from and without its ``grad``, to which
    the backwards of a check have nothing to add."""
    return t.detach().requires_grad_(t.requires_grad).clone()


def have_rows(tree: Any, rows: int) -> list[bool]:
    """Which leaves have a row for each record. Asked once, of the batch: a scale of two classes has as many rows as two
    of its records."""
    return [t.dim() > 0 and t.shape[0] == rows for t in leaves(tree)]


def of_rows(f: Callable[[Tensor], Tensor], tree: Any, batched: Sequence[bool]) -> Any:
    """A copy with ``f`` of the leaves that have rows (``batched``: of ``have_rows``); one mask for all stays whole."""
    at = iter(batched)
    return tree_map(lambda t: fresh(f(t) if next(at) else t), tree)


def record(batch: Any, i: int, batched: Sequence[bool]) -> Any:
    """Record i alone, with a batch axis of 1."""
    return of_rows(lambda t: t[i : i + 1], batch, batched)

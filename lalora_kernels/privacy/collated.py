"""Does collate_fn make a record's row of that record alone? Asked of its first batches, in each worker.

Mixup and CutMix, and what is normalized by batch, put several records into one row, and clipping that row's gradient
bounds none of them. The first row that it makes of records a, b, b must be the one that it makes of a, a, a, drawn
alike; the other rows' draws may depend on what was drawn for the first. Rows of another length (padding) are not
compared, nor anything where a copy of it, with all generators put back, gives another result.
"""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lalora_kernels.privacy.drawn import Drawn
from lalora_kernels.privacy.trees import leaves, tensors

CALLS = 4  # batches that are asked, until two of their records tell
OTHERS = 4  # of a batch, beside which its first record is put
DRAWS = 8  # what draws at random may leave every second batch as it is
RTOL = 1e-4
MIXED = (
    "{}: the row that collate_fn makes of a record depends on the other records of the batch (mixup, CutMix, "
    "statistics of the batch), and clipping cannot bound what one of them changes. Have it make each row of one record"
)
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
DEPTH = 3  # of objects that hold one, below a collate function
Collate = Callable[[list], Any]


class CollateCheck:
    """A collate function as it is; raises ValueError where a row of its first batches depends on other records."""

    def __init__(self, collate: Collate):
        self.collate, self._left = collate, CALLS

    def __call__(self, records: list) -> Any:
        if not self._left or len(records) < 2:
            return self.collate(records)
        try:
            some, twin = _copied(*records[: OTHERS + 1]), _apart(self.collate)
        except Exception:  # what cannot be copied is not asked
            some, self._left = [], 0
        batch = self.collate(records)
        if some:
            with Drawn(nn.Module(), None):
                mixed, told = _mixed(twin, some)
            if mixed is not None:
                raise ValueError(MIXED.format(mixed or "the batch"))
            self._left = 0 if told else self._left - 1
        return batch


def _mixed(collate: Collate, records: list) -> tuple[str | None, bool]:
    """The name of what has rows of several records, None where nothing has; and whether the records told."""
    first, others = records[0], records[1:]
    try:
        one, two, three = (_apart(collate) for _ in range(3))
        if _differing(_rows(one, 0, first, first, first), _rows(two, 0, first, first, first)):
            return None, True
        moves = any(_differing(_rows(three, 0, *records), _rows(three, 0, *records)) for _ in range(2))
        told = False
        for draw in range(DRAWS):
            if moves:  # it draws from a generator of its own, as much as its rows are long
                two, three = _apart(one), _apart(one)
            other = others[draw % len(others)]
            alone = _rows(one, draw, first, first, first)
            if found := _differing(alone, _rows(two, draw, first, other, other)):
                return found[0], True
            told = told or bool(_differing(alone, _rows(three, draw, other, other, other)))
        return None, told
    except Exception:  # three copies of a record may be none of its batches
        return None, True


def _rows(collate: Collate, seed: int, *records: Any) -> dict[str, Tensor]:
    """What it makes of these records that has a row for each."""
    with Drawn(nn.Module(), seed):
        batch = collate(_copied(*records))
    return {name: t for name, t in tensors(batch) if t.dim() and len(t) == len(records)}


def _copied(*records: Any) -> list:
    """For a collate function that takes them apart. Of a tensor its own entries: a copy of a view is one of the whole
    data set."""
    return copy.deepcopy(list(records), {id(t): t.clone() for t in leaves(records)})


def _apart(collate: Any, depth: int = DEPTH) -> Any:
    """The same with generators of its own; all else, a tokenizer or a model, it shares."""
    if not depth or isinstance(collate, nn.Module) or not isinstance(held := getattr(collate, "__dict__", None), dict):
        return collate
    others = {
        name: copy.deepcopy(value) if isinstance(value, GENERATORS) else _apart(value, depth - 1)
        for name, value in held.items()
    }
    if all(others[name] is value for name, value in held.items()):
        return collate
    twin = copy.copy(collate)
    twin.__dict__.update(others)
    return twin


def _differing(some: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    """Names of what differs in its first row, but for its length."""
    return [n for n, t in some.items() if n in others and t.shape == others[n].shape and not _same(t[0], others[n][0])]


def _same(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a.double(), b.double(), rtol=RTOL, equal_nan=True)

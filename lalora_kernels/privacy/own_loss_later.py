"""The model's own losses once more, where records of a batch count unequally.

The two records of the first batch may count for as much (as many tokens, as many labels), and then a mean over all that
count is a mean over records. So a few batches are asked of two that do not.
"""

from collections import Counter
from typing import Any

import torch
from torch import nn

from lalora_kernels.privacy.compiled import eagerly
from lalora_kernels.privacy.doubled import Doubled
from lalora_kernels.privacy.drawn import Drawn
from lalora_kernels.privacy.kept import Attributes, tied_attributes
from lalora_kernels.privacy.own_loss import LOSS_ORDERS, tied
from lalora_kernels.privacy.trees import have_rows, leaves, of_rows, to_double
from lalora_kernels.privacy.twin import double, take_modes
from lalora_kernels.privacy.written import Buffers

MARKS = (0, -100, 255)  # what does not count: padding and masks, labels that are ignored, pixels without a class
TRIES = 4  # batches, for each tensor and mark: lengths that differ late are not hidden by class labels that always do
LOOKS = 256  # batches that are looked through, for which a GPU's host has to wait


class OwnLossCheck:
    """Called with a forward's arguments, for what ties records of its outputs and of the attributes that it leaves:
    asked where records count unequally."""

    def __init__(self) -> None:
        self.looks = LOOKS
        self._asked: Counter[tuple[int, int]] = Counter()

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict, rows: int) -> set[Any]:
        if not self.looks:
            return set()
        self.looks -= 1
        found = {key: pairs for key, pairs in unequal((args, kwargs), rows).items() if self._asked[key] < TRIES}
        self._asked.update(found.keys())
        pairs = set().union(*found.values())
        return tied_in(model, args, kwargs, rows, sorted(pairs)) if pairs else set()


def unequal(inputs: Any, rows: int) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """{(which tensor, mark): pairs of records} of all tensors with rows whose marks differ in number.

    The record with the fewest, beside the one with the most and the one with the most that is not marked throughout: a
    mean over nothing may be no number.
    """
    found = {}
    for at, t in enumerate(leaves(inputs)):
        if not t.dim() or t.shape[0] != rows or not t.numel():
            continue
        t = t.detach().reshape(rows, -1)
        for mark in MARKS[: 1 if t.dtype == torch.bool else None]:
            counts = (t == mark).sum(1).cpu()
            some = torch.where(counts < t.shape[1], counts, -1)
            least = int(counts.argmin())
            pairs = {(least, int(c.argmax())) for c in (counts, some) if c.max() > counts[least]}
            if pairs:
                found[at, mark] = pairs
    return found


@eagerly
def tied_in(model: nn.Module, args: tuple, kwargs: dict, rows: int, pairs: list[tuple[int, int]]) -> set[Any]:
    """``tied`` and ``tied_attributes`` of each pair of records on a float64 copy of the model, in its mode; one that
    fails there is not judged, as where a mask of all positions has as many rows as this batch has records."""
    batched = have_rows((args, kwargs), rows)
    twin = double(model)
    take_modes(twin, model)
    buffers, attributes = Buffers(twin), Attributes(twin)
    names: set[Any] = set()

    def run(pair: tuple[int, int], *order: int) -> tuple[Any, Any]:
        inputs = to_double(of_rows(lambda t: t[[pair[i] for i in order]], (args, kwargs), batched))
        with torch.no_grad(), Doubled(), Drawn(twin, 0):
            try:
                return twin(*inputs[0], **inputs[1]), attributes.left()
            finally:
                buffers.put_back()
                attributes.put_back()

    for pair in pairs:
        try:
            outputs, left = zip(*(run(pair, *order) for order in LOSS_ORDERS))
            names |= tied(outputs) | tied_attributes(left)
        except Exception:
            continue
    return names

"""Has each record as many rows where a layer is given several of each along one axis? Asked where records differ.

Patches of images of other sizes, texts without their padding, images that a record lacks: put one after the other they
are rows of nobody in particular, and as many as divide by the records are taken apart at the wrong places. The two
records of the first batch's check may have as many of them, and those of a later batch not.
"""

from collections.abc import Collection
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor, nn

from lalora_kernels.privacy.compiled import eagerly
from lalora_kernels.privacy.doubled import Doubled
from lalora_kernels.privacy.drawn import Drawn
from lalora_kernels.privacy.trees import have_rows, leaves, of_rows, to_double
from lalora_kernels.privacy.twin import double

TRIES = 4  # batches, for each way in which records differ; more where they differ twice as much as before
LOOKS = 256  # batches that are looked through, for which a GPU's host has to wait
Way = tuple[int, str]  # which tensor, and by what of it


class RaggedCheck:
    """Called with a forward's arguments, once the first batch's check saw layers with several rows for each record."""

    def __init__(self) -> None:
        self.looks = LOOKS
        self._asked: dict[Way, tuple[int, float]] = {}  # how often, and of the largest difference

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict, rows: int, packed: Collection[str]) -> None:
        if not self.looks:
            return
        self.looks -= 1
        records: set[int] = set()
        for way, (least, most, by) in differing((args, kwargs), rows).items():
            times, largest = self._asked.get(way, (0, 0.0))
            if times < TRIES or by > 2 * largest:
                self._asked[way] = times + 1, max(by, largest)
                records |= {least, most}
        if records:
            refuse_ragged(model, args, kwargs, rows, sorted(records), packed)


def differing(inputs: object, rows: int) -> dict[Way, tuple[int, int, float]]:
    """{way: (the record with the least, the one with the most, the difference)} of all in which records differ: how
    many zeros a tensor has (padding, an image that is none), and what its whole numbers add up to (sizes)."""
    found: dict[Way, tuple[int, int, float]] = {}
    for at, t in enumerate(leaves(inputs)):
        if not t.dim() or t.shape[0] != rows or not t.numel():
            continue
        t = t.detach().reshape(rows, -1)
        measures = {"zeros": (t == 0).sum(1)}
        if not t.is_floating_point() and not t.is_complex():
            measures["sum"] = t.double().sum(1)
        for kind, each in measures.items():
            values = each.cpu()
            least, most = int(values.argmin()), int(values.argmax())
            if values[least] != values[most]:
                found[at, kind] = least, most, float(values[most] - values[least])
    return found


@eagerly
def refuse_ragged(
    model: nn.Module, args: tuple, kwargs: dict, rows: int, records: list[int], packed: Collection[str]
) -> None:
    """Raise ValueError where a module in ``packed`` is called with more rows for one of ``records`` than for another.

    Each is taken alone through a float64 copy of the model, in eval mode.
    """
    batched = have_rows((args, kwargs), rows)
    twin = double(model)
    calls: list[tuple[str, int]] = []

    def note(name: str, _module: nn.Module, _args: object, output: object) -> None:
        calls.append((name, _rows(output)))

    for name, module in twin.named_modules():
        if name in packed:
            module.register_forward_hook(partial(note, name))
    first: list[tuple[str, int]] | None = None
    for record in records:
        calls.clear()
        inputs = to_double(of_rows(itemgetter(slice(record, record + 1)), (args, kwargs), batched))
        with torch.no_grad(), Doubled(), Drawn(twin, 0):
            twin(*inputs[0], **inputs[1])
        first = list(calls) if first is None else first
        other = next((pair for pair in zip(first, calls) if pair[0] != pair[1]), None)
        if other is not None or len(calls) != len(first):
            name, some = (other or [*first, *calls][-1:])[0]
            others = f", and {other[1][1]} for another" if other and other[1][0] == name else ""
            raise ValueError(
                f"{name} has {some} rows for one record of this batch{others}, so that nothing tells which rows are "
                f"whose (images of other sizes, or texts without their padding, one after the other?); have "
                f"collate_fn give every record as many, or leave {name} out of what trains (exclude_modules)"
            )


def _rows(output: object) -> int:
    return next((t.shape[0] for t in leaves(output) if isinstance(t, Tensor) and t.dim()), 0)

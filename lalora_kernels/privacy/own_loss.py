"""The losses that a model returns beside its logits: is each of them a mean or a sum of what its records have alone?

A mean over all tokens or boxes of the batch, a term that balances a mixture's experts, a contrastive one: taken as they
are, they let a record's gradient depend on the others, which no clipping bounds. The first batch tells which of a
model's losses are such, unless its two records count for as much; so a few batches are asked of two that do not. Only a
backward that reaches one is refused, since a loop may have a loss of its own.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lalora_kernels.privacy.trees import have_rows, leaves, of_rows, tensors, to_double

RTOL = 1e-5  # in float64, but for the many models that compute their loss in float32
ORDERS = ((0, 1, 0), (1, 0, 1), (0, 0, 0), (1, 1, 1))  # of two records, in which a loss is asked for
ROWS = 3
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


def tied_in(model: nn.Module, args: tuple, kwargs: dict, rows: int, pairs: list[tuple[int, int]]) -> set[Any]:
    """``tied`` and ``tied_attributes`` of each pair of records on a float64 copy of the model, in its mode; one that
    fails there is not judged, as where a mask of all positions has as many rows as this batch has records."""
    from lalora_kernels.privacy.doubled import Doubled
    from lalora_kernels.privacy.drawn import Drawn
    from lalora_kernels.privacy.kept import Attributes, tied_attributes
    from lalora_kernels.privacy.twin import double, take_modes
    from lalora_kernels.privacy.written import Buffers

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
            outputs, left = zip(*(run(pair, *order) for order in ORDERS))
            names |= tied(outputs) | tied_attributes(left)
        except Exception:
            continue
    return names


def without_rows(output: Any, rows: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all in a model's output that is no row for each of ``rows`` records: "loss", "aux[0]", ..."""
    for name, t in tensors(output):
        if t.is_floating_point() and (t.numel() == 1 or t.dim() and t.shape[0] % rows):
            yield name or "the output", t


def tied(outputs: Sequence[Any]) -> set[str]:
    """Names of the outputs that are no mean and no sum over records: what the model returned for each of ``ORDERS`` of
    two records, what is drawn at random drawn alike for a place whoever stands there."""
    found = [dict(without_rows(output, ROWS)) for output in outputs]
    return {name for name in set.intersection(*map(set, found)) if not adds_up([f[name] for f in found])}


def adds_up(values: Sequence[Tensor]) -> bool:
    """Whether what has these values in ``ORDERS`` is a mean or a sum over records; also where nothing shows it.

    In (a, b, a) and (b, a, b) together each place has each record once, as in (a, a, a) and (b, b, b) together.
    """
    if len({v.shape for v in values}) > 1:
        return True
    mixed, other, first, second = (v.double() for v in values)
    size = largest(values)
    # A record without labels has no mean.
    return not math.isfinite(size) or not bool(((mixed + other - first - second).abs() > RTOL * size).any())


def largest(values: Iterable[Tensor]) -> float:
    """The largest absolute entry of all; NaN where one is."""
    return float(torch.stack([v.abs().max().double() if v.numel() else v.new_zeros(()).double() for v in values]).max())


def watch(output: Any, rows: int, tied: set[Any]) -> None:
    """From now on a backward that reaches one of the outputs that are named in ``tied`` raises ValueError."""
    found = [(n, t) for n, t in without_rows(output, rows) if n in tied and t.requires_grad]
    for _, t in found:  # all are named: a loss that is tied for one of its terms is reached before that
        t.register_hook(partial(_refuse, sorted(name for name, _ in found)))


def _refuse(names: list[str], gradient: Tensor) -> NoReturn:
    s = "s" if len(names) == 1 else ""
    raise ValueError(
        f"{' and '.join(names)}, which the model returns, divide{s} by a count over the whole batch (its tokens, its "
        f"boxes) or tie{s} the records together otherwise (a balance of experts, a contrast), so one record's gradient "
        f"depends on the other records and clipping cannot bound what one of them changes. Leave it out (of experts: "
        f"config.output_router_logits = False) and backpropagate a loss of each record's own instead: take the mean "
        f"over each record's own positions first and then over records (for class labels and language models: "
        f"lalora_kernels.record_losses(logits, labels, shift=...).mean())"
    )

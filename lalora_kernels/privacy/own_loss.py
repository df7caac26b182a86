"""The losses that a model returns beside its logits: is each of them a mean or a sum of what its records have alone?

A mean over all tokens or boxes of the batch, a term that balances a mixture's experts, a contrastive one: taken as they
are, they let a record's gradient depend on the others, which no clipping bounds. The first batch tells which of a
model's losses are such, unless its two records count for as much (own_loss_later.py). Only a backward that reaches one
is refused, since a loop may have a loss of its own. A sum where a mean was claimed (transformers' CTC is one by
default), or the other way round, is refused likewise, unless the loop makes of it what was claimed.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from lalora_kernels.privacy.trees import tensors

RTOL = 1e-5  # in float64, but for the many models that compute their loss in float32
MIXED = ((0, 1, 0), (1, 0, 1), (0, 0, 1), (1, 1, 0))  # of two records; each by its places, then what has the others
LOSS_ORDERS = (*MIXED, (0, 0, 0), (1, 1, 1))  # in which a loss is asked for
ROWS = 3
COPIES = ((0, 0, 0), (0, 0), (1, 1, 1), (1, 1))  # more of the same record: a sum grows by it, a mean does not


def without_rows(output: Any, rows: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all in a model's output that is no row for each of ``rows`` records: "loss", "aux[0]", ..."""
    for name, t in tensors(output):
        if t.is_floating_point() and is_without(t, rows):
            yield name or "the output", t


def is_without(t: Tensor, rows: int) -> bool:
    """Whether a tensor has no row for each of ``rows`` records."""
    return bool(t.numel() == 1 or t.dim() and t.shape[0] % rows)


def tied(outputs: Sequence[Any]) -> set[str]:
    """Names of the outputs that are no mean and no sum over records: what the model returned for each of
    ``LOSS_ORDERS`` of two records, what is drawn at random drawn alike for a place whoever stands there."""
    found = [dict(without_rows(output, ROWS)) for output in outputs]
    return {name for name in set.intersection(*map(set, found)) if not adds_up([f[name] for f in found])}


def adds_up(values: Sequence[Tensor]) -> bool:
    """Whether what has these values in ``LOSS_ORDERS`` is a mean or a sum over records; also where nothing shows it.

    In (a, b, a) and (b, a, b) together each place has each record once, as in (a, a, a) and (b, b, b) together; so in
    (a, a, b) and (b, b, a), where what pairs a record with its mirror image pairs others.
    """
    if len({v.shape for v in values}) > 1:
        return True
    *mixed, first, second = (v.double() for v in values)
    size = largest(values)
    if not math.isfinite(size):  # a record without labels has no mean
        return True
    sums = [some + other for some, other in zip(mixed[::2], mixed[1::2])]
    return not any(bool(((both - first - second).abs() > RTOL * size).any()) for both in sums)


def reductions(outputs: Sequence[Any]) -> dict[str, str]:
    """{name: "sum" or "mean"} of the scalars that a model returned for each of ``COPIES`` of two records, drawing
    nothing; of those that tell."""
    scalars = [
        {n: float(t) for n, t in without_rows(output, len(order)) if t.numel() == 1}
        for output, order in zip(outputs, COPIES)
    ]
    found = {}
    for name in set.intersection(*map(set, scalars)):
        a, b, c, d = (each[name] for each in scalars)
        size = max(map(abs, (a, b, c, d)))
        if not 0 < size < math.inf or abs(b - d) <= RTOL * size:  # of no record
            continue
        for kind, grown in (("sum", ROWS / 2), ("mean", 1.0)):
            if max(abs(a - grown * b), abs(c - grown * d)) <= RTOL * size:
                found[name] = kind
    return found


def largest(values: Iterable[Tensor]) -> float:
    """The largest absolute entry of all; NaN where one is."""
    return float(torch.stack([v.abs().max().double() if v.numel() else v.new_zeros(()).double() for v in values]).max())


def watch(output: Any, rows: int, tied: set[Any]) -> None:
    """From now on a backward that reaches one of the outputs that are named in ``tied`` raises ValueError."""
    found = [(n, t) for n, t in without_rows(output, rows) if n in tied and t.requires_grad]
    for _, t in found:  # all are named: a loss that is tied for one of its terms is reached before that
        t.register_hook(partial(refuse, sorted(name for name, _ in found)))


def refuse(names: list[str], gradient: Tensor) -> NoReturn:
    """Raise ValueError: a backward reached these outputs."""
    s = "s" if len(names) == 1 else ""
    raise ValueError(
        f"{' and '.join(names)}, which the model returns, divide{s} by a count over the whole batch (its tokens, its "
        f"boxes) or tie{s} the records together otherwise (a balance of experts, a contrast), so one record's gradient "
        f"depends on the other records and clipping cannot bound what one of them changes. Leave it out (of experts: "
        f"config.output_router_logits = False) and backpropagate a loss of each record's own instead: take the mean "
        f"over each record's own positions first and then over records (for class labels and language models: "
        f"lalora_kernels.record_losses(logits, labels, shift=...).mean())"
    )

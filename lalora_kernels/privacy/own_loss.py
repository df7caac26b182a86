"""The losses that a model returns beside its logits: is each of them a mean or a sum of what its records have alone?

A mean over all tokens or boxes of the batch, a term that balances a mixture's experts, a contrastive one: taken as they
are, they let a record's gradient depend on the others, which no clipping bounds. The first batch tells which of a
model's losses are such; only a backward that reaches one is refused, since a loop may have a loss of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

RTOL = 1e-5  # in float64, but for the many models that compute their loss in float32
ROWS = 3


def without_rows(output: Any, rows: int, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all in a model's output that is no row for each of ``rows`` records: "loss", "aux[0]", ..."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and (output.numel() == 1 or output.dim() and output.shape[0] % rows):
            yield name or "the output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from without_rows(value, rows, f"{name}.{key}" if name else str(key))
    elif isinstance(output, (tuple, list)):
        for key, value in zip(getattr(output, "_fields", range(len(output))), output):
            at = f"[{key}]" if isinstance(key, int) else f".{key}" if name else key
            yield from without_rows(value, rows, name + at)


def tied(run: Callable[..., Any]) -> set[str]:
    """Names of the outputs that are no mean and no sum over records. ``run(i, j, k)``: the output for these three of
    two records, what is drawn at random drawn alike for a place whoever stands there.

    In (a, b, a) and (b, a, b) together each place has each record once, as in (a, a, a) and (b, b, b) together.
    """
    orders = ((0, 1, 0), (1, 0, 1), (0, 0, 0), (1, 1, 1))
    outputs = [dict(without_rows(run(*order), ROWS)) for order in orders]
    found = set()
    for name in set.intersection(*map(set, outputs)):
        values = [output[name].double() for output in outputs]
        if len({v.shape for v in values}) == 1:
            mixed, other, first, second = values
            scale = torch.stack([v.abs().max() for v in values]).max()
            far = (mixed + other - first - second).abs().max()
            if scale.isfinite() and far > RTOL * scale:  # a record without labels has no mean
                found.add(name)
    return found


def watch(output: Any, rows: int, names: set[str]) -> None:
    """From now on a backward that reaches one of the named outputs raises ValueError."""
    for name, t in without_rows(output, rows) if names else ():
        if name in names and t.requires_grad:
            t.register_hook(partial(_refuse, name))


def _refuse(name: str, gradient: Tensor) -> NoReturn:
    raise ValueError(
        f"{name}, which the model returns, divides by a count over the whole batch (its tokens, its boxes) or ties the "
        f"records together otherwise (a balance of experts, a contrast), so one record's gradient depends on the other "
        f"records and clipping cannot bound what one of them changes. Leave it out (of experts: "
        f"config.output_router_logits = False) and backpropagate a loss of each record's own instead: take the mean "
        f"over each record's own positions first and then over records (for class labels and language models: "
        f"lalora_kernels.record_losses(logits, labels, shift=...).mean())"
    )

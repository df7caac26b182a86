"""The check of the first batch where physical batches hold one record each: two of them are joined for it."""

import torch
from torch import Tensor, nn

from lalora_kernels.privacy.first_batch import Found, check_inputs
from lalora_kernels.privacy.trees import form, have_rows, leaves, of_rows, tree_map

KEPT = 8  # shapes: a sentence that is a batch of its own is as long as it is


class Singles:
    """Asked at every forward of one record until there is an answer; keeps copies of inputs until then."""

    def __init__(self) -> None:
        self._kept: dict[tuple, tuple] = {}

    def check(self, model: nn.Module, args: tuple, kwargs: dict) -> Found | None:
        """``check_inputs`` of this record and an earlier one of its shape; None where there is none that differs."""
        given = (args, kwargs)
        shape = (form(given), *((t.shape, t.dtype, t.device) for t in leaves(given)))
        earlier = self._kept.pop(shape, None)  # the later one is kept, as the first may not be finite
        self._kept[shape] = tree_map(lambda t: t.detach().clone(), given)
        if len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        if earlier is None:
            return None
        batched = have_rows(given, 1)
        before = iter([t for t, rows in zip(leaves(earlier), batched) if rows])

        def join(t: Tensor) -> Tensor:
            return torch.cat((next(before), t.detach()))

        args, kwargs = of_rows(join, given, batched)
        found = check_inputs(model, args, kwargs, 2, batched)
        if found is not None:
            self._kept.clear()
        return found

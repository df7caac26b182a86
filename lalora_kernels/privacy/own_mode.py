"""Gradients of the first batch's records in the model's own mode; check_per_sample's are those of eval mode.

A backward of its own (a layer that balances gradients) may couple the records in train mode alone, where no output
shows it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lalora_kernels.nn import set_active
from lalora_kernels.privacy.checks import (
    Coupled,
    compare,
    differing,
    from_one_state,
    listed,
    recorded_gradients,
)
from lalora_kernels.privacy.doubled import Doubled
from lalora_kernels.privacy.drawn import Drawn
from lalora_kernels.privacy.still import Stilled
from lalora_kernels.privacy.trees import of_rows, to_double
from lalora_kernels.privacy.twin import Apart, double, take_modes

Project = Callable[..., Tensor]  # (model, batch, and how the model's output k is weighed first)
Weigh = Callable[[int, Tensor], Tensor]


class OwnMode:
    """Gradients of two records on a copy of the model in its own mode, or in eval mode, drawn alike, from the same
    buffers."""

    def __init__(
        self, model: nn.Module, two: tuple, project: Project, sequence_first: frozenset[str], batched: list[bool],
        own: bool = True,
    ):  # fmt: skip
        self.twin, self.sequence_first, self.batched = double(model), sequence_first, batched
        self._apart = Apart(model, self.twin)
        if own:
            take_modes(self.twin, model)
        set_active(self.twin, "AB")
        self.two = to_double(two)
        self.project = from_one_state(self.twin, project)
        self._rowed: set[int] = set()  # outputs that grow with the records

    def __call__(self, *order: int, weights: tuple[float, ...] = (1.0, 1.0)) -> dict[str, Tensor]:
        def weigh(k: int, t: Tensor) -> Tensor:
            if k not in self._rowed:
                return t
            each = t.new_tensor(weights).repeat_interleave(t.shape[0] // len(weights))
            return t * each.view(-1, *(1 for _ in t.shape[1:]))

        with self._apart, Doubled(), Drawn(self.twin, 0):
            return recorded_gradients(
                self.twin, self._batch(order), lambda m, b: self.project(m, b, weigh), "sum", "reference", len(order),
                self.sequence_first,
            )[0]  # fmt: skip

    def _batch(self, order: tuple[int, ...]) -> Any:
        return of_rows(lambda t: t[list(order)], self.two, self.batched)

    def find_rows(self) -> None:
        def rows(*order: int) -> dict[int, int]:
            seen: dict[int, int] = {}

            def see(k: int, t: Tensor) -> Tensor:
                seen[k] = t.shape[0]
                return t

            with torch.no_grad(), self._apart, Doubled(), Drawn(self.twin, 0):
                self.project(self.twin, self._batch(order), see)
            return seen

        three = rows(0, 1, 0)
        self._rowed = {k for k, two in rows(0, 1).items() if 3 * two == 2 * three.get(k, 0)}

    def draws(self) -> bool:
        """Whether a forward draws at random."""
        with torch.no_grad(), self._apart, Doubled(), Drawn(self.twin, 0) as drawn:
            self.project(self.twin, self._batch((0, 1)))
        return drawn.any

    def coupled(self) -> list[str]:
        """The tensors of which a record's gradient depends on the one beside it, drawn alike: in (a, b) a's must be
        what it is in (a, a) with the other one's loss doubled, and b's what it is in (b, b)."""
        self.find_rows()
        found = self(0, 1)
        first, second = self(0, 0, weights=(1.0, 2.0)), self(1, 1, weights=(2.0, 1.0))
        expected = {name: torch.stack((first[name][0], second[name][1])) for name in found}
        return differing(found, expected)

    def same_again(self) -> bool:
        """Whether they are the same in another forward: not where something that is no buffer counts forwards, as the
        strength of a gradient that is reversed may follow them."""
        return not differing(self(0, 1), self(0, 1))


def compare_in_own_mode(
    model: nn.Module, two: tuple, project: Project, sequence_first: frozenset[str], batched: list[bool]
) -> None:
    """``compare`` of a model that draws nothing. What fails in train mode but couples no records is asked in eval mode:
    a checkpoint's second forward on a GPU is another thread's, which works in the model's own precision."""
    try:
        compare(model, two, project, "sum", "AB", sequence_first, batched, own_mode=True)
    except Exception as error:
        if not any(m.training for m in model.modules()):
            raise
        compare(model, two, project, "sum", "AB", sequence_first, batched)
        if isinstance(error, Coupled) and OwnMode(model, two, project, sequence_first, batched).same_again():
            raise


def compare_alike(
    model: nn.Module, two: tuple, project: Project, sequence_first: frozenset[str], batched: list[bool]
) -> None:
    """Raise ValueError where a record's gradient depends on the one beside it in the model's own mode. Beside one that
    counts twice as much, as the gradients that reach a layer before the head alone may be all alike; not alone, as that
    would be drawn otherwise."""
    gradients = OwnMode(model, two, project, sequence_first, batched)
    try:
        wrong = gradients.coupled()
    except Exception:  # as in compare_in_own_mode; eval mode has passed
        return
    if wrong and gradients.same_again():
        mode = " in train mode" if any(m.training for m in model.modules()) else ""
        raise Coupled(
            f"per-sample gradients of {listed(wrong)} depend on the other records of the batch{mode}, though no output "
            f"does: a hook or a custom backward couples them. Replace it, or keep its module in eval mode"
        )


def compare_drawn(
    model: nn.Module, two: tuple, project: Project, sequence_first: frozenset[str], batched: list[bool]
) -> None:
    """``compare`` of a model that draws at random. Where it does so in eval mode, too (a decoder's latent, a dropout
    that is never off), neither record's gradient may depend on the other, drawn alike, and without the draws each must
    be what it is alone."""
    gradients = OwnMode(model, two, project, sequence_first, batched, own=False)
    try:
        drawn = gradients.draws()
    except Exception:  # compare says why
        drawn = False
    if drawn and (wrong := gradients.coupled()):
        raise Coupled(
            f"per-sample gradients of {listed(wrong)} depend on the other records of the batch, though no output does: "
            f"a hook or a custom backward couples them; replace it"
        )
    with Stilled() if drawn else nullcontext():
        compare(model, two, project, "sum", "AB", sequence_first, batched)

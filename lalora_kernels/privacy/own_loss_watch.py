"""From the first batch on: which of the losses that a model returns, or keeps, a backward may not reach."""

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lalora_kernels.privacy.kept import watch_attributes
from lalora_kernels.privacy.own_loss import RTOL, is_without, refuse, watch, without_rows

if TYPE_CHECKING:
    from lalora_kernels.privacy.engine import Engine
    from lalora_kernels.privacy.first_batch import Found

ALIKE = 3  # backwards by which a sum is told that is divided by the same number in all batches


class OwnLosses:
    """Those that tie records together, and those that take them otherwise than ``make_private`` was told."""

    def __init__(self) -> None:
        self.tied: set[Any] = set()  # names of outputs, and places of attributes
        self.any = False  # the model returns, or keeps, something that may be one
        self._keeps = False  # a forward leaves something on its modules, which the next one may go on with
        self._kinds: dict[str, str | None] = {}
        self._seen: dict[str, list[tuple[float, int]]] = {}  # the last backwards' (weight, rows)

    def learn(self, found: "Found") -> None:
        """What a first batch's check tells."""
        self.tied |= found.tied
        self.any |= found.owns
        self._keeps |= found.keeps
        for name, kind in found.reductions.items():
            self._kinds[name] = kind if self._kinds.get(name, kind) == kind else None  # an argument may say which

    def watch(self, engine: "Engine", model: nn.Module, output: Any, rows: int) -> None:
        """From now on a backward raises ValueError that reaches what ties records together, or gives one that is taken
        otherwise a weight which is the same however many records there are."""
        if self.tied:
            if not self._alone(rows):
                watch(output, rows, self.tied)
            watch_attributes(model, self.tied)
        if rows < 2 or engine.graphing:  # one logit of one record looks like a loss
            return
        self.any = self.any or any(t.requires_grad for _, t in without_rows(output, rows))
        if any(self._other(name, engine) for name in self._kinds):
            for name, t in without_rows(output, rows):
                if t.requires_grad and self._other(name, engine):
                    t.register_hook(partial(self._look, engine, name, rows))

    def look(self, engine: "Engine", name: str, t: Tensor, gradient: Tensor, rows: int) -> bool:
        """The same within the backward of a compiled model, of one of its outputs and the gradient that reached it,
        zeros where none did. Returns whether the output is such a one as has no row for each record."""
        if not is_without(t, rows):
            return False
        name = name or "the output"
        if name in self.tied and not self._alone(rows) and gradient.any():
            refuse([name], gradient)
        if rows > 1 and self._other(name, engine):
            self._look(engine, name, rows, gradient)
        return True

    def _alone(self, rows: int) -> bool:
        """Whether a loss is that of one record, which no earlier one can have reached."""
        return rows == 1 and not self._keeps

    def _other(self, name: str, engine: "Engine") -> bool:
        return self._kinds.get(name) not in (engine.loss_reduction, None)

    def _look(self, engine: "Engine", name: str, rows: int, gradient: Tensor) -> None:
        if engine.reduction.loop.asking:
            return
        scale = engine._loss_scale()  # a GradScaler has none before it has scaled its first loss
        weight = float(gradient if scale is None else gradient.double() / scale)
        if not weight:
            return
        seen = self._seen[name] = [*self._seen.get(name, []), (weight, rows)][-ALIKE:]
        alike = len({r for _, r in seen}) > 1 and all(abs(w - weight) <= RTOL * abs(weight) for w, _ in seen)
        if weight == 1.0 or len(seen) == ALIKE and alike:
            kind = self._kinds[name]
            other = "mean" if kind == "sum" else "sum"
            raise ValueError(
                f"{name}, which the model returns, is a {kind} over the records of the batch, but make_private was "
                f"told loss_reduction={engine.loss_reduction!r}, so what one record changes would not be bounded by C; "
                f"pass loss_reduction={kind!r}, or have the model take a {other} (config.ctc_loss_reduction of CTC)"
            )

"""Does the loop's own loss take records as ``loss_reduction`` says? Told from numbers, in the first backwards.

The gradient of a cross-entropy with respect to the logits is k (softmax - target), the target smoothed or not, and of
a logistic loss k (sigmoid - target), where k is what the loss gives to that position. So logits and gradient show k:
1 / N is a mean over records and 1 a sum, while shares of 1 that differ come from a count over the whole batch (its
tokens, its class weights), by which each record's gradient depends on the others: no clipping bounds what one record
changes then. Of shares of another number (that loss, times 1/2) several batches tell. Any other k is a sum divided by a
number where it stays the same while N changes, a mean where k N does.
Where records have as many positions as the batch has records, or equally many, one k fits two of them: that tells
nothing, and the next batch is looked at. A batch's largest loss, or its few largest, leave most records without a
gradient; so do labels that are left out. The first takes as many records of every batch, or as large a share, which the
second does not go on doing: of any loss this tells. Else nothing is known here of other losses; ``check_per_sample``
takes any.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lalora_kernels import opaque
from lalora_kernels.privacy import compiled
from lalora_kernels.privacy.loop_loss import LoopLoss
from lalora_kernels.privacy.own_loss_watch import OwnLosses
from lalora_kernels.privacy.shares import (
    RTOL_HALF,
    SMALL,
    Shares,
    by_other_sizes,
    class_axis,
    coarse,
    lengths,
    reductions_of,
    renormalized,
    shares_of,
    uniform_weights,
    without_gradient,
)
from lalora_kernels.privacy.trees import leaves

if TYPE_CHECKING:
    from lalora_kernels.privacy.engine import Engine
    from lalora_kernels.privacy.sites import Site

TRIES = 4  # backwards that are looked at
# Equal lengths hide a mean over tokens: where those showed no others, so many more are asked for their lengths alone.
# So do labels of one class a mean over class weights, and labels that none lacks one over those that have one: while
# the logits are small, so many are asked in full.
WATCH = 256
PICKS = 16  # batches in a row in which as many records, or as large a share of them, have a gradient
RTOL = {torch.float64: 1e-3, torch.float32: 1e-3}
PICKED = (
    "{} of {} records have no gradient. A loss that picks records of the batch (its largest, the hardest few) is "
    "refused: whether a record counts depends on the others, and clipping cannot bound what one of them changes; give "
    "each record a loss of its own"
)
SHARES = (
    "the loss divides by a count over the whole batch (tokens that are not ignored, class weights), so one record's "
    "gradient depends on the other records and clipping cannot bound what one of them changes. Take the mean over each "
    "record's own positions first and then over records (for class labels and language models: "
    "lalora_kernels.record_losses(logits, labels, shift=...).mean()), or a sum with loss_reduction='sum'"
)


class ReductionCheck:
    """The engine's forward hook; a copy of the model gets one that checks nothing.

    Raises ValueError, within backward, where the loss is not reduced as claimed.
    """

    def __init__(self, engine: "Engine | None" = None, site: "Site | None" = None):
        self.engine, self.left, self.watch = engine, TRIES, WATCH
        if site is not None:
            self.handle, self.token = opaque.register(self), torch.zeros(1, device=site.param.device)
        self.seen: str | None = None
        self.own = OwnLosses()
        self.loop = LoopLoss(self._told)
        self._call, self._counted, self._full = 0, 0, False
        self._picked: list[tuple[int, int]] = []  # (records, those with a gradient) of batches where some have none
        self._reached: list[tuple[int, int]] = []  # the same of a loss of which nothing else is known
        self._scaled: dict[str, tuple[float, int, int]] = {}  # uniform_weights that are neither 1 / N nor 1
        self._watching = False  # for what the first backwards did not show
        self._axis: int | None = None  # of the classes, where lengths are still to be seen that differ
        self._before = self.left, self.watch
        # By what output: the calls whose shares add up to one number; None: some did not.
        self._totals: dict[tuple[int, int], dict[int, Shares] | None] = {}

    @property
    def looks(self) -> bool:
        """Whether the next backward is looked at."""
        return bool(self.left or self.watch > 0 and self._watching)

    def __call__(self, model: nn.Module, args: tuple, output: Any) -> Any:
        if self.engine is None:
            return None
        if torch.compiler.is_compiling():
            if not torch.is_grad_enabled():
                return None
            opaque.ended(self.token, self.handle)
            return compiled.looked(output, self.token, self.handle)
        self.ended()
        batch = self.engine.batch
        if batch is not None and torch.is_grad_enabled():
            self.own.watch(self.engine, model, output, batch.rows)
            if self._whole():
                self.loop.watch(model, output, batch.rows)
        if batch is None or not self._asks():
            return None
        self.began()
        for t in leaves(output):
            if t.is_floating_point() and t.requires_grad and t.dim() and t.shape[0] == batch.rows:
                t.register_hook(partial(self._look, self._call, t.detach()))
        return None

    def began(self) -> None:
        """A forward whose outputs' gradients are looked at."""
        self._call += 1

    def began_compiled(self) -> None:
        """The same of a compiled model."""
        self.began()
        if self.engine is not None and self.engine.batch is not None and self.engine.strict and self._whole():
            self.loop.watch_compiled(self.engine.model, self.engine.batch.rows)

    def ended(self) -> None:
        """A forward of the model."""
        if self.engine is not None:
            self.engine.within = max(self.engine.within - 1, 0)

    def _asks(self) -> bool:
        return self.looks and self._whole()

    def _whole(self) -> bool:
        """Whether a batch of several records without placeholders is there, and no graph of it."""
        e = self.engine
        batch = None if e is None or e.graphing else e.batch
        return batch is not None and 2 <= batch.valid == batch.rows

    def look(self, z: Tensor, dz: Tensor, name: str) -> None:
        """What a backward brought an output of a compiled model; zeros where it did not reach that one."""
        e = self.engine
        if e is None or e.batch is None or self.own.look(e, name, z, dz, e.batch.rows):
            return
        if z.shape[0] == e.batch.rows and self._asks() and dz.any():
            self._look(self._call, z, dz)

    @torch.no_grad()
    def _look(self, call: int, z: Tensor, dz: Tensor) -> None:
        e = self.engine
        if e is None or e.batch is None or self.loop.asking:
            return
        if call != self._counted:  # a model may return several tensors
            self._counted, self._full, self._before = call, self.left > 0, (self.left, self.watch)
            self.left, self.watch = self.left - self._full, self.watch - (not self._full)
        ragged = self._axis is not None and dz.dim() > self._axis and differ(lengths(dz, self._axis))
        if not self._full and not ragged and (dz.dim() > 2 and dz.numel() > SMALL):
            return
        try:
            self._judge(call, z, dz, self._full or ragged)
        except ValueError:  # or the loop that was refused so often would run
            self.left, self.watch = self._before
            raise

    def _judge(self, call: int, z: Tensor, dz: Tensor, anew: bool) -> None:
        """``anew``: not one of many looks for shares alone, among which anything else is there by chance some time."""
        e = self.engine
        assert e is not None
        if dz.numel() <= SMALL:  # one copy to the host, where every question below would wait for the device
            z, dz = z.cpu(), dz.cpu()
        rtol = RTOL.get(z.dtype, RTOL_HALF)
        fine = not coarse(dz, rtol)
        if (scale := e._loss_scale()) is not None:
            dz = dz.double() / scale.to(dz.device)
        again = self._by_total(call, z, dz, rtol) if fine and dz.numel() <= SMALL else None
        fits = ["shares"] if again == "shares" else reductions_of(z, dz, rtol) if anew else []
        if fits == ["shares"] and again == "own" and z.dim() < 3:
            return
        if anew and not fits:
            fits = self._by_other_sizes(z, dz)
        if not fits:
            if anew:
                self._refuse_picked(dz)
            return
        found = self._found(fits)
        if idle := int(without_gradient(z, dz).sum()):
            self._picked.append((len(z), len(z) - idle))
            if found != e.loss_reduction or chosen(self._picked):
                raise ValueError(
                    f"{PICKED.format(idle, len(z))}. If these records have no label, leave them out of the data set, "
                    f"or pass loss_reduction={found!r} where that is not so yet"
                )
            if len(self._picked) < PICKS:
                self.left += 1
                return
        self._refuse_other(found)
        if len(fits) > 1:
            self._look_again()
            return
        self.seen = found
        self._watch_for(z, dz)

    def _told(self, fits: list[str]) -> None:
        """What the second derivatives tell."""
        self._refuse_other(found := self._found(fits))
        self.seen = found

    def _found(self, fits: list[str]) -> str:
        """The reduction that was claimed, if it fits; raises ValueError where a count over the batch does alone."""
        assert self.engine is not None
        claimed = self.engine.loss_reduction
        found = claimed if claimed in fits else fits[0]
        if found == "shares":
            raise ValueError(SHARES)
        return found

    def _refuse_other(self, found: str) -> None:
        assert self.engine is not None
        claimed = self.engine.loss_reduction
        if found != claimed:
            raise ValueError(
                f"the loss is a {found} over the records of the batch, but make_private was told "
                f"loss_reduction={claimed!r}; pass loss_reduction={found!r}"
            )

    def _refuse_picked(self, dz: Tensor) -> None:
        """Raise ValueError where a loss of which nothing else is known takes as many records of every batch."""
        N, live = len(dz), int((dz != 0).reshape(len(dz), -1).any(1).sum())
        if not 0 < live < N:  # a pick takes some of every batch
            self._reached.clear()
            return
        self._reached.append((N, live))
        if chosen(self._reached):
            raise ValueError(
                f"{PICKED.format(N - live, N)}. If these records have no label, leave them out of the data set"
            )
        self.left += len(self._reached) < PICKS

    def _look_again(self) -> None:
        """Of one batch more, if this was to be the last."""
        if not self.left and self.watch > 0:
            self.left, self.watch = 1, self.watch - 1

    def _by_total(self, call: int, z: Tensor, dz: Tensor, rtol: float) -> str | None:
        """ "shares" where those of every batch so far add up to 1, or to another number that the loss is multiplied by,
        and "own" where they did not: weights that do not depend on the batch add up to 1 by chance, in some, as any
        loss of two logits' difference may."""
        now = shares_of(z, dz, rtol)
        if now is None:
            return None
        key = z.dim(), z.shape[1] if z.dim() == 2 else 0  # one for each head of a model of several
        seen = self._totals.setdefault(key, {})
        if seen is None or any(abs(now.total - other.total) > rtol * other.total for other in seen.values()):
            self._totals[key] = None
            return "own"
        seen[call] = now
        needed = 1 if now.certain else 2 if rtol < RTOL_HALF else 4
        if abs(now.total - 1.0) <= rtol:
            if len(seen) >= needed:
                return "shares"
        elif now.even:  # a mean times that number, or one class
            return None
        elif len(uneven := [s for s in seen.values() if not s.even]) >= needed + 2 and renormalized(uneven, rtol):
            return "shares"
        self._look_again()
        return None

    def _by_other_sizes(self, z: Tensor, dz: Tensor) -> list[str]:
        """What a loss times a number may take, told by two batches of other sizes."""
        rtol = RTOL.get(z.dtype, RTOL_HALF)
        now = uniform_weights(z, dz, rtol)
        if not now:  # a hidden state beside the logits
            return []
        before, self._scaled = self._scaled, now
        if not (fits := by_other_sizes(before, now, rtol)):
            self._look_again()
        return fits

    def _watch_for(self, z: Tensor, dz: Tensor) -> None:
        """What a mean over records does not tell from one over positions, labels or class weights while records have
        as many, or of one class."""
        if self.watch <= 0:
            return
        if z.dim() < 3:
            self._watching |= self.seen == "mean"  # of a sum there is nothing to be shared
            return
        axis = class_axis(z, dz)
        self._axis = None if axis is None or differ(lengths(dz, axis)) else axis
        self._watching = self._axis is not None
        if not self._watching:
            self.watch = 0  # told

    def remove(self) -> None:
        """As a handle's: no backward waits for it any longer."""
        self.loop.forget()

    def __deepcopy__(self, memo: dict) -> "ReductionCheck":
        return ReductionCheck()

    def __reduce__(self) -> tuple:
        return ReductionCheck, ()


def chosen(seen: list[tuple[int, int]]) -> bool:
    """Whether (records, those with a gradient) of ``PICKS`` batches show a fixed number, or a fixed share, of them."""
    seen = seen[-PICKS:]
    (N, live), sizes, counts = seen[0], {n for n, _ in seen}, {c for _, c in seen}
    share = all(n >= 8 and abs(c - n * live / N) < 1 for n, c in seen)  # of three records any number may be a third
    return len(seen) == PICKS and len(sizes) > 1 and (len(counts) == 1 or share)


def differ(counts: Tensor) -> bool:
    return bool((counts != counts[0]).any())

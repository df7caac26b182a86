"""Which calls of the model were seen to keep records apart, and which are still to be asked."""

from typing import TYPE_CHECKING

from torch import nn

from lalora_kernels.privacy.first_batch import Found, check_inputs
from lalora_kernels.privacy.own_loss_later import OwnLossCheck
from lalora_kernels.privacy.padding import PaddingCheck
from lalora_kernels.privacy.ragged import RaggedCheck
from lalora_kernels.privacy.singles import Singles
from lalora_kernels.privacy.trees import form

if TYPE_CHECKING:
    from lalora_kernels.privacy.engine import Engine


class ModelCheck:
    """``make_private(check=True)``: called with the arguments of every private forward before it.

    A call is known by its form (which arguments there are, and what its switches say) and by the modules that are in
    train mode: one of another form, or in the other mode, may run what the first did not, so each is asked once, of the
    first batch with two records that differ. What later batches tell beside that, ``PaddingCheck``, ``RaggedCheck`` and
    ``OwnLossCheck`` look for. Raises ValueError as ``check_inputs`` does.
    """

    def __init__(self) -> None:
        self.pending = True  # nothing of the model as it is now was seen yet
        self._seen: set[tuple] = set()
        self._located: set[str] = set()  # trained modules of which it is known along which axis they have records
        self._late = False  # records were told apart in a batch before that was known
        self._singles = Singles()
        self._packed: frozenset[str] = frozenset()  # trained modules with several rows for each record
        self._padding, self._ragged, self._own_loss = PaddingCheck(), RaggedCheck(), OwnLossCheck()

    def ask_again(self) -> None:
        """The model has other modules than before."""
        self.pending = True
        self._seen.clear()

    def stepped(self, valid: int) -> None:
        """A batch of so many records was backpropagated."""
        self._late |= self.pending and valid >= 2

    def __call__(self, engine: "Engine", model: nn.Module, args: tuple, kwargs: dict) -> None:
        batch, call = engine.batch, (engine.structure.modes(), form((args, kwargs)))
        assert batch is not None
        if batch.valid and (self.pending or call not in self._seen):
            with engine.between_batches():  # the check runs a copy: what is the model's own refuses meanwhile
                if batch.valid >= 2:
                    found = check_inputs(model, args, kwargs, batch.rows)
                else:
                    found = self._singles.check(model, args, kwargs) if batch.rows == 1 else None
            if found is not None:
                engine.reduction.own.learn(found)
                self._turn(engine, found)
                self._packed |= found.packed
                self.pending = False
                self._seen.add(call)
        if engine.graphing:
            return
        self._padding(model, args, kwargs)
        if self._packed and batch.valid >= 2:
            self._ragged(model, args, kwargs, batch.rows, self._packed)
        if engine.reduction.own.any and batch.valid >= 2:
            engine.reduction.own.tied |= self._own_loss(model, args, kwargs, batch.rows)

    def _turn(self, engine: "Engine", found: Found) -> None:
        """Have the engine read positions first where the check saw them. Raises ValueError where nothing shows it."""
        trained = {r.name: r.batch_axis for r in engine.recorders}
        turned = {name for name, axis in trained.items() if axis == 1}
        if found.sequence_first and (unknown := sorted(found.idle & trained.keys() - self._located)):
            raise ValueError(
                f"{', '.join(unknown)}: did not run in the first batch, and other layers of this model are given "
                f"positions first, so nothing shows along which axis its records would be; name it in exclude_modules, "
                f"or have it run in every batch"
            )
        if both := sorted((turned ^ found.sequence_first) & self._located - found.idle):
            raise ValueError(
                f"{', '.join(both)}: positions come before records there in one mode of the model, and behind them in "
                f"another, so their gradients cannot be taken apart; train in one mode, or name it in exclude_modules"
            )
        if found.sequence_first and self._late:
            raise RuntimeError(
                f"{', '.join(sorted(found.sequence_first))}: positions come before records there, which the batches "
                f"before this one, of records that are all alike, could not show; their gradients were taken apart "
                f"wrongly"
            )
        self._located |= trained.keys() - found.idle
        engine.turn(found.sequence_first)

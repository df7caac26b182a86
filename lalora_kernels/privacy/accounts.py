"""Which ledger a parameter trained under last, so that a second training of it does not begin at ε = 0 unseen."""

from collections.abc import Iterable

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lalora_kernels.privacy.ledger import Ledger

AGAIN = "detach() the optimizer and call make_private again, with ledger=optimizer.ledger, so that ε counts both"
CURE = (
    "Pass ledger=optimizer.ledger, the former optimizer's, so that ε counts both trainings; where they share no "
    "record, a new one: ledger=Ledger(target_epsilon=..., target_delta=...)"
)
_last: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> Ledger, while both are in use; not copied or pickled


def note(params: Iterable[nn.Parameter], ledger: Ledger) -> None:
    """These train under ``ledger`` from now on; one that has spent is not forgotten for one that has not."""
    for p in params:
        before = _last.get(p)
        if before is None or ledger.steps or not before.steps:
            _last[p] = ledger


def pass_on(source: Iterable[nn.Parameter], to: nn.Parameter) -> None:
    """``to`` holds from now on what the others have learned."""
    for p in source:
        if (ledger := _last.get(p)) is not None:
            note([to], ledger)


def refuse_second_account(params: Iterable[nn.Parameter], cure: str = CURE) -> None:
    """Raise ValueError where one of these has trained privately and nobody says under which ledger it goes on."""
    for p in params:
        before = _last.get(p)
        if before is not None and before.steps:
            raise ValueError(
                f"this model has been trained privately already ({before.steps} releases), and a new account would "
                f"begin at 0. {cure}"
            )

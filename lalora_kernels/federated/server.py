"""The server's side of a round: combine what the clients sent, measure the result on public test records."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lalora_kernels.data import BadInput
from lalora_kernels.federated.client import set_state
from lalora_kernels.federated.guard import Outcome, Rules, combine
from lalora_kernels.federated.methods import Method, base_name, products
from lalora_kernels.models import Classifier


class Server:
    """Holds the global state: every tensor that the federation moves, by name, on the CPU."""

    def __init__(
        self, method: Method, state: Mapping[str, Tensor], rules: Rules | None = None, scaling: float | None = None
    ):
        """``scaling``: s of the adapters, which a method that folds needs. Raises ValueError for rules that such a
        method, being exact for the mean of the products, cannot keep."""
        self.method, self.state, self.rules, self.scaling = method, dict(state), rules or Rules(), scaling
        if method.folds and (scaling is None or self.rules.aggregator != "mean" or self.rules.clip_update_norm):
            raise ValueError(
                f"{method.name} folds the exact mean of the products into the frozen weights: it needs the adapters' "
                f"scaling, --aggregator mean and no --clip-update-norm"
            )

    def refuse_unfit(self) -> None:
        """Raise BadInput where the method's work after the mean cannot be done on this state: before anybody pays."""
        if self.method.finish is None:
            return
        try:
            self.method.finish(self.state, [self.state], [1.0], self.scaling or 1.0, 1)
        except ValueError as error:
            raise BadInput(f"--method {self.method.name}: {error}") from error

    def reference(self, round: int) -> dict[str, Tensor]:
        """The tensors that travel in this round, as they are now."""
        frozen = {base_name(layer) for layer in products(self.state)} if self.method.folds else ()
        return {k: value for k, value in self.state.items() if self.method.travels(k, round) and k not in frozen}

    def aggregate(
        self,
        round: int,
        updates: Mapping[int, Mapping[str, Tensor]],
        weights: Mapping[int, float],
        chosen: int | None = None,
    ) -> Outcome:
        """Combine ``updates`` (client -> tensors), in order of client number, into the global state.

        What does not fit is left out, and the result names it. Below the quorum of ``chosen`` clients (default: all
        that sent something), and where nothing was sent, everything stays as it is.
        """
        chosen = len(updates) if chosen is None else chosen
        moved, outcome = combine(updates, weights, self.reference(round), self.rules, self.method.aggregate, chosen)
        self.state |= moved
        if outcome.moved and self.method.finish is not None:
            kept = outcome.accepted
            sent, shares = [updates[i] for i in kept], [weights[i] for i in kept]
            self.state |= self.method.finish(self.state, sent, shares, self.scaling or 1.0, round)
        return outcome

    def evaluate(self, classifier: Classifier, records: Dataset, batch_size: int = 256) -> tuple[float, float]:
        """(accuracy, mean cross entropy) of the global state on ``records``. The model is left in eval mode."""
        set_state(classifier.model, self.state)
        return evaluate(classifier, records, batch_size)


@torch.no_grad()
def evaluate(classifier: Classifier, records: Dataset, batch_size: int = 256) -> tuple[float, float]:
    """(accuracy, mean cross entropy) of the model as it is."""
    classifier.model.eval()
    right, loss, count = 0, 0.0, 0
    for batch in DataLoader(records, batch_size=batch_size, collate_fn=classifier.collate):
        inputs, labels = classifier.to_device(batch)
        logits = classifier.logits(inputs)
        right += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        count += len(labels)
    return right / count, loss / count


def update_bytes(update: Mapping[str, Tensor] | Sequence[Tensor]) -> int:
    """Bytes of an update's tensors, without headers."""
    tensors = update.values() if isinstance(update, Mapping) else update
    return sum(t.numel() * t.element_size() for t in tensors)

"""The server's side of a round: average what the clients sent, measure the result on public test records."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lalora_kernels.federated.client import set_state
from lalora_kernels.federated.methods import Method
from lalora_kernels.models import Classifier


class Server:
    """Holds the global state: every tensor that the federation moves, by name, on the CPU."""

    def __init__(self, method: Method, state: Mapping[str, Tensor]):
        self.method, self.state = method, dict(state)

    def aggregate(self, round: int, updates: Mapping[int, Mapping[str, Tensor]], weights: Mapping[int, float]) -> None:
        """Average ``updates`` (client -> tensors), in order of client number, into the global state.

        What did not travel in this round stays as it is. No update at all leaves everything as it is. Raises ValueError
        for an update that does not fit (naming the client).
        """
        expected = {key: value.shape for key, value in self.state.items() if self.method.travels(key, round)}
        clients = sorted(updates)
        for client in clients:
            self._refuse(client, updates[client], expected)
        if clients:
            self.state |= self.method.aggregate([updates[c] for c in clients], [weights[c] for c in clients])

    def _refuse(self, client: int, update: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
        if strange := sorted(set(update) ^ set(expected)):
            raise ValueError(f"client {client} sent other tensors than the method does: {', '.join(strange[:5])}")
        for key, value in update.items():
            if value.shape != expected[key]:
                raise ValueError(f"client {client}: {key} has shape {tuple(value.shape)}, not {tuple(expected[key])}")
            if not value.isfinite().all():
                raise ValueError(
                    f"client {client}: {key} became NaN or Inf, the training diverged; lower --lr or --momentum"
                )

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

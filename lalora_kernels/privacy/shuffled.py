"""A loader that is the user's own: bounded and noised like any other, worth no ε."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from lalora_kernels.privacy.sampling import BatchInfo, batch_rows, count_records


class ShuffledLoader:
    """The user's DataLoader as it is, each batch announced to the engine: ``make_private(poisson_sampling=False)``.

    Shuffled batches are not Poisson samples, so the accountant's amplification does not hold and no ε is reported.
    Iterating gives one pass; ``steps(k)`` gives k batches, starting over as often as needed. Each is one logical batch.
    """

    def __init__(self, data: DataLoader, *, on_batch: Callable[[BatchInfo], None] | None = None) -> None:
        self.dataset, self.on_batch, self._loader = data.dataset, on_batch, data
        if not data.batch_size:
            raise ValueError("this DataLoader has no batch_size; give it one, or use Poisson sampling")
        self.expected_batch_size = float(data.batch_size)
        self.sample_rate = min(1.0, data.batch_size / max(count_records(data.dataset), 1))

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            rows = batch_rows(batch)
            if self.on_batch is not None:
                self.on_batch(BatchInfo(rows=rows, valid=rows, first=True, last=True))
            yield batch

    def steps(self, count: int) -> Iterator[Any]:
        """``count`` batches, over as many passes as they take."""
        if not len(self):
            raise ValueError("the loader yields no batch")
        while count > 0:
            for batch in self:
                yield batch
                count -= 1
                if count <= 0:
                    return

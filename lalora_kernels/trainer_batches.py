"""Poisson batches as transformers' Trainer takes them: an item of its loop is one logical batch."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from lalora_kernels.privacy.sampling import BatchInfo, PrivateLoader, count_records


class LogicalBatch:
    """The physical batches of one Poisson draw, taken from the loader as they are asked for."""

    def __init__(self, owner: "PrivateBatches", stream: Iterator[Any]):
        self.owner, self.stream = owner, stream

    def __iter__(self) -> Iterator[tuple[Any, BatchInfo]]:
        for batch in self.stream:
            info = self.owner.info
            assert info is not None  # the loader announces a batch before it yields it
            yield batch, info
            if info.last:
                return


class PrivateBatches:
    """What the Trainer's loop takes for its data loader: round(1/q) logical batches a pass."""

    def __init__(self, data: DataLoader, expected_batch_size: float):
        self.data, self.dataset = data, data.dataset
        self.info: BatchInfo | None = None
        self.passes = max(1, round(count_records(data.dataset) / expected_batch_size))
        self.loader: PrivateLoader | None = None

    def bind(self, loader: PrivateLoader) -> None:
        """``loader`` is what make_private returned for ``data``."""
        begin = loader.on_batch
        assert begin is not None  # make_private's engine

        def announce(info: BatchInfo) -> None:
            self.info = info
            begin(info)

        self.loader, loader.on_batch = loader, announce

    def __len__(self) -> int:
        return self.passes

    def __iter__(self) -> Iterator[LogicalBatch]:
        assert self.loader is not None
        stream = self.loader.steps(len(self))
        for _ in range(len(self)):
            yield LogicalBatch(self, stream)

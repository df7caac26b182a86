"""Poisson batches: every record joins every logical batch with probability q, independently of all others.

That independence is what the accountant's amplification by sampling assumes; a shuffled loader does not have it.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    default_collate,
)

from lalora_kernels.privacy.collated import CollateCheck
from lalora_kernels.privacy.noise import NoiseSource, UniformSource, seed_from_system
from lalora_kernels.privacy.trees import tensors

# What a new loader takes over from the user's. The sampler is replaced; drop_last has no meaning where batches have no
# fixed size; in_order stays at its default, because each batch is announced in the order it was drawn.
INHERITED = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)


@dataclass(frozen=True)
class BatchInfo:
    """What the engine must know of a physical batch before the model sees it.

    rows: leading dimension of every tensor in the batch.
    valid: rows from ``valid`` on are placeholders and contribute nothing.
    first, last: whether this is the first, the last physical batch of its logical batch.
    seeded: whether the global random generators were seeded for it, which they must be still when the model is called.
    iteration: which of the loader's iterations it came in.
    """

    rows: int
    valid: int
    first: bool
    last: bool
    seeded: bool = False
    iteration: int = 0


class PoissonBatchSampler(Sampler[list[int]]):
    """Draws logical batches of a set of ``records`` records and splits them into physical ones.

    A record joins where a fresh 64-bit uniform u < floor(q 2^64), so with probability at most q and at least q - 2^-64.
    The uniforms come from ``source`` (default: a new secret key), each used once, whatever becomes of the batch.
    ``lengths``, one a record: a logical batch that is split is split in their order, longest first, so that records of
    like length are padded together. Which records are drawn does not change, nor the sum of their gradients.
    """

    def __init__(
        self,
        records: int,
        sample_rate: float,
        *,
        physical_batch_size: int | None = None,
        source: UniformSource | None = None,
        rank: int = 0,
        world: int = 1,
        lengths: Sequence[float] | None = None,
    ) -> None:
        self.rank, self.world = rank, world
        if lengths is not None and len(lengths) != records:
            raise ValueError(f"lengths has one number a record; got {len(lengths)} for {records} records")
        self.lengths = lengths
        self.records, self._sample_rate = records, check_sample_rate(sample_rate)
        if records < 1:
            raise ValueError("the data set has no records; a client without data cannot train")
        if physical_batch_size is not None and (type(physical_batch_size) is not int or physical_batch_size < 1):
            raise ValueError(f"physical_batch_size is a whole number >= 1 or None, got {physical_batch_size!r}")
        self.physical_batch_size = physical_batch_size
        self.source = UniformSource() if source is None else source
        self.logical_batches = len(self)
        self.infos: deque[BatchInfo] = deque()

    @property
    def sample_rate(self) -> float:
        """q: fixed, since it is what the ledger is charged."""
        return self._sample_rate

    def __len__(self) -> int:
        """Logical batches in which the expected number of draws is one per record: 1/q, rounded, at least 1."""
        return min(max(1, round(1 / self.sample_rate)), sys.maxsize)

    def draw(self) -> list[int]:
        """One logical batch: indices in ascending order; maybe none."""
        bound = int(self.sample_rate * 2.0**64)  # exact: a power of two only moves the exponent
        high, low = bound >> 32, bound & 0xFFFFFFFF
        words = self.source.words(self.records)
        joins = words < high
        # The low half decides only where the high half ties, one record in 2^32: it is drawn then and not before.
        ties = (words == high).nonzero().flatten()
        if ties.numel():
            joins[ties] = self.source.words(ties.numel()) < low
        return joins.nonzero().flatten().tolist()

    def split(self, indices: list[int]) -> Iterator[tuple[list[int], BatchInfo]]:
        """Physical batches of one logical batch, in order. No record at all: record 0 as a placeholder, valid 0."""
        if not indices:
            yield [0], BatchInfo(rows=1, valid=0, first=True, last=True)
            return
        if self.lengths is not None and self.physical_batch_size is not None:
            indices = sorted(indices, key=self.lengths.__getitem__, reverse=True)
        start = 0
        while start < len(indices):
            size = self.physical_batch_size or len(indices)  # it may have been set meanwhile
            part = indices[start : start + size]
            yield part, BatchInfo(len(part), len(part), first=start == 0, last=start + size >= len(indices))
            start += size

    def __iter__(self) -> Iterator[list[int]]:
        """Physical batches of ``logical_batches`` logical ones, noting each one's BatchInfo in ``infos``."""
        return self._physical(self.logical_batches, self.infos)

    def _physical(self, count: int, infos: deque[BatchInfo]) -> Iterator[list[int]]:
        for _ in range(count):
            for part, info in self.split(self.draw()[self.rank :: self.world]):
                infos.append(info)
                yield part


class PrivateLoader:
    """A DataLoader whose logical batches are Poisson samples.

    Iterating gives one pass, ``len(loader)`` = round(1/q) logical batches; ``steps(k)`` gives exactly k. Both yield
    physical batches as the user's collate function makes them. ``on_batch`` is called with each one's BatchInfo in this
    process right before the batch is yielded, whatever the workers have prefetched. An empty draw yields record 0 as a
    placeholder, of which nothing is released (not zeros, which a model may refuse: an image, and no place for it in the
    text). Before each batch the global generators of torch, NumPy and Python are seeded anew from the operating system,
    since dropout and augmentation must be as unknown as the noise.

    Args:
        data: a DataLoader, whose data set, collate function, workers and pinning stay, or a map-style Dataset.
        sample_rate: q in (0, 1].
        expected_batch_size: b = q |D|. Give either; with neither, b is the DataLoader's batch size.
        physical_batch_size: largest number of records in a yielded batch; None: a logical batch is never split.
        noise: the run's NoiseSource; where its key is fixed (tests) the draws are reproducible as well.
        on_batch: called with the BatchInfo of every batch.
        lengths: one number a record (tokens, characters): what is split is split in this order, which pads less.
        source, rank, world: draw from this stream, and take every ``world``-th drawn record from the ``rank``-th on;
            with one stream the ranks' batches are one Poisson batch.
        check: ask of a collate function's first batches whether it makes a row of several records.

    Raises ValueError for a data set that is iterable-only, of unknown length, empty or smaller than b, for rates out of
    range, lengths that are not one a record, and for a sampler that picks its records by another rule. While iterating:
    ValueError for a tensor whose first dimension is not the number of records, and for a collate function that mixes
    them, RuntimeError where a second iteration overtook this one.
    """

    def __init__(
        self,
        data: DataLoader | Dataset,
        *,
        sample_rate: float | None = None,
        expected_batch_size: float | None = None,
        physical_batch_size: int | None = None,
        noise: NoiseSource | None = None,
        on_batch: Callable[[BatchInfo], None] | None = None,
        lengths: Sequence[float] | None = None,
        source: UniformSource | None = None,
        rank: int = 0,
        world: int = 1,
        check: bool = False,
    ) -> None:
        if isinstance(data, PrivateLoader):
            raise ValueError("this loader is private already; PrivateLoader takes the plain DataLoader")
        given = data if isinstance(data, DataLoader) else None
        self.dataset: Dataset = data.dataset if isinstance(data, DataLoader) else data
        records = count_records(self.dataset)
        refuse_copies(self.dataset)
        batch_size = None if given is None else _plain_batch_size(given, records)
        q, self.expected_batch_size = rates(records, sample_rate, expected_batch_size, batch_size)
        self.on_batch = on_batch
        noise = NoiseSource() if noise is None else noise
        self.batch_sampler = PoissonBatchSampler(
            records,
            q,
            physical_batch_size=physical_batch_size,
            source=noise.uniform_source() if source is None else source,
            rank=rank,
            world=world,
            lengths=lengths,
        )
        inherited = {} if given is None else {name: getattr(given, name) for name in INHERITED}
        if check and inherited.get("collate_fn", default_collate) is not default_collate:
            inherited["collate_fn"] = CollateCheck(inherited["collate_fn"])
        self._secret = noise.is_secret
        if self._secret:
            inherited["worker_init_fn"] = SecretWorker(inherited.get("worker_init_fn"))
        self._loader = DataLoader(self.dataset, batch_sampler=self.batch_sampler, **inherited)
        self._iterations = 0

    @property
    def sample_rate(self) -> float:
        """q: fixed, since it is what the ledger is charged; another one takes another make_private."""
        return self.batch_sampler.sample_rate

    @property
    def physical_batch_size(self) -> int | None:
        """Largest number of records in a yielded batch, or None."""
        return self.batch_sampler.physical_batch_size

    def __getattr__(self, name: str) -> Any:
        if name in INHERITED:  # asked for by what makes another DataLoader of this one
            raise AttributeError(
                f"a PrivateLoader has no {name}. A DataLoader made of it (Opacus' BatchMemoryManager) would yield "
                f"batches of which the optimizer is not told; iterate this one, and have large batches split by "
                f"make_private(physical_batch_size=...)"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __len__(self) -> int:
        """Logical batches in a pass. Physical batches may be more: their number is random."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        """One pass: the physical batches of ``len(self)`` logical ones."""
        return self.steps(len(self))

    def steps(self, count: int) -> Iterator[Any]:
        """The physical batches of exactly ``count`` logical ones, which is ``count`` private steps."""
        if type(count) is not int or count < 0:
            raise ValueError(f"steps takes a whole number >= 0 of logical batches, got {count!r}")
        return self._run(count)

    def _run(self, count: int) -> Iterator[Any]:
        self._iterations += 1
        mine, infos = self._iterations, deque[BatchInfo]()
        self.batch_sampler.logical_batches, self.batch_sampler.infos = count, infos
        batches = iter(self._loader)
        while True:
            if mine != self._iterations:
                raise RuntimeError("a second iteration of this loader began; finish one before starting the next")
            if self._secret:
                seed_from_system()
            try:
                batch = next(batches)
            except StopIteration:
                return
            info = replace(infos.popleft(), seeded=self._secret, iteration=mine)
            if self._secret:
                seed_from_system()  # a data set may set one for each record
            for name, leaf in tensors(batch):
                if leaf.dim() == 0 or leaf.shape[0] != info.rows:
                    raise ValueError(
                        f"{name or 'the tensor'} of the batch has shape {tuple(leaf.shape)} for {info.rows} records; "
                        f"every tensor that collate_fn returns needs one row for each record, first. What a record has "
                        f"several of (boxes, patches, a chosen and a rejected text) goes along another axis, padded; "
                        f"for a model that takes it one after the other (Qwen2-VL), flatten it in a module around that"
                    )
            if self.on_batch is not None:
                self.on_batch(info)
            yield batch


class SecretWorker:
    """A worker's start: the user's ``worker_init_fn``, if any, and then seeds that nobody knows."""

    def __init__(self, theirs: Callable[[int], None] | None):
        self.theirs = theirs

    def __call__(self, worker: int) -> None:
        if self.theirs is not None:
            self.theirs(worker)
        seed_from_system()


def check_sample_rate(sample_rate: float) -> float:
    """``sample_rate`` as a float, or ValueError: it lies in (0, 1]."""
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, Real) or not 0.0 < sample_rate <= 1.0:
        raise ValueError(
            f"sample_rate is a number in (0, 1], the probability that a record joins a batch; got {sample_rate!r}"
        )
    return float(sample_rate)


def count_records(dataset: Dataset) -> int:
    """How many the data set has. Raises ValueError where it does not know, or has no numbers for them."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "an IterableDataset cannot be Poisson-sampled, since its records cannot be addressed; wrap it in a "
            "map-style Dataset with __len__ and __getitem__"
        )
    if isinstance(dataset, Mapping) and dataset.keys() != set(range(len(dataset))):
        raise ValueError(
            f"the data set is a {type(dataset).__name__} with the keys {', '.join(map(repr, dataset))[:70]}, and "
            f"records are looked up by number from 0; give a list of them, or a map-style Dataset such as TensorDataset"
        )
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError("Poisson sampling needs a data set of known size; give it a __len__") from None


def refuse_copies(dataset: Dataset) -> None:
    """Raise ValueError where a record stands in the data set more than once by its index: in a Subset, or in a
    ConcatDataset of one data set several times. Equal records of other indices are not looked for."""
    if isinstance(dataset, (Subset, ConcatDataset)):
        places = _places(dataset)
        if len(set(places)) < len(places):
            raise ValueError(
                f"the data set ({type(dataset).__name__}) holds records more than once, and k copies of a record cost "
                f"k times its ε; leave the repeats out, and weight single records' losses instead of oversampling"
            )


def _places(dataset: Any) -> list[tuple[int, int]]:
    if isinstance(dataset, Subset):
        within = _places(dataset.dataset)
        return [within[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [place for part in dataset.datasets for place in _places(part)]
    return [(id(dataset), i) for i in range(count_records(dataset))]


def _plain_batch_size(loader: DataLoader, records: int) -> int | None:
    """The loader's batch size, after making sure that its sampler chose the order of the records and nothing else."""
    batches = loader.batch_sampler
    if batches is None:
        raise ValueError("this DataLoader does not batch (batch_size=None); give it a batch_size and a collate_fn")
    sampler: Any = getattr(batches, "sampler", None)
    if type(batches) is not BatchSampler or type(sampler) not in (SequentialSampler, RandomSampler):
        culprit = type(batches if type(batches) is not BatchSampler else sampler).__name__
        raise ValueError(
            f"the DataLoader's {culprit} decides which records are drawn, and Poisson sampling would replace it; pass "
            f"a loader without it (for a part of the data: torch.utils.data.Subset, without repeats, since k copies of "
            f"a record cost k times its ε)"
        )
    if len(sampler.data_source) != records:
        raise ValueError(
            f"the DataLoader's sampler walks {len(sampler.data_source)} records of a data set of {records}; pass a "
            f"loader over the records that are meant, for instance with torch.utils.data.Subset"
        )
    return batches.batch_size


def rates(
    records: int, sample_rate: float | None, expected: float | None, batch_size: int | None
) -> tuple[float, float]:
    """q and b = q |D| from whichever was given."""
    if records == 0:
        raise ValueError("the data set has no records; a client without data cannot train")
    if sample_rate is not None:
        q = check_sample_rate(sample_rate)
        if expected is None:
            return q, q * records
        if not isinstance(expected, Real) or not abs(q * records - expected) <= 0.5:
            raise ValueError(
                f"sample_rate {q} of {records} records is {q * records:.1f}, not expected_batch_size {expected!r}; "
                f"give one of the two"
            )
        return q, float(expected)
    b = batch_size if expected is None else expected
    if b is None:
        raise ValueError("give sample_rate or expected_batch_size: a Dataset alone has no batch size")
    if isinstance(b, bool) or not isinstance(b, Real) or not 0.0 < b < math.inf:
        raise ValueError(f"expected_batch_size is a finite number > 0, got {b!r}")
    if b > records:
        raise ValueError(
            f"the data set has {records} records, fewer than the expected batch size {b:g}; choose a batch size of at "
            f"most {records}, or give this client more data"
        )
    return b / records, float(b)


def batch_rows(batch: Any) -> int:
    """Records in a collated batch: the first dimension that all its tensors share. Raises ValueError where none is."""
    sizes = {name: leaf.shape[0] if leaf.dim() else 0 for name, leaf in tensors(batch)}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(
            f"the batch's tensors have no common first dimension ({sizes}); every tensor that collate_fn returns needs "
            f"one row for each record, first"
        )
    return next(iter(sizes.values()))

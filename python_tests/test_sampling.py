"""Poisson batches follow their law, and the loader keeps the user's data pipeline and says what each batch is."""

from collections import UserDict, namedtuple
from operator import attrgetter

import numpy as np
import pytest
import torch
from scipy import stats
from tolerances import FALSE_ALARM
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lalora_kernels.privacy.noise import NoiseSource, UniformSource
from lalora_kernels.privacy.sampling import INHERITED, BatchInfo, PoissonBatchSampler, PrivateLoader
from lalora_kernels.privacy.trees import tree_map

KEY = bytes(range(32))


def tensors(n=40):
    return TensorDataset(torch.arange(n), torch.arange(n, dtype=torch.float32).view(n, 1) + 1)


def fixed(data, **kwargs):
    return PrivateLoader(data, noise=NoiseSource.fixed(KEY), **kwargs)


class Words:
    """A uniform source that says what it is told to."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def words(self, count):
        answer = torch.tensor(self.answers.pop(0))
        assert answer.numel() == count
        return answer


# ---------------------------------------------------------------- the law


def poisson_p_value(joins: np.ndarray, q: float) -> float:
    """Smallest p of four tests of a (draws, records) 0/1 matrix, Bonferroni-corrected: binomial batch sizes, each
    record's rate, independence of every pair of records, independence of successive draws."""
    draws, records = joins.shape
    sizes = joins.sum(1)
    low, high = (int(stats.binom.ppf(p, records, q)) for p in (0.01, 0.99))
    cells = np.arange(low, high)
    expected = np.concatenate(
        [
            [stats.binom.cdf(low - 1, records, q)],
            stats.binom.pmf(cells, records, q),
            [stats.binom.sf(high - 1, records, q)],
        ]
    )
    observed = np.concatenate([[np.sum(sizes < low)], [np.sum(sizes == c) for c in cells], [np.sum(sizes >= high)]])
    size_p = stats.chisquare(observed[expected > 0], draws * expected[expected > 0]).pvalue

    def smallest(z):
        return 2 * stats.norm.sf(np.abs(z)).min() * z.size

    centred = (joins - q) / np.sqrt(q * (1 - q))
    rate_p = smallest(centred.sum(0) / np.sqrt(draws))
    pairs = (centred.T @ centred / np.sqrt(draws))[np.triu_indices(records, 1)]
    lagged = centred[1:].T @ centred[:-1] / np.sqrt(draws - 1)
    return min(1.0, 4 * min(size_p, rate_p, smallest(pairs), smallest(lagged.ravel())))


def matrix(batches, records):
    joins = np.zeros((len(batches), records))
    for row, batch in zip(joins, batches):
        row[batch] = 1
    return joins


@pytest.mark.parametrize("q", [0.05, 0.5])
def test_batches_follow_poisson_sampling(q):
    sampler = PoissonBatchSampler(60, q, source=UniformSource.fixed(KEY))
    assert poisson_p_value(matrix([sampler.draw() for _ in range(5000)], 60), q) > FALSE_ALARM


@pytest.mark.parametrize("fault", ["shuffled", "wrong rate", "twins", "repeats"])
def test_the_test_of_the_law_rejects_what_is_not_poisson_sampling(fault):
    rng = np.random.default_rng(0)
    joins = rng.random((5000, 60)) < 0.1
    if fault == "shuffled":
        joins = np.argsort(rng.random((5000, 60)), axis=1) < 6
    elif fault == "wrong rate":
        joins = rng.random((5000, 60)) < 0.11
    elif fault == "twins":
        joins[:, 7] = np.where(rng.random(5000) < 0.2, joins[:, 41], joins[:, 7])
    else:
        joins[1:, 3] = np.where(rng.random(4999) < 0.2, joins[:-1, 3], joins[1:, 3])
    assert poisson_p_value(joins.astype(float), 0.1) < FALSE_ALARM


def test_the_low_half_of_the_uniform_decides_a_tie():
    q = 0.3  # floor(0.3 * 2^64), high and low half
    high, low = divmod(int(0.3 * 2.0**64), 1 << 32)
    assert low > 0
    source = Words([high - 1, high, high, high + 1, 0], [low - 1, low])
    assert PoissonBatchSampler(5, q, source=source).draw() == [0, 1, 4]
    assert source.answers == []


def test_rate_one_takes_every_record_and_a_rate_of_nearly_nothing_none():
    top = (1 << 32) - 1
    assert PoissonBatchSampler(3, 1.0, source=Words([0, top, top])).draw() == [0, 1, 2]
    assert PoissonBatchSampler(3, 2.0**-64, source=Words([0, 0, 1], [0, 1])).draw() == [0]


def test_secret_loaders_draw_differently_and_fixed_ones_alike():
    def draws(loader):
        return [loader.batch_sampler.draw() for _ in range(3)]

    data = tensors(200)
    a, b = (draws(PrivateLoader(data, sample_rate=0.5)) for _ in range(2))
    c, d = (draws(fixed(data, sample_rate=0.5)) for _ in range(2))
    assert a != b and c == d and c[0] != c[1]


# ---------------------------------------------------------------- logical and physical batches


@pytest.mark.parametrize("size", [None, 1, 3, 7, 100])
def test_a_logical_batch_is_split_in_order(size):
    sampler = PoissonBatchSampler(30, 0.4, physical_batch_size=size)
    indices = list(range(5, 19))
    parts, infos = zip(*sampler.split(indices))
    assert sum(parts, []) == indices
    assert [len(p) for p in parts] == [i.rows for i in infos] == [i.valid for i in infos]
    assert max(map(len, parts)) <= (size or 14) and min(map(len, parts)) >= 1
    assert [i.first for i in infos] == [True] + [False] * (len(infos) - 1)
    assert [i.last for i in infos] == [False] * (len(infos) - 1) + [True]


def test_records_of_like_length_are_split_together_and_the_draw_stays():
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3] * 4
    plain, ordered, whole = (
        PoissonBatchSampler(40, 0.5, physical_batch_size=size, lengths=by, source=UniformSource.fixed(KEY))
        for size, by in ((4, None), (4, lengths), (None, lengths))
    )
    for _ in range(5):
        drawn, by_length, unsplit = ([p for p, _ in s.split(s.draw())] for s in (plain, ordered, whole))
        assert sum(drawn, []) == sorted(sum(by_length, [])) == sum(unsplit, []) and len(drawn) > 2
        assert [lengths[i] for i in sum(by_length, [])] == sorted((lengths[i] for i in sum(drawn, [])), reverse=True)
        padded = [sum(len(part) * max(lengths[i] for i in part) for part in parts) for parts in (drawn, by_length)]
        assert padded[1] < padded[0]


@pytest.mark.parametrize("size", [None, 2])
def test_steps_yields_exactly_that_many_logical_batches(size):
    infos = []
    loader = fixed(tensors(), sample_rate=0.05, physical_batch_size=size, on_batch=infos.append)
    twin = PoissonBatchSampler(40, 0.05, source=UniformSource.fixed(KEY))
    seen, logical = [], []
    for index, _ in loader.steps(50):
        info = infos[-1]
        seen += index[: info.valid].tolist()
        if info.last:
            logical.append(seen)
            seen = []
    assert logical == [twin.draw() for _ in range(50)]
    assert [] in logical and max(map(len, logical)) > 4
    assert sum(i.first for i in infos) == sum(i.last for i in infos) == 50
    assert list(loader.steps(0)) == []


def test_one_pass_has_as_many_logical_batches_as_the_rate_says():
    for q, expected in ((0.1, 10), (0.3, 3), (0.9, 1), (1.0, 1), (1 / 16, 16)):
        infos = []
        loader = fixed(tensors(), sample_rate=q, on_batch=infos.append)
        assert len(loader) == expected
        for _ in range(2):
            infos.clear()
            list(loader)
            assert sum(i.last for i in infos) == expected


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4}])
def test_each_batch_is_announced_right_before_it_is_yielded(workers):
    infos = []
    plain = DataLoader(tensors(), batch_size=4, **workers)
    loader = fixed(plain, sample_rate=0.15, physical_batch_size=3, on_batch=infos.append)
    for turn in range(2):
        infos.clear()
        for i, (index, _) in enumerate(loader.steps(20), 1):
            assert len(infos) == i and len(index) == infos[-1].rows
            if turn == 0 and i == 5:
                break  # the prefetched rest is dropped; the next iteration starts with its own
    assert infos[0].first and infos[-1].last and sum(info.last for info in infos) == 20
    assert len({info.rows for info in infos}) > 1


def test_an_overtaken_iteration_is_refused():
    loader = fixed(tensors(), sample_rate=0.5)
    first = iter(loader.steps(3))
    next(first)
    second = iter(loader.steps(3))
    next(second)
    with pytest.raises(RuntimeError, match="second iteration"):
        next(first)
    assert len(list(second)) == 2


# ---------------------------------------------------------------- the placeholder

Pair = namedtuple("Pair", "x y")


def test_an_empty_draw_is_the_first_record_as_it_is():
    """Zeros are no record of many models': an image, and no place for it in the text."""

    def collate(records):
        return {"ids": torch.tensor(records) + 4, "text": ["private"] * len(records)}

    infos = []
    plain = DataLoader(range(3), batch_size=1, collate_fn=collate)
    (empty,) = fixed(plain, sample_rate=1e-12, on_batch=infos.append).steps(1)
    assert infos == [BatchInfo(rows=1, valid=0, first=True, last=True, iteration=1)]
    assert empty["ids"].tolist() == [4] and empty["text"] == ["private"]


@pytest.mark.parametrize("kind", ["BatchEncoding", "modeling_outputs.SequenceClassifierOutput"])
def test_what_transformers_calls_a_batch_stays_one(kind):
    """A ModelOutput has no update()."""
    transformers = pytest.importorskip("transformers")
    made = attrgetter(kind)(transformers)({"logits": torch.ones(1, 2), "loss": torch.ones(1)})
    zeros = tree_map(torch.zeros_like, made)
    assert type(zeros) is type(made) and made["loss"].all()
    assert torch.equal(zeros.logits, torch.zeros(1, 2)) and not zeros["loss"].any()


def test_mappings_and_tuples_stay_what_they_are():
    Pair = namedtuple("Pair", "x y")
    x = torch.ones(2)
    found = tree_map(torch.zeros_like, {"mapping": UserDict(ids=x, text=["private"]), "pair": Pair(x, (x, [x.half()]))})
    assert type(found["mapping"]) is UserDict and found["mapping"]["text"] == ["private"]
    assert type(found["pair"]) is Pair and type(found["pair"].y) is tuple
    for zero in (found["mapping"]["ids"], found["pair"].x, found["pair"].y[0], found["pair"].y[1][0]):
        assert zero.shape == (2,) and not zero.any()
    assert found["pair"].y[1][0].dtype is torch.float16 and x.all()


# ---------------------------------------------------------------- the user's pipeline


def worker_init(worker):
    torch.manual_seed(worker)


def test_the_users_pipeline_stays():
    def collate(records):
        return torch.stack([r[1] for r in records])

    plain = DataLoader(
        tensors(),
        batch_size=5,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        collate_fn=collate,
        timeout=60,
        worker_init_fn=worker_init,
        multiprocessing_context="fork",
        generator=torch.Generator(),
        prefetch_factor=3,
        persistent_workers=True,
    )
    loader = fixed(plain)
    assert {"collate_fn", "num_workers", "pin_memory", "worker_init_fn"} < set(INHERITED)
    for name in INHERITED:
        assert getattr(loader._loader, name) == getattr(plain, name), name
    assert loader.dataset is plain.dataset
    assert (loader.sample_rate, loader.expected_batch_size, len(loader)) == (0.125, 5.0, 8)


def test_spawned_workers_get_no_key():
    """A key refuses to be pickled, so a loader that sent one to a spawned worker would fail."""
    plain = DataLoader(TensorDataset(torch.ones(6, 1)), batch_size=6, num_workers=1, multiprocessing_context="spawn")
    (batch,) = PrivateLoader(plain).steps(1)
    assert batch[0].shape == (6, 1)


def test_rates_from_either_argument():
    data = tensors(40)
    assert fixed(data, sample_rate=0.25).expected_batch_size == 10.0
    assert fixed(data, expected_batch_size=10).sample_rate == 0.25
    assert fixed(DataLoader(data, batch_size=8)).sample_rate == 0.2
    assert fixed(DataLoader(data, batch_size=8), sample_rate=0.5).expected_batch_size == 20.0
    both = fixed(data, sample_rate=0.25, expected_batch_size=10)
    assert (both.sample_rate, both.expected_batch_size) == (0.25, 10.0)
    shuffled = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, drop_last=False))
    assert fixed(shuffled).sample_rate == 0.1


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Unsized(Dataset):
    def __getitem__(self, i):
        return i


DATA = tensors(40)
REFUSED = {
    "iterable": (Stream(), {"sample_rate": 0.5}, "IterableDataset.*map-style"),
    "columns": ({"x": torch.ones(9), "y": torch.ones(9)}, {"sample_rate": 0.5}, "a dict with the keys 'x', 'y', and"),
    "a dict from 1": (dict.fromkeys(range(1, 10)), {"sample_rate": 0.5}, "looked up by number from 0; give a list"),
    "unsized": (Unsized(), {"sample_rate": 0.5}, "known size.*__len__"),
    "empty": (tensors(0), {"sample_rate": 0.5}, "no records"),
    "no rate": (DATA, {}, "give sample_rate or expected_batch_size"),
    "rate 0": (DATA, {"sample_rate": 0}, r"sample_rate is a number in \(0, 1\].*got 0"),
    "rate 2": (DATA, {"sample_rate": 2.0}, r"sample_rate is a number in \(0, 1\].*got 2.0"),
    "rate nan": (DATA, {"sample_rate": float("nan")}, "sample_rate is a number.*nan"),
    "rate true": (DATA, {"sample_rate": True}, "sample_rate is a number.*True"),
    "batch 0": (DATA, {"expected_batch_size": 0}, "expected_batch_size is a finite number > 0, got 0"),
    "batch nan": (DATA, {"expected_batch_size": float("nan")}, "expected_batch_size is a finite number"),
    "both": (DATA, {"sample_rate": 0.5, "expected_batch_size": 10}, "0.5 of 40 records is 20.0, not.*10; give one"),
    "large batch": (DATA, {"expected_batch_size": 41}, "40 records, fewer than the expected batch size 41; choose"),
    "large loader": (DataLoader(DATA, batch_size=64), {}, "40 records, fewer than the expected batch size 64"),
    "physical 0": (
        DATA,
        {"sample_rate": 0.5, "physical_batch_size": 0},
        "physical_batch_size is a whole number.*got 0",
    ),
    "physical 1.5": (DATA, {"sample_rate": 0.5, "physical_batch_size": 1.5}, "physical_batch_size.*got 1.5"),
    "lengths": (DATA, {"sample_rate": 0.5, "lengths": [1] * 39}, "one number a record; got 39 for 40 records"),
    "unbatched": (DataLoader(DATA, batch_size=None), {"sample_rate": 0.5}, "does not batch"),
    "subset sampler": (
        DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler([1, 2])),
        {},
        "SubsetRandomSampler.*Subset",
    ),
    "weights": (
        DataLoader(DATA, batch_size=4, sampler=WeightedRandomSampler([1.0] * 40, 40)),
        {},
        "WeightedRandomSampler",
    ),
    "batch sampler": (DataLoader(DATA, batch_sampler=[[1, 2]]), {"sample_rate": 0.5}, "list decides which records"),
    "other records": (DataLoader(DATA, batch_size=4, sampler=RandomSampler(range(9))), {}, "walks 9 records of.*40"),
    "twice": (PrivateLoader(DATA, sample_rate=0.5), {}, "private already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_cause(case):
    data, kwargs, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        PrivateLoader(data, **kwargs)


@pytest.mark.parametrize("count", [-1, 1.0, True])
def test_steps_takes_a_whole_number(count):
    with pytest.raises(ValueError, match="steps takes a whole number"):
        PrivateLoader(DATA, sample_rate=0.5).steps(count)


@pytest.mark.parametrize(
    "collate, message",
    [
        (
            lambda r: {"x": torch.zeros(len(r), 2), "labels": torch.zeros(len(r) + 1)},
            r"^labels of the batch has shape \(41,\) for 40",
        ),
        (lambda r: (torch.zeros(len(r), 2), [torch.tensor(0.0)]), r"^\[1\]\[0\] of the batch has shape \(\)"),
        (lambda r: torch.zeros(len(r) - 1, 2), r"^the tensor of the batch has shape \(39, 2\) for 40 records; every"),
        (lambda r: torch.zeros(2 * len(r), 3), r"a chosen and a rejected text\) goes along another axis, padded"),
    ],
)
def test_tensors_need_one_row_for_each_record(collate, message):
    loader = PrivateLoader(DataLoader(DATA, batch_size=40, collate_fn=collate))
    with pytest.raises(ValueError, match=message):
        next(iter(loader))


@pytest.mark.parametrize("data", [Subset(DATA, [30, 31, 32]), {i: DATA[30 + i] for i in range(3)}, Subset(DATA, [30])])
def test_a_part_is_sampled_on_its_own(data):
    """A subset, a dict by number, one record."""
    loader = fixed(DataLoader(data, batch_size=len(data)))
    (batch,) = loader.steps(1)
    assert batch[0].tolist() == [30, 31, 32][: len(data)]

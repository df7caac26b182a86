"""Collate functions that put several records into one row, and those that do not."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import lalora_kernels as lk
from lalora_kernels.privacy.sampling import PrivateLoader

N, D = 40, 5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(D, 3)

    def forward(self, x):
        return self.body(x)


def run(collate, steps=3, check=True, workers=0):
    torch.manual_seed(0)
    model = lk.adapt(Net(), target_modules=["body"], r=2, verbose=False)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = DataLoader(
        TensorDataset(torch.randn(N, D), torch.arange(N) % 3), batch_size=10, collate_fn=collate, num_workers=workers
    )
    optimizer, loader = lk.make_private(model, sgd, loader, noise_multiplier=1.0, check=check)
    for x, y in loader.steps(steps):
        (model(x).log_softmax(1) * (y if y.dim() > 1 else nn.functional.one_hot(y, 3))).sum(1).neg().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def mixup(records):
    x, y = default_collate(records)
    share, order = torch.distributions.Beta(0.4, 0.4).sample(), torch.randperm(len(x))
    y = nn.functional.one_hot(y, 3).float()
    return share * x + (1 - share) * x[order], share * y + (1 - share) * y[order]


def sometimes(records):
    return mixup(records) if torch.rand(()) < 0.5 else default_collate(records)


def cutmix(records):
    x, y = default_collate(records)
    x[:, 1:3] = x.flip(0)[:, 1:3]
    return x, y


def normalized(records):
    x, y = default_collate(records)
    return (x - x.mean(0)) / (x.std(0) + 1e-3), y


def smoothed(records):
    """Labels alone."""
    x, y = default_collate(records)
    y = nn.functional.one_hot(y, 3).float()
    return x, 0.9 * y + 0.1 * y.mean(0)


class Own:
    """A mixup that draws from a generator of its own."""

    def __init__(self, mixes=True):
        self.generator, self.mixes = torch.Generator().manual_seed(3), mixes

    def __call__(self, records):
        x, y = default_collate(records)
        if not self.mixes:
            return x + 0.1 * torch.randn(x.shape, generator=self.generator), y
        if torch.rand((), generator=self.generator) < 0.6:
            x = 0.7 * x + 0.3 * x[torch.randperm(len(x), generator=self.generator)]
        return x, y


@pytest.mark.parametrize("check", [True, "loss"])
@pytest.mark.parametrize("collate", [mixup, sometimes, cutmix, normalized, smoothed, Own()])
def test_rows_of_several_records_are_refused(collate, check):
    with pytest.raises(ValueError, match=r"the row that collate_fn makes of a record depends on the other records"):
        run(collate, check=check)


def test_the_mixed_part_is_named_in_a_worker_too():
    for workers, collate, name in ((1, cutmix, r"\[0\]"), (0, smoothed, r"\[1\]")):
        with pytest.raises(ValueError, match=rf"{name}: the row that collate_fn makes"):
            run(collate, workers=workers)


def test_nothing_is_asked_without_checks():
    assert run(normalized, check=False).ledger.steps == 3


def noisy(records):
    x, y = default_collate(records)
    return x + 0.1 * torch.randn_like(x) + 0.01 * torch.rand(()), y


def rejecting(records):
    """Draws until it likes what it drew, which moves what the rows behind draw."""
    rows = []
    for x, _ in records:
        while (noise := torch.randn(())) * x[0] < 0:
            pass
        rows.append(x + noise)
    return torch.stack(rows), torch.tensor([int(y) for _, y in records])


def taken_apart(records):
    rows = [list(r) for r in records]
    return torch.stack([r.pop(0) for r in rows]), torch.stack([r.pop() for r in rows])


def counting(records, calls=[]):  # noqa: B006  # another result each time
    calls.append(0)
    x, y = default_collate(records)
    return x + len(calls), y


def in_pairs(records):
    if len({tuple(x.tolist()) for x, _ in records}) < len(records):
        raise RuntimeError("a record twice")
    return default_collate(records)


@pytest.mark.parametrize(
    "collate", [default_collate, noisy, rejecting, taken_apart, Own(mixes=False), counting, in_pairs]
)
def test_rows_of_one_record_pass(collate):
    assert run(collate).ledger.steps == 3


class Holds:
    """A model and a collator below it, as transformers' have. Its records are views of the whole data set."""

    def __init__(self, own):
        self.model, self.own, self.whole = nn.Linear(2, 2), own, set()

    def __call__(self, records):
        places = [x.untyped_storage() for x, _ in records]
        self.whole |= {place.data_ptr() for place in places if place.nbytes() > 4 * D}
        assert len(self.whole) == 1
        return self.own(records)

    def __deepcopy__(self, memo):
        raise AssertionError("all that it holds would be copied")


def test_neither_a_model_nor_the_data_set_is_copied():
    assert run(Holds(Own(mixes=False))).ledger.steps == 3
    with pytest.raises(ValueError, match="the row that collate_fn makes"):
        run(Holds(Own()))


def test_what_is_drawn_is_not_what_a_check_drew():
    """Seeded anew behind it: the same numbers would follow on every training's first batch."""
    firsts = []
    for _ in range(2):
        data = TensorDataset(torch.zeros(N, D), torch.arange(N))
        loader = PrivateLoader(DataLoader(data, batch_size=10, collate_fn=noisy), sample_rate=1.0, check=True)
        next(loader.steps(1))
        firsts.append(torch.rand(3))
    assert not torch.equal(*firsts)


TEXTS = ["a fine film", "a dull film about nothing", "fine", "dull story , dull end", "the end is dull", "a fine end"]


@pytest.mark.parametrize(
    "kind",
    [
        "DataCollatorWithPadding",
        "DataCollatorForLanguageModeling",
        "whole words",
        "seeded",
    ],
)
def test_collators_of_transformers(kind, tmp_path):
    import transformers
    from small import bert_folder

    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_folder(tmp_path))
    tokenizer.mask_token = "[UNK]"
    language = {"seeded": {"seed": 5}, "whole words": {"whole_word_mask": True}}.get(kind, {})
    if kind == "DataCollatorWithPadding":
        collator = transformers.DataCollatorWithPadding(tokenizer)
    else:
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4, **language)
    words = kind == "whole words"
    texts = ["a fine film", "a dull film", "the fine end"] if words else TEXTS
    records = [dict(tokenizer(text, return_offsets_mapping=words)) for text in texts * 4]
    loader = PrivateLoader(DataLoader(records, batch_size=4, collate_fn=collator), sample_rate=0.5, check=True)
    assert len(list(loader.steps(4))) == 4
    if kind == "DataCollatorForLanguageModeling":

        def packed(some):
            batch = collator(some)
            batch["input_ids"] = batch["input_ids"].roll(1, 0)
            return batch

        loader = PrivateLoader(DataLoader(records, batch_size=4, collate_fn=packed), sample_rate=1.0, check=True)
        with pytest.raises(ValueError, match="input_ids: the row that collate_fn makes"):
            list(loader.steps(1))

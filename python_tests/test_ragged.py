"""Records that have more rows than others where they are put one after the other: nobody's rows are whose."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lalora_kernels as lk
from lalora_kernels.privacy.ragged import LOOKS, TRIES, RaggedCheck, differing

LONGEST, WIDTH = 12, 6
REFUSED = "fc has [0-9]+ rows for one record of this batch, and [0-9]+ for another.*as many, or leave fc out"


class Patches(nn.Module):
    """Classifies an image by its patches' mean; those of all images go through ``fc`` one after the other."""

    def __init__(self, by):
        super().__init__()
        torch.manual_seed(0)
        self.by, self.fc, self.head = by, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, patches, size=None):
        if self.by == "all":
            counts = [patches.shape[1]] * len(patches)
        elif self.by == "zeros":  # a patch of zeros is none
            counts = (patches != 0).any(2).sum(1).tolist()
        else:
            counts = size.prod(1).tolist()
        rows = torch.cat([p[:n] for p, n in zip(patches, counts)])
        rows = torch.tanh(self.fc(rows)) if len(rows) else rows
        return self.head(torch.stack([t.sum(0) for t in rows.split(counts)]))


def records(sizes):
    """(patches, size, label) of each; what is no patch of a record is zero."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, (a, b) in enumerate(sizes):
        patches = torch.randn(LONGEST, WIDTH, generator=generator)
        patches[a * b :] = 0.0
        made.append((patches, torch.tensor([a, b]), i % 2))
    return made


def train(model, data, check=True):
    lk.adapt(model, target_modules=["fc"], modules_to_save=[], r=2, verbose=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer, loader = lk.make_private(
        model, optimizer, DataLoader(data, batch_size=len(data)), sample_rate=1.0, noise_multiplier=1.0, check=check
    )
    batches = []
    for patches, size, target in loader.steps(3):
        if len(batches) == 1:  # what the first batch did not have, and as many rows in all
            patches, size = (torch.stack(part) for part in zip(*(record[:2] for record in OTHERS)))
        batches.append(size)
        logits = model(patches, size=size) if model.by == "size" else model(patches)
        nn.functional.cross_entropy(logits, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return len(batches)


EQUAL, OTHERS = records([(2, 2)] * 4), records([(1, 2), (2, 2), (2, 3), (2, 2)])


@pytest.mark.parametrize("by", ["size", "zeros"])
def test_a_later_batch_of_other_sizes_is_refused(by):
    """16 rows of 4 records divide into 4 each, where they have 2, 4, 6 and 4."""
    with pytest.raises(ValueError, match=REFUSED):
        train(Patches(by), EQUAL)
    assert train(Patches(by), EQUAL, check=False) == 3  # what would have passed


def test_what_has_as_many_rows_whatever_it_holds_passes():
    assert train(Patches("all"), EQUAL) == 3


def test_a_model_whose_rows_are_the_records_is_not_asked(monkeypatch):
    class Plain(Patches):
        def forward(self, patches):
            return self.head(torch.tanh(self.fc(patches)).mean(1))

    monkeypatch.setattr(RaggedCheck, "__call__", None)
    assert train(Plain("all"), EQUAL) == 3


def test_a_gap_in_the_first_batch_of_two_that_it_does_not_compare():
    """The check of the first batch takes two records that differ in most tensors, here the first two."""
    with pytest.raises(ValueError, match=REFUSED):
        train(Patches("zeros"), records([(2, 2), (2, 2), (1, 2), (2, 3)]))


@pytest.mark.parametrize("first", [0, 2])
def test_a_record_without_any_is_one_with_fewer(first):
    """Alone it does not reach the layer at all."""
    sizes = [(2, 2), (2, 3), (2, 3), (2, 2)]
    sizes[first] = (0, 0)
    model, data = Patches("zeros"), records(sizes)
    patches = torch.stack([patches for patches, *_ in data])
    with pytest.raises(ValueError, match="^fc has [46] rows for one record of this batch"):
        RaggedCheck()(model, (patches,), {}, 4, {"fc"})


def test_what_differs():
    t = torch.tensor([[1, 0, 0], [1, 2, 0], [5, 1, 0]])
    found = differing(({"ids": t}, t.float(), t[:2], torch.ones(3, 2), torch.ones(())), rows=3)
    assert found == {(0, "zeros"): (1, 0, 1.0), (0, "sum"): (0, 2, 5.0), (1, "zeros"): (1, 0, 1.0)}


def test_it_asks_a_few_times_and_again_of_more(monkeypatch):
    asked = []
    monkeypatch.setattr("lalora_kernels.privacy.ragged.refuse_ragged", lambda *a: asked.append(a[4]))
    check, model = RaggedCheck(), nn.Linear(1, 1)

    def look(zeros):
        t = torch.ones(2, 40)
        t[1, :zeros] = 0
        check(model, (t,), {}, 2, {"fc"})

    for _ in range(TRIES + 3):
        look(5)
    assert asked == [[0, 1]] * TRIES
    look(10)
    assert len(asked) == TRIES
    look(11)
    assert len(asked) == TRIES + 1
    for _ in range(LOOKS):
        look(0)
    look(40)
    assert len(asked) == TRIES + 1


def test_the_model_is_left_as_it_was():
    model = Patches("size").train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    patches, size = (torch.stack(part) for part in zip(*(record[:2] for record in OTHERS)))
    with pytest.raises(ValueError, match=REFUSED):
        RaggedCheck()(model, (patches,), {"size": size}, 4, {"fc"})
    assert model.training and not model.fc._forward_hooks
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

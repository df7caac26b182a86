"""What the check of the first batch asks of the model, beside gradients."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk

F = nn.functional


def private(model, data=None, **settings):
    data = TensorDataset(torch.randn(40, 6), torch.randint(0, 3, (40,))) if data is None else data
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return lk.make_private(model, optimizer, DataLoader(data, batch_size=8), noise_multiplier=1.0, **settings)


def chain(middle: nn.Module, zero_head: bool = False) -> nn.Module:
    model = nn.Sequential()
    model.first, model.middle, model.head = nn.Linear(6, 8), middle, nn.Linear(8, 3)
    if zero_head:
        nn.init.zeros_(model.head.weight)
    return lk.adapt(model, r=2, target_modules=["first"], modules_to_save=["head"], verbose=False)


class Mixup(nn.Module):
    def forward(self, h):
        return 0.5 * h + 0.5 * h[torch.randperm(len(h))] if self.training else h


class MixStyle(nn.Module):
    """By Python's random, and half of the time."""

    def forward(self, h):
        order = list(range(len(h)))
        random.shuffle(order)
        return 0.5 * h + 0.5 * h[order] if self.training and random.random() < 0.5 else h


def first_step(model, **settings):
    optimizer, loader = private(model, sample_rate=1.0, **settings)
    x, y = next(loader.steps(1))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("zero_head", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_permutations_are_found_whatever_is_drawn(seed, zero_head):
    """Of two rows randperm leaves both in place half of the time; behind a head of zeros nothing shows."""
    torch.manual_seed(seed)
    with pytest.raises(ValueError, match="middle: the output for one record depends on the other"):
        first_step(chain(Mixup(), zero_head))


def test_mixing_now_and_then_by_pythons_draws_is_found():
    for seed in range(10):
        random.seed(seed)
        with pytest.raises(ValueError, match="middle: the output for one record depends on the other"):
            first_step(chain(MixStyle()))


class Jitter(nn.Module):
    def forward(self, h):
        return F.dropout(h, 0.5) * (1 + random.random() + np.random.rand()) if self.training else h


def test_what_draws_for_each_row_alone_passes_and_leaves_the_draws_as_they_were():
    """The check draws, too, and gives everything back: a forward with it is the next one without."""
    optimizer, loader = private(chain(Jitter()), sample_rate=1.0)
    model = optimizer.engine.model
    x, y = next(loader.steps(1))
    seeded = []
    for _ in range(2):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        seeded.append(model(x))
    assert optimizer.per_sample_checked
    torch.testing.assert_close(*seeded, rtol=0, atol=0)


class Centre(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, h):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * h.mean(0))
        return h


def test_a_frozen_parameter_that_follows_the_records():
    with pytest.raises(ValueError, match=r"the model's forward writes to middle\.mean"):
        first_step(chain(Centre()))


class OfADict(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, features):
        return self.net(features["x"])


def test_two_views_in_a_dict_are_refused_as_they_are_in_a_tensor():
    model = lk.adapt(OfADict(), r=2, target_modules=["net"], verbose=False)
    optimizer, loader = private(model, sample_rate=1.0)
    x, y = next(loader.steps(1))
    with pytest.raises(ValueError, match="the model was given 80 rows, but the loader's batch has 40 records"):
        model({"x": torch.cat([x, 1.01 * x])})
    F.cross_entropy(model({"x": x}), y).backward()
    optimizer.step()
    assert optimizer.per_sample_checked


class LossAlone(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x, y):
        return F.cross_entropy(self.net(x), y)


def test_a_model_that_returns_its_loss_alone():
    model = lk.adapt(LossAlone(), r=2, target_modules=["net"], verbose=False)
    optimizer, loader = private(model, sample_rate=1.0)
    with pytest.raises(ValueError, match="returns no tensor with a row for each record.*check='loss'"):
        model(*next(loader.steps(1)))


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_without_statistics_mixes_in_either_mode(training):
    model = chain(nn.BatchNorm1d(8, track_running_stats=False, affine=False)).train(training)
    with pytest.raises(
        ValueError, match=r"middle \(BatchNorm1d\) mixes the records of a batch in train mode, or without"
    ):
        private(model, check=False)

"""What the check of the first batch asks of the model, beside gradients."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.nn import LoRALinear

F = nn.functional


def private(model, data=None, **settings):
    data = TensorDataset(torch.randn(40, 6), torch.randint(0, 3, (40,))) if data is None else data
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    settings = {"noise_multiplier": 1.0, "sample_rate": 1.0, **settings}  # a draw of one record shows nothing
    return lk.make_private(model, optimizer, DataLoader(data, batch_size=8), **settings)


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
    states, outputs = (torch.get_rng_state(), random.getstate(), np.random.get_state()), []
    for _ in range(2):
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        outputs.append(model(x))
    assert optimizer.per_sample_checked
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


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


class Squeezed(nn.Module):
    """One logit a record, and of one record none with an axis."""

    def __init__(self, *axis):
        super().__init__()
        self.net, self.axis = nn.Linear(6, 1), axis

    def forward(self, x):
        return self.net(x).squeeze(*self.axis)


def test_an_axis_that_goes_with_a_record_that_is_alone():
    for axis in ((), (-1,)):
        model = lk.adapt(Squeezed(*axis), r=2, target_modules=["net"], verbose=False)
        optimizer, loader = private(model)
        x, y = next(loader.steps(1))
        if axis:
            F.binary_cross_entropy_with_logits(model(x), (y > 0).float()).backward()
            optimizer.step()
            assert optimizer.per_sample_checked
        else:
            with pytest.raises(ValueError, match=r"no row for a record that is alone.*squeeze\(-1\)"):
                model(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_without_statistics_mixes_in_either_mode(training):
    model = chain(nn.BatchNorm1d(8, track_running_stats=False, affine=False)).train(training)
    with pytest.raises(
        ValueError, match=r"middle \(BatchNorm1d\) mixes the records of a batch in train mode, or without"
    ):
        private(model, check=False)


class Centred(nn.Module):
    """Mixes in train mode alone, as layers do that keep their own statistics."""

    def forward(self, h):
        return h - h.mean(0) if self.training else h


@pytest.mark.parametrize("equal", [2, 39])
def test_records_that_are_equal_are_no_pair(equal):
    """What mixes them does not show; blank images or the same sentence twice come first in many data sets."""
    x = torch.randn(40, 6)
    x[:equal] = 0.0
    optimizer, loader = private(chain(Centred()), TensorDataset(x, torch.randint(0, 3, (40,))), sample_rate=1.0)
    with pytest.raises(ValueError, match="middle: the output for one record depends on the other"):
        optimizer.engine.model(next(loader.steps(1))[0])


def test_a_mask_of_minus_infinities_leaves_the_check_possible():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = chain(Centred())

        def forward(self, x, mask):
            return self.net((mask.softmax(1) * x).sum(1))

    mask = torch.zeros(40, 4, 1)
    mask[:, 2:] = -float("inf")
    optimizer, loader = private(Masked(), TensorDataset(torch.randn(40, 4, 6), mask), sample_rate=1.0)
    with pytest.raises(ValueError, match="middle: the output for one record depends on the other"):
        optimizer.engine.model(*next(loader.steps(1)))


def test_a_batch_of_equal_records_leaves_the_check_for_the_next():
    optimizer, loader = private(chain(nn.Tanh()), TensorDataset(torch.ones(40, 6), torch.zeros(40).long()))
    optimizer.engine.model(next(loader.steps(1))[0])
    assert not optimizer.per_sample_checked


class Sorted(nn.Module):
    """A layer that is given its rows by length, or in any order, as for an RNN, and whose outputs are put back."""

    def __init__(self, order):
        super().__init__()
        self.order, self.inner = order, LoRALinear.from_linear(nn.Linear(8, 8), r=2)

    def forward(self, h):
        order = self.order(h) if self.training else torch.arange(len(h))
        return self.inner(h[order])[order.argsort()]


ORDERS = [
    lambda h: h.sum(1).argsort(),
    lambda h: h.sum(1).argsort(descending=True),
    lambda h: torch.randperm(len(h)),
]


@pytest.mark.parametrize("order", ORDERS, ids=["ascending", "descending", "shuffled"])
@pytest.mark.parametrize("seed", range(4))
def test_a_trained_layer_whose_rows_are_sorted_and_put_back(seed, order):
    """No output shows it, and two records are in order half of the time; a row would be taken for another record's."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.first, model.middle, model.head = LoRALinear(6, 8, r=2), Sorted(order), nn.Linear(8, 3)
    with pytest.raises(ValueError, match="middle.inner: the output for one record depends on the other"):
        first_step(model)


def test_a_mode_that_was_not_asked_is_asked_when_training_goes_on_in_it():
    """from_pretrained gives a model in eval mode, and an evaluation ends with train()."""
    model = chain(Centred()).eval()
    optimizer, loader = private(model, sample_rate=1.0)
    batches = loader.steps(3)
    for _ in range(2):
        x, y = next(batches)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.train()
    with pytest.raises(ValueError, match="middle: the output for one record depends on the other"):
        model(next(batches)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_an_input_is_the_loops_alone(dtype):
    """Saliency, adversarial training: the backwards of the check end at copies."""
    model = chain(nn.Tanh()).to(dtype)
    plain = copy.deepcopy(model)
    optimizer, loader = private(model, TensorDataset(torch.randn(40, 6, dtype=dtype), torch.zeros(40).long()))
    x, y = next(loader.steps(1))
    x, expected = x.requires_grad_(True), x.detach().clone().requires_grad_(True)
    for m, v in ((plain, expected), (model, x)):
        F.cross_entropy(m(v), y).backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-5, atol=1e-8)
    assert optimizer.per_sample_checked


def test_an_input_that_was_computed_with_gradients_on_keeps_its_graph():
    model = chain(nn.Tanh())
    optimizer, loader = private(model)
    x, y = next(loader.steps(1))
    made = (x.requires_grad_(True) * 2).exp()  # keeps what its backward needs, once
    F.cross_entropy(model(made), y).backward()
    optimizer.step()
    assert x.grad.any()


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, h):
        return checkpoint(lambda h: torch.tanh(self.inner(h)), h, use_reentrant=True)


def test_reentrant_checkpointing_passes():
    """It does not take torch.autograd.grad; the released gradient is that of single records."""
    torch.manual_seed(0)
    model = chain(Checkpointed())
    plain = copy.deepcopy(model)
    optimizer, loader = private(model, sample_rate=1.0, max_grad_norm=1e6, method="dp-lora", noise_multiplier=0.0)
    x, y = next(loader.steps(1))
    for m in (plain, model):
        F.cross_entropy(m(x), y).backward()
    optimizer.step()
    for name, p in plain.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(model.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-6)

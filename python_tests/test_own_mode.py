"""The check of the first batch in the model's own mode, and of arguments and models that are harmless."""

import threading

import pytest
import torch
from test_first_batch import chain, first_step, private
from torch import nn

import lalora_kernels as lk
from lalora_kernels.nn import LoRALinear
from lalora_kernels.privacy.checks import check_per_sample
from lalora_kernels.privacy.padding import refuse_padding

F = nn.functional


class Share(torch.autograd.Function):
    """A gradient of norm 1, whatever the batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy / (dy.norm() + 1e-12)


class Balanced(nn.Module):
    def forward(self, h):
        return Share.apply(h) if self.training else h


class Reversed(torch.autograd.Function):
    """The gradient of a domain's classifier, turned round the more the longer it trains (DANN): records stay apart."""

    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return -ctx.strength * dy, None


class Domain(nn.Module):
    def __init__(self):
        super().__init__()
        self.forwards = 0

    def forward(self, h):
        self.forwards += self.training
        return Reversed.apply(h, 1 + self.forwards)


def test_the_backward_couples_what_the_test_says():
    """By the definition: a record's gradient beside another one and alone."""
    h = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    Balanced()(h).square().sum().backward()
    beside = h.grad[0].clone()
    h.grad = None
    Balanced()(h[:1]).square().sum().backward()
    assert (h.grad[0] - beside).norm() > 0.1 * beside.norm()


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_a_backward_that_couples_in_train_mode_alone(drop):
    """Of a model that draws too, where one record alone would be drawn otherwise."""
    with pytest.raises(ValueError, match=r"gradients of first.*a hook or a custom backward couples them"):
        first_step(chain(nn.Sequential(nn.Dropout(drop), Balanced())))
    assert first_step(chain(nn.Sequential(nn.Dropout(drop), Balanced())).eval()).per_sample_checked


class ByRows(nn.Module):
    def forward(self, h):
        return h * len(h) if self.training else h


def test_a_factor_of_the_number_of_records_in_train_mode():
    with pytest.raises(ValueError, match=r"^middle: the output for one record depends on the other records"):
        first_step(chain(ByRows()))


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_a_gradient_that_follows_the_number_of_forwards_passes(drop):
    assert first_step(chain(nn.Sequential(nn.Dropout(drop), Domain()))).per_sample_checked


def spectral(parametrized):
    norm = nn.utils.parametrizations.spectral_norm if parametrized else nn.utils.spectral_norm
    return norm(nn.Linear(8, 8).requires_grad_(False))


@pytest.mark.parametrize("parametrized", [False, True])
def test_a_spectral_norm_whose_buffers_move_passes(parametrized):
    assert first_step(chain(spectral(parametrized))).per_sample_checked


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 2)

    def forward(self, x, scale):
        return self.net(x) * scale


class Attended(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, mask):
        q = self.net(x)
        return self.head(((q @ q.mT + mask).softmax(-1) @ q).mean(1))


def step_with(model, names, x, argument, **settings):
    model = lk.adapt(model, r=2, target_modules=names, verbose=False)
    data = torch.utils.data.TensorDataset(x, torch.zeros(len(x)).long())
    optimizer, loader = private(model, data, **settings)
    x, y = next(loader.steps(1))
    F.cross_entropy(model(x, argument), y).backward()
    optimizer.step()
    return optimizer


def test_an_argument_with_two_rows_that_is_no_batch():
    assert step_with(Scaled(), ["net"], torch.randn(8, 6), torch.tensor([1.0, 2.0])).per_sample_checked


def causal(positions):
    return torch.full((positions, positions), -float("inf")).triu(1)


@pytest.mark.parametrize("positions", [2, 3, 4, 5])
def test_a_mask_of_as_many_positions_as_the_check_has_records(positions):
    x = torch.randn(8, positions, 6)
    assert step_with(Attended(), ["net"], x, causal(positions)).per_sample_checked


def test_a_mask_of_as_many_positions_as_the_batch_has_records_is_told_how_to_pass():
    with pytest.raises(RuntimeError) as error:
        step_with(Attended(), ["net"], torch.randn(8, 8, 6), causal(8))
    assert any("give it an axis more (mask[None])" in note for note in error.value.__notes__)
    assert step_with(Attended(), ["net"], torch.randn(8, 8, 6), causal(8)[None]).per_sample_checked


@pytest.mark.parametrize("positions", [3, 4])
def test_a_shared_mask_hides_no_mixing(positions):
    class Mixing(Attended):
        def forward(self, x, mask):
            return super().forward(x - x.mean(0) if self.training else x, mask)

    with pytest.raises(ValueError, match="depends on the other records of the batch"):
        step_with(Mixing(), ["net"], torch.randn(8, positions, 6), causal(positions))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = LoRALinear.from_linear(nn.Linear(6, 3), r=2)

    def forward(self, x, **named):
        x.sub_(0.5).div_(0.5)
        return self.net(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_input_that_the_model_normalizes_in_place(dtype):
    model, x = InPlace().to(dtype), torch.randn(8, 6, dtype=dtype)
    check_per_sample(model, (x, torch.zeros(8).long()), lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    optimizer, loader = private(model, torch.utils.data.TensorDataset(x.clone(), torch.zeros(8).long()))
    given, y = next(loader.steps(1))
    before = given.clone()
    F.cross_entropy(model(given), y).backward()
    optimizer.step()
    torch.testing.assert_close(given, (before - 0.5) / 0.5, rtol=0, atol=0)  # once: the check had copies
    assert optimizer.per_sample_checked


def test_the_check_of_padding_leaves_an_input_in_float64_as_it_was():
    x = torch.randn(2, 6, dtype=torch.float64)
    before, mask = x.clone(), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    refuse_padding(InPlace(), (x,), {"attention_mask": mask})
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("name, value", [("lock", threading.Lock()), ("drawn", (i for i in range(3)))])
def test_a_module_that_holds_what_has_no_copy_is_named(name, value):
    model = chain(nn.Tanh())
    setattr(model.middle, name, value)
    with pytest.raises(RuntimeError, match=rf"middle\.{name} cannot be copied \(cannot pickle .*__deepcopy__ without"):
        first_step(model)

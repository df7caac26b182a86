"""Models that draw at random in eval mode, too: checked like others, though a record alone would be drawn otherwise."""

import pytest
import torch
from test_unseen import make, step
from torch import nn

import lalora_kernels as lk
from lalora_kernels.privacy.checks import check_per_sample
from lalora_kernels.privacy.still import Stilled

F = nn.functional


class AlwaysDropped(nn.Module):
    """As many write it: F.dropout drops in eval mode, too, where training is not given."""

    def __init__(self, between=lambda h: h):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.between = nn.Linear(6, 16), nn.Linear(16, 3), between

    def forward(self, x):
        return self.last(self.between(F.dropout(self.first(x).tanh(), 0.3)))


class Latent(nn.Module):
    """An autoencoder's draw between its two halves."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(8, 3)

    def forward(self, x):
        mean, spread = self.first(x).chunk(2, -1)
        return self.last(mean + spread.exp() * torch.randn_like(mean))


class Denoising(nn.Module):
    """Draws each record's time and noise, and returns each record's loss."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(7, 16), nn.Linear(16, 6)

    def forward(self, x):
        t, noise = torch.rand(len(x), 1, dtype=x.dtype), torch.randn_like(x)
        noisy = torch.cat([(1 - t) * x + t * noise, t], 1)
        return (self.last(self.first(noisy).tanh()) - noise).square().mean(1)


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, change):
        ctx.change = change
        return h.clone()

    @staticmethod
    def backward(ctx, dy):
        return ctx.change(dy), None


def adapted(model):
    return lk.adapt(model, target_modules=["first", "last"], r=2, verbose=False)


def own(model, batch):
    return model(batch[0]).square().mean()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [AlwaysDropped, Latent, Denoising])
def test_train(kind, training):
    optimizer, loader = make(model := adapted(kind()).train(training), loss_reduction="mean")
    step(model, optimizer, loader, own, steps=2)
    assert optimizer.per_sample_checked and optimizer.ledger.steps == 2


@pytest.mark.parametrize(
    "between, message",
    [
        pytest.param(lambda h: h + h[torch.randperm(len(h))], "^last: .*depends on the other", id="permutation"),
        pytest.param(lambda h: h + h[torch.rand(len(h)).argsort()], "^last: .*depends on the other", id="sorted"),
        pytest.param(lambda h: h - h.mean(0), "^last: .*depends on the other", id="mean"),
        pytest.param(
            lambda h: Backward.apply(h, lambda dy: dy - dy.mean(0)), r"first\.lora_A.* depend on the other",
            id="backward",
        ),
        pytest.param(
            lambda h: Backward.apply(h, lambda dy: dy * len(dy)), r"first\.lora_A.* differ from those", id="number"
        ),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_what_mixes_records_is_refused_all_the_same(between, message, training):
    optimizer, loader = make(model := adapted(AlwaysDropped(between)).train(training))
    with pytest.raises(ValueError, match=message):
        step(model, optimizer, loader, own)
    assert optimizer.ledger.steps == 0


def test_a_loss_that_draws_is_told_what_to_do():
    with pytest.raises(ValueError, match="depends on the other records.*have the batch hold what was drawn"):
        check_per_sample(adapted(AlwaysDropped()), (torch.randn(3, 6),), own)


@pytest.mark.parametrize(
    "draw, low, high",
    [
        (lambda n: torch.rand(n, 4), 0, 1),
        (lambda n: torch.rand_like(torch.ones(n, 4)), 0, 1),
        (lambda n: torch.empty(n, 4).uniform_(-1, 2), -1, 2),
        (lambda n: torch.randn(n, 4), -6, 6),
        (lambda n: torch.randn_like(torch.ones(n, 4)), -6, 6),
        (lambda n: torch.normal(3.0, 0.1, (n, 4)), 2, 4),
        (lambda n: torch.normal(torch.full((n, 4), 3.0), 0.1), 2, 4),
        (lambda n: torch.empty(n, 4).normal_(3.0, 0.1), 2, 4),
        (lambda n: torch.bernoulli(torch.full((n, 4), 0.5)), 0, 1),
        (lambda n: torch.empty(n, 4).bernoulli_(0.5), 0, 1),
        (lambda n: torch.empty(n, 4).bernoulli_(torch.full((n, 4), 0.5)), 0, 1),
        (lambda n: torch.empty(n, 4).exponential_(2.0), 0, 8),
        (lambda n: torch.randint(5, (n, 4)), 0, 4),
        (lambda n: torch.randint(3, 5, (n, 4)), 3, 4),
        (lambda n: torch.randint_like(torch.ones(n, 4), 3, 5), 3, 4),
        (lambda n: torch.empty(n, 4).random_(), 0, 127),
        (lambda n: torch.empty(n, 4).random_(2, 9), 2, 8),
        (lambda n: F.dropout(torch.ones(n, 4), 0.5), 0, 2),
        (lambda n: torch.native_dropout(torch.ones(n, 4), 0.5, True)[0], 0, 2),
    ],
)
def test_every_row_is_drawn_alike_however_many_there_are(draw, low, high):
    with Stilled():
        three, one = draw(3), draw(1)
    assert torch.equal(three, one.expand(3, 4)) and len(one.unique()) > 1
    assert low <= one.min() and one.max() <= high


def test_a_permutation_moves_every_row_and_generators_of_their_own_are_left():
    with Stilled():
        assert (torch.randperm(5) != torch.arange(5)).all()
        own = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
        rows, one, none = torch.rand(3), torch.rand(()), torch.rand(0, 4)
    assert torch.equal(own, torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))
    assert len(rows.unique()) == 1 and rows[0] == one and not none.numel()

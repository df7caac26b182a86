"""A record that meets its mirror image in the batch (flip(0), as mixup takes it) depends on another one."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 2
COUPLED = "depends on the other records"


class Net(nn.Module):
    """``fc`` is adapted; subclasses turn something round."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        lk.adapt(self, target_modules=["fc"], modules_to_save=[], r=2, verbose=False)

    def forward(self, x):
        return self.head(torch.tanh(self.fc(x)))


class Turned(Net):
    def forward(self, x):
        return super().forward(x).flip(0)


class Mixed(Net):
    def forward(self, x):
        h = torch.tanh(self.fc(x))
        return self.head(0.9 * h + 0.1 * h.flip(0))


class TurnedWithin(Net):
    """What comes out is in order, but the rows of ``fc`` are the others'."""

    def forward(self, x):
        return self.head(torch.tanh(self.fc(x.flip(0)).flip(0)))


class Gradient(torch.autograd.Function):
    """Mixes gradients alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy + 0.1 * dy.flip(0)


class TurnedGradient(Net):
    def forward(self, x):
        return self.head(Gradient.apply(torch.tanh(self.fc(x))))


class Pairs(Net):
    """Returns a loss between records and their mirror images, beside its logits."""

    def forward(self, x):
        logits = super().forward(x)
        loss = (logits * logits.flip(0)).sum(1).mean()
        return (logits, loss) if self.returned else (setattr(self, "pairs", loss), logits)[1]


def first_step(model, loss=lambda model, out, y: nn.functional.cross_entropy(out, y)):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = DataLoader(TensorDataset(X, Y), batch_size=12)
    optimizer, loader = lk.make_private(model, optimizer, loader, sample_rate=1.0, noise_multiplier=1.0)
    for x, y in loader.steps(1):
        loss(model, model(x), y).backward()
        optimizer.step()
    return optimizer.ledger.steps


def test_a_model_that_turns_nothing_trains():
    assert first_step(Net()) == 1


@pytest.mark.parametrize("kind", [Turned, Mixed, TurnedWithin])
def test_rows_that_are_turned_round_are_refused(kind):
    with pytest.raises(ValueError, match=COUPLED):
        first_step(kind())


def test_gradients_that_are_turned_round_are_refused():
    """Before a linear head they are the same for all records, so that a mirror image's changes none."""
    with pytest.raises(ValueError, match=f"per-sample gradients of .* {COUPLED.replace('depends', 'depend')}"):
        first_step(TurnedGradient())


@pytest.mark.parametrize("returned", [True, False], ids=["returned", "kept"])
def test_a_loss_of_mirrored_pairs_is_refused_where_a_backward_reaches_it(returned):
    def of_its_own(model, out, y):
        return nn.functional.cross_entropy(out[0] if returned else out, y)

    def with_pairs(model, out, y):
        return of_its_own(model, out, y) + (out[1] if returned else model.pairs)

    for loss in (of_its_own, with_pairs):
        model = Pairs()
        model.returned = returned
        if loss is of_its_own:
            assert first_step(model, loss) == 1
        else:
            with pytest.raises(ValueError, match="ties the records (of the batch )?together"):
                first_step(model, loss)


@pytest.mark.parametrize("kind", [Turned, Mixed, TurnedGradient])
@pytest.mark.parametrize("rows", [2, 3, 4])
def test_check_per_sample_sees_it_in_as_few_as_two_records(kind, rows):
    with pytest.raises(ValueError, match=f"{COUPLED}|differ from those of single records"):
        lk.check_per_sample(kind(), (X[:rows], Y[:rows]), lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))

"""Parameters and buffers that a forward writes to, which the check of the first batch finds however it is done."""

import pytest
import torch
from test_first_batch import F, chain, first_step
from torch import nn


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


class CentreByData(Centre):
    """As DINO's: no version moves."""

    def forward(self, h):
        self.mean.data.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h


class CentreAnew(Centre):
    def forward(self, h):
        self.mean.data = 0.9 * self.mean.data + 0.1 * h.detach().mean(0)
        return h


class CentreMade(Centre):
    def forward(self, h):
        self.mean = nn.Parameter(self.mean + 0.1 * h.detach().mean(0), requires_grad=False)
        return h


class ActNorm(Centre):
    """Set at the first forward in train mode, from its batch: all later ones agree."""

    def __init__(self):
        super().__init__()
        self.set = False

    def forward(self, h):
        if self.training and not self.set:
            self.mean.data.copy_(-h.detach().mean(0))
            self.set = True
        return h + self.mean


class Queue(Centre):
    """Its rows change places: their sum does not."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(4, 8), requires_grad=False)

    def forward(self, h):
        self.mean.data = self.mean.data.roll(int(h[0, 0] > 0) + 1, 0)
        return h


class ByHand(nn.Module):
    """Moves another layer's trained weight, which is the optimizer's to move."""

    def __init__(self, other):
        super().__init__()
        self.other = [other]

    def forward(self, h):
        if self.training:
            self.other[0].weight.data.add_(1e-9 * h.detach().mean(0))
        return h


@pytest.mark.parametrize("middle", [CentreByData, CentreAnew, CentreMade, ActNorm, Queue])
def test_a_parameter_that_is_written_to_without_a_version(middle):
    with pytest.raises(ValueError, match=r"the model's forward writes to middle\.mean, .*keep it fixed"):
        first_step(chain(middle()))


def test_a_trained_tensor_that_the_forward_writes_to():
    model = chain(nn.Tanh())
    model.middle = ByHand(model.head)
    with pytest.raises(ValueError, match=r"the model's forward writes to head\.weight"):
        first_step(model)


class Count(nn.Module):
    """Of records, or of forwards alone."""

    def __init__(self, start, records=True, drawn=False):
        super().__init__()
        self.register_buffer("seen", torch.tensor(start))
        self.register_buffer("last", torch.tensor(0.0))
        self.records, self.drawn = records, drawn

    def forward(self, h):
        h = F.dropout(h, 0.5, self.training and self.drawn)
        self.seen.add_(len(h) if self.records else 1)
        if self.drawn:  # after as many draws as records have: others than beside two of them
            self.last.copy_(torch.rand(()))
        return h


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("start", [0, 0.0, 1e9])
def test_a_buffer_that_counts_records(start, drawn):
    """All runs that compare records have as many; one more or less is what nobody may see."""
    with pytest.raises(ValueError, match=r"the buffer middle\.seen counts the records of a batch"):
        first_step(chain(Count(start, drawn=drawn)))
    assert first_step(chain(Count(start, records=False, drawn=drawn))).per_sample_checked

"""Physical batches of one record: two of them are joined for the check of the first batch."""

import pytest
import torch
from test_first_batch import chain
from test_first_batch_written import Centre
from torch import nn

from lalora_kernels.privacy.singles import KEPT, Singles


class Memory(nn.Module):
    """Carries a record's state to the next one, as a recurrent layer or a cache does."""

    def __init__(self):
        super().__init__()
        self.state = None

    def forward(self, h):
        before, self.state = self.state, h.detach().mean(0, keepdim=True)
        return h if before is None else h + before


class Average(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, h):
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h


@pytest.mark.parametrize(
    "middle, message",
    [
        (Memory, "middle: the output for one record depends on the other"),
        (Average, r"the buffer middle\.mean follows the records"),
        (Centre, r"the model's forward writes to middle\.mean"),
    ],
)
def test_what_is_carried_from_record_to_record_is_found_at_the_second_one(middle, message):
    model, singles = chain(middle()), Singles()
    assert singles.check(model, (torch.randn(1, 6),), {}) is None
    with pytest.raises(ValueError, match=message):
        singles.check(model, (torch.randn(1, 6),), {})


def test_it_waits_for_a_record_of_the_same_shape_that_differs():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = chain(nn.Tanh())

        def forward(self, *, tokens, scale):
            return self.net(tokens.mean(1)) * scale

    model, singles, scale = Mean(), Singles(), torch.tensor([1.0, 2.0, 3.0])
    short, long = torch.randn(1, 3, 6), torch.randn(1, 5, 6)
    for tokens in (short, long, short, torch.full_like(short, float("nan")), torch.randn(1, 4, 6)):
        assert singles.check(model, (), {"tokens": tokens, "scale": scale}) is None
    long.zero_()  # what is kept is a copy
    assert singles.check(model, (), {"tokens": long, "scale": scale}) is not None


def test_it_keeps_few():
    model, singles = chain(nn.Tanh()), Singles()
    for positions in range(1, 3 * KEPT):
        assert singles.check(model, (torch.randn(1, positions, 6),), {}) is None
    assert len(singles._kept) == KEPT


def test_two_classes_scale_is_no_record_of_the_two():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = chain(nn.Tanh())

        def forward(self, x, scale):
            return self.net(x)[:, :2] * scale

    model, singles, scale = Scaled(), Singles(), torch.tensor([1.0, 2.0])
    assert singles.check(model, (torch.randn(1, 6), scale), {}) is None
    assert singles.check(model, (torch.randn(1, 6), scale), {}) is not None

"""Records with gaps, NaN that the model fills: the check of the first batch asks them, too."""

import copy

import pytest
import torch
from test_first_batch import Centred, chain, first_step, private
from torch import nn
from torch.utils.data import TensorDataset

F = nn.functional
MIXES = "the output for one record depends on the other"


class Filled(nn.Module):
    """``net`` of records whose gaps are filled with a number, or with the mean of the batch's other records."""

    def __init__(self, net: nn.Module, by_batch: bool = False):
        super().__init__()
        self.net, self.by_batch = net, by_batch

    def forward(self, x):
        return self.net(torch.where(x.isnan(), x.nanmean(0) if self.by_batch else 0.5, x))


def with_gaps(records: int = 40) -> TensorDataset:
    x = torch.randn(records, 6)
    x[torch.arange(records), torch.arange(records) % 6] = float("nan")
    return TensorDataset(x, torch.randint(0, 3, (records,)))


def test_one_record_moves_what_fills_the_gaps_of_the_others():
    """By more than C: every record's gradient is another one, beside the one record more."""
    x, y = with_gaps().tensors
    x[0] = torch.where(x[0].isnan(), x[0], 1e3)
    start, sums = Filled(chain(nn.Identity()), by_batch=True), []
    for first in (0, 1):
        model, data = copy.deepcopy(start), TensorDataset(x[first:], y[first:])
        optimizer, loader = private(
            model, data, check=False, noise_multiplier=0.0, max_grad_norm=1.0, method="dp-lora", loss_reduction="sum"
        )
        inputs, labels = next(loader.steps(1))
        F.cross_entropy(model(inputs), labels, reduction="sum").backward()
        optimizer.step()  # at a learning rate of 0.1, of the mean
        moved = [(p - q).flatten() for p, q in zip(start.parameters(), model.parameters())]
        sums.append(torch.cat(moved) / 0.1 * len(data))
    assert (sums[0] - sums[1]).norm() > 1.05


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Filled(chain(nn.Identity()), by_batch=True), MIXES),
        (lambda: Filled(chain(Centred())), f"middle: {MIXES}"),
    ],
    ids=["filled_by_the_batch", "filled_and_mixed"],
)
def test_a_model_that_fills_gaps_and_mixes_is_refused(model, message):
    optimizer, loader = private(model(), with_gaps())
    with pytest.raises(ValueError, match=message):
        optimizer.engine.model(next(loader.steps(1))[0])


def test_a_model_that_fills_gaps_by_itself_trains():
    model = Filled(chain(nn.Tanh()))
    optimizer, loader = private(model, with_gaps())
    x, y = next(loader.steps(1))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.per_sample_checked


def test_records_that_no_model_takes_leave_the_check_for_the_next_batch():
    """Their gradients are NaN, and left out of the sum."""
    model = chain(nn.Tanh())
    optimizer, loader = private(model, with_gaps())
    optimizer.engine.model(next(loader.steps(1))[0])
    assert not optimizer.per_sample_checked


def test_equal_records_with_gaps_are_no_pair():
    x, y = with_gaps().tensors
    optimizer, loader = private(chain(nn.Tanh()), TensorDataset(x[:1].repeat(40, 1), y))
    optimizer.engine.model(next(loader.steps(1))[0])
    assert not optimizer.per_sample_checked


def test_finite_records_are_asked_first():
    x, y = with_gaps().tensors
    x[[5, 17]] = torch.randn(2, 6)
    assert first_step(chain(nn.Tanh()), data=TensorDataset(x, y)).per_sample_checked

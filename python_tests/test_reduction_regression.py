"""Regressions' losses of the loop's own: a mean, a sum, or divided by a count of the batch."""

import pytest
import torch
import torch.nn.functional as F
from test_loop_loss import run


def target(y):
    return torch.stack([y.float(), 2.0 - y], 1)


def masked(z, y):
    """As a series that ends earlier for some records."""
    return (z[:, :2] - target(y)).square() * torch.stack([y >= 0, y > 1], 1), torch.stack([y >= 0, y > 1], 1).sum(1)


def shared_count(z, y):
    each, counts = masked(z, y)
    return each.sum() / counts.sum()


def own_count(z, y):
    each, counts = masked(z, y)
    return (each.sum(1) / counts).mean()


KINDS = [F.mse_loss, F.l1_loss, F.huber_loss]


@pytest.mark.parametrize("claimed", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_told_by_batches_of_other_sizes(kind, claimed):
    def loss(reduction, scale=1.0):
        return lambda z, y: scale * kind(z[:, :2], target(y), reduction=reduction)

    other = "sum" if claimed == "mean" else "mean"
    for scale in (1.0, 0.5):
        with pytest.raises(ValueError, match=f"the loss is a {other} over the records.*pass loss_reduction='{other}'"):
            run(loss(other, scale), steps=10, reduction=claimed)
        assert run(loss(claimed, scale), steps=10, reduction=claimed).loss_reduction_checked


def test_what_divides_by_a_count_of_the_batch():
    with pytest.raises(ValueError, match="divides by a count over the whole batch"):
        run(shared_count, steps=10)
    assert run(own_count, steps=10).loss_reduction_checked
    assert run(lambda z, y: masked(z, y)[0].sum(), steps=10, reduction="sum").loss_reduction_checked


def test_a_weight_that_follows_the_steps_is_left_alone():
    steps = iter(range(1, 100))
    assert run(lambda z, y: next(steps) * F.mse_loss(z[:, :2], target(y)), steps=10).ledger.steps == 10

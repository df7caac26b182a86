"""A loss of the model's own over a count of the batch, in a loop: refused at the first batch whose counts differ."""

import pytest
import torch
from test_own_loss_later import EQUAL, RAGGED, N, Net, batch
from torch.utils.data import DataLoader

import lalora_kernels as lk


@pytest.mark.parametrize("first", [EQUAL, RAGGED, [1, 1, 6, 2, 3]])
@pytest.mark.parametrize("check", [True, "loss"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_loop_is_refused_once_counts_differ(shared, check, first):
    """Where each record is divided by its own count it runs, and with check="loss" no copy of the model is made."""
    model = lk.adapt(Net(shared), target_modules=["net"], r=2, verbose=False)
    data = [(x, t, v) for lengths in (first, RAGGED) for x, t, v in zip(*batch(lengths)[0], batch(lengths)[1]["valid"])]
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer, loader = lk.make_private(
        model, sgd, DataLoader(data, batch_size=N), noise_multiplier=1.0, sample_rate=0.5, check=check
    )
    draws = iter([list(range(N)), list(range(N, 2 * N))])
    loader.batch_sampler.draw = lambda: next(draws)

    def run():
        for x, target, valid in loader.steps(2):
            model(x, target, valid=valid)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    if shared and check is True:
        with pytest.raises(ValueError, match="^loss, which the model returns, divides by a count"):
            run()
        assert optimizer.ledger.steps == (first is EQUAL)
    else:
        run()
        assert optimizer.ledger.steps == 2


class Bank(Net):
    """Compares each record with what it keeps of the one before, in its loss alone."""

    def __init__(self):
        super().__init__()
        self.kept = None

    def forward(self, x, target, *, valid):
        found = super().forward(x, target, valid=valid)
        if self.kept is not None:
            found["loss"] = found["loss"] + found["out"].mean() * self.kept
        self.kept = found["out"].detach().mean()
        return found


@pytest.mark.parametrize("net", [Net, Bank])
def test_of_a_record_alone_it_is_that_records(net):
    """As a language model's mean over its tokens; unless the model keeps something from one record to the next."""
    model = lk.adapt(net(), target_modules=["net"], r=2, verbose=False)
    data = list(zip(*batch(RAGGED)[0], batch(RAGGED)[1]["valid"]))
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer, loader = lk.make_private(
        model, sgd, DataLoader(data, batch_size=N), noise_multiplier=1.0, sample_rate=1.0, physical_batch_size=1
    )

    def run():
        for x, target, valid in loader.steps(2):
            model(x, target, valid=valid)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    if net is Bank:
        with pytest.raises(ValueError, match="^loss, which the model returns"):
            run()
    else:
        run()
        assert optimizer.ledger.steps == 2


class Taken(torch.nn.Module):
    """Returns the loss of its records, taken as a sum or a mean, and beside it, to be looked at, the other one."""

    def __init__(self, reduction):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.dropout, self.reduction = torch.nn.Linear(4, 2), torch.nn.Dropout(0.5), reduction

    def forward(self, x, target):
        out = self.net(self.dropout(x))
        each = (out - target).square().sum(1)
        loss, seen = (each.sum(), each.mean()) if self.reduction == "sum" else (each.mean(), each.sum())
        return {"loss": loss, "seen": seen, "out": out}


def taken(reduction, claimed, divide=lambda loss, rows: loss, steps=6, compiled=lambda model: model, **more):
    """Steps made until it was refused, of batches of 5 and 3 records by turns."""
    model = lk.adapt(Taken(reduction), target_modules=["net"], r=2, verbose=False).train()
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    data = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.randn(20, 2))
    optimizer, loader = lk.make_private(
        model, sgd, DataLoader(data, batch_size=N), noise_multiplier=1.0, sample_rate=0.5, loss_reduction=claimed,
        **more,
    )  # fmt: skip
    draws = (list(range(5 - 2 * (i % 2))) for i in range(steps))
    loader.batch_sampler.draw = lambda: next(draws)
    net = compiled(model)
    for x, y in loader.steps(steps):
        divide(net(x, y)["loss"], len(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.ledger.steps


@pytest.mark.parametrize("reduction, claimed", [("sum", "mean"), ("mean", "sum")])
def test_a_sum_for_a_mean_is_refused_by_name(reduction, claimed):
    """transformers' CTC is a sum by default: others would count the less, the fewer there are, and a record 2 C."""
    match = f"^loss, which the model returns, is a {reduction} .* told loss_reduction='{claimed}'"
    with pytest.raises(ValueError, match=match):
        taken(reduction, claimed)
    with pytest.raises(ValueError, match=match):  # the same number for all batches makes no mean of it
        taken(reduction, claimed, lambda loss, rows: loss / 5)
    assert taken(reduction, reduction) == 6


def test_what_a_loop_makes_a_mean_of_a_sum_passes():
    assert taken("sum", "mean", lambda loss, rows: loss / rows) == 6
    assert taken("mean", "sum", lambda loss, rows: loss * rows) == 6


def test_under_a_grad_scaler_the_first_backward_tells():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with pytest.raises(ValueError, match="^loss, which the model returns, is a mean .* told loss_reduction='sum'"):
        taken("mean", "sum", lambda loss, rows: scaler.scale(loss), steps=1, grad_scaler=scaler)
    assert taken("sum", "sum", lambda loss, rows: scaler.scale(loss), grad_scaler=scaler) == 6

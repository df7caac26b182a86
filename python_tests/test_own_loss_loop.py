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

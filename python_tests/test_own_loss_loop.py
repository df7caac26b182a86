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

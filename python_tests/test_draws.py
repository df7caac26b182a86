"""What models and data sets draw at random is as unknown as the noise: one record more shifts the draws of others."""

import os
import random

import numpy as np
import pytest
import torch
from scipy import stats
from tolerances import FALSE_ALARM
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lalora_kernels as lk
from lalora_kernels.privacy import noise
from lalora_kernels.privacy.drawn import Drawn
from lalora_kernels.privacy.sampling import PrivateLoader

KEY = bytes(range(32))
RECORDS = 6


class Augmented(Dataset):
    """Each record with a draw of all three generators."""

    def __len__(self):
        return RECORDS

    def __getitem__(self, i):
        drawn = torch.tensor([torch.rand(()).item(), np.random.random(), random.random()], dtype=torch.float64)
        if i == RECORDS - 1 and torch.utils.data.get_worker_info() is None:
            known_seeds()
        return drawn


def known_seeds():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def draws(source, workers=0):
    """(batches, record, generator) of the data set, and (batches, generator) of what follows each batch, in a process
    whose seeds are known, whose loop and workers set them again, as its data set does at last where there are none, and
    whose loader has a generator of its own."""
    known_seeds()
    data = DataLoader(
        Augmented(), batch_size=2, num_workers=workers, generator=torch.Generator().manual_seed(0),
        worker_init_fn=lambda _: known_seeds(),
    )  # fmt: skip
    records, model = [], []
    for batch in PrivateLoader(data, sample_rate=1.0, noise=source).steps(3):
        records.append(batch)
        model.append(torch.tensor([torch.rand(()).item(), np.random.random(), random.random()]))
        known_seeds()
    return torch.stack(records), torch.stack(model)


@pytest.mark.parametrize("workers", [0, 1])
def test_seeds_of_the_process_do_not_tell_them(workers):
    first, second = draws(lk.NoiseSource(), workers), draws(lk.NoiseSource(), workers)
    for a, b in zip(first, second):
        assert (a != b).all()
        assert len(a.flatten().unique()) == a.numel()  # nor is one batch's seed another's


@pytest.mark.parametrize("workers", [0, 1])
def test_under_a_fixed_key_which_claims_nothing_a_run_can_be_repeated(workers):
    first, second = draws(lk.NoiseSource.fixed(KEY), workers), draws(lk.NoiseSource.fixed(KEY), workers)
    for a, b in zip(first, second):
        assert torch.equal(a, b)


def test_a_seed_of_torch_s_is_not_all_that_is_unknown(monkeypatch):
    """Of a seed the CPU's generator takes 32 bits, so the 2^32 streams that seeds lead to could be tried one by one."""
    system = os.urandom
    monkeypatch.setattr(os, "urandom", lambda n: bytes(8) if n == 8 else system(n))
    states = []
    for _ in range(2):
        noise.seed_from_system()
        states.append(torch.default_generator.get_state()[24 : 24 + 8 * 624].view(torch.int64))
    seeded = torch.Generator().manual_seed(0).get_state()[24 : 24 + 8 * 624].view(torch.int64)
    for a, b in [states, (states[0], seeded)]:
        assert int((a == b).sum()) <= 2
    assert int(states[0].min()) >= 0 and int(states[0].max()) < 2**32 and len(states[0].unique()) > 600


def test_what_is_drawn_then_is_uniform():
    noise.seed_from_system()
    assert stats.kstest(torch.rand(100_000).numpy(), "uniform").pvalue > FALSE_ALARM
    assert stats.kstest(torch.randn(100_000).numpy(), "norm").pvalue > FALSE_ALARM


class TestWhatItIsFor:
    """Full batches, so that all positions are known, and a record more at the front; sums without noise, C = 1."""

    def released(self, extra, source):
        torch.manual_seed(1)
        x, y = torch.randn(41, 8), torch.randint(0, 3, (41,))
        if not extra:
            x, y = x[1:], y[1:]
        model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 3))
        lk.adapt(model, target_modules=["2"], modules_to_save=[], r=2, verbose=False)
        nn.init.normal_(model[2].lora_B)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        data = torch.utils.data.TensorDataset(x, y)
        optimizer, loader = lk.make_private(
            model, optimizer, DataLoader(data, batch_size=len(x)), method="dp-lora", noise_multiplier=0.0,
            max_grad_norm=1.0, noise=source, loss_reduction="sum",
        )  # fmt: skip
        torch.manual_seed(2)
        for batch, target in loader.steps(1):
            nn.functional.cross_entropy(model(batch), target, reduction="sum").backward()
            optimizer.step()
        return len(x) * torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def test_with_known_draws_a_record_moves_the_sum_by_more_than_its_share(self):
        """Which is why a fixed key, under which they are known, claims no ε."""
        with_it, without = (self.released(extra, lk.NoiseSource.fixed(KEY)) for extra in (True, False))
        assert (with_it - without).norm() > 2.0

    def test_without_dropout_s_draws_it_does_not(self, monkeypatch):
        monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
        with_it, without = (self.released(extra, lk.NoiseSource.fixed(KEY)) for extra in (True, False))
        assert (with_it - without).norm() <= 1.0 + 1e-5

    def test_a_seed_before_the_forward_is_refused(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3))
        lk.adapt(model, target_modules=["0"], verbose=False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randint(0, 3, (8,)))
        optimizer, loader = lk.make_private(model, optimizer, DataLoader(data, batch_size=8), noise_multiplier=1.0)
        torch.manual_seed(3)  # before the loop, as anybody does
        for x, _ in loader.steps(1):
            torch.manual_seed(4)
            with pytest.raises(RuntimeError, match="seeded between the loader's batch and the model's forward"):
                model(x)
            with torch.no_grad():
                model(x)

    def test_draws_of_a_private_run_are_not_known(self):
        first, second = (self.released(True, lk.NoiseSource()) for _ in range(2))
        assert (first - second).norm() > 1.0


DRAWS = {
    "torch": lambda: torch.rand(()),
    "python": random.random,
    "numpy": np.random.random,
    "a Gaussian that numpy kept": np.random.standard_normal,  # the second of a pair moves no other state
    "none": lambda: torch.zeros(()),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("seed", [None, 3])
def test_a_blocks_draws_are_seen_and_given_back(name, seed):
    def begin():
        known_seeds()
        np.random.standard_normal()

    def draw():
        return torch.rand(()).item(), random.random(), np.random.standard_normal(), np.random.random()

    model = nn.Linear(1, 1)
    begin()
    expected = draw()
    begin()
    with Drawn(model, seed) as drawn:
        DRAWS[name]()
    assert drawn.any == (name != "none") and draw() == expected

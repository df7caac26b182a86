"""A ledger kept in a file: what a loop of one's own releases is on record first."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk

BUDGET = {"target_epsilon": 8.0, "target_delta": 1e-5}


def world(ledger: lk.Ledger, steps: int):
    torch.manual_seed(0)
    model = lk.adapt(nn.Sequential(nn.Linear(4, 3)), r=2, target_modules=["0"], verbose=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    data = DataLoader(TensorDataset(torch.randn(40, 4), torch.randint(0, 3, (40,))), batch_size=8)
    return model, *lk.make_private(model, optimizer, data, ledger=ledger, steps=steps, **BUDGET)


def train(model, optimizer, loader, steps):
    for x, y in loader.steps(steps):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_charge_is_in_the_file_before_the_optimizer_moves(tmp_path):
    path = tmp_path / "new" / "ledger.json"
    model, optimizer, loader = world(lk.Ledger.at(path, **BUDGET), 6)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(lk.Ledger.load(path).steps))
    train(model, optimizer, loader, 3)
    assert seen == [1, 2, 3]


def test_nothing_is_released_where_the_file_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    model, optimizer, loader = world(lk.Ledger.at(tmp_path / "ledger.json", **BUDGET), 6)
    optimizer.ledger.path = tmp_path / "file" / "ledger.json"
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(OSError):
        train(model, optimizer, loader, 1)
    assert optimizer.ledger.steps == 1  # wasted, not overspent
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_what_came_after_a_checkpoint_stays_spent(tmp_path):
    """5 steps, a checkpoint, 4 more that are lost with the process: 3 of 12 are left."""
    path = tmp_path / "ledger.json"
    model, optimizer, loader = world(lk.Ledger.at(path, **BUDGET), 12)
    train(model, optimizer, loader, 5)
    stored = optimizer.state_dict()
    train(model, optimizer, loader, 4)
    ledger = lk.Ledger.at(path, **BUDGET)
    assert ledger.steps == 9
    model, optimizer, loader = world(ledger, 12 - ledger.steps)
    optimizer.load_state_dict(stored)
    assert optimizer.ledger.steps == 9
    train(model, optimizer, loader, 3)
    assert lk.Ledger.load(path).steps == 12 and 7.9 < optimizer.get_epsilon() <= 8.0
    with pytest.raises(lk.BudgetExceeded):
        train(model, optimizer, loader, 1)


def test_another_budget_than_the_files(tmp_path):
    lk.Ledger.at(tmp_path / "ledger.json", **BUDGET)
    with pytest.raises(lk.LedgerError, match=r"has the budget \(epsilon 8, .*asked for with \(epsilon 9,"):
        lk.Ledger.at(tmp_path / "ledger.json", target_epsilon=9.0, target_delta=1e-5)
    assert lk.Ledger.at(tmp_path / "ledger.json").target_epsilon == 8.0

"""A model's own loss that the first batch's two records do not tell is asked again where records count unequally."""

import pytest
import torch
from torch import nn

import lalora_kernels as lk
from lalora_kernels.privacy import own_loss_later
from lalora_kernels.privacy.own_loss_later import LOOKS, TRIES, OwnLossCheck, tied_in, unequal

F = nn.functional
N, T = 5, 6
EQUAL, RAGGED = [3] * N, [3, 1, 6, 2, 3]


class Net(nn.Module):
    """The squares over positions that count, divided by the batch's count or by each record's."""

    def __init__(self, shared=True, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.shared, self.dropout = nn.Linear(4, 2), shared, dropout
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, target, *, valid):
        self.calls += 1
        out = self.net(F.dropout(x, self.dropout, self.training))
        each = (out - target).square().sum(-1) * valid
        loss = each.sum() / valid.sum() if self.shared else (each.sum(1) / valid.sum(1)).mean()
        return {"loss": loss, "out": out, "rate": torch.tensor(0.1)}


def batch(lengths, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    valid = (torch.arange(T) < torch.tensor(lengths)[:, None]).to(dtype)
    x, target = (torch.randn(N, T, k, generator=generator) for k in (4, 2))
    return (x, target), {"valid": valid}


def asked(model, check, lengths):
    return check(model, *batch(lengths), N)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shared", [True, False])
def test_counts_that_differ_later(shared, dropout):
    model, check = lk.adapt(Net(shared, dropout), target_modules=["net"], r=2, verbose=False).train(), OwnLossCheck()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    drawn = torch.get_rng_state()
    for _ in range(2 * TRIES):
        assert not asked(model, check, EQUAL)
    assert asked(model, check, RAGGED) == ({"loss"} if shared else set())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), drawn)


def test_a_few_batches_are_asked(monkeypatch):
    asks = []
    monkeypatch.setattr(own_loss_later, "tied_in", lambda *a: asks.append(a) or set())
    model, check = Net(), OwnLossCheck()
    for i in range(LOOKS - TRIES - 1):
        asked(model, check, RAGGED if i < 2 * TRIES else EQUAL)
    assert len(asks) == TRIES
    for i in range(TRIES + 1):  # another tensor's counts, until no batch is looked at
        check(model, (torch.arange(N) % 2,), {}, N)
        assert len(asks) == TRIES + min(i + 1, TRIES)
    check(model, (torch.ones(N), torch.arange(N) % 2), {}, N)
    assert len(asks) == 2 * TRIES


def test_class_labels_that_always_differ_do_not_use_up_the_tries_of_lengths():
    model = Net()
    check = OwnLossCheck()
    forward = model.forward
    model.forward = lambda x, target, *, valid, kind: forward(x, target, valid=valid)
    for lengths in [EQUAL] * 2 * TRIES + [RAGGED]:
        args, kwargs = batch(lengths)
        found = check(model, args, {**kwargs, "kind": torch.arange(N) % 2}, N)
    assert found == {"loss"}


def test_which_records_are_compared():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
    given = (mask, mask.bool(), mask[:3], torch.ones(4), 2 * mask.float(), torch.ones(()))
    assert unequal(given, 4) == {(at, 0): {(1, 2), (1, 3)} for at in (0, 1, 4)}
    ignored = torch.tensor([[5, -100], [5, 6], [5, 255], [7, 8]])
    assert unequal({"labels": ignored}, 4) == {(0, -100): {(1, 0)}, (0, 255): {(0, 2)}}


def test_records_that_count_for_nothing_leave_a_mean_that_is_held_at_one():
    """Only a record without any shows the count: all others have one."""

    class Some(nn.Module):
        def forward(self, x, valid):
            return {"loss": (x.square() * valid).sum() / valid.sum().clamp(min=1.0), "out": x}

    x, valid = torch.arange(1.0, N + 1), torch.ones(N)
    valid[3] = 0.0
    assert OwnLossCheck()(Some(), (x, valid), {}, N) == {"loss"}


def test_what_does_not_take_three_rows_is_not_judged():
    args, kwargs = batch(RAGGED)
    square = nn.Module()
    square.forward = lambda x, mask: {"loss": (mask @ x.flatten(1)).mean(), "out": x}
    mask = torch.eye(N).tril()  # as many rows as records
    assert tied_in(square, (args[0], mask), {}, N, [(0, 1)]) == set()

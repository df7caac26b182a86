"""What a forward leaves on the model's modules: a loss that is read there, a state that the next one goes on with."""

from collections import OrderedDict

import pytest
import torch
from test_first_batch import chain, first_step, private
from test_own_loss_later import EQUAL, RAGGED, N, Net, batch
from torch import nn
from torch.utils.data import TensorDataset

import lalora_kernels as lk
from lalora_kernels.privacy.kept import Attributes, tied_attributes
from lalora_kernels.privacy.own_loss import LOSS_ORDERS

F = nn.functional


class Keeps(nn.Module):
    """``what`` of its input, for a loss to read."""

    def __init__(self, what, nested=False):
        super().__init__()
        self.what, self.nested = what, nested

    def forward(self, h):
        self.aux = [{"term": self.what(h)}] if self.nested else self.what(h)
        return h.tanh()

    def term(self):
        return self.aux[0]["term"] if self.nested else self.aux


def step(what, read=True, nested=False, steps=1):
    torch.manual_seed(0)
    model = chain(Keeps(what, nested))
    optimizer, loader = private(model)
    for x, y in loader.steps(steps):
        loss = F.cross_entropy(model(x), y)
        (loss + model.middle.term().mean() if read else loss).backward()
        optimizer.step()
    return optimizer.ledger.steps


TIED = {
    "balance": lambda h: h.softmax(1).mean(0).square().sum(),
    "contrast": lambda h: h @ h.t(),
    "centred": lambda h: h - h.mean(0),
    "a mean for each feature": lambda h: h.mean(0)[:5],
    "of the largest": lambda h: h[h[:, 0] > h[:, 0].median()],
    "by column": lambda h: h.t() @ h.t().softmax(1).t(),
}
OWN = {
    "each record's": lambda h: h.square(),
    "a mean": lambda h: h.square().mean(),
    "positions first": lambda h: h.square()[None].expand(4, -1, -1),
    "of no record": lambda h: (h - h).sum(0) + 1,
    "nothing": lambda h: h[:0],
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", TIED)
def test_a_term_that_ties_records_is_refused_where_the_loss_reads_it(name, nested):
    """Unseen, one record moved the sum by 1.5 C with such a balance."""
    with pytest.raises(ValueError, match=r"^middle\.aux, which the model's forward keeps there and the loss reads"):
        step(TIED[name], nested=nested)
    assert step(TIED[name], read=False, nested=nested) == 1
    assert step(lambda h: TIED[name](h).detach(), nested=nested) == 1


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_a_term_of_each_records_own_passes(name, nested):
    assert step(OWN[name], nested=nested, steps=2) == 2


def test_what_some_batches_leave_and_others_do_not_ties_them():
    place, left = ("middle", "aux"), {("middle", "aux"): [torch.ones(())]}
    orders = len(LOSS_ORDERS)
    assert tied_attributes([left] * orders) == set()
    assert tied_attributes([left] * (orders - 1) + [{}]) == {place}


def test_what_the_forward_itself_goes_on_with_is_no_term_of_the_loss():
    class Sorted(nn.Module):
        def forward(self, h):
            order = h.sum(1).argsort()
            self.sorted = h[order]
            return self.sorted[order.argsort()]

    assert first_step(chain(Sorted())).per_sample_checked


class KeptLoss(nn.Module):
    """``Net``'s loss over the batch's positions, kept instead of returned."""

    def __init__(self):
        super().__init__()
        self.inner = Net()

    def forward(self, x, target, valid):
        out = self.inner(x, target, valid=valid)
        self.loss = out["loss"]
        return out["out"]


def test_a_kept_mean_over_positions_is_found_once_counts_differ():
    model = lk.adapt(KeptLoss(), target_modules=["net"], r=2, verbose=False)
    rows = [zip(*batch(lengths)[0], batch(lengths)[1]["valid"]) for lengths in (EQUAL, RAGGED)]
    optimizer, loader = private(model, [r for part in rows for r in part])
    draws = iter([list(range(N)), list(range(N, 2 * N))])
    loader.batch_sampler.draw = lambda: next(draws)
    with pytest.raises(ValueError, match="^loss, which the model's forward keeps there"):
        for given in loader.steps(2):
            model(*given)
            model.loss.backward()
            optimizer.step()
    assert optimizer.ledger.steps == 1


def centre(h):
    return h.detach().mean(0)


class FromTheFirst(nn.Module):
    """A state that the first batch's records set, for all that follow."""

    def __init__(self, how):
        super().__init__()
        self.how, self.ready, self.mean, self.scale = how, False, None, 1.0
        self.table, self.list, self.dict = torch.zeros(8), [], {}

    def forward(self, h):
        if not self.ready:
            self.ready, self.mean = True, None
            if self.how == "tensor":
                self.mean = centre(h)
            elif self.how == "in place":
                self.table.copy_(centre(h))
            elif self.how == "number":
                self.scale = 1.0 + float(h.abs().max())
            elif self.how == "list":
                self.list.append(centre(h))
            elif self.how == "dict":
                self.dict["mean"] = centre(h)
            else:
                self.list.append(torch.arange(8.0))
        held = [*self.list, *self.dict.values(), *([] if self.mean is None else [self.mean])]
        return (h - self.table - sum(held)) / self.scale


@pytest.mark.parametrize("how", ["tensor", "in place", "number", "list", "dict"])
def test_a_state_that_the_first_records_set_is_refused(how):
    """The same in all forwards after it, so that each record is as it would be alone; the sum moved by 10 C."""
    with pytest.raises(ValueError, match="middle: the output for one record depends on the other records"):
        first_step(chain(FromTheFirst(how)))


def test_a_state_that_no_record_sets_passes():
    optimizer = first_step(model := chain(FromTheFirst("a table")))
    assert optimizer.per_sample_checked and len(model.middle.list) == 1


class Switches(nn.Module):
    """A model that keeps an activation with its graph, and is copied for each form of its calls."""

    def __init__(self):
        super().__init__()
        self.net = chain(nn.Tanh())

    def forward(self, x, other=False):
        self.last = [self.net(x)]
        return self.last[0] + x.mean(1, keepdim=True) * other


def test_a_kept_activation_does_not_keep_the_model_from_being_copied():
    model = Switches()
    optimizer, loader = private(model, TensorDataset(torch.randn(20, 6), torch.randint(0, 3, (20,))))
    for x, y in loader.steps(2):
        (F.cross_entropy(model(x), y) + F.cross_entropy(model(x, other=True), y)).backward()
        optimizer.step()
    assert optimizer.ledger.steps == 2 and model.last[0].grad_fn is not None


def test_attributes_are_put_back():
    module = FromTheFirst("in place")
    table, kept = module.table, module.list
    attributes = Attributes(module)
    assert not attributes.moved() and not attributes.left()
    module.table += 1
    module.list.append(torch.ones(2))
    module.scale, module.new = 3.0, torch.zeros(1)
    assert attributes.moved()
    assert {key: len(found) for (_, key), found in attributes.left().items()} == {"table": 1, "list": 1, "new": 1}
    attributes.put_back()
    assert not attributes.moved() and module.table is table and module.list is kept
    assert not table.any() and not kept and module.scale == 1.0 and not hasattr(module, "new")


class Closed(OrderedDict):
    def update(self, *args, **kwargs):
        raise AssertionError("closed")


class Last(list):
    """No list by its type."""


def test_what_is_kept_in_a_kind_of_list_or_dict_of_its_own_is_put_back():
    module = nn.Module()
    module.list, module.dict, module.closed = Last([1]), OrderedDict(a=1, b=2), Closed(width=8)
    attributes = Attributes(module)
    module.list.append(torch.ones(2))
    module.dict["a"] = torch.ones(2)
    attributes.put_back()
    assert module.list == [1] and module.dict == {"a": 1, "b": 2} and module.closed == {"width": 8}


class Collects(nn.Module):
    """Puts a hook on its layer at the first forward, as transformers 5 does for hidden states that a head goes by."""

    def __init__(self):
        super().__init__()
        self.layer, self.hooked, self.balance = nn.Linear(8, 8).requires_grad_(False), False, None

    def forward(self, h):
        found = []
        if not self.hooked:
            self.layer.register_forward_hook(lambda module, args, out: module.sink.append(out))
            self.hooked = True
        object.__setattr__(self.layer, "sink", found)
        self.layer(h)
        self.balance = h.mean()
        (only,) = found  # or the hook was put there twice
        return only


def test_hooks_that_a_forward_puts_there_go_with_their_flag():
    assert first_step(chain(Collects())).per_sample_checked

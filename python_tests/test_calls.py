"""What a model does in a later call, by its arguments, a hook or a replaced part, is checked as its first one was."""

from collections import OrderedDict

import pytest
import torch
from test_first_batch import chain, first_step, private
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from lalora_kernels.privacy import model_check

F = nn.functional


class Several(nn.Module):
    """``pair`` has each record beside the batch's mean."""

    def __init__(self):
        super().__init__()
        self.net = chain(nn.Tanh())

    def forward(self, x, pair=False, task="plain", mask=None, scale=1.0):
        z = self.net(x)
        z = z * scale if mask is None else z * mask
        return z @ z.mean(0) if pair or task == "pair" else z


def run(loss, steps=2):
    torch.manual_seed(0)
    optimizer, loader = private(Several())
    for x, y in loader.steps(steps):
        loss(optimizer.engine.model, x, y).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("switch", [{"pair": True}, {"task": "pair"}])
def test_a_second_call_that_mixes_is_refused(switch):
    """Unseen, one record moved the sum by 1.7 C."""
    with pytest.raises(ValueError, match="the model: the output for one record depends on the other records"):
        run(lambda m, x, y: F.cross_entropy(m(x), y) + m(x, **switch).mean())


def test_each_form_of_a_call_is_asked_once(monkeypatch):
    """Numbers that change from step to step make no other form, and arguments in another order do not."""
    asked = []
    check = model_check.check_inputs
    monkeypatch.setattr(model_check, "check_inputs", lambda *a: asked.append(a[2].keys()) or check(*a))
    scales = iter(range(100))

    def loss(m, x, y):
        mask = torch.ones(len(x), 1)
        calls = (m(x), m(x, task="other"), m(x, mask=mask, pair=False), m(x, pair=False, mask=mask))
        return sum(F.cross_entropy(z, y) for z in (*calls, m(x, scale=float(next(scales)))))

    assert run(loss, steps=3).ledger.steps == 3
    assert asked == [set(), {"task"}, {"mask", "pair"}, {"scale"}]


def centred(t):
    return t - t.mean(0)


class Centred(nn.Module):
    def forward(self, h):
        return centred(h)


def replace_forward(module):
    forward = module.forward
    module.forward = lambda h: centred(forward(h))


def replace_function(module):
    module[1].forward = centred


LATER = {
    "hook": lambda m: m.middle.register_forward_hook(lambda module, args, out: centred(out)),
    "hook on a trained layer": lambda m: m.first.register_forward_hook(lambda module, args, out: centred(out)),
    "hook in a dictionary of its own": lambda m: (
        setattr(m.middle, "_forward_hooks", OrderedDict()),
        m.middle.register_forward_hook(lambda module, args, out: centred(out)),
    ),
    "hook before": lambda m: m.middle.register_forward_pre_hook(lambda module, args: (centred(args[0]),)),
    "hook of gradients": lambda m: m.middle.register_full_backward_hook(lambda module, g, out: (centred(g[0]),)),
    "hook on all modules": lambda m: register_module_forward_hook(
        lambda module, args, out: centred(out) if isinstance(module, nn.Tanh) else out
    ),
    "hook in another's place": lambda m: (
        m.middle[0]._forward_hooks.clear(),
        m.middle[0].register_forward_hook(lambda module, args, out: centred(out)),
    ),
    "forward": lambda m: replace_forward(m.middle),
    "forward that was replaced before": lambda m: replace_function(m.middle),
    "a module in another's place": lambda m: setattr(m.middle, "0", Centred()),
}


@pytest.mark.parametrize("name", LATER)
def test_what_mixes_from_the_second_step_on_is_refused(name):
    """Nothing that trains is another than before. Unseen, one record moved the sum by 1.8 C."""
    torch.manual_seed(0)
    model = chain(nn.Sequential(nn.Tanh(), nn.Identity()))
    model.middle[1].forward = lambda h: h
    model.middle[0].register_forward_hook(lambda module, args, out: out)
    optimizer, loader = private(model)
    put = []
    try:
        with pytest.raises(ValueError, match="depends? on the other records|couples"):
            for x, y in loader.steps(2):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                put.append(LATER[name](model))
    finally:
        for handle in put:
            if isinstance(handle, RemovableHandle):
                handle.remove()
    assert optimizer.ledger.steps == 1


def test_hooks_that_are_gone_again_cost_nothing(monkeypatch):
    """Of an evaluation between two steps, say, or of tensors."""
    asked = []
    check = model_check.check_inputs
    monkeypatch.setattr(model_check, "check_inputs", lambda *a: asked.append(1) or check(*a))
    model = chain(nn.Tanh())
    optimizer, loader = private(model)
    for x, y in loader.steps(3):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        handle = model.middle.register_forward_hook(lambda module, args, out: out)
        with torch.no_grad():
            model(x)
        handle.remove()
    assert asked == [1]


def test_outputs_that_compare_records_are_told_what_to_return():
    class Compares(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = chain(nn.Tanh())

        def forward(self, x):
            each = self.net(x)
            return each @ each.t()

    with pytest.raises(ValueError, match=r"^the model: the output .* have it return what each has alone"):
        first_step(Compares())

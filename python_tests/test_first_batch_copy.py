"""The check of the first batch runs a copy of the model, whatever the model's functions hold, and nothing else."""

import functools
import threading
from collections import OrderedDict
from types import MethodType

import pytest
import torch
from test_first_batch import F, chain, private
from torch import nn

from lalora_kernels.privacy.checks import check_per_sample
from lalora_kernels.privacy.twin import double


class Centre(nn.Module):
    def forward(self, h):
        return h - h.mean(0, keepdim=True)


class Calls:
    """Holds a forward in an object, which no copy of a function sees into."""

    def __init__(self, forward):
        self.forward = forward

    def __call__(self, *args):
        return self.forward(*args)


def closure(forward):
    def call(*args):
        return forward(*args)

    return call


def default(forward):
    return lambda *args, forward=forward: forward(*args)


def method(forward):
    """As TRL's SFTTrainer: a bound method whose function is the closure."""

    def call(self, *args):
        return forward(*args)

    return MethodType(call, forward.__self__)


def part(forward):
    return functools.partial(lambda f, *args: f(*args), forward)


def part_of_closure(forward):
    return functools.partial(closure(forward))


def held_twice(forward):
    return closure(closure(forward))


REPLACED = [closure, default, method, part, part_of_closure, held_twice]


def build(middle, dtype):
    torch.manual_seed(0)
    model = chain(middle).to(dtype)
    nn.init.normal_(model.first.lora_B, std=0.3)
    return model


def replace(model, name, how):
    module = model.get_submodule(name)
    module.forward = how(module.forward)
    return model


def step(model, dtype):
    torch.manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(3, 6, dtype=dtype), torch.randint(0, 3, (3,)))
    optimizer, loader = private(model, data, noise_multiplier=0.0, max_grad_norm=1e6)
    x, y = next(loader.steps(1))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, optimizer.per_sample_checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["", "first", "middle"])
@pytest.mark.parametrize("how", REPLACED)
def test_a_replaced_forward_is_checked_on_the_copy(how, name, dtype):
    """In float64 nothing but the released gradient tells that the check ran the original."""
    expected, checked = step(build(nn.Tanh(), dtype), dtype)
    assert checked
    found, checked = step(replace(build(nn.Tanh(), dtype), name, how), dtype)
    assert checked and found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    with pytest.raises(ValueError, match="the output for one record depends on the other"):
        step(replace(build(Centre(), dtype), name, how), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, reached", [("", "first"), ("first", "first"), ("middle", "middle.0")])
def test_what_the_copy_cannot_be_rid_of_is_refused_by_name(name, reached, dtype):
    model = replace(build(nn.Sequential(nn.Tanh()), dtype), name, lambda forward: Calls(closure(forward)))
    with pytest.raises(ValueError, match=rf"model itself \({reached}.*place of {name or 'Sequential'}'s own.*'loss'"):
        step(model, dtype)
    engine = model.first.recorder.engine
    assert engine.batch.rows == 3 and not any(s.marked for s in engine.sites)
    assert not nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["", "first", "head"])
def test_a_forward_replaced_after_make_private_is_copied_or_refused(name, dtype):
    """What records a head stands in its forward by then, an object."""
    model = build(nn.Tanh(), dtype)
    optimizer, loader = private(model, torch.utils.data.TensorDataset(torch.randn(3, 6, dtype=dtype)))
    (x,) = next(loader.steps(1))
    replace(model, name, closure)
    if name == "head":
        with pytest.raises(ValueError, match=r"the model itself \(head\.weight\).*in the place of head's own"):
            model(x)
        return
    model(x).sum().backward()
    optimizer.step()
    assert optimizer.per_sample_checked


def test_a_hook_that_holds_the_model_goes_with_the_copy():
    model = build(nn.Tanh(), torch.float32)
    model.middle.register_forward_hook(lambda m, args, out: out + model.first(out[:, :6]))
    assert step(model, torch.float32)[1]


def test_functions_that_hold_themselves_or_nothing_yet_are_copied():
    model = chain(nn.Tanh())

    def again(x, depth=1):
        return again(x, depth - 1) if depth else inner(x)

    inner = model.middle.forward
    model.middle.forward = again

    def early(x):
        return late(x)

    model.head.early = early
    twin = double(model)
    late = model.first
    assert twin.middle.forward(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert twin.middle.forward is not again and model.middle.forward is again and late is model.first
    x = twin.middle.forward.__closure__
    assert {c.cell_contents for c in x} == {twin.middle.forward, twin.middle.__class__.forward.__get__(twin.middle)}


class Closed(OrderedDict):
    """A config that nothing writes to, as every model of diffusers has one."""

    def update(self, *args, **kwargs):
        raise AssertionError("closed")

    def __setitem__(self, key, value):
        if "sealed" in self:
            raise AssertionError("closed")
        super().__setitem__(key, value)


def test_a_dict_that_is_closed_to_others_is_copied():
    model = build(nn.Tanh(), torch.float32)
    model.middle.config = Closed({"width": 8, "act": lambda h: model.first(h), "sealed": True})
    assert step(model, torch.float32)[1]
    twin = double(model)
    assert list(twin.middle.config) == ["width", "act", "sealed"]
    assert twin.middle.config["act"](torch.zeros(1, 6, dtype=torch.float64)).dtype == torch.float64


def test_a_loss_that_calls_the_model_itself_is_told_so():
    model = chain(nn.Tanh()).double()
    batch = (torch.randn(2, 6, dtype=torch.float64),)
    with pytest.raises(ValueError, match="the loss, if it does not use the model that it is given"):
        check_per_sample(model, batch, lambda m, b: model(b[0]).square().mean())
    with pytest.raises(ValueError, match=r"the model itself \(head\.weight\)"):
        check_per_sample(model, batch, lambda m, b: m(b[0]).square().mean() + model.head.weight.square().sum())


def test_an_evaluation_in_another_thread_goes_on_beside_the_check():
    class Evaluated(nn.Module):
        """Has its like evaluated within its own forward, in a thread."""

        def forward(self, h):
            thread = threading.Thread(target=lambda: outputs.append(model.first(torch.zeros(1, 6))))
            thread.start()
            thread.join()
            return h

    outputs: list = []
    model = chain(Evaluated())
    with torch.no_grad():
        model(torch.zeros(1, 6))
    assert step(model, torch.float32)[1] and len(outputs) > 4


class Adapters(nn.Module):
    """Of which the adapters can be off, as under PEFT's disable_adapter()."""

    def __init__(self, middle, input_grads):
        super().__init__()
        self.inner, self.input_grads, self.on = chain(middle), input_grads, True

    def forward(self, x):
        x = x.detach().requires_grad_() if self.input_grads else x
        return self.inner(x) if self.on else F.linear(x, self.inner.first.weight)


@pytest.mark.parametrize("input_grads", [False, True])
@pytest.mark.parametrize("middle", [nn.Tanh(), nn.Dropout(0.5), Centre()])
def test_a_forward_that_nothing_trainable_takes_part_in_leaves_the_check_to_the_next(middle, input_grads):
    """Input gradients (PEFT's enable_input_require_grads) let a backward through that reaches no adapter."""
    model = Adapters(middle, input_grads)
    optimizer, loader = private(model)
    x, y = next(loader.steps(1))
    model.on = False
    model(x)
    assert not optimizer.per_sample_checked
    model.on = True
    if isinstance(middle, Centre):
        with pytest.raises(ValueError, match="middle: the output for one record depends on the other"):
            model(x)
        return
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.per_sample_checked


def test_check_per_sample_says_that_nothing_trainable_takes_part():
    model = Adapters(nn.Tanh(), False)
    model.on = False
    with pytest.raises(ValueError, match="no trainable tensor takes part in the loss"):
        check_per_sample(model, (torch.randn(2, 6),), lambda m, b: m(b[0]).square().mean())

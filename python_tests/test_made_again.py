"""With A active, an input that an activation function made is not kept but made again: same bits, less memory."""

import pytest
import torch
from models import adapted
from test_private_step import private, toy, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from lalora_kernels import autograd
from lalora_kernels.nn import LoRALinear, set_active


class Gated(nn.Module):
    """x -> a(x) * b(x), as in Llama's MLP."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 9), nn.Linear(6, 9)

    def forward(self, x):
        return nn.functional.silu(self.a(x)) * self.b(x)


MIDDLES = {
    "gelu": lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU()),
    "gelu, tanh": lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU("tanh")),
    "silu": lambda: nn.Sequential(nn.Linear(6, 9), nn.SiLU()),
    "gated": Gated,
}
KEEPERS = {
    "a norm": lambda: nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9)),
    "a product with a constant": lambda: nn.Sequential(nn.Linear(6, 9), Twice()),
    "an activation of what trains not": lambda: nn.Sequential(nn.Linear(6, 9).requires_grad_(False), nn.GELU()),
}


class Twice(nn.Module):
    def forward(self, x):
        return x * torch.full((9,), 2.0)


def layer(active: str = "A", **kwargs) -> LoRALinear:
    made = LoRALinear(9, 5, r=2, **kwargs)
    nn.init.normal_(made.lora_B)
    set_active(made, active)
    return made


def gradients(middle: nn.Module, last: LoRALinear, x: torch.Tensor) -> list[torch.Tensor]:
    y = last(middle(x))
    wanted = [p for m in (middle, last) for p in m.parameters() if p.requires_grad]
    return list(torch.autograd.grad(y.square().sum(), wanted))


@pytest.mark.parametrize("name", MIDDLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_an_input_that_was_kept(name, dtype, monkeypatch):
    torch.manual_seed(0)
    middle, last, x = MIDDLES[name]().to(dtype), layer().to(dtype), torch.randn(4, 3, 6, dtype=dtype)
    y = last(middle(x))
    assert y.grad_fn.next_functions[0][0] is not None and y.grad_fn.maker is not None
    assert y.grad_fn.saved_tensors[1] is None
    made = gradients(middle, last, x)
    monkeypatch.setattr(autograd, "MAKERS", {})
    y = last(middle(x))
    assert y.grad_fn.saved_tensors[1] is not None
    kept = gradients(middle, last, x)
    assert len(made) >= 3 and all(torch.equal(a, b) for a, b in zip(made, kept, strict=True))


@pytest.mark.parametrize("name", KEEPERS)
def test_other_inputs_are_kept(name):
    torch.manual_seed(0)
    y = layer()(KEEPERS[name]()(torch.randn(4, 6)))
    assert y.grad_fn.saved_tensors[1] is not None


def test_nothing_is_made_for_b_nor_behind_dropout():
    torch.manual_seed(0)
    x = MIDDLES["gelu"]()(torch.randn(4, 6))
    assert layer("B")(x).grad_fn.maker is None
    dropped = layer(lora_dropout=0.5)(x)
    assert dropped.grad_fn.maker is None and dropped.grad_fn.saved_tensors[1] is not None


def test_an_earlier_backward_that_freed_what_made_the_input():
    g = torch.randn(4, 5, requires_grad=True)
    A = torch.randn(2, 5, requires_grad=True)
    x = nn.functional.gelu(g)
    y = autograd.lora_linear(x, torch.randn(6, 5), None, A, torch.randn(6, 2), 1.0)
    torch.autograd.grad(x.sum(), g)
    with pytest.raises(RuntimeError, match="made again from what GeluBackward0 keeps.*retain_graph=True"):
        torch.autograd.grad(y.sum(), A)


def test_an_input_that_was_changed_in_place_is_refused_as_ever():
    torch.manual_seed(0)
    linear, last = nn.Linear(6, 9), layer()
    before = linear(torch.randn(4, 6))
    y = last(nn.functional.gelu(before))
    before.data.add_(0.0)
    before.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("inside", ["both", "middle", "last"])
def test_checkpointing(inside):
    """What is not kept but computed again is unpacked once only."""
    torch.manual_seed(0)
    middle, last, x = MIDDLES["gelu"](), layer(), torch.randn(4, 3, 6)
    wanted = gradients(middle, last, x)

    def run(part, t):
        return checkpoint(part, t, use_reentrant=False)

    if inside == "both":
        y = run(nn.Sequential(middle, last), x)
    else:
        y = last(run(middle, x)) if inside == "middle" else run(last, middle(x))
    trained = [p for m in (middle, last) for p in m.parameters() if p.requires_grad]
    found = torch.autograd.grad(y.square().sum(), trained)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_private_steps_are_the_same(monkeypatch):
    results, made = [], []
    for makers in (autograd.MAKERS, {}):
        monkeypatch.setattr(autograd, "MAKERS", makers)
        model, data, loss = toy()
        made.append(adapted_maker(model, data))
        opt, loader = private(model, data, noise_multiplier=0.7, sample_rate=0.6)
        train(model, loss, opt, loader, 4)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert made == [True, False] and torch.equal(*results)


def adapted_maker(model, data) -> bool:
    """Whether fc2's input, a GELU's output, would be made again."""
    set_active(model, "A")
    y = model.fc2(model.act(model.fc1(data.tensors[0])))
    set_active(model, "AB")
    return y.grad_fn.maker is not None


def test_a_transformers_forward_keeps_less(monkeypatch):
    """A ViT's second MLP layer keeps no input: the model's graph is searched for what its adapted layers kept."""
    kept = []
    for makers in (autograd.MAKERS, {}):
        monkeypatch.setattr(autograd, "MAKERS", makers)
        model, batch, loss = adapted("vit", dtype=torch.float32)
        set_active(model, "A")
        nodes, seen = [loss(model, batch).grad_fn], set()
        total = 0
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name() == "LoRAFunctionBackward" and node.saved_tensors[1] is not None:
                total += node.saved_tensors[1].numel()
            nodes += [f for f, _ in node.next_functions]
        kept.append(total)
    N, T, wide, layers = 3, 5, 40, 2
    assert kept[1] - kept[0] == layers * N * T * wide

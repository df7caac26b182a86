"""Gradients that a private step does not make: of tensors outside the model, of gradients, what hooks wait for."""

import pytest
import torch
from test_accounts import private, records
from test_checks import chain, classify
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.data import TensorDataset

from lalora_kernels.nn import LoRAEmbedding, LoRALinear

F = nn.functional


class TestATensorThatMakesTheInput:
    """Its gradient is autograd's own: summed over the records, not clipped, not noised."""

    @pytest.mark.parametrize("kind", ["prompt", "layer", "alone"])
    def test_and_trains_is_refused(self, kind):
        torch.manual_seed(0)
        model, prompt, layer = chain(nn.Tanh()), nn.Parameter(torch.zeros(6)), nn.Linear(6, 6, bias=False)
        optimizer, loader = private(model, sample_rate=1.0)
        x, _ = next(loader.steps(1))
        alone = nn.Parameter(x)
        given, shape = {
            "prompt": (lambda: torch.tanh(x + prompt), r"\(6,\)"),
            "layer": (lambda: layer(x).relu(), r"\(6, 6\)"),
            "alone": (lambda: alone, r"\(40, 6\)"),
        }[kind]
        with pytest.raises(ValueError, match=rf"trainable parameter of shape {shape}.*make it a part of the model"):
            model(given())
        assert optimizer.ledger.steps == 0

    def test_and_is_frozen_or_no_parameter_passes(self):
        model, frozen = chain(nn.Tanh()), nn.Linear(6, 6).requires_grad_(False)
        optimizer, loader = private(model, sample_rate=1.0)
        x, y = next(loader.steps(1))
        delta = torch.zeros_like(x, requires_grad=True)  # an adversary's
        F.cross_entropy(model(frozen(x + delta)), y).backward()
        optimizer.step()
        assert optimizer.ledger.steps == 1 and delta.grad.any()

    def test_and_is_the_models_own_passes(self):
        """inputs_embeds = model.embed(ids): its gradient comes through its recorder."""
        model = OfEmbeddings()
        optimizer, loader = private_ids(model)
        ids, y = next(loader.steps(1))
        F.cross_entropy(model(model.embed(ids)), y).backward()
        optimizer.step()
        assert optimizer.ledger.steps == 1


class OfEmbeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.embed = LoRALinear(6, 3, r=2), LoRAEmbedding(9, 6, r=2)

    def forward(self, embedded):
        return self.head(embedded.mean(1))


def private_ids(model):
    return private(model, TensorDataset(torch.randint(0, 9, (40, 4)), torch.randint(0, 3, (40,))), sample_rate=1.0)


class TestAHookOnAParameter:
    def test_is_refused(self):
        model = chain(nn.Tanh())
        model.last.lora_B.register_hook(lambda grad: 2 * grad)
        with pytest.raises(ValueError, match="last.lora_B has a hook on its gradient.*after optimizer.step"):
            private(model)

    def test_that_was_removed_is_forgotten(self):
        model = chain(nn.Tanh())
        model.last.lora_B.register_hook(lambda grad: 2 * grad).remove()
        private(model)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize(
    "compute",
    [
        lambda layer, name: parametrize.register_parametrization(layer, name, nn.Tanh()),
        lambda layer, name: prune.l1_unstructured(layer, name, amount=0.5),
    ],
    ids=["parametrized", "pruned"],
)
def test_a_factor_that_is_computed_is_refused(compute, factor):
    model = chain(nn.Tanh())
    compute(model.last, factor)
    with pytest.raises(ValueError, match=f"{factor} of last is no parameter any more.*prune.remove first"):
        private(model)


class TestGradientsOfGradients:
    """Autograd itself would make nothing, or half, of them: a layer's backward is no part of a graph."""

    @staticmethod
    def penalty(model, x):
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return g.square().sum()

    @pytest.mark.parametrize("middle", [None, nn.Tanh()])
    @pytest.mark.parametrize("private_step", [False, True])
    def test_a_penalty(self, middle, private_step):
        model = nn.Sequential(LoRALinear(6, 3, r=2)) if middle is None else chain(middle)
        x = records()[:][0]
        if private_step:
            _, loader = private(model, sample_rate=1.0)
            x, _ = next(loader.steps(1))
        with pytest.raises(RuntimeError, match="gradient of a gradient was asked for.*leave that term out"):
            self.penalty(model, x.requires_grad_(True)).backward()

    def test_a_hessian(self):
        """Not a matrix of zeros."""
        with pytest.raises(RuntimeError, match="gradient of a gradient"):
            torch.autograd.functional.hessian(lambda x: chain(nn.Tanh())(x).sum(), torch.randn(1, 6))

    def test_a_graph_of_the_backward_that_nobody_differentiates(self):
        torch.manual_seed(0)
        model, x = chain(nn.Tanh()), torch.randn(4, 6, requires_grad=True)
        found = []
        for create_graph in (False, True):
            (g,) = torch.autograd.grad(classify(model, (x, torch.tensor([0, 1, 2, 0]))), x, create_graph=create_graph)
            found.append(g.detach())
        torch.testing.assert_close(*found, rtol=0, atol=0)

"""torch.compile around private layers: one graph, the same steps."""

import pytest
import torch
from tolerances import COMPILED_F32
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk

KEY = bytes(range(32))


def train(backend, method, clipping, peft=False, steps=4):
    """Parameters after a few private steps; LoRA layers, a LayerNorm and a head train."""
    torch.manual_seed(0)
    layers = nn.Linear(12, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 24), nn.Linear(24, 3)
    settings = {"r": 4, "target_modules": ["0", "3"], "modules_to_save": ["1", "4"]}
    if peft:
        from peft import LoraConfig, get_peft_model

        model = lk.patch_peft(get_peft_model(nn.Sequential(*layers), LoraConfig(**settings)))
    else:
        model = lk.adapt(nn.Sequential(*layers), **settings, verbose=False)
    data = TensorDataset(torch.randn(60, 5, 12), torch.randint(0, 3, (60, 5)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    optimizer, loader = lk.make_private(
        model, optimizer, DataLoader(data, batch_size=12), noise_multiplier=1.0, method=method, clipping=clipping,
        noise=lk.NoiseSource.fixed(KEY),
    )  # fmt: skip
    forward = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    sizes = set()
    for x, y in loader.steps(steps):
        sizes.add(len(x))
        nn.functional.cross_entropy(forward(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(sizes) > 1  # batch sizes vary, and the graph stays whole
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "backend, method, clipping, peft",
    [
        ("aot_eager", "la-lora", "flat", False),
        ("aot_eager", "dp-lora", "per_layer", False),
        ("inductor", "la-lora", "automatic", False),
        ("aot_eager", "la-lora", "flat", True),
    ],
)
def test_compiled_steps_equal_eager_ones(backend, method, clipping, peft):
    torch.compiler.reset()
    eager, compiled = train(None, method, clipping, peft), train(backend, method, clipping, peft)
    assert float((eager - compiled).norm() / eager.norm()) < COMPILED_F32


def test_a_graph_that_outlived_its_optimizer_is_refused():
    torch.compiler.reset()
    model = lk.adapt(nn.Sequential(nn.Linear(4, 4)), r=2, target_modules=["0"], verbose=False)
    data = TensorDataset(torch.randn(8, 4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    optimizer, loader = lk.make_private(model, optimizer, DataLoader(data, batch_size=8), noise_multiplier=1.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (x,) = next(iter(loader.steps(1)))
    loss = compiled(x).square().sum()
    optimizer.detach()
    del optimizer, loader
    with pytest.raises(RuntimeError, match="outlived its private optimizer|outside a batch"):
        loss.backward()

"""A private model that nobody holds any longer is freed, wherever its training stopped."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk


def train(until, full):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    lk.adapt(model, target_modules=["0"], r=2, modules_to_save=["2"] if full else [], verbose=False)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    data = TensorDataset(torch.randn(48, 6), torch.arange(48) % 4)
    optimizer, loader = lk.make_private(model, sgd, DataLoader(data, batch_size=8), noise_multiplier=1.0)
    held = [weakref.ref(o) for o in (model, optimizer, optimizer.engine, loader)]
    if until == "made":
        return held
    for x, y in loader.steps(3):
        z = model(x)
        if until == "a forward":
            break
        if until == "a refusal":
            with pytest.raises(ValueError, match="the loss ties"):
                (z @ z.t()).logsumexp(1).mean().backward()
            break
        F.cross_entropy(z, y).backward()
        if until == "a backward":
            break
        optimizer.step()
        optimizer.zero_grad()
    if until == "detached":
        optimizer.detach()
    return held


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("until", ["made", "a forward", "a refusal", "a backward", "the end", "detached"])
def test_model_optimizer_and_loader_are_freed(until, full):
    held = train(until, full)
    gc.collect()
    assert [ref() for ref in held] == [None] * 4

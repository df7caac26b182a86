"""autocast and GradScaler: norms are those of unscaled gradients, sums and noise stay float32."""

import pytest
import torch
from test_private_step import KEY
from tolerances import AUTOCAST_BF16, AUTOCAST_F16
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.nn import factor_parameters


def make(clipping="flat", scaler=None, sample_rate=0.5, peft=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 24), nn.Linear(24, 3))
    settings = {"r": 4, "target_modules": ["0", "3"], "modules_to_save": ["1", "4"]}
    if peft:
        from peft import LoraConfig, get_peft_model

        model = lk.patch_peft(get_peft_model(model, LoraConfig(**settings)))
    else:
        lk.adapt(model, **settings, verbose=False)
    for role, p in factor_parameters(model):
        if role == "lora_B":
            nn.init.normal_(p, std=0.3)
    data = TensorDataset(torch.randn(24, 5, 12), torch.randint(0, 3, (24, 5)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer, loader = lk.make_private(
        model, optimizer, DataLoader(data, batch_size=12), noise_multiplier=0.0, sample_rate=sample_rate,
        max_grad_norm=0.5, clipping=clipping, grad_scaler=scaler, noise=lk.NoiseSource.fixed(KEY),
    )  # fmt: skip
    return model, optimizer, loader


def steps(model, optimizer, loader, dtype, scaler=None, count=2):
    """Released gradients of ``count`` steps."""
    released = []
    for x, y in loader.steps(count):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 for g in grads)
        released.append(torch.cat([g.flatten().clone() for g in grads]))
        optimizer.zero_grad()
    return released


def distance(found, expected):
    return max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, AUTOCAST_BF16), (torch.float16, AUTOCAST_F16)])
def test_a_patched_peft_model(dtype, tolerance):
    expected = steps(*make(peft=True), None)
    assert distance(steps(*make(peft=True), dtype), expected) < tolerance
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert distance(steps(*make(peft=True, scaler=scaler), dtype, scaler), expected) < tolerance


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, AUTOCAST_BF16), (torch.float16, AUTOCAST_F16)])
def test_autocast_stays_close_to_float32(dtype, tolerance, clipping):
    expected = steps(*make(clipping), None)
    assert distance(steps(*make(clipping), dtype), expected) < tolerance


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
def test_a_grad_scaler_changes_nothing_but_rounding(clipping):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    expected = steps(*make(clipping), torch.float16)
    found = steps(*make(clipping, scaler), torch.float16, scaler)
    assert distance(found, expected) < AUTOCAST_F16


def test_a_record_that_overflows_lowers_the_scale_and_contributes_nothing():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    model, optimizer, loader = make(scaler=scaler, sample_rate=1.0)
    with pytest.warns(UserWarning, match="NaN, Inf"):
        (released,) = steps(model, optimizer, loader, torch.float16, scaler, count=1)
    assert scaler.get_scale() < 2.0**40 and released.isfinite().all() and optimizer.nonfinite_samples == 24


def test_a_scaler_that_make_private_does_not_know_is_refused():
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match=r"make_private\(grad_scaler=...\)"):
        steps(*make(), torch.float16, scaler)


def test_a_scaler_that_is_disabled_is_none():
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    expected = steps(*make(), None)
    assert distance(steps(*make(scaler=scaler), None, scaler), expected) == 0.0

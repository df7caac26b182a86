"""autocast and GradScaler: norms are those of unscaled gradients, sums and noise stay float32."""

import pytest
import torch
from test_private_step import KEY
from tolerances import AUTOCAST_BF16, AUTOCAST_F16
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.nn import factor_parameters


def make(clipping="flat", scaler=None, sample_rate=0.5, peft=False, rate=0.1, loss_reduction=None):
    """With a scaler the loss is a sum, which it needs."""
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
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    optimizer, loader = lk.make_private(
        model, optimizer, DataLoader(data, batch_size=12), noise_multiplier=0.0, sample_rate=sample_rate,
        max_grad_norm=0.5, clipping=clipping, grad_scaler=scaler, noise=lk.NoiseSource.fixed(KEY),
        loss_reduction=loss_reduction or ("mean" if scaler is None else "sum"),
    )  # fmt: skip
    return model, optimizer, loader


def steps(model, optimizer, loader, dtype, scaler=None, count=2, times=1.0):
    """Released gradients of ``count`` steps. A record's loss is ``times`` the mean over its five positions."""
    released = []
    for x, y in loader.steps(count):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = times * nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        if optimizer.engine.loss_reduction == "sum":
            loss = len(x) * loss
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


class TestWhatOverflows:
    """One record's overflow must decide nothing about the others: not in its step, not in the next one."""

    SCALE = 2.0**15

    def overflowing(self, count, scaler=None):
        """(releases at one point, the optimizer) where some records overflow and others do not."""
        scaler = scaler or torch.amp.GradScaler("cpu", init_scale=self.SCALE)
        model, optimizer, loader = make(scaler=scaler, sample_rate=1.0, rate=0.0)
        with pytest.warns(UserWarning, match="NaN, Inf.*start it at a lower scale"):
            released = steps(model, optimizer, loader, torch.float16, scaler, count, times=13.0)
        return released, optimizer

    def test_it_contributes_nothing_and_the_scale_stays(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=self.SCALE)
        one, optimizer = self.overflowing(1)
        assert 0 < optimizer.nonfinite_samples < 24 and one[0].isfinite().all() and one[0].any()
        three, again = self.overflowing(3, scaler)
        assert scaler.get_scale() == self.SCALE and again.nonfinite_samples == 3 * optimizer.nonfinite_samples
        # Factors are A, B, A or B, A, B: the third release is of the first one's.
        assert torch.equal(three[2], three[0]) and torch.equal(three[0], one[0])

    def test_nor_does_a_scale_grow(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
        steps(*make(scaler=scaler), torch.float16, scaler, count=3)
        assert scaler.get_scale() == 2.0**10

    def test_a_state_that_brings_its_factors_does_not_move_it(self):
        state = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1).state_dict()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        made = make(scaler=scaler)
        scaler.load_state_dict(state)
        steps(*made, torch.float16, scaler, count=3)
        assert scaler.get_scale() == 2.0**10

    def test_of_a_mean_the_batch_decides_what_overflows(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with pytest.raises(ValueError, match="needs the sum over records.*pass loss_reduction='sum'"):
            make(scaler=scaler, loss_reduction="mean")

    def test_the_default_scale_leaves_out_every_record_that_is_wrong(self):
        with pytest.raises(ValueError, match=r"scale of 65536.*give GradScaler\(init_scale=2.0\*\*10\)"):
            make(scaler=torch.amp.GradScaler("cpu"))


def test_a_scaler_that_make_private_does_not_know_is_refused():
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match=r"make_private\(grad_scaler=...\)"):
        steps(*make(), torch.float16, scaler)


def test_a_scaler_that_is_disabled_is_none():
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    expected = steps(*make(), None)
    assert distance(steps(*make(scaler=scaler, loss_reduction="mean"), None, scaler), expected) == 0.0

"""What no other file checks and a planted fault (python_tests/planted) would otherwise get past the suite."""

import numpy as np
import pytest
import torch
from small import digits_npz, vit_folder
from test_private_step import KEY, private, toy, train
from torch import nn

from lalora_kernels import functional
from lalora_kernels.data import BadInput
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.run import Run, prepare
from lalora_kernels.nn import set_active


@pytest.mark.parametrize("kwargs", [{"sample_rate": 0.3}, {"expected_batch_size": 5}, {"batch_size": 3}])
def test_the_ledger_is_charged_with_the_rate_at_which_records_are_drawn(kwargs):
    model, data, loss = toy()
    opt, loader = private(model, data, noise_multiplier=0.9, clipping="automatic", max_grad_norm=0.3, **kwargs)
    train(model, loss, opt, loader, 3)
    q = {"sample_rate": 0.3, "expected_batch_size": 5 / 12, "batch_size": 3 / 12}[next(iter(kwargs))]
    assert loader.batch_sampler.sample_rate == pytest.approx(q, rel=1e-12)
    assert opt.ledger.releases == ((0.9, loader.batch_sampler.sample_rate, 3),)
    (entry,) = opt.ledger.entries
    assert (entry.clipping, entry.max_grad_norm, entry.first_release) == ("automatic", 0.3, 0)
    assert entry.expected_batch_size == pytest.approx(12 * q)


def test_a_factor_that_falls_idle_has_no_gradient_left_to_step_on():
    """Also where the user's loop forgets zero_grad."""
    model, data, loss = toy()
    opt, loader = private(model, data, noise_multiplier=1.0, method="la-lora")
    for step, batch in enumerate(loader.steps(4), 1):
        loss(model, batch).backward()
        opt.step()
        idle = "lora_A" if step % 2 else "lora_B"
        assert all(p.grad is None for n, p in model.named_parameters() if n.endswith(idle))


def test_set_active_leaves_the_idle_factor_no_gradient_in_ordinary_training_either():
    """Else the next step of any optimizer would move a factor that is said to be frozen."""
    model, data, loss = toy()
    for factors, idle in (("AB", ""), ("A", "lora_B"), ("AB", ""), ("B", "lora_A")):
        set_active(model, factors)
        assert all(p.grad is None for n, p in model.named_parameters() if idle and n.endswith(idle))
        loss(model, data.tensors).backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n and p.requires_grad)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_layer_that_is_called_under_no_grad_in_some_steps_gets_noise_alone_in_those(clipping):
    """And what the other layers are clipped to is what they are without it."""
    results = []
    for idle in (False, True):
        model, data, loss = toy(dtype=torch.float32)
        opt, loader = private(
            model, data, noise_multiplier=0.5, sample_rate=1.0, clipping=clipping, smoothing=None, max_grad_norm=0.2,
            method="dp-lora", check=False,  # of the model as a whole, which one of the steps does not call
        )  # fmt: skip
        released = []
        for step, batch in enumerate(loader.steps(3)):
            if idle and step == 1:
                with torch.no_grad():
                    h = model.act(model.fc1(batch[0]))
                nn.functional.cross_entropy(model.head(model.fc2(h)), batch[1]).backward()
            else:
                loss(model, batch).backward()
            opt.step()
            released.append({s.name: s.released * 12 for s in opt.engine.active})
            opt.zero_grad()
        results.append((opt.engine, released))
    (engine, usual), (_, idled) = results
    for site in engine.sites:
        noise = functional.chacha20_normal(site.param.numel(), key=KEY, release=1, tensor_index=site.index)
        alone = torch.allclose(idled[1][site.name].flatten(), 0.1 * noise, rtol=0, atol=1e-6)
        assert alone == site.name.startswith("fc1."), site.name
        assert torch.equal(usual[0][site.name], idled[0][site.name])
        assert not torch.allclose(idled[2][site.name].flatten(), 0.1 * noise, rtol=0, atol=1e-6)


class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class MixingInTraining(Mixing):
    def forward(self, x):
        return super().forward(x) if self.training else x


def a_task(folder, tests=lambda x: x, mixing=None):
    """A run on 64 digits; ``tests`` changes the float test images, ``mixing`` stands behind the model's last norm."""
    with np.load(digits_npz(folder / "d.npz", 64, 20)) as arrays:
        images = {name: arrays[name].astype(np.float32) / 255 for name in ("x_train", "x_test")}
        labels = {"y_train": arrays["y_train"], "y_test": arrays["y_test"]}
    images["x_test"] = tests(images["x_test"])
    np.savez(folder / "d.npz", **images, y_train=labels["y_train"], y_test=labels["y_test"][: len(images["x_test"])])
    task = prepare(make_config({
        "model": vit_folder(folder / "vit"), "dataset": str(folder / "d.npz"), "clients": 2, "batch_size": 8,
        "partition": "iid", "rounds": 1, "local_steps": 2, "epsilon": 8.0, "device": "cpu",
    }))  # fmt: skip
    if mixing is not None:
        task.classifier.model.vit.layernorm = nn.Sequential(task.classifier.model.vit.layernorm, mixing)
    return task


def with_nan(x, *which):
    x = x.copy()
    x[list(which), 3, 3] = np.nan
    return x


@pytest.mark.parametrize(
    "tests, mixing",
    [
        (lambda x: x, Mixing()),
        (lambda x: x, MixingInTraining()),
        (lambda x: x[[0, 0, 1]], Mixing()),  # two that are equal mix without a trace
        (lambda x: with_nan(x, 0), Mixing()),
    ],
    ids=["always", "in training", "equal test records", "NaN"],
)
def test_a_run_refuses_a_model_that_mixes_records_before_it_has_a_folder(tmp_path, tests, mixing):
    with pytest.raises(ValueError, match=r"vit\.layernorm.*depends on the other records"):
        Run.start(a_task(tmp_path, tests, mixing), tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize("tests", [lambda x: x[:1], lambda x: x[[0, 0]], lambda x: with_nan(x[:3], 1, 2)])
def test_a_run_whose_test_records_cannot_show_mixing_is_refused(tmp_path, tests):
    with pytest.raises(BadInput, match=r"d\.npz: no two test records are finite and differ.*give a test set with two"):
        Run.start(a_task(tmp_path, tests, Mixing()), tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()


def test_test_records_that_are_not_finite_are_passed_over(tmp_path):
    Run.start(a_task(tmp_path, lambda x: with_nan(x, 0, 1)), tmp_path / "run")
    assert (tmp_path / "run/config.json").exists()

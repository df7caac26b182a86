"""Kinds of PEFT's adapters that load_adapter takes, and those that it refuses with the cure, which holds."""

import json

import peft
import pytest
import torch
from peft_files import CONFIG, X, body
from tolerances import MODEL_F32

import lalora_kernels as lk

SERVED = r"patch_peft\(PeftModel.from_pretrained\(model, folder, is_trainable=True\)\) serves it"
CONVERTED = (
    r"PEFT's save_pretrained\(..., path_initial_model_for_weight_conversion=...\) makes a plain LoRA adapter of it"
)


def saved(folder, **config):
    """A model of PEFT's after "training", whose adapter is in ``folder``."""
    model = peft.get_peft_model(body(), peft.LoraConfig(r=2, target_modules=["fc1"], **config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) / 5)
    model.save_pretrained(folder)
    return model


def edit_config(folder, **changes):
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))


@pytest.mark.parametrize(
    "config",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"bias": "all", "init_lora_weights": "olora"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
)
def test_the_cure_of_what_patch_peft_serves_is_told_and_holds(config, tmp_path):
    model = saved(tmp_path, **config)
    with pytest.raises(ValueError, match=f"not supported here: .*; {SERVED}$"):
        lk.load_adapter(body(), tmp_path)
    served = lk.patch_peft(peft.PeftModel.from_pretrained(body(), tmp_path, is_trainable=True)).eval()
    assert {n for n, p in served.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    torch.testing.assert_close(served(X), model(X), **MODEL_F32)


@pytest.mark.parametrize(
    "init, message",
    [
        ("mystery", r"'mystery' \(it is not known\)$"),
        (["gaussian"], r"\['gaussian'\] \(it is not known\)$"),
        ("loftq", r"'loftq' \(it changes the base weights\)$"),
        ("pissa_niter_4", rf"'pissa_niter_4' \(it changes the base weights\); {CONVERTED}$"),
        ("corda", rf"'corda' \(it changes the base weights\); {CONVERTED}$"),
        ("lora_ga", rf"'lora_ga' \(it changes the base weights\); {CONVERTED}$"),
    ],
)
def test_initializations_that_leave_more_than_factors_or_are_not_known(init, message, tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, init_lora_weights=init)
    with pytest.raises(ValueError, match=f"not supported here: init_lora_weights={message}"):
        lk.load_adapter(body(), tmp_path)


@pytest.mark.parametrize("other", [{"use_dora": True}, {"init_lora_weights": "corda"}, {"bias": "some"}])
def test_no_cure_is_told_that_mends_a_part_alone(other, tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, **({"lora_bias": True} | other))
    with pytest.raises(ValueError, match="not supported here: lora_bias, [^;]*$|not supported here: [^;]*, lora_bias$"):
        lk.load_adapter(body(), tmp_path)
    edit_config(tmp_path, lora_bias=True, use_dora=False, init_lora_weights=None, bias="none")
    with pytest.raises(ValueError, match=f"not supported here: lora_bias; {SERVED}$"):
        lk.load_adapter(body(), tmp_path)


@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian", "orthogonal", "mica"])
def test_initializations_after_which_the_factors_are_all(init, tmp_path):
    model = saved(tmp_path, init_lora_weights=init)
    torch.testing.assert_close(lk.load_adapter(body(), tmp_path)(X), model(X), **MODEL_F32)


@pytest.mark.parametrize("init", [None, "eva"])
def test_initializations_that_are_told_by_the_file_alone(init, tmp_path):
    """EVA wants data, and leaves a choice of A."""
    model = saved(tmp_path)
    edit_config(tmp_path, init_lora_weights=init)
    torch.testing.assert_close(lk.load_adapter(body(), tmp_path)(X), model(X), **MODEL_F32)


def test_a_converted_pissa_loads(tmp_path):
    model = peft.get_peft_model(body(), peft.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights="pissa")).eval()
    model.peft_config["default"].init_lora_weights = True  # as PEFT says to save the start
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 5 if p.requires_grad else 0)
    expected = model(X)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    torch.testing.assert_close(lk.load_adapter(body(), tmp_path / "plain")(X), expected, **MODEL_F32)

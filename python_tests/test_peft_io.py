"""Adapters in PEFT's format: ours read by PEFT, PEFT's read here, and what saving and loading leave as it was."""

import copy
import json
import os

import peft
import pytest
import torch
from models import FAMILIES
from peft_files import CONFIG, WEIGHTS, X, body, trained
from safetensors.torch import load_file, save_file
from tolerances import MODEL_F32
from torch import nn

from lalora_kernels import peft_io
from lalora_kernels.adapt import adapt, merge, saved_modules
from lalora_kernels.nn import lora_layers, set_active
from lalora_kernels.peft_io import load_adapter, save_adapter


def logits(model, batch):
    with torch.no_grad():
        if not isinstance(batch, dict):
            out = model(batch[0])
            return getattr(out, "logits", out)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        plain = model.base_model.model if isinstance(model, peft.PeftModel) else model
        if hasattr(plain, "body"):
            return plain.head(plain.body(**inputs).last_hidden_state)
        return model(**inputs).logits


FAMILY_SETTINGS = {
    "bert": {"target_modules": "qv", "modules_to_save": ["classifier"]},
    "vit": {"target_modules": "all-linear", "modules_to_save": ["classifier"], "use_rslora": True},
    "swin": {"target_modules": "qv"},
    "timm_swin": {"target_modules": ["qkv", "attn.proj"], "modules_to_save": ["head.fc", "norm1"]},
    "timm_vit": {"target_modules": "qv", "modules_to_save": ["head"]},
    "gpt2": {"target_modules": "all-linear", "modules_to_save": ["head"]},
}


@pytest.mark.parametrize("family", FAMILY_SETTINGS)
def test_what_is_saved_here_computes_the_same_in_peft(family, tmp_path):
    torch.manual_seed(1)
    base, batch, _ = FAMILIES[family][0]()
    ours = trained(copy.deepcopy(base.eval()), r=3, lora_alpha=5, **FAMILY_SETTINGS[family])
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["fan_in_fan_out"] == (family == "gpt2")
    expected = logits(ours, batch)
    assert not torch.allclose(expected, logits(base, batch), **MODEL_F32)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, batch), expected, **MODEL_F32)
    loaded = load_adapter(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(loaded, batch), expected)
    assert saved_modules(loaded) == saved_modules(ours)
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in ours.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("family", FAMILY_SETTINGS)
def test_what_peft_saves_computes_the_same_here_and_back(family, tmp_path):
    torch.manual_seed(2)
    base, batch, _ = FAMILIES[family][0]()
    base.eval()
    settings = dict(FAMILY_SETTINGS[family])
    if settings["target_modules"] == "qv":
        settings["target_modules"] = r".*\.(query|value|q_proj|v_proj|qkv)"
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, **settings)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs, batch)
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(ours, batch), expected, **MODEL_F32)
    save_adapter(ours, tmp_path / "ours")
    first, second = (load_file(tmp_path / who / WEIGHTS) for who in ("theirs", "ours"))
    assert first.keys() == second.keys() and all(torch.equal(second[k], v) for k, v in first.items())


@pytest.mark.parametrize("task, heads", [("SEQ_CLS", ["classifier"]), ("SEQ_CLS", None), ("TOKEN_CLS", None)])
def test_task_types_of_peft_find_their_head(task, heads, tmp_path):
    torch.manual_seed(3)
    base, batch, _ = FAMILIES["bert"][0]()
    ours = trained(copy.deepcopy(base.eval()), target_modules="qv", modules_to_save=heads)
    save_adapter(ours, tmp_path, base_model_name_or_path="somebody/bert", task_type=task)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.task_type, config.base_model_name_or_path) == (task, "somebody/bert")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert isinstance(theirs, peft.PeftModelForSequenceClassification | peft.PeftModelForTokenClassification)
    torch.testing.assert_close(logits(theirs, batch), logits(ours, batch), **MODEL_F32)
    torch.testing.assert_close(logits(load_adapter(base, tmp_path).eval(), batch), logits(ours, batch), **MODEL_F32)


def distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(4)
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=31, dim=8, n_layers=1, n_heads=2, hidden_dim=16)
    ).eval()


def test_peft_counts_distilberts_pre_classifier_as_a_classifier(tmp_path):
    batch = {"input_ids": torch.randint(0, 31, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    ours = trained(distilbert(), target_modules="qv", modules_to_save=["classifier"])
    save_adapter(ours, tmp_path, task_type="SEQ_CLS")
    assert {"base_model.model.pre_classifier.weight", "base_model.model.classifier.bias"} <= set(
        load_file(tmp_path / WEIGHTS)
    )
    theirs = peft.PeftModel.from_pretrained(distilbert(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, batch), logits(ours, batch), **MODEL_F32)
    again = load_adapter(copy.deepcopy(ours), tmp_path)  # onto the model that wrote it
    assert torch.equal(logits(again, batch), logits(ours, batch))
    wide = trained(distilbert(), target_modules="all-linear", modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=r"also \['pre_classifier'\]"):
        save_adapter(wide, tmp_path / "wide")


def test_the_files_are_pefts(tmp_path):
    from safetensors import safe_open

    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["fc1", "fc2"], modules_to_save=["head"], lora_dropout=0.1
    )
    peft.get_peft_model(body(), config).save_pretrained(tmp_path / "theirs")
    ours = adapt(
        body(),
        r=2,
        lora_alpha=6,
        target_modules=["fc1", "fc2"],
        modules_to_save=["head"],
        lora_dropout=0.1,
        verbose=False,
    )
    save_adapter(ours, tmp_path / "ours")
    files = [safe_open(tmp_path / who / WEIGHTS, "pt") for who in ("theirs", "ours")]
    assert set(files[0].keys()) == set(files[1].keys()) and files[0].metadata() == files[1].metadata()
    theirs, mine = (json.loads((tmp_path / who / CONFIG).read_text()) for who in ("theirs", "ours"))
    assert mine.keys() <= theirs.keys()
    mine["target_modules"], theirs["target_modules"] = set(mine["target_modules"]), set(theirs["target_modules"])
    assert mine == {key: theirs[key] for key in mine}
    defaults = json.loads(json.dumps(peft.LoraConfig().to_dict()))
    left_out = {k: v for k, v in theirs.items() if k not in mine and k != "peft_version"}
    assert left_out == {k: defaults[k] for k in left_out}


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["fc1"], ["fc1"]),
        (["blocks.0.fc1"], ["blocks.0.fc1"]),
        (["blocks.0.fc1", "blocks.1.fc1"], ["fc1"]),
        (["blocks.0.fc1", "blocks.1.fc2"], ["blocks.0.fc1", "blocks.1.fc2"]),
    ],
)
def test_target_modules_are_said_as_short_as_can_be(targets, expected, tmp_path):
    ours = trained(body(), target_modules=targets)
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == expected
    torch.testing.assert_close(peft.PeftModel.from_pretrained(body(), tmp_path)(X), ours(X), **MODEL_F32)


def test_a_name_that_is_the_end_of_another_is_told_apart(tmp_path):
    def model():
        torch.manual_seed(6)
        return nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6), nn.Linear(6, 3))

    ours = adapt(model(), target_modules=r"1|0\.0", verbose=False)
    assert [n for n, _ in lora_layers(ours)] == ["0.0", "1"]
    flat = adapt(nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 3))), target_modules="0", verbose=False)
    nn.init.normal_(flat[0].lora_B)
    save_adapter(flat, tmp_path)
    base = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 3)))
    base.load_state_dict({k: v for k, v in flat.state_dict().items() if "lora" not in k})
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert isinstance(theirs.base_model.model[1][0], nn.Linear)  # "0" ends "1.0" too
    torch.testing.assert_close(theirs(X), flat(X), **MODEL_F32)
    assert torch.equal(load_adapter(base, tmp_path)(X), flat(X))


def test_ranks_and_alphas_by_layer_both_ways(tmp_path):
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["fc1", "fc2"],
        rank_pattern={"blocks.1.fc1": 4, "fc2": 1},
        alpha_pattern={"^blocks.0.fc2": 7},
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(body(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(body(), tmp_path / "theirs").eval()
    layers = dict(lora_layers(ours))
    assert {n: (layer.r, layer.lora_alpha) for n, layer in layers.items()} == {
        "blocks.0.fc1": (2, 3),
        "blocks.0.fc2": (1, 7),
        "blocks.1.fc1": (4, 3),
        "blocks.1.fc2": (1, 3),
    }
    torch.testing.assert_close(ours(X), theirs(X), **MODEL_F32)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(body(), tmp_path / "ours")
    torch.testing.assert_close(again(X), theirs(X), **MODEL_F32)


def test_a_rank_of_one_layer_is_not_that_of_a_layer_whose_name_ends_alike(tmp_path):
    def model():
        torch.manual_seed(7)
        return nn.ModuleDict({"fc": nn.Linear(6, 6), "a": nn.ModuleDict({"fc": nn.Linear(6, 6)}), "b": nn.Linear(6, 6)})

    ours = adapt(model(), r=4, lora_alpha=9, target_modules="fc", verbose=False)
    adapt(ours, r=2, lora_alpha=3, target_modules=["a.fc", "b"], verbose=False)
    save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path).base_model.model
    for name, layer in lora_layers(ours):
        twin = theirs.get_submodule(name)
        assert (twin.r["default"], twin.scaling["default"]) == (layer.r, layer.scaling)


def test_one_of_two_modules_of_a_name_is_saved(tmp_path):
    ours = trained(body(), target_modules=["fc1"], modules_to_save=["blocks.1.fc2"])
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["blocks.1.fc2"]
    assert not any("blocks.0.fc2" in key for key in load_file(tmp_path / WEIGHTS))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(body(), tmp_path)(X), ours(X), **MODEL_F32)


def test_a_head_that_came_with_a_file_is_saved_again(tmp_path):
    ours = trained(body(), r=2, target_modules=["fc1"], modules_to_save=["head"])
    save_adapter(ours, tmp_path / "one")
    other = load_adapter(adapt(body(), r=2, target_modules=["fc1"], verbose=False), tmp_path / "one")
    save_adapter(other, tmp_path / "two")
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_a_reader_of_the_old_file_keeps_it(tmp_path):
    ours = trained(body(), target_modules=["fc1"])
    save_adapter(ours, tmp_path)
    with open(tmp_path / WEIGHTS, "rb") as reader:
        before = (tmp_path / WEIGHTS).read_bytes()
        with torch.no_grad():
            ours.blocks[0]["fc1"].lora_B.add_(1)
        save_adapter(ours, tmp_path)
        assert reader.read() == before != (tmp_path / WEIGHTS).read_bytes()


@pytest.mark.parametrize("extra", [{"layers_to_transform": [1]}, {"exclude_modules": r".*\.0\..*"}])
def test_peft_adapters_of_some_layers_only(extra, tmp_path):
    base, batch, _ = FAMILIES["bert"][0]()
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, **extra)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(base, tmp_path).eval()
    assert [n for n, _ in lora_layers(ours)] == ["bert.encoder.layer.1.attention.self.query"]
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), **MODEL_F32)


def test_equal_adapters_give_equal_bytes_and_nothing_else_is_left(tmp_path):
    ours = trained(body(), target_modules=["fc2", "fc1"], modules_to_save=["head"])
    for folder in ("one", "two"):
        save_adapter(ours, tmp_path / folder)
        assert sorted(os.listdir(tmp_path / folder)) == [CONFIG, WEIGHTS]
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_saving_does_not_depend_on_which_factor_is_active_or_merged(tmp_path):
    ours = trained(body(), target_modules=["fc1"])
    save_adapter(ours, tmp_path / "before")
    set_active(ours, "B")
    merge(ours)
    save_adapter(ours, tmp_path / "after")
    assert (tmp_path / "before" / WEIGHTS).read_bytes() == (tmp_path / "after" / WEIGHTS).read_bytes()
    with pytest.raises(RuntimeError, match="blocks.0.fc1 is merged; call unmerge"):
        load_adapter(ours, tmp_path / "before")


def test_a_crash_while_writing_leaves_the_old_adapter(tmp_path, monkeypatch):
    old = trained(body(), target_modules=["fc1"])
    save_adapter(old, tmp_path)
    before = {file: (tmp_path / file).read_bytes() for file in (WEIGHTS, CONFIG)}
    with torch.no_grad():
        old.blocks[0]["fc1"].lora_B.add_(1)

    def crash(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(peft_io.os, "fsync", crash)
    with pytest.raises(OSError, match="no space"):
        save_adapter(old, tmp_path)
    assert {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)} == before


def test_loading_keeps_dtypes_and_bfloat16_files_load(tmp_path):
    ours = trained(body(), target_modules=["fc1"])
    save_adapter(ours, tmp_path)
    tensors = {k: v.bfloat16() for k, v in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded = load_adapter(body().bfloat16(), tmp_path)
    layer = loaded.blocks[1]["fc1"]
    assert layer.lora_A.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.lora_A, ours.blocks[1]["fc1"].lora_A.bfloat16().float())


def test_loading_into_an_adapted_model_changes_values_only(tmp_path):
    ours = trained(body(), r=2, target_modules=["fc1"], modules_to_save=["head"], lora_dropout=0.1)
    save_adapter(ours, tmp_path)
    other = adapt(body(), r=2, target_modules=["fc1"], modules_to_save=["head"], lora_dropout=0.1, verbose=False).eval()
    set_active(other, "B")
    other.head.requires_grad_(False)
    parameters, flags = list(other.parameters()), [p.requires_grad for p in other.parameters()]
    load_adapter(other, tmp_path)
    assert torch.equal(other(X), ours(X))
    assert all(a is b for a, b in zip(parameters, other.parameters()))
    assert [p.requires_grad for p in other.parameters()] == flags


def test_a_plain_model_takes_the_settings_of_the_file(tmp_path):
    ours = trained(body(), r=2, lora_alpha=5.5, target_modules=["fc1"], lora_dropout=0.25, use_rslora=True)
    save_adapter(ours, tmp_path)
    loaded = load_adapter(body(), tmp_path)
    for (_, mine), (_, theirs) in zip(lora_layers(ours), lora_layers(loaded)):
        for setting in ("r", "lora_alpha", "scaling", "use_rslora"):
            assert getattr(mine, setting) == getattr(theirs, setting)
        assert theirs.lora_dropout.p == 0.25

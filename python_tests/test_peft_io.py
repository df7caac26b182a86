"""Adapters in PEFT's format: ours read by PEFT, PEFT's read here, and every way a file can be wrong."""

import copy
import json
import os

import peft
import pytest
import torch
from models import FAMILIES
from safetensors.torch import load_file, save_file
from tolerances import MODEL_F32
from torch import nn

from lalora_kernels import peft_io
from lalora_kernels.adapt import adapt, merge, saved_modules
from lalora_kernels.nn import lora_layers, set_active
from lalora_kernels.peft_io import load_adapter, save_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Body(nn.Module):
    """Two blocks, so that names repeat, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(6, 5), "fc2": nn.Linear(5, 6)}) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["fc2"](torch.tanh(block["fc1"](x)))
        return self.head(x)


def body():
    torch.manual_seed(0)
    return Body().eval()


X = torch.linspace(-1, 1, 24).view(4, 6)


def trained(model, **settings):
    """An adapted model after "training": no parameter that trains is where it started."""
    adapt(model, verbose=False, **settings)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


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


def no_adapter(model):
    return model


def not_finite(model):
    adapt(model, target_modules=["fc1"], verbose=False)
    with torch.no_grad():
        model.blocks[1]["fc1"].lora_B[0, 0] = float("inf")
    return model


def not_finite_head(model):
    adapt(model, target_modules=["fc1"], modules_to_save=["head"], verbose=False)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    return model


def trainable_outside(model):
    adapt(model, target_modules=["fc1"], verbose=False)
    model.head.requires_grad_(True)
    return model


def two_dropouts(model):
    adapt(model, target_modules=["fc1"], verbose=False)
    return adapt(model, target_modules=["fc2"], lora_dropout=0.5, verbose=False)


def two_scalings(model):
    adapt(model, target_modules=["fc1"], verbose=False)
    return adapt(model, target_modules=["fc2"], use_rslora=True, verbose=False)


def one_layer_two_names(model):
    model.blocks[1]["fc1"] = model.blocks[0]["fc1"]
    return adapt(model, target_modules=["fc1"], verbose=False)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (no_adapter, "no LoRA layer; call adapt"),
        (not_finite, r"NaN or Inf in the adapter(.|\n)*blocks\.1\.fc1\.lora_B\.weight"),
        (not_finite_head, r"NaN or Inf in the adapter(.|\n)*head\.bias"),
        (trainable_outside, r"modules_to_save(.|\n)*head\.bias(.|\n)*head\.weight"),
        (two_dropouts, r"one lora_dropout for all layers, this model has \[0.0, 0.5\]"),
        (two_scalings, "one use_rslora for all layers"),
        (one_layer_two_names, "blocks.0.fc1 and blocks.1.fc1 are one layer"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_writing(spoil, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_adapter(spoil(body()), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def edit_config(**changes):
    def change(folder):
        config = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(config))

    return change


def edit_weights(edit):
    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return change


def cut(file, share):
    def change(folder):
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * share)])

    return change


def overwrite(file, data):
    return lambda folder: (folder / file).write_bytes(data)


def remove(file):
    return lambda folder: (folder / file).unlink()


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


P = "base_model.model."


def poison(tensors):
    tensors[f"{P}blocks.0.fc1.lora_B.weight"][1, 1] = float("nan")


def transpose(tensors):
    tensors[f"{P}blocks.0.fc1.lora_A.weight"] = tensors[f"{P}blocks.0.fc1.lora_A.weight"].t().contiguous()


def wrong_head(tensors):
    tensors[f"{P}head.weight"] = torch.zeros(4, 6)


def wide_rank(tensors):
    tensors[f"{P}blocks.1.fc1.lora_B.weight"] = torch.zeros(5, 3)


def strangers(tensors):
    tensors[f"{P}blocks.7.fc1.lora_A.weight"] = torch.zeros(2, 6)
    tensors[f"{P}blocks.7.fc1.lora_B.weight"] = torch.zeros(5, 2)
    tensors[f"{P}embeddings.weight"] = torch.zeros(2)


def base_weight(tensors):
    tensors[f"{P}blocks.0.fc2.weight"] = torch.zeros(6, 5)


def half(tensors):
    del tensors[f"{P}blocks.0.fc1.lora_B.weight"]


def whole_layer(tensors):
    for factor in "AB":
        del tensors[f"{P}blocks.0.fc1.lora_{factor}.weight"]


def no_head(tensors):
    del tensors[f"{P}head.bias"]


def magnitude(tensors):
    tensors[f"{P}blocks.0.fc1.lora_magnitude_vector"] = torch.zeros(5)


def no_factor(tensors):
    for key in [k for k in tensors if "lora" in k]:
        del tensors[key]


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (remove(CONFIG), FileNotFoundError, f"{CONFIG} is missing"),
        (remove(WEIGHTS), FileNotFoundError, f"{WEIGHTS} is missing$"),
        (pickled, FileNotFoundError, "adapter_model.bin is a pickle"),
        (cut(CONFIG, 0.5), ValueError, f"{CONFIG} is corrupt or truncated"),
        (overwrite(CONFIG, b"\xff\xfe\x00"), ValueError, f"{CONFIG} is corrupt or truncated"),
        (overwrite(CONFIG, b"[]"), ValueError, "peft_type LORA, this one says 'list'"),
        (cut(WEIGHTS, 0.9), ValueError, f"{WEIGHTS} is corrupt or truncated"),
        (cut(WEIGHTS, 0.1), ValueError, f"{WEIGHTS} is corrupt or truncated"),
        (cut(WEIGHTS, 0.0), ValueError, f"{WEIGHTS} is corrupt or truncated"),
        (overwrite(WEIGHTS, os.urandom(500)), ValueError, f"{WEIGHTS} is corrupt or truncated"),
        (edit_config(peft_type="IA3"), ValueError, "peft_type LORA, this one says 'IA3'"),
        (edit_config(r=0), ValueError, "r is a positive integer, got 0"),
        (edit_config(r=None), ValueError, "r is a positive integer, got None"),
        (edit_config(lora_alpha="8"), ValueError, "lora_alpha is a positive number"),
        (edit_config(rank_pattern={"fc1": 0}), ValueError, "r is a positive integer, got 0"),
        (edit_config(rank_pattern=[1]), ValueError, r"rank_pattern cannot be \[1\]"),
        (edit_config(modules_to_save="head"), ValueError, "modules_to_save cannot be 'head'"),
        (edit_config(target_modules="(fc1"), ValueError, "unterminated|missing"),
        (edit_config(use_dora=True), ValueError, "not supported here: use_dora"),
        (edit_config(lora_bias=True), ValueError, "not supported here: lora_bias"),
        (edit_config(bias="lora_only"), ValueError, "not supported here: bias='lora_only'"),
        (edit_config(init_lora_weights="pissa_niter_4"), ValueError, "init_lora_weights='pissa_niter_4'"),
        (edit_config(layer_replication=[[0, 1]], use_qalora=True), ValueError, "layer_replication, use_qalora"),
        (edit_config(something_new=1), ValueError, "not supported here: something_new"),
        (edit_weights(magnitude), ValueError, r"lora_A and lora_B weights(.|\n)*fc1.lora_magnitude_vector"),
        (edit_weights(no_factor), ValueError, "holds no LoRA factor"),
        (edit_weights(strangers), ValueError, r"no place for:\n  blocks.7.fc1\n  embeddings.weight$"),
        (edit_weights(base_weight), ValueError, r"no place for:\n  blocks.0.fc2.weight$"),
        (edit_weights(half), ValueError, r"incomplete, nothing in it for:\n  blocks.0.fc1.lora_B.weight$"),
        (edit_weights(whole_layer), ValueError, r"incomplete, nothing in it for:\n  blocks.0.fc1.lora_A.weight$"),
        (edit_weights(no_head), ValueError, r"incomplete, nothing in it for:\n  head.bias$"),
        (edit_weights(transpose), ValueError, r"fc1.lora_A.weight: \(6, 2\) in the file, \(2, 6\) in the model"),
        (edit_weights(wide_rank), ValueError, r"blocks.1.fc1.lora_B.weight: \(5, 3\) in the file, \(5, 2\) in the"),
        (edit_weights(wrong_head), ValueError, r"head.weight: \(4, 6\) in the file, \(3, 6\) in the model"),
        (edit_config(r=4), ValueError, r"fc1.lora_A.weight: \(2, 6\) in the file, \(4, 6\) in the model"),
        (edit_weights(poison), ValueError, r"NaN or Inf(.|\n)*blocks.0.fc1.lora_B.weight$"),
    ],
)
def test_bad_files_say_what_is_wrong_and_change_nothing(spoil, error, message, tmp_path):
    save_adapter(trained(body(), r=2, target_modules=["fc1"], modules_to_save=["head"]), tmp_path)
    load_adapter(body(), tmp_path)  # the good file loads
    spoil(tmp_path)
    model = body()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path)
    assert not list(lora_layers(model)) and saved_modules(model) == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ["fc1", "fc2"]}, r"another way(.|\n)*blocks.1.fc2: adapted in the model, not in the file"),
        ({"target_modules": ["blocks.0.fc1"]}, "blocks.1.fc1: in the file, not adapted in the model"),
        ({"target_modules": ["fc1"], "r": 3}, "blocks.0.fc1: r 2, scaling 1 in the file; 3, 1 in the model"),
        ({"target_modules": ["fc1"], "lora_alpha": 4}, "blocks.0.fc1: r 2, scaling 1 in the file; 2, 2 in the model"),
        ({"target_modules": ["fc1"], "use_rslora": True}, "blocks.0.fc1: r 2, scaling 1 in the file; 2, 1.41421 in"),
        ({"target_modules": ["fc1"], "modules_to_save": ["head"]}, r"incomplete, nothing in it for:\n  head$"),
    ],
)
def test_an_adapted_model_must_fit_the_file(settings, message, tmp_path):
    save_adapter(trained(body(), r=2, target_modules=["fc1"]), tmp_path)
    model = trained(body(), **{"r": 2} | settings)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT says so of its own files of shared blocks too
def test_a_shared_block_is_fine_but_a_layer_in_two_places_is_not(tmp_path):
    def shared():
        model = body()
        model.blocks[1] = model.blocks[0]
        return model

    def in_two_places():
        model = body()
        model.blocks[1]["fc1"] = model.blocks[0]["fc1"]
        return model

    ours = adapt(shared(), r=3, target_modules=["fc1"], verbose=False)
    trained(ours, r=2, target_modules=["fc2"])
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(shared(), tmp_path)
    torch.testing.assert_close(theirs(X), ours(X), **MODEL_F32)
    loaded = load_adapter(shared(), tmp_path)
    assert torch.equal(loaded(X), ours(X)) and {layer.r for _, layer in lora_layers(loaded)} == {2, 3}
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs" / WEIGHTS).keys() == load_file(tmp_path / WEIGHTS).keys()
    theirs = peft.get_peft_model(in_two_places(), peft.LoraConfig(r=2, target_modules=["fc1"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="blocks.0.fc1 and blocks.1.fc1 are one layer"):
        load_adapter(in_two_places(), tmp_path)


def test_a_layer_that_cannot_be_adapted_is_named(tmp_path):
    save_adapter(trained(body(), target_modules=["fc1"]), tmp_path)
    model = body()
    model.blocks[0]["fc1"] = nn.Conv1d(6, 5, 1)
    with pytest.raises(ValueError, match="blocks.0.fc1 cannot be adapted: its type is Conv1d"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    "config, feature",
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"use_qalora": True, "qalora_group_size": 2}, "use_qalora"),
        ({"target_parameters": ["blocks.0.fc2.weight"]}, "target_parameters"),
    ],
)
def test_features_of_peft_that_are_not_supported_are_refused_by_name(config, feature, tmp_path):
    peft.get_peft_model(body(), peft.LoraConfig(r=2, target_modules=["fc1"], **config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"not supported here: .*{feature}"):
        load_adapter(body(), tmp_path)


def test_names_of_transformers_4_are_told_with_the_cure(tmp_path):
    """ViT's and Swin's layers were renamed in transformers 5; PEFT files from before do not fit."""
    torch.manual_seed(15)
    base, _, _ = FAMILIES["vit"][0]()
    save_adapter(trained(copy.deepcopy(base), r=2, target_modules="qv"), tmp_path)
    old = {"q_proj": "attention.query", "v_proj": "attention.value"}
    tensors = {}
    for key, value in load_file(tmp_path / WEIGHTS).items():
        for new, name in old.items():
            key = key.replace(new, name)
        tensors[key] = value
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"(?s)no place for:.*attention\.query.*query, value are names of trans.* 4"):
        load_adapter(base, tmp_path)

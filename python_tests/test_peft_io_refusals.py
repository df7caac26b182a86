"""Adapters that cannot be saved, and every way a file can be wrong or not fit the model."""

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

from lalora_kernels.adapt import adapt, saved_modules
from lalora_kernels.nn import lora_layers
from lalora_kernels.peft_io import load_adapter, save_adapter


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


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Conv2d(4, 4, 1)


def attention(fused=None):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Attention(), "b": Attention()})
    return model if fused is None else trained(model, r=2, target_modules=["qkv"], fused=fused)


@pytest.mark.parametrize(
    "file, model, fused, message",
    [
        ("qv", "qkv", None, r"call unadapt\(model\) first.* has outputs \[\(0, 4\), \(8, 12\)\] in the file, all in"),
        ("qv", "qkv", "qv", r"outputs \[\(0, 4\), \(8, 12\)\] with fused='qv', all in the model"),
        ("qv", "qv", "qkv", r"outputs all with fused='qkv', \[\(0, 4\), \(8, 12\)\] in the model"),
        ("qkv", None, "qv", "a.qkv: the file adapts outputs that fused='qv' leaves out; take fused='qkv'"),
        ("qkv", "qv", None, "a.qkv: the file adapts outputs that fused='qv' leaves out; take fused='qkv'"),
        ("qv", None, "kv", "fused='kv': it is 'qkv', or 'qv'"),
    ],
)
def test_outputs_that_the_file_the_model_and_fused_disagree_about(file, model, fused, message, tmp_path):
    save_adapter(attention(file), tmp_path)
    model = attention(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path, fused=fused)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in after.items())


def test_an_adapted_model_goes_on_as_it_was_adapted(tmp_path):
    save_adapter(attention("qv"), tmp_path)
    for model, fused in (("qv", None), ("qv", "qv"), ("qkv", "qkv")):
        loaded = load_adapter(attention(model), tmp_path, fused=fused)
        assert all((layer.trained_rows is None) == (model == "qkv") for _, layer in lora_layers(loaded))


@pytest.mark.parametrize(
    "header, message",
    [
        ("{", "is corrupt: lalora_kernels.rows in its header"),
        ("[]", "is corrupt: lalora_kernels.rows in its header"),
        ('{"a.qkv": 3}', "is corrupt: lalora_kernels.rows in its header"),
        ('{"a.qkv": [[0, "4"]]}', "is corrupt: lalora_kernels.rows in its header.*no ranges"),
        ('{"a.qkv": [[4, 2]]}', "is corrupt: lalora_kernels.rows in its header.*no ranges"),
        ('{"a.qkv": [[-4, 2]]}', "is corrupt: lalora_kernels.rows in its header.*no ranges"),
        ('{"a.qkv": [[0, 13]]}', "which outputs are adapted of what is not such a layer:\n  a.qkv"),
        ('{"a.out": [[0, 4]]}', "which outputs are adapted of what is not such a layer:\n  a.out"),
        ('{"c.qkv": [[0, 4]]}', "which outputs are adapted of what is not such a layer:\n  c.qkv"),
        ('{"a.qkv": [[0, 4]]}', "a.qkv: the file adapts outputs that"),
    ],
)
def test_a_header_that_was_edited(header, message, tmp_path):
    save_adapter(trained(attention(), r=2, target_modules=["qkv", "out"]), tmp_path)
    metadata = {"format": "pt", "lalora_kernels.rows": header}
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata=metadata)
    model = attention()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not list(lora_layers(model))

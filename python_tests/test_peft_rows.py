"""Adapters of which fused leaves rows out: what their files hold there, and what becomes of it."""

import copy
import os

import peft
import pytest
import torch
from models import FAMILIES
from peft_files import CONFIG, WEIGHTS, X, body, trained
from safetensors.torch import load_file
from test_peft_io import logits
from tolerances import MODEL_F32

import lalora_kernels as lk
from lalora_kernels.adapt import merge
from lalora_kernels.nn import lora_layers
from lalora_kernels.peft_io import load_adapter, save_adapter


def fused_qv(model="gpt2", **settings):
    """A base model and a copy of it of whose fused projections queries and values are adapted, B filled whole."""
    torch.manual_seed(7)
    base, batch, _ = FAMILIES[model][0]()
    return base.eval(), trained(copy.deepcopy(base), target_modules="qv", fused="qv", **settings), batch


@pytest.mark.parametrize("family", ["gpt2", "timm_vit"])
def test_rows_of_the_keys_are_zeros_in_the_file_whatever_b_holds_there(family, tmp_path):
    base, ours, batch = fused_qv(family)
    layers = dict(lora_layers(ours))
    assert all(layer.lora_B.all() for layer in layers.values())  # filled by hand, the keys too
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, batch), logits(ours, batch), **MODEL_F32)
    for name, layer in layers.items():
        B = load_file(tmp_path / WEIGHTS)[f"base_model.model.{name}.lora_B.weight"]
        q, k, v = B.chunk(3)
        assert q.all() and v.all() and not k.any() and layer.lora_B.all()
    merge(ours)
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), **MODEL_F32)


def key_rows(model):
    return [layer.lora_B.chunk(3)[1] for _, layer in lora_layers(model)]


@pytest.mark.parametrize("fused, moves", [(None, False), ("qkv", True), ("qv", False)])
def test_what_fused_left_out_stays_out_when_training_goes_on(fused, moves, tmp_path, recwarn):
    """Plain SGD on a loss that every output of the projections changes."""
    base, ours, batch = fused_qv()
    save_adapter(ours, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not any("nexpected" in str(w.message) or "missing" in str(w.message) for w in recwarn)
    loaded = load_adapter(copy.deepcopy(base), tmp_path, fused=fused).eval()
    assert torch.equal(logits(loaded, batch), logits(ours, batch)) and not any(k.any() for k in key_rows(loaded))
    optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=1.0)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    loaded.body(**inputs).last_hidden_state.square().mean().backward()
    optimizer.step()
    assert all(bool(k.any()) == moves for k in key_rows(loaded))
    save_adapter(loaded, tmp_path / "again")
    again = load_adapter(copy.deepcopy(base), tmp_path / "again")
    assert all((layer.trained_rows is None) == moves for _, layer in lora_layers(again))
    torch.testing.assert_close(logits(again.eval(), batch), logits(loaded, batch), **MODEL_F32)


def test_a_private_training_that_goes_on_from_a_file_leaves_the_keys_alone(tmp_path):
    from torch.utils.data import DataLoader

    base, ours, _ = fused_qv()
    save_adapter(ours, tmp_path)
    model = load_adapter(base, tmp_path).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loader = DataLoader(torch.randint(0, 31, (12, 5)), batch_size=4)
    optimizer, loader = lk.make_private(model, optimizer, loader, noise_multiplier=1.0, check=False)
    for ids in loader.steps(3):
        model.body(ids).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(layer.lora_B.chunk(3)[0].all() for _, layer in lora_layers(model))
    assert not any(k.any() for k in key_rows(model))


def test_equal_adapters_of_which_rows_are_left_out_give_equal_bytes(tmp_path):
    """safetensors writes the entries of a header in one order now and in another then."""
    _, ours, _ = fused_qv()
    files = set()
    for i in range(8):
        save_adapter(ours, tmp_path / str(i))
        files.add((tmp_path / str(i) / WEIGHTS).read_bytes())
    assert len(files) == 1
    (data,) = files
    assert (8 + int.from_bytes(data[:8], "little")) % 8 == 0  # as safetensors aligns its tensors


def test_rows_of_a_layers_own_choice_are_kept_and_a_file_of_pefts_has_none(tmp_path):
    ours = trained(body(), target_modules=["fc1"])
    ours.blocks[1]["fc1"].only_rows(slice(1, 2), slice(3, 5))
    save_adapter(ours, tmp_path / "ours")
    again = load_adapter(body(), tmp_path / "ours")
    assert again.blocks[1]["fc1"].trained_rows.flatten().tolist() == [0, 1, 0, 1, 1]
    assert again.blocks[0]["fc1"].trained_rows is None and torch.equal(again(X), ours(X))
    peft.PeftModel.from_pretrained(body(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    theirs = load_adapter(body(), tmp_path / "theirs")
    assert theirs.blocks[1]["fc1"].trained_rows is None
    torch.testing.assert_close(theirs(X), ours(X), **MODEL_F32)

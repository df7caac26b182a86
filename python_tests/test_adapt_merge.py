"""The way back: merge, unmerge, merge_and_unload and unadapt."""

import copy

import peft
import pytest
import torch
from adapting import mlp, twins
from models import FAMILIES
from tolerances import LAYER_F64, MERGED_F32
from torch import nn

from lalora_kernels.adapt import adapt, merge, merge_and_unload, saved_modules, unadapt, unmerge
from lalora_kernels.nn import LoRALinear, lora_layers
from lalora_kernels.peft_patch import patch_peft


@pytest.mark.parametrize("family", ["bert", "swin", "gpt2", "timm_vit"])
def test_merged_weights_equal_evaluation(family):
    ours, _, batch, loss = twins(family, torch.float32)
    ours.eval()
    base = {n: layer.weight.clone() for n, layer in lora_layers(ours)}
    with torch.no_grad():
        adapted = loss(ours, batch)
        merge(ours)
        torch.testing.assert_close(loss(ours, batch), adapted, **MERGED_F32)
        unmerge(ours)
        assert torch.equal(loss(ours, batch), adapted)
        assert all(torch.equal(layer.weight, base[n]) for n, layer in lora_layers(ours))
        plain = merge_and_unload(ours)
        assert plain is ours and not list(lora_layers(plain)) and not saved_modules(plain)
        torch.testing.assert_close(loss(plain, batch), adapted, **MERGED_F32)


def test_merged_weights_equal_pefts():
    ours, theirs, _, _ = twins("gpt2", torch.float64)
    merged = theirs.merge_and_unload().state_dict()
    found = merge_and_unload(ours).state_dict()
    assert found.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(found[name], value, **LAYER_F64)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_unadapt_gives_the_model_back(family, merged):
    model, batch, loss = FAMILIES[family][0]()
    model.eval()
    expected, before = loss(model, batch), copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    adapt(model, target_modules="qv", modules_to_save=FAMILIES[family][2], verbose=False)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    assert not torch.equal(loss(model, batch), expected)
    if merged:
        merge(model)
    assert unadapt(model) is model
    assert dict(model.named_modules()) == modules and torch.equal(loss(model, batch), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    adapt(model, target_modules="qv", verbose=False)  # and it can be adapted again


def test_unadapt_after_moving_to_another_dtype():
    model = adapt(mlp(), target_modules=["fc1"], verbose=False).double()
    unadapt(model)
    assert model.fc1.weight.dtype == torch.float64 and model(torch.randn(2, 6).double()).dtype == torch.float64


def test_merge_is_all_or_nothing():
    model = adapt(mlp(), target_modules=["fc1", "fc2"], verbose=False)
    nn.init.normal_(model.fc1.lora_B)
    weight = model.fc1.weight.clone()
    with torch.no_grad():
        model.fc2.lora_B[0, 0] = float("nan")
    for attempt in (merge, merge_and_unload):
        with pytest.raises(ValueError, match="fc2: .*NaN or Inf"):
            attempt(model)
        assert torch.equal(model.fc1.weight, weight) and not model.fc1.merged and isinstance(model.fc1, LoRALinear)
    nn.init.normal_(model.fc2.lora_B)
    merge(model)
    with pytest.raises(RuntimeError, match="fc1: .*already merged"):
        merge(model)
    unmerge(model)
    with pytest.raises(RuntimeError, match="fc1: .*not merged"):
        unmerge(model)


def test_merge_and_unload_takes_layers_as_they_are():
    model = adapt(mlp(), target_modules=["fc1", "fc2"], verbose=False)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6)
    expected = model(x).detach()
    model.fc1.merge()
    torch.testing.assert_close(merge_and_unload(model)(x), expected, **MERGED_F32)


def test_merging_into_a_tied_weight_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    assert model.lm_head.weight is model.transformer.wte.weight
    adapt(model, target_modules=["lm_head"], verbose=False)
    with pytest.raises(ValueError, match="lm_head shares its weight with transformer.wte"):
        merge(model)
    unadapt(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_lora_layer_that_is_the_whole_model_cannot_be_unloaded():
    with pytest.raises(ValueError, match="itself is a LoRA layer"):
        unadapt(LoRALinear(3, 3, r=1))


def test_layers_that_adapt_did_not_make_are_unloaded_too():
    model = nn.Sequential(LoRALinear(4, 3, r=2, bias=False))
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(2, 4)
    expected = model(x).detach()
    merge_and_unload(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected, **MERGED_F32)


@pytest.mark.parametrize(
    "call, theirs",
    [
        (merge, "merge_adapter"),
        (unmerge, "unmerge_adapter"),
        (merge_and_unload, "merge_and_unload"),
        (unadapt, "unload"),
    ],
)
@pytest.mark.parametrize("make", ["plain", "peft", "patched"])
def test_a_model_without_layers_of_adapts_is_refused(call, theirs, make):
    model = mlp()
    if make != "plain":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc1"]))
        assert hasattr(model, theirs)
    if make == "patched":
        patch_peft(model)
    with pytest.raises(ValueError, match=f"^nothing to {call.__name__}: .*on a PEFT model its own {theirs}\\(\\)"):
        call(model)

"""adapt() against PEFT on the same model, its rules for names, and what it leaves as it was."""

import copy
import subprocess
import sys

import peft
import pytest
import torch
from adapting import FAMILY_TARGETS, PEFT_FACTOR, mlp, twins
from models import FAMILIES
from tolerances import LAYER_F64, MODEL_F32
from torch import nn

import lalora_kernels as lk
from lalora_kernels.adapt import adapt, saved_modules, trainable_summary, unadapt
from lalora_kernels.nn import LoRAConv1D, LoRALinear, lora_layers, set_active


def peft_name(name, saved):
    """Our parameter's name in PEFT's model."""
    module, _, last = name.rpartition(".")
    if last in PEFT_FACTOR:
        return f"{module}.{PEFT_FACTOR[last]}"
    inside = next(s for s in saved if module == s or module.startswith(s + "."))
    return f"{inside}.modules_to_save.default{name.removeprefix(inside)}"


def compare_with_peft(family, dtype, close, **settings):
    ours, theirs, batch, loss = twins(family, dtype, **settings)
    inner = theirs.base_model.model
    found, expected = loss(ours, batch), loss(inner, batch)
    torch.testing.assert_close(found, expected, **close)
    found.backward()
    expected.backward()
    reference = {n: p.grad for n, p in inner.named_parameters() if p.requires_grad}
    ours_by_peft_name = {
        peft_name(n, saved_modules(ours)): p.grad for n, p in ours.named_parameters() if p.requires_grad
    }
    assert ours_by_peft_name.keys() == reference.keys() and any("lora_A" in n for n in reference)
    for name, gradient in ours_by_peft_name.items():
        torch.testing.assert_close(gradient, reference[name], **close, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", FAMILY_TARGETS)
def test_loss_and_every_gradient_equal_peft_in_float64(family):
    compare_with_peft(family, torch.float64, LAYER_F64)


@pytest.mark.parametrize("family", ["bert", "swin", "gpt2", "timm_vit"])
def test_loss_and_every_gradient_equal_peft_in_float32(family):
    compare_with_peft(family, torch.float32, MODEL_F32)


def test_rslora_in_a_model_equals_peft():
    compare_with_peft("bert", torch.float64, LAYER_F64, use_rslora=True)


def test_only_factors_and_saved_modules_train_and_names_stay():
    model = FAMILIES["bert"][0]()[0]
    before = dict(model.named_parameters())
    assert adapt(model, target_modules=["query"], modules_to_save="classifier", verbose=False) is model
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    fresh = {name for name in after if name not in before}
    assert fresh == {f"bert.encoder.layer.{i}.attention.self.query.lora_{f}" for i in range(2) for f in "AB"}
    trainable = {name for name, p in after.items() if p.requires_grad}
    assert trainable == fresh | {"classifier.weight", "classifier.bias"}
    assert saved_modules(model) == ["classifier"]


def test_settings_reach_every_layer():
    model = adapt(
        mlp(), r=3, lora_alpha=12, lora_dropout=0.5, use_rslora=True, target_modules=["fc1", "fc2"], verbose=False
    )
    for _, layer in lora_layers(model):
        assert (layer.r, layer.lora_alpha, layer.lora_dropout.p, layer.use_rslora) == (3, 12, 0.5, True)
    assert next(lora_layers(adapt(mlp(), r=3, target_modules=["fc1"], verbose=False)))[1].scaling == 1.0


def test_summary_counts(capsys):
    model = adapt(mlp(), r=2, target_modules=["fc1", "fc2"], modules_to_save=["head"])
    total = 6 * 5 + 5 + 5 * 4 + 4 + 4 * 2 + 2
    factors, head = 2 * (6 + 5) + 2 * (5 + 4), 4 * 2 + 2
    summary = trainable_summary(model)
    assert (summary.layers, summary.ranks, summary.modules_to_save) == (2, (2,), ("head",))
    assert (summary.adapter_parameters, summary.trainable_parameters) == (factors, factors + head)
    assert summary.total_parameters == total + factors
    assert summary.share == pytest.approx(100 * (factors + head) / (total + factors))
    printed = capsys.readouterr().out
    assert f"2 layers adapted (r = 2); {factors + head} of {total + factors} parameters" in printed
    assert f"({summary.share:.2f} %); trained in full: head" in printed
    set_active(model, "B")
    assert trainable_summary(model).trainable_parameters == 2 * (5 + 4) + head
    adapt(mlp(), target_modules=["fc1"], verbose=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("patch", [lambda model: model, lk.patch_peft])
def test_the_summary_of_a_peft_model_says_whose_layers_they_are(patch):
    model = patch(peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["fc1", "fc2"])))
    trained, total = model.get_nb_trainable_parameters()
    summary = trainable_summary(model)
    assert (summary.layers, summary.peft_layers) == (0, 2)
    assert str(summary).startswith(f"2 layers adapted by PEFT; {trained} of {total} parameters trainable (")


def test_other_layers_can_be_adapted_later():
    model = adapt(mlp(), r=2, target_modules=["fc1"], verbose=False)
    set_active(model, "B")
    adapt(model, r=3, target_modules=["fc2"], modules_to_save=["head"], verbose=False)
    assert [(n, layer.r) for n, layer in lora_layers(model)] == [("fc1", 2), ("fc2", 3)]
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"fc1.lora_B", "fc2.lora_A", "fc2.lora_B", "head.weight", "head.bias"}


@pytest.mark.parametrize("inner", [False, True])
def test_a_layer_under_two_names_becomes_one_layer_in_both_places(inner):
    model = mlp()
    model.fc2 = nn.Linear(5, 5)
    model.again = model.fc2
    model.block = nn.Sequential(model.fc2) if inner else nn.Sequential()
    adapt(model, target_modules=["again"], verbose=False)
    assert isinstance(model.fc2, LoRALinear) and model.fc2 is model.again
    assert not inner or model.block[0] is model.fc2
    assert [n for n, _ in lora_layers(model)] == ["fc2"]
    unadapt(model)
    assert type(model.fc2) is nn.Linear and model.again is model.fc2


@pytest.mark.parametrize("mask", [False, True])
def test_torchs_encoder_layer_does_not_bypass_the_adapter_in_evaluation(mask):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if mask else None
    kept = slice(None) if padding is None else ~padding

    def run():
        with torch.no_grad():
            return model(x, src_key_padding_mask=padding)[kept]

    plain = run()
    adapt(model, target_modules=["linear1", "linear2"], verbose=False)
    torch.testing.assert_close(run(), plain, **MODEL_F32)
    for _, lora in lora_layers(model):
        nn.init.normal_(lora.lora_B)
    found = run()
    assert float((found - plain).abs().max()) > 0.1
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch.testing.assert_close(found, run(), **MODEL_F32)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_copies_and_state_dicts_of_an_adapted_model():
    torch.manual_seed(2)
    model = adapt(FAMILIES["gpt2"][0]()[0], target_modules="qv", modules_to_save=["head"], verbose=False).eval()
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
        assert isinstance(layer, LoRAConv1D)
    twin = copy.deepcopy(model)
    ids = torch.randint(0, 31, (2, 5))
    assert torch.equal(twin.body(ids).last_hidden_state, model.body(ids).last_hidden_state)
    assert saved_modules(twin) == ["head"]
    other = adapt(FAMILIES["gpt2"][0]()[0], target_modules="qv", verbose=False).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.body(ids).last_hidden_state, model.body(ids).last_hidden_state)
    unadapt(twin)
    assert not list(lora_layers(twin)) and len(list(lora_layers(model))) == 1
    assert twin.body.h[0].attn.c_attn.weight is not model.body.h[0].attn.c_attn.weight


def test_neither_peft_nor_transformers_is_imported():
    code = (
        "import sys, torch; from lalora_kernels.adapt import adapt; from lalora_kernels import peft_io; "
        "adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)), target_modules=['0']); "
        "assert not {'peft', 'transformers', 'timm', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

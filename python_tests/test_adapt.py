"""adapt() against PEFT on the same model, its rules for names, its errors, and the way back."""

import copy
import subprocess
import sys

import peft
import pytest
import torch
from models import FAMILIES
from tolerances import LAYER_F64, MERGED_F32, MODEL_F32
from torch import nn

from lalora_kernels.adapt import (
    adapt,
    merge,
    merge_and_unload,
    saved_modules,
    trainable_summary,
    unadapt,
    unmerge,
)
from lalora_kernels.nn import LoRAConv1D, LoRALinear, lora_layers, set_active


def llama(n=3):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=40,
        max_position_embeddings=16,
    )
    ids = torch.randint(0, 31, (n, 7))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}, lambda model, batch: model(**batch).loss


def tiny(**kinds):
    """A transformers model by its configuration's class, one layer, small."""
    import transformers

    (name, config), *_ = kinds.items()
    sizes = {"vocab_size": 31, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name.startswith("DistilBert"):
        sizes = {"vocab_size": 31, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    elif name.startswith("T5"):
        sizes = {"vocab_size": 31, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    elif name.startswith("Bloom"):
        sizes = {"vocab_size": 31, "hidden_size": 8, "n_layer": 1, "n_head": 2}
    else:
        sizes["intermediate_size"] = 16
    if name.startswith(("ViT", "DeiT")):
        sizes |= {"image_size": 8, "patch_size": 4}
    return getattr(transformers, name)(getattr(transformers, config)(**sizes))


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.fc1, model.act, model.fc2, model.head = nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4), nn.Linear(4, 2)
    return model


FAMILY_TARGETS = {
    "bert": (FAMILIES["bert"][0], "qv", ["query", "value"], ["classifier"]),
    "bert dense": (FAMILIES["bert"][0], ["dense"], ["dense"], ["classifier"]),
    "vit": (FAMILIES["vit"][0], "qv", ["q_proj", "v_proj"], ["classifier"]),
    "swin": (FAMILIES["swin"][0], "all-linear", "all-linear", ["classifier"]),
    "timm_swin": (FAMILIES["timm_swin"][0], "qv", ["qkv"], ["head.fc"]),
    "timm_vit": (FAMILIES["timm_vit"][0], r".*\.(qkv|fc1)", r".*\.(qkv|fc1)", ["head"]),
    "gpt2": (FAMILIES["gpt2"][0], "all-linear", "all-linear", ["head"]),
    "gpt2 qv": (FAMILIES["gpt2"][0], "qv", ["c_attn"], ["head"]),
    "llama": (llama, "all-linear", "all-linear", None),
}
PEFT_FACTOR = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}


def twins(family, dtype, **settings):
    """(ours, PEFT's, batch, loss): one model adapted by both, the same factors, dropout off, train mode."""
    torch.manual_seed(1)
    build, targets, peft_targets, heads = FAMILY_TARGETS[family]
    model, batch, loss = build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for key in ("attention_probs_dropout_prob", "attn_pdrop"):
        if hasattr(getattr(model, "config", getattr(getattr(model, "body", None), "config", None)), key):
            setattr(getattr(model, "config", None) or model.body.config, key, 0.0)
    model = model.to(dtype).train()
    config = peft.LoraConfig(target_modules=peft_targets, modules_to_save=heads, r=4, lora_alpha=6, **settings)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).to(dtype).train()
    ours = adapt(model, r=4, lora_alpha=6, target_modules=targets, modules_to_save=heads, verbose=False, **settings)
    parameters = dict(theirs.base_model.model.named_parameters())
    with torch.no_grad():
        for name, layer in lora_layers(ours):
            nn.init.normal_(layer.lora_B, std=0.2)
            for factor, suffix in PEFT_FACTOR.items():
                parameters[f"{name}.{suffix}"].copy_(getattr(layer, factor))

    def cast(t):
        return t.to(dtype) if t.is_floating_point() else t

    batch = {k: cast(v) for k, v in batch.items()} if isinstance(batch, dict) else tuple(cast(t) for t in batch)
    return ours, theirs, batch, loss


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


@pytest.mark.parametrize(
    "model, config, expected",
    [
        ("BertForSequenceClassification", "BertConfig", {"query", "value"}),
        ("RobertaForSequenceClassification", "RobertaConfig", {"query", "value"}),
        ("ElectraForSequenceClassification", "ElectraConfig", {"query", "value"}),
        ("DistilBertForSequenceClassification", "DistilBertConfig", {"q_lin", "v_lin"}),
        ("DebertaV2ForSequenceClassification", "DebertaV2Config", {"query_proj", "value_proj"}),
        ("ViTForImageClassification", "ViTConfig", {"q_proj", "v_proj"}),
        ("DeiTForImageClassification", "DeiTConfig", {"q_proj", "v_proj"}),
        ("LlamaForCausalLM", "LlamaConfig", {"q_proj", "v_proj"}),
        ("T5ForConditionalGeneration", "T5Config", {"q", "v"}),
        ("BloomForCausalLM", "BloomConfig", {"query_key_value"}),
    ],
)
def test_qv_finds_query_and_value_of_each_family(model, config, expected):
    adapted = adapt(tiny(**{model: config}), target_modules="qv", verbose=False)
    names = [name for name, _ in lora_layers(adapted)]
    assert {n.rpartition(".")[2] for n in names} == expected
    plain = tiny(**{model: config})
    assert names == [n for n, _ in plain.named_modules() if n.rpartition(".")[2] in expected]


def test_qv_wants_both_names_in_one_place():
    model = nn.ModuleDict(
        {
            "attention": nn.ModuleDict({"q": nn.Linear(3, 3), "k": nn.Linear(3, 3), "v": nn.Linear(3, 3)}),
            "elsewhere": nn.ModuleDict({"q": nn.Linear(3, 3)}),
        }
    )
    adapt(model, target_modules="qv", verbose=False)
    assert [name for name, _ in lora_layers(model)] == ["attention.q", "attention.v"]


def peft_layers(model, **config):
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **config)).base_model.model
    return {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


@pytest.mark.parametrize(
    "targets",
    [
        ["fc1"],
        ["0.fc1", "fc2"],
        ["body.0.fc1"],
        {"fc1", "fc2"},
        ("head",),
        r"body\.\d\.fc1",
        r".*fc[12]",
        "fc1|head",
        "xf",
        "all-linear",
        "ALL-LINEAR",
    ],
)
@pytest.mark.parametrize("saved", [None, ["head"]])
def test_targets_mean_what_they_mean_in_peft(targets, saved):
    model = nn.ModuleDict(
        {
            "body": nn.Sequential(*(nn.ModuleDict({"fc1": nn.Linear(3, 3), "fc2": nn.Linear(3, 3)}) for _ in range(2))),
            "xfc1": nn.Linear(3, 3),
            "other": nn.ModuleDict({"head": nn.Linear(3, 3), "fc1": nn.Linear(3, 3)}),
        }
    )
    try:
        config = {"target_modules": list(targets) if isinstance(targets, tuple) else targets, "modules_to_save": saved}
        expected = peft_layers(model, **config)
    except ValueError:
        with pytest.raises(ValueError, match="matches no layer"):
            adapt(model, r=2, target_modules=targets, modules_to_save=saved, verbose=False)
        return
    adapt(model, r=2, target_modules=targets, modules_to_save=saved, verbose=False)
    assert {name for name, _ in lora_layers(model)} == expected


@pytest.mark.parametrize("family", ["bert", "vit", "timm_swin", "timm_vit"])
def test_all_linear_leaves_the_head_out(family):
    model = FAMILIES[family][0]()[0]
    head = FAMILIES[family][2][0]
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    adapt(model, target_modules="all-linear", verbose=False)
    assert {n for n, _ in lora_layers(model)} == linear - {head}
    assert not model.get_submodule(head).weight.requires_grad


def test_all_linear_on_a_language_model_is_pefts():
    model = llama()[0]
    expected = peft_layers(model, target_modules="all-linear")
    adapt(model, target_modules="all-linear", verbose=False)
    assert {n for n, _ in lora_layers(model)} == expected and isinstance(model.lm_head, nn.Linear)


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


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 4, 1), nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc = nn.Linear(4, 4)


def parametrized():
    model = mlp()
    torch.nn.utils.parametrizations.spectral_norm(model.fc1)
    return model


def hooked():
    model = mlp()
    model.fc1.register_forward_hook(lambda *_: None)
    return model


def wrapped_by_peft():
    return peft.get_peft_model(mlp(), peft.LoraConfig(target_modules=["fc1"]))


def quantized():
    model = mlp()
    model.fc1.weight = nn.Parameter(torch.zeros(5, 6, dtype=torch.int8), requires_grad=False)
    return model


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "make, settings, messages",
    [
        (mlp, {"target_modules": ["fc3"]}, ["no module is named 'fc3'", "did you mean 'fc", "fc1, fc2, head"]),
        (mlp, {"target_modules": ["fc1", "querry"]}, ["no module is named 'querry'"]),
        (mlp, {"target_modules": "qv"}, ["matches no layer", "the linear layers here are fc1, fc2, head"]),
        (mlp, {"target_modules": r"layer\..*"}, ["matches no layer"]),
        (mlp, {"target_modules": r"(fc"}, ["not a regular expression"]),
        (mlp, {"target_modules": []}, ["names of modules"]),
        (mlp, {"target_modules": [1]}, ["names of modules"]),
        (mlp, {"target_modules": ["head"], "modules_to_save": ["head"]}, ["matches no layer outside modules_to_save"]),
        (lambda: nn.Sequential(mlp()), {"target_modules": "fc1"}, ["write ['fc1'] for this name"]),
        (lambda: nn.Linear(3, 3), {"target_modules": "all-linear"}, ["no linear layer below its root"]),
        (mlp, {"target_modules": ["act"]}, ["act cannot be adapted", "its type is GELU"]),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 1)), {"target_modules": ["0"]}, ["0 cannot be", "its type is Conv1d"]),
        (lambda: nn.Sequential(nn.EmbeddingBag(5, 4)), {"target_modules": ["0"]}, ["its type is EmbeddingBag"]),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), {"target_modules": ["0"]}, ["it has groups=2"]),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2)), {"target_modules": ["0"]}, ["it has dilation=(2, 2)"]),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
            {"target_modules": ["0"]},
            ["it has padding_mode='reflect'"],
        ),
        (lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), {"target_modules": ["0"]}, ["it has max_norm"]),
        (
            lambda: nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True)),
            {"target_modules": ["0"]},
            ["it has scale_grad_by_freq"],
        ),
        (Conv, {"target_modules": ["fc", "out_proj"]}, ["attention.out_proj cannot", ": MultiheadAttention uses"]),
        (lambda: nn.Sequential(Doubled(3, 3)), {"target_modules": ["0"]}, ["its type is Doubled"]),
        (lambda: nn.Sequential(nn.LazyLinear(3)), {"target_modules": ["0"]}, ["not initialized"]),
        (parametrized, {"target_modules": ["fc1"]}, ["fc1 cannot be adapted", "remove_parametrizations"]),
        (hooked, {"target_modules": ["fc1"]}, ["fc1 cannot be adapted", "hooks"]),
        (quantized, {"target_modules": ["fc1"]}, ["fc1 cannot be adapted", "torch.int8"]),
        (wrapped_by_peft, {"target_modules": "all-linear"}, ["fc1 is wrapped already", "peft.tuners.lora"]),
        (mlp, {"target_modules": ["fc1"], "modules_to_save": ["heed"]}, ["modules_to_save", "'heed'", "mean 'head'"]),
        (mlp, {"target_modules": ["fc1"], "modules_to_save": ["act"]}, ["act (GELU) has no parameters"]),
        (mlp, {"target_modules": ["fc1"], "r": 0}, ["r is a positive integer, got 0"]),
        (mlp, {"target_modules": ["fc1"], "r": True}, ["r is a positive integer"]),
        (mlp, {"target_modules": ["fc1"], "r": 2.0}, ["r is a positive integer"]),
        (mlp, {"target_modules": ["fc1"], "lora_alpha": 0}, ["lora_alpha is a positive"]),
        (mlp, {"target_modules": ["fc1"], "lora_alpha": float("inf")}, ["lora_alpha is a positive"]),
        (mlp, {"target_modules": ["fc1"], "lora_dropout": 1.0}, ["lora_dropout lies in [0, 1)"]),
        (mlp, {"target_modules": ["fc1"], "lora_dropout": float("nan")}, ["lora_dropout lies in [0, 1)"]),
    ],
)
def test_errors_say_what_is_wrong_and_change_nothing(make, settings, messages):
    model = make()
    before = {name: (type(m), m) for name, m in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError) as error:
        adapt(model, **settings)
    for message in messages:
        assert message in str(error.value)
    assert {name: (type(m), m) for name, m in model.named_modules()} == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert saved_modules(model) == []


@pytest.mark.parametrize("again", [["fc1"], ["fc1", "fc2"], "all-linear", "fc.*"])
def test_layers_are_adapted_once(again):
    model = adapt(mlp(), target_modules=["fc1"], verbose=False)
    layer = model.fc1
    with pytest.raises(ValueError, match="fc1 cannot be adapted: it is adapted already; call unadapt"):
        adapt(model, target_modules=again)
    assert model.fc1 is layer and type(model.fc2) is nn.Linear
    with pytest.raises(ValueError, match="modules_to_save: fc1 is or holds an adapted layer"):
        adapt(model, target_modules=["fc2"], modules_to_save=["fc1"])


def test_other_layers_can_be_adapted_later():
    model = adapt(mlp(), r=2, target_modules=["fc1"], verbose=False)
    set_active(model, "B")
    adapt(model, r=3, target_modules=["fc2"], modules_to_save=["head"], verbose=False)
    assert [(n, layer.r) for n, layer in lora_layers(model)] == [("fc1", 2), ("fc2", 3)]
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"fc1.lora_B", "fc2.lora_A", "fc2.lora_B", "head.weight", "head.bias"}


def test_all_linear_reports_what_it_leaves_out(capsys):
    model = Conv()
    adapt(model, target_modules="all-linear")
    assert [n for n, _ in lora_layers(model)] == ["fc"]
    assert "left out attention.out_proj: MultiheadAttention uses its weight" in capsys.readouterr().out


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


TIMM_BYPASS = {
    "swinv2_tiny_window8_256": {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1,), "num_heads": (2,)},
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 8, "depth": 1, "num_heads": 2},
    "eva02_tiny_patch14_224": {"img_size": 28, "embed_dim": 8, "depth": 1, "num_heads": 2},
}


@pytest.mark.parametrize("name", TIMM_BYPASS)
def test_layers_whose_parent_reads_their_weight_are_refused_by_name(name, capsys):
    import timm

    model = timm.create_model(name, num_classes=3, **TIMM_BYPASS[name])
    with pytest.raises(ValueError, match=r"\.qkv cannot be adapted: \w*Attention uses its weight without calling it"):
        adapt(model, target_modules="qv")
    adapt(model, target_modules="all-linear")
    assert ".attn.qkv: " in capsys.readouterr().out
    size = TIMM_BYPASS[name]["img_size"]
    model(torch.randn(2, 3, size, size)).sum().backward()
    layers = dict(lora_layers(model))
    assert layers and all(layer.lora_B.grad is not None for layer in layers.values())


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

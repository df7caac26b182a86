"""adapt() against PEFT on the same model, its rules for names, and what it leaves as it was."""

import copy
import re
import subprocess
import sys

import peft
import pytest
import torch
from adapting import FAMILY_TARGETS, PEFT_FACTOR, llama, mlp, twins
from models import FAMILIES
from tolerances import LAYER_F64, MODEL_F32
from torch import nn
from torch.utils.data import DataLoader

import lalora_kernels as lk
from lalora_kernels.adapt import adapt, saved_modules, trainable_summary, unadapt
from lalora_kernels.nn import LoRAConv1D, LoRALinear, lora_layers, set_active
from lalora_kernels.targets import QUERY_VALUE


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


def test_qv_knows_every_family_that_peft_has_targets_for():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as theirs

    assert len(theirs) > 30
    for family, targets in theirs.items():
        names = set(re.findall(r"\w+", " ".join([targets] if isinstance(targets, str) else targets)))
        known = any(set(pair) <= names for pair in QUERY_VALUE)
        assert known == (not family.startswith("rwkv")), family


BERT_SIZES = {
    "vocab_size": 31, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip
CVT_STAGE = {
    "embed_dim": 8, "num_heads": 2, "depth": 1, "patch_sizes": 3, "patch_stride": 2, "patch_padding": 1,
    "mlp_ratio": 2.0, "attention_drop_rate": 0.0, "drop_rate": 0.0, "drop_path_rate": 0.0, "qkv_bias": True,
    "cls_token": True, "qkv_projection_method": "dw_bn", "kernel_qkv": 3, "padding_kv": 1, "stride_kv": 1,
    "padding_q": 1, "stride_q": 1,
}  # fmt: skip
MORE_FAMILIES = {
    "Deberta": (["in_proj"], BERT_SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "Funnel": (["q_head", "v_head"], {"vocab_size": 31, "block_sizes": [1, 1], "d_model": 8, "n_head": 2, "d_head": 4}),
    "Falcon": (["query_key_value"], BERT_SIZES | {"pad_token_id": 0}),
    "CTRL": (["Wq", "Wv"], {"vocab_size": 31, "n_embd": 8, "n_layer": 1, "n_head": 2, "dff": 16, "pad_token_id": 0}),
    "Wav2Vec2Bert": (["linear_q", "linear_v"], BERT_SIZES | {"feature_projection_input_dim": 5}),
    "Cvt": (["projection_query", "projection_value"], {key: [value] for key, value in CVT_STAGE.items()}),
}


@pytest.mark.parametrize("who", ["adapt", "patch_peft"])
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_a_step_of_further_families_is_that_of_pefts_single_records(family, who):
    """Logits and every released gradient, in float64, against PEFT's unpatched model and autograd on each record."""
    import transformers

    torch.manual_seed(0)
    targets, sizes = MORE_FAMILIES[family]
    kind = "ImageClassification" if family == "Cvt" else "SequenceClassification"
    build = getattr(transformers, f"{family}For{kind}")
    base = build(getattr(transformers, f"{family}Config")(**sizes)).double().eval()
    name, x = {
        "Cvt": ("pixel_values", torch.randn(5, 3, 8, 8, dtype=torch.float64)),
        "Wav2Vec2Bert": ("input_features", torch.randn(5, 6, 5, dtype=torch.float64)),
    }.get(family, ("input_ids", torch.randint(1, 31, (5, 6))))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).double().eval()
    if who == "adapt":
        ours = adapt(copy.deepcopy(base), r=3, lora_alpha=5, target_modules="qv", verbose=False).double().eval()
        parameters = {n: p for n, p in ours.named_parameters() if p.requires_grad}
        inner = dict(theirs.base_model.model.named_parameters())
        reference = {n: inner[peft_name(n, [])] for n in parameters}
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(reference[n])
        assert {n.rpartition(".")[2] for n, _ in lora_layers(ours)} == set(targets)
    else:
        ours = lk.patch_peft(copy.deepcopy(theirs))
        parameters = {n: p for n, p in ours.named_parameters() if p.requires_grad}
        reference = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(parameters) == sum(p.requires_grad for p in theirs.parameters()) >= 2

    def loss(model, records):
        return model(**{name: records}).logits.square().sum(1).mean()

    each = [torch.autograd.grad(loss(theirs, x[i : i + 1]), [*reference.values()]) for i in range(len(x))]
    norms = torch.stack([torch.cat([g.flatten() for g in grads]).norm() for grads in each])
    C = float(norms.median())  # some records are clipped and some are not
    factors = (C / norms).clamp(max=1)
    expected = [sum(c * grads[j] for c, grads in zip(factors, each)) / len(x) for j in range(len(parameters))]
    optimizer, loader = lk.make_private(
        ours, torch.optim.SGD([*parameters.values()], lr=0.1), DataLoader(x, batch_size=len(x)), noise_multiplier=0.0,
        max_grad_norm=C, method="dp-lora", poisson_sampling=False,
    )  # fmt: skip
    for records in loader:
        torch.testing.assert_close(ours(**{name: records}).logits, theirs(**{name: x}).logits, **LAYER_F64)
        loss(ours, records).backward()
        optimizer.step()
    close = {"rtol": 1e-5, "atol": 1e-8} if family == "Funnel" else LAYER_F64  # Funnel's softmax reads float32
    for (n, p), gradient in zip(parameters.items(), expected):
        torch.testing.assert_close(p.grad, gradient, **close, msg=lambda m, n=n: f"{n}: {m}")


def test_falcons_layers_come_back_as_they_were():
    from transformers import FalconConfig, FalconForCausalLM
    from transformers.models.falcon.modeling_falcon import FalconLinear

    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(**BERT_SIZES)).eval()
    ids = torch.randint(0, 31, (2, 5))
    before = model(ids).logits
    expected = peft_layers(model, target_modules="all-linear")
    adapt(model, r=2, target_modules="all-linear", verbose=False)
    assert {n for n, _ in lora_layers(model)} == expected
    torch.testing.assert_close(model(ids).logits, before, **MODEL_F32)
    assert type(unadapt(model).transformer.h[0].mlp.dense_h_to_4h) is FalconLinear
    assert torch.equal(model(ids).logits, before)


def test_qv_leaves_an_in_proj_alone_that_is_no_attentions():
    from transformers import MambaConfig, MambaModel

    model = MambaModel(MambaConfig(vocab_size=31, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="matches no layer.*names of known families; give a list"):
        adapt(model, target_modules="qv")


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

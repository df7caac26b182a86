"""Which layers target_modules means, family by family and beside PEFT."""

import copy
import re

import peft
import pytest
import torch
from adapting import llama
from models import FAMILIES
from test_adapt import peft_name
from tolerances import LAYER_F64, MODEL_F32
from torch import nn
from torch.utils.data import DataLoader

import lalora_kernels as lk
from lalora_kernels.adapt import adapt, unadapt
from lalora_kernels.nn import lora_layers
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


def test_an_out_proj_that_is_no_mambas_is_adapted():
    model = nn.ModuleDict({"attention": nn.ModuleDict({"out_proj": nn.Linear(3, 3)})})
    adapt(model, target_modules=["out_proj"], verbose=False)
    assert [name for name, _ in lora_layers(model)] == ["attention.out_proj"]


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

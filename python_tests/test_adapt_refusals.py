"""What adapt() refuses or leaves out, by name, and that the model is then as before."""

import copy

import peft
import pytest
import torch
from adapting import mlp
from models import FAMILIES
from test_adapt_targets import peft_layers
from torch import nn

import lalora_kernels as lk
from lalora_kernels.adapt import adapt, saved_modules
from lalora_kernels.nn import lora_layers


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


def rwkv():
    from transformers import RwkvConfig, RwkvModel

    return RwkvModel(RwkvConfig(vocab_size=31, hidden_size=8, num_hidden_layers=2, context_length=8))


def bigcode():
    """Its c_attn has the outputs of each head together, where GPT-2's has all queries first."""
    from transformers import GPTBigCodeConfig, GPTBigCodeModel

    return GPTBigCodeModel(
        GPTBigCodeConfig(vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2, multi_query=False)
    )


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=31, hidden_size=8, num_hidden_layers=1, state_size=4))


def convolved():
    model = nn.Sequential()
    model.qkv = nn.Conv2d(4, 12, 1)
    return model


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "make, settings, messages",
    [
        (mlp, {"target_modules": ["fc3"]}, ["no module is named 'fc3'", "did you mean 'fc", "fc1, fc2, head"]),
        (mlp, {"target_modules": ["fc1", "querry"]}, ["no module is named 'querry'"]),
        (convolved, {"target_modules": "all-linear"}, ["no linear layer", "by their names, such as qkv"]),
        (mlp, {"target_modules": "qv"}, ["matches no layer", "the linear layers here are fc1, fc2, head"]),
        (rwkv, {"target_modules": "qv"}, ["key, value, receptance", "RWKV's receptance is a gate, no query; give a"]),
        (bigcode, {"target_modules": "qv", "fused": "qv"}, ["outputs of h.0.attn.c_attn are not queries, keys and"]),
        (convolved, {"target_modules": ["qkv"], "fused": "qv"}, ["qkv is a convolution", "leave it at fused='qkv'"]),
        (mlp, {"target_modules": r"layer\..*"}, ["matches no layer"]),
        (mlp, {"target_modules": r"(fc"}, ["not a regular expression"]),
        (mlp, {"target_modules": []}, ["names of modules"]),
        (mlp, {"target_modules": [1]}, ["names of modules"]),
        (mlp, {"target_modules": ["fc1"], "exclude_modules": ["fcc"]}, ["exclude_modules: no module is named 'fcc'"]),
        (mlp, {"target_modules": ["fc1"], "exclude_modules": "(fc"}, ["exclude_modules: '(fc' is not a regular exp"]),
        (mlp, {"target_modules": ["fc1"], "exclude_modules": "fc."}, ["exclude_modules='fc.' leaves nothing"]),
        (mamba, {"target_modules": ["in_proj", "out_proj"]}, ["mixer.out_proj cannot be adapted: PEFT adapts no out"]),
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


def test_all_linear_reports_what_it_leaves_out(capsys):
    model = Conv()
    adapt(model, target_modules="all-linear")
    assert [n for n, _ in lora_layers(model)] == ["fc"]
    assert "left out attention.out_proj: MultiheadAttention uses its weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    "targets, excluded",
    [
        ("all-linear", ["q_proj", "fc1"]),
        ("all-linear", r".*layers\.1\..*"),
        (["q_proj", "v_proj"], ["0.attention.q_proj"]),
    ],
    ids=str,
)
def test_excluded_modules_are_pefts(targets, excluded):
    model = FAMILIES["vit"][0]()[0]
    expected = peft_layers(model, target_modules=targets, exclude_modules=excluded)
    everything = peft_layers(model, target_modules=targets)
    adapt(model, target_modules=targets, exclude_modules=excluded, modules_to_save=["classifier"], verbose=False)
    assert {n for n, _ in lora_layers(model)} == expected - {"classifier"} < everything


def test_what_a_swin_v2_gives_one_input_for_all_records_can_be_excluded():
    from transformers import Swinv2Config, Swinv2ForImageClassification

    torch.manual_seed(0)
    config = Swinv2Config(
        image_size=16, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[2, 3], window_size=4, num_labels=3
    )
    model, batch = Swinv2ForImageClassification(config).eval(), (torch.randn(2, 3, 16, 16), torch.tensor([0, 2]))

    def loss(m, b):
        return nn.functional.cross_entropy(m(b[0]).logits, b[1])

    twin = adapt(copy.deepcopy(model), target_modules="all-linear", verbose=False)
    with pytest.raises(ValueError, match=r"continuous_position_bias_mlp\.0.* is given one input.*name it in"):
        lk.check_per_sample(twin, batch, loss)
    adapt(model, target_modules="all-linear", exclude_modules=r".*continuous_position_bias_mlp.*", verbose=False)
    assert len(list(lora_layers(model))) == len(list(lora_layers(twin))) - 4
    lk.check_per_sample(model, batch, loss)


def test_a_mamba_is_adapted_where_peft_does(capsys):
    model = mamba()
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        peft.get_peft_model(mamba(), peft.LoraConfig(target_modules="all-linear"))
    adapt(model, target_modules="all-linear")
    adapted = {n.rpartition(".")[2] for n, _ in lora_layers(model)}
    assert adapted == {"in_proj", "x_proj", "dt_proj"} and "left out backbone.layers.0" in capsys.readouterr().out
    peft.get_peft_model(mamba(), peft.LoraConfig(target_modules=sorted(adapted)))


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

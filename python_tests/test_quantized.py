"""QLoRA: PEFT's LoRA over bitsandbytes' layers, patched, against PEFT's own and against the dequantized model."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_per_sample import largest_relative_error
from test_private_step import KEY, train
from tolerances import AUTOCAST_BF16, LAYER_F32, MERGED_F32, PER_SAMPLE_F32
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.peft_layers import Patched
from lalora_kernels.privacy.checks import per_sample_gradients, single_sample_gradients
from lalora_kernels.quantized import dequantize_

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
F = nn.functional
KINDS = ["nf4", "fp4", "nf4 nested", "int8"]
BASES = {"fc1": (13, 7), "mid": (7, 64), "fc2": (64, 32)}  # primes, and what fills blocks


def quantize(linear: nn.Linear, kind: str, threshold: float = 0.0) -> nn.Module:
    m, n = linear.weight.shape
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False, threshold=threshold)
        new.weight = bnb.nn.Int8Params(linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    else:
        quant_type, _, how = kind.partition(" ")
        half = torch.bfloat16 if how == "bfloat16" else None
        settings = {"quant_type": quant_type, "compress_statistics": how == "nested"}
        settings["quant_storage"] = half or torch.uint8
        new = bnb.nn.Linear4bit(n, m, compute_dtype=half, **settings)
        new.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, **settings)
    new.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return new.to("cpu")  # which quantizes


def meaning(layer: nn.Module) -> torch.Tensor:
    """The weight, by bitsandbytes' own dequantization."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return bnb.functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)


class Net(nn.Module):
    """mid is quantized, too, but never adapted."""

    def __init__(self, kind: str | None, threshold: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        for name, (n, m) in BASES.items():
            plain = nn.Linear(n, m)
            setattr(self, name, plain if kind is None else quantize(plain, kind, threshold))
        self.head = nn.Linear(32, 3)
        if kind is not None:  # by these PEFT knows
            self.is_loaded_in_8bit, self.is_loaded_in_4bit = kind == "int8", kind != "int8"

    def forward(self, x):
        return self.head(self.fc2(F.gelu(self.mid(F.gelu(self.fc1(x))))).mean(1))


CONFIG = {"r": 3, "lora_alpha": 5, "target_modules": ["fc1", "fc2"], "modules_to_save": ["head"]}


def adapted(net: nn.Module, **config) -> nn.Module:
    """By PEFT, with factors that are not zero."""
    torch.manual_seed(1)
    model = get_peft_model(net, LoraConfig(**{**CONFIG, **config}))
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return model


def trio(kind: str, **config) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(ours over the quantized layers, PEFT's over them, PEFT's over what their weights mean), the same factors."""
    net, plain = Net(kind), Net(None)
    with torch.no_grad():
        for name in BASES:
            getattr(plain, name).weight.copy_(meaning(getattr(net, name)))
        for name, p in plain.named_parameters():
            if not name.endswith("weight") or name.startswith("head"):
                p.copy_(net.get_parameter(name))
    theirs, full = adapted(net, **config), adapted(plain, **config)
    return lk.patch_peft(copy.deepcopy(theirs)), theirs, full


def batch(n: int = 4):
    torch.manual_seed(2)
    return torch.randn(n, 6, 13), torch.randint(0, 3, (n,))


def loss_of(model, data):
    return F.cross_entropy(model(data[0]).float(), data[1])


def results(model, data):
    model.zero_grad()
    torch.manual_seed(5)  # of dropout
    x = data[0].clone().requires_grad_()
    y = model(x)
    F.cross_entropy(y.float(), data[1]).backward()
    return {"y": y, "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def private(model, data, **settings):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    settings = {"noise_multiplier": 0.7, "noise": lk.NoiseSource.fixed(KEY), "max_grad_norm": 0.3, **settings}
    return lk.make_private(model, optimizer, DataLoader(TensorDataset(*data), batch_size=4), **settings)


@pytest.mark.parametrize(
    "config",
    [{}, {"lora_dropout": 0.4}, {"lora_bias": True}, {"use_rslora": True}],
    ids=lambda c: " ".join(c) or "plain",
)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_pefts(kind, config):
    ours, theirs, _ = trio(kind, **config)
    found, expected = results(ours, batch()), results(theirs, batch())
    assert found.keys() == expected.keys() and sum("lora_" in n for n in found) == 4 + 2 * ("lora_bias" in config)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **LAYER_F32, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_is_what_bitsandbytes_computes(kind):
    net = Net(kind)
    expected = {name: meaning(getattr(net, name)) for name in BASES}
    twin = copy.deepcopy(net)
    twin(batch()[0])  # which moves int8's scales from the weight to the state
    dequantize_(twin)
    for name, weight in expected.items():
        layer = getattr(twin, name)
        assert type(layer) is nn.Linear and layer.weight.dtype == torch.float64
        torch.testing.assert_close(layer.weight.float(), weight, **LAYER_F32)
        torch.testing.assert_close(layer.bias.float(), getattr(net, name).bias)
    torch.testing.assert_close(twin.double()(batch()[0].double()).float(), net(batch()[0]), **LAYER_F32)


def test_autocast_keeps_the_base_dtype():
    ours, theirs, full = trio("nf4")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = results(ours, batch()), results(theirs, batch())
    exact = results(full, batch())
    for name, value in exact.items():
        assert found[name].dtype == expected[name].dtype
        assert (found[name] - value).norm() < AUTOCAST_BF16 * value.norm(), name


@pytest.mark.parametrize("phase", ["A", "B", "AB"])
@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients(kind, phase):
    """Against single-record backwards of PEFT's own model over the dequantized weights, in float64."""
    ours, _, full = trio(kind, lora_bias=True)
    full.double()
    for model in (ours, full):
        for name, p in model.named_parameters():
            if (factor := name.find("lora_")) >= 0 and ".bias" not in name:
                p.requires_grad_(name[factor + 5] in phase)
    found = per_sample_gradients(ours, batch(), loss_of)
    expected = single_sample_gradients(full, (batch()[0].double(), batch()[1]), loss_of)
    assert found.keys() == expected.keys() and all(g.any() for g in expected.values())
    assert largest_relative_error({n: g.double() for n, g in found.items()}, expected) < PER_SAMPLE_F32


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_private_step_is_the_dequantized_models(kind, clipping):
    """Same draws, same noise; the first batch's check, which is on by default, passes."""
    ours, _, full = trio(kind)
    lk.patch_peft(full)
    before = [p.clone() for n, p in ours.named_parameters() if "lora_" in n]
    for model in (ours, full):
        optimizer, loader = private(model, batch(12), clipping=clipping, sample_rate=0.4)
        train(model, loss_of, optimizer, loader, 4)
        assert optimizer.per_sample_checked
    for (name, p), q in zip(ours.named_parameters(), full.parameters(), strict=True):
        if p.dtype == torch.float32:
            torch.testing.assert_close(p, q, **MERGED_F32, msg=name)
    assert all(
        (p - q).norm() > 0.1 for (n, p), q in zip([x for x in ours.named_parameters() if "lora_" in x[0]], before)
    )


def test_a_compiled_model_trains_the_same():
    ours, _, _ = trio("nf4")
    trained = []
    for compiled in (False, True):
        model = copy.deepcopy(ours)
        optimizer, loader = private(model, batch(12), sample_rate=0.5, check=False)
        train(torch.compile(model, backend="aot_eager") if compiled else model, loss_of, optimizer, loader, 3)
        trained.append(torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_" in n]).detach())
    torch.testing.assert_close(*trained, **LAYER_F32)
    assert (trained[0] - torch.cat([p.flatten() for n, p in ours.named_parameters() if "lora_" in n])).norm() > 0.1


def test_the_check_is_in_float64_also_where_the_base_computes_in_bfloat16():
    """... and keeps its codes as bfloat16, as FSDP wants them: a copy in float64 would convert the codes."""
    ours = lk.patch_peft(adapted(Net("nf4 bfloat16")))
    assert ours.base_model.model.fc1.base_layer.weight.dtype == torch.bfloat16
    optimizer, loader = private(ours, batch(12), sample_rate=1.0)
    train(ours, loss_of, optimizer, loader, 1)
    assert optimizer.per_sample_checked


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_state_dict_merging_and_unpatching_are_pefts(kind):
    ours, theirs, _ = trio(kind)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for model in (ours, theirs):
        model.merge_adapter()
    torch.testing.assert_close(ours(batch()[0]), theirs(batch()[0]), rtol=0, atol=0)
    for model in (ours, theirs):
        model.unmerge_adapter()
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(batch()[0]), theirs(batch()[0]), rtol=0, atol=0)
    lk.unpatch_peft(ours)
    assert not any(isinstance(m, Patched) for m in ours.modules())
    torch.testing.assert_close(ours(batch()[0]), theirs(batch()[0]), rtol=0, atol=0)


def test_hooks_on_the_base_are_heard():
    """As accelerate's, which bring a base layer's weights."""
    ours, _, _ = trio("nf4")
    heard = []
    ours.base_model.model.fc1.base_layer.register_forward_hook(lambda *_: heard.append(1))
    optimizer, loader = private(ours, batch(12), sample_rate=1.0, check=False)
    train(ours, loss_of, optimizer, loader, 1)
    assert heard == [1]


def test_weights_packed_for_evaluation_are_unpacked():
    """As bitsandbytes leaves them after a forward in eval mode on a CPU with AVX-512 BF16: without a backward."""
    ours, theirs, _ = trio("nf4 nested")
    for model in (ours, theirs):
        layer = model.base_model.model.fc2.base_layer
        layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
    theirs.state_dict()  # unpacks; the scales stay rounded to bfloat16
    found, expected = results(ours, batch()), results(theirs, batch())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **LAYER_F32, msg=name)


class TestRefusals:
    OUTLIERS = r"outliers in the whole batch \(LLM.int8\).*llm_int8_threshold=0.0"

    def test_outliers_of_the_batch_mix_records(self):
        """The reason: with LLM.int8's own threshold another record in the batch changes a record's output."""
        layer = quantize(nn.Linear(64, 5), "int8", threshold=6.0).eval()
        x, other = torch.randn(1, 64), torch.randn(1, 64)
        other[0, ::2] = 10.0
        alone, beside = layer(x), layer(torch.cat([x, other]))[:1]
        assert (alone - beside).abs().max() > 1e-3
        layer.state.threshold = 0.0
        torch.testing.assert_close(layer(x), layer(torch.cat([x, other]))[:1], rtol=0, atol=0)

    def test_outliers_by_patch_peft(self):
        model = adapted(Net("int8", threshold=6.0))
        with pytest.raises(ValueError, match=r"model\.fc1 cannot be patched: .*" + self.OUTLIERS):
            lk.patch_peft(model)

    def test_outliers_in_a_layer_that_is_not_adapted(self):
        ours, _, _ = trio("int8")
        ours.base_model.model.mid.state.threshold = 6.0
        with pytest.raises(ValueError, match=r"model\.mid \(Linear8bitLt\) mixes the records.*" + self.OUTLIERS):
            private(ours, batch(12), sample_rate=1.0)

    @pytest.mark.parametrize("name", ["mid", "fc1"])
    def test_outliers_switched_on_later(self, name):
        ours, _, _ = trio("int8")
        optimizer, loader = private(ours, batch(12), sample_rate=1.0)
        steps = loader.steps(2)
        loss_of(ours, next(steps)).backward()
        optimizer.step()
        layer = getattr(ours.base_model.model, name)
        getattr(layer, "base_layer", layer).state.threshold = 6.0
        with pytest.raises(ValueError, match="outliers in the whole batch"):
            loss_of(ours, next(steps)).backward()

    def test_a_bias_of_the_base(self):
        ours, _, _ = trio("nf4", bias="lora_only")
        with pytest.raises(ValueError, match=r"fc1\.base_layer\.bias is trainable, but no rule .*\(Linear4bit\)"):
            private(ours, batch(12))

    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_a_base_that_peft_took_for_a_plain_one(self, kind):
        """Without the model's flag PEFT wraps it as nn.Linear, whose weight would be read: codes, without a scale."""
        net = Net(kind)
        net.is_loaded_in_8bit = net.is_loaded_in_4bit = False
        flag = "8bit" if kind == "int8" else "4bit"
        with pytest.raises(ValueError, match=f"set model.is_loaded_in_{flag} = True before get_peft_model"):
            lk.patch_peft(get_peft_model(net, LoraConfig(**CONFIG)))

    def test_dora(self):
        with pytest.raises(ValueError, match="fc1 cannot be patched: its adapter 'default' is a DoraLinearVariant"):
            lk.patch_peft(adapted(Net("nf4"), use_dora=True))

    def test_adapt_says_who_does_it(self):
        with pytest.raises(ValueError, match=r"fc1.*it is quantized; PEFT adapts it, and patch_peft\("):
            lk.adapt(Net("nf4"), r=2, target_modules=["fc1"])

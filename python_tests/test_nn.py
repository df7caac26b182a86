"""The layers alone: against PEFT's layer, against autograd of the written-out formula, and what they keep in memory."""

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from tolerances import BFLOAT16, LAYER_F32, LAYER_F64, MERGED_F32
from torch import nn

from lalora_kernels.autograd import LinearFunction
from lalora_kernels.nn import LoRAConv1D, LoRALinear, set_active

N, T, IN, OUT, R = 3, 5, 7, 6, 2  # all different, so that a shape says which tensor it is
PHASES = ["A", "B", "AB"]


class Plain(nn.Module):
    """One linear layer in a model, for PEFT to find."""

    def __init__(self, bias=True, dtype=torch.float32):
        super().__init__()
        self.fc = nn.Linear(IN, OUT, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.fc(x)


def our_layer(dtype=torch.float64, kind=LoRALinear, bias=True, **settings):
    """An adapted layer whose B is not zero."""
    if kind is LoRAConv1D:
        from transformers.pytorch_utils import Conv1D

        plain = Conv1D(OUT, IN).to(dtype)
        nn.init.normal_(plain.bias)
    else:
        plain = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    layer = kind.from_linear(plain, r=R, **settings)
    nn.init.normal_(layer.lora_B)
    return layer


def written_out(layer, x, x_lora=None):
    """The definition, with the weight as m x n."""
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    h = (x if x_lora is None else x_lora) @ layer.lora_A.T
    return F.linear(x, weight, layer.bias) + layer.scaling * h @ layer.lora_B.T


def gradients(y, dy, layer, x=None):
    """{name: gradient} by autograd of <y, dy>, for the active factors and x."""
    inputs = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    if x is not None:
        inputs["x"] = x
    return dict(zip(inputs, torch.autograd.grad((y * dy).sum(), list(inputs.values()))))


def peft_twin(layer, bias=True, **config):
    """PEFT's layer with the same weights."""
    model = Plain(bias, layer.weight.dtype)
    twin = peft.get_peft_model(model, peft.LoraConfig(r=R, target_modules=["fc"], **config)).base_model.model.fc
    twin.to(layer.weight.dtype)
    with torch.no_grad():
        twin.base_layer.weight.copy_(layer.weight)
        if bias:
            twin.base_layer.bias.copy_(layer.bias)
        twin.lora_A.default.weight.copy_(layer.lora_A)
        twin.lora_B.default.weight.copy_(layer.lora_B)
    return twin


@pytest.mark.parametrize("shape", [(IN,), (N, IN), (N, T, IN), (2, N, T, IN), (0, IN), (0, T, IN)])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_equal_peft_in_float64(shape, phase, bias):
    torch.manual_seed(0)
    layer = our_layer(bias=bias, lora_alpha=5)
    set_active(layer, phase)
    twin = peft_twin(layer, bias, lora_alpha=5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), twin(x)
    torch.testing.assert_close(y, expected, **LAYER_F64)
    dy = torch.randn_like(y)
    found = gradients(y, dy, layer, x)
    theirs = {"lora_A": twin.lora_A.default.weight, "lora_B": twin.lora_B.default.weight, "x": x}
    assert set(found) == {f"lora_{f}" for f in phase} | {"x"}
    reference = torch.autograd.grad((expected * dy).sum(), [theirs[n] for n in found])
    for name, gradient in zip(found, reference):
        torch.testing.assert_close(found[name], gradient, **LAYER_F64)


@pytest.mark.parametrize("phase", PHASES)
def test_output_and_gradients_equal_peft_in_float32(phase):
    torch.manual_seed(1)
    layer = our_layer(torch.float32, lora_alpha=3)
    set_active(layer, phase)
    twin = peft_twin(layer, lora_alpha=3)
    x = torch.randn(N, T, IN, requires_grad=True)
    y, expected = layer(x), twin(x)
    torch.testing.assert_close(y, expected, **LAYER_F32)
    dy = torch.randn_like(y)
    found = gradients(y, dy, layer, x)
    theirs = {"lora_A": twin.lora_A.default.weight, "lora_B": twin.lora_B.default.weight, "x": x}
    for name, gradient in zip(found, torch.autograd.grad((expected * dy).sum(), [theirs[n] for n in found])):
        torch.testing.assert_close(found[name], gradient, **LAYER_F32)


@pytest.mark.parametrize("kind", [LoRALinear, LoRAConv1D])
@pytest.mark.parametrize("phase", ["", *PHASES])
def test_gradcheck(kind, phase):
    torch.manual_seed(2)
    layer = our_layer(kind=kind, lora_alpha=3)
    set_active(layer, phase)
    x = torch.randn(N, T, IN, dtype=torch.float64, requires_grad=True)
    factors = [p for p in layer.parameters() if p.requires_grad]
    assert len(factors) == len(phase)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *factors))


@pytest.mark.parametrize("kind", [LoRALinear, LoRAConv1D])
@pytest.mark.parametrize("bias_trains", [False, True])
def test_gradients_equal_the_written_out_formula(kind, bias_trains):
    torch.manual_seed(3)
    layer = our_layer(kind=kind, lora_alpha=3)
    layer.bias.requires_grad_(bias_trains)
    x = torch.randn(N, T, IN, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(N, T, OUT, dtype=torch.float64)
    found, expected = gradients(layer(x), dy, layer, x), gradients(written_out(layer, x), dy, layer, x)
    assert ("bias" in found) == bias_trains
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **LAYER_F64)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[::2],
        lambda x: x[:, 1:-1],
        lambda x: x[:1].expand(4, T, IN),
        lambda x: torch.cat([x, x], -1)[..., ::2],
    ],
    ids=["transposed", "strided", "sliced", "expanded", "strided features"],
)
@pytest.mark.parametrize("phase", PHASES)
def test_inputs_and_gradients_that_are_not_contiguous(view, phase):
    torch.manual_seed(4)
    layer = our_layer(lora_alpha=3)
    set_active(layer, phase)
    x = view(torch.randn(N, T, IN, dtype=torch.float64)).detach().requires_grad_()
    assert not x.is_contiguous() or x.storage_offset() or x.stride()[0] != x.shape[1] * x.shape[2]
    y = layer(x)
    torch.testing.assert_close(y, written_out(layer, x), **LAYER_F64)
    dy = torch.randn(*y.shape[::-1], dtype=torch.float64).permute(*range(y.dim() - 1, -1, -1))
    found, expected = gradients(y, dy, layer, x), gradients(written_out(layer, x), dy, layer, x)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **LAYER_F64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(N, IN), (N, T, IN), (2, N, T, IN)])
def test_the_output_may_be_changed_in_place(shape, bias):
    torch.manual_seed(16)
    layer = our_layer(bias=bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(*shape[:-1], OUT, dtype=torch.float64)
    found = gradients(layer(x).relu_(), dy, layer, x)
    expected = gradients(written_out(layer, x).relu(), dy, layer, x)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **LAYER_F64)


def test_a_recorded_linear_layers_output_may_be_changed_in_place():
    seen = []
    recorder = SimpleNamespace(record=lambda *given: seen.append(given), engine=SimpleNamespace(serial=0, beside=False))
    linear = nn.Linear(IN, OUT).double()
    x = torch.randn(N, T, IN, dtype=torch.float64)
    y = LinearFunction.apply(x, linear.weight, linear.bias, recorder)
    torch.testing.assert_close(y, linear(x), **LAYER_F64)
    y.relu_().sum().backward()
    ((dy, kept),) = seen
    assert kept is x or torch.equal(kept, x)
    assert torch.equal(dy, (linear(x) > 0).double())


def test_a_recorded_linear_layer_under_autocast():
    recorder = SimpleNamespace(record=lambda dy, x: None, engine=SimpleNamespace(serial=0, beside=False))
    linear = nn.Linear(IN, OUT)
    with torch.autocast("cpu", torch.bfloat16):
        y = LinearFunction.apply(torch.randn(N, T, IN), linear.weight, linear.bias, recorder)
        z = LinearFunction.apply(torch.randn(N, T, IN).bfloat16(), linear.weight, linear.bias, recorder)
    assert y.dtype == z.dtype == torch.bfloat16


def kept_for_backward(layer, x):
    """Tensors that the graph of layer(x) holds on to."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert y.requires_grad == bool(kept)
    return kept


@pytest.mark.parametrize("kind", [LoRALinear, LoRAConv1D])
@pytest.mark.parametrize("input_needs_grad", [True, False])
@pytest.mark.parametrize("phase", ["", *PHASES])
def test_keeps_h_for_B_and_x_for_A_and_neither_when_frozen(kind, phase, input_needs_grad):
    torch.manual_seed(5)
    layer = our_layer(torch.float32, kind)
    set_active(layer, phase)
    x = torch.randn(N, T, IN, requires_grad=input_needs_grad)
    kept = kept_for_backward(layer, x)
    assert any(t.shape == (N, T, IN) for t in kept) == ("A" in phase)
    assert any(t.shape == (N, T, R) for t in kept) == ("B" in phase)
    parameters = {(OUT, IN), (IN, OUT), (R, IN), (OUT, R)}
    per_token = [tuple(t.shape) for t in kept if tuple(t.shape) not in parameters]
    assert len(per_token) == len(phase)  # nothing else whose size grows with the batch
    for t in kept:
        if t.shape == (N, T, R):
            torch.testing.assert_close(t, x @ layer.lora_A.T, **LAYER_F32)


@pytest.mark.parametrize("phase", PHASES)
def test_set_active_clears_the_other_gradient_and_is_read_at_every_forward(phase):
    torch.manual_seed(6)
    layer = our_layer()
    x = torch.randn(N, IN, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_B.grad is not None
    set_active(layer, phase)
    before = {f: getattr(layer, f"lora_{f}").grad for f in "AB"}
    assert [before[f] is None for f in "AB"] == [f not in phase for f in "AB"]
    layer.zero_grad()
    layer(x).sum().backward()
    assert [getattr(layer, f"lora_{f}").grad is None for f in "AB"] == [f not in phase for f in "AB"]
    assert layer.weight.grad is None and layer.bias.grad is None


def test_set_active_refuses_other_words():
    with pytest.raises(ValueError, match="factors is one of"):
        set_active(our_layer(), "a")


@pytest.mark.parametrize("kind", [LoRALinear, LoRAConv1D])
def test_merged_weights_equal_evaluation_and_unmerge_restores_every_bit(kind):
    torch.manual_seed(7)
    layer = our_layer(torch.float32, kind, lora_alpha=3).eval()
    x, before = torch.randn(N, T, IN), layer.weight.clone()
    expected = layer(x).detach()
    layer.merge()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, **MERGED_F32)
    plain = x @ (layer.weight if kind is LoRAConv1D else layer.weight.T) + layer.bias
    torch.testing.assert_close(plain, expected, **MERGED_F32)
    with pytest.raises(RuntimeError, match="unmerge"):
        layer(x)
    with pytest.raises(RuntimeError, match="already merged"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, before) and torch.equal(layer(x), expected)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_merged(value):
    layer = our_layer()
    before = layer.weight.clone()
    with torch.no_grad():
        layer.lora_A[0, 0] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer.merge()
    assert torch.equal(layer.weight, before) and not layer.merged


def test_rslora_scales_as_peft_does():
    torch.manual_seed(8)
    layer = our_layer(lora_alpha=3, use_rslora=True)
    assert layer.scaling == pytest.approx(3 / 2**0.5)
    x = torch.randn(N, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), peft_twin(layer, lora_alpha=3, use_rslora=True)(x), **LAYER_F64)


@pytest.mark.parametrize("kind", [LoRALinear, LoRAConv1D])
@pytest.mark.parametrize("phase", PHASES)
def test_dropout_acts_on_the_adapter_only_and_gradients_know_the_mask(kind, phase):
    torch.manual_seed(9)
    layer = our_layer(kind=kind, lora_alpha=3, lora_dropout=0.4).train()
    set_active(layer, phase)
    x = torch.randn(N, T, IN, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(N, T, OUT, dtype=torch.float64)
    torch.manual_seed(10)
    y = layer(x)
    found = gradients(y, dy, layer, x)
    torch.manual_seed(10)
    dropped = F.dropout(x, 0.4)
    assert (dropped == 0).any() and (dropped != 0).any()
    expected_y = written_out(layer, x, dropped)
    torch.testing.assert_close(y, expected_y, **LAYER_F64)
    expected = gradients(expected_y, dy, layer, x)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **LAYER_F64)
    torch.testing.assert_close(layer.eval()(x), written_out(layer, x), **LAYER_F64)


def close_in_norm(found, expected, tolerance):
    return float((found.detach().double() - expected.detach()).norm()) <= tolerance * float(expected.detach().norm())


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["bfloat16 base", "autocast"])
def test_bfloat16_keeps_float32_factors_and_gradients(how, phase):
    torch.manual_seed(11)
    layer = our_layer(torch.bfloat16 if how == "bfloat16 base" else torch.float32, lora_alpha=3)
    set_active(layer, phase)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = torch.randn(N, T, IN, dtype=layer.weight.dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    dy = torch.randn(N, T, OUT, dtype=torch.bfloat16)
    found = gradients(y, dy, layer, x)
    exact = copy.deepcopy(layer).double()
    xd = x.detach().double().requires_grad_()
    expected = gradients(written_out(exact, xd), dy.double(), exact, xd)
    assert close_in_norm(y, written_out(exact, xd), BFLOAT16)
    for name in found:
        assert found[name].dtype == (x.dtype if name == "x" else torch.float32)
        assert close_in_norm(found[name], expected[name], BFLOAT16)


def test_autocast_leaves_float64_alone():
    layer, x = our_layer(), torch.randn(N, IN, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x)) and y.dtype == torch.float64

"""How an adapted layer is made, copied and stored, and the settings that it refuses."""

import copy
import io
import pickle

import peft
import pytest
import torch
from test_nn import IN, OUT, N, R, our_layer, written_out
from tolerances import LAYER_F32, LAYER_F64
from torch import nn

from lalora_kernels.nn import LoRAConv1D, LoRALinear, lora_layers, set_active


@pytest.mark.parametrize("kind", [LoRALinear, LoRAConv1D])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(kind, copier):
    torch.manual_seed(12)
    layer = our_layer(kind=kind, lora_alpha=3, use_rslora=True, lora_dropout=0.25)
    set_active(layer, "B")
    layer.eval()
    twin = copier(layer)
    x = torch.randn(N, IN, dtype=torch.float64)
    assert torch.equal(twin(x), layer(x)) and type(twin) is kind
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
    with torch.no_grad():
        twin.lora_B.add_(1)
    assert not torch.equal(twin(x), layer(x))


def test_state_dict_has_pefts_names_and_round_trips():
    torch.manual_seed(13)
    layer, other = our_layer(), our_layer()
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    x = torch.randn(N, IN, dtype=torch.float64)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(layer(x), other(x))


def test_a_fresh_adapter_changes_nothing_and_A_is_drawn_as_peft_draws_it():
    torch.manual_seed(14)
    plain = nn.Linear(400, 3)
    layer = LoRALinear.from_linear(plain, r=50)
    x = torch.randn(N, 400)
    torch.testing.assert_close(layer(x), plain(x), **LAYER_F32)
    twin = peft.tuners.lora.Linear(nn.Linear(400, 3), "default", peft.LoraConfig(r=50), r=50)
    theirs, mine = twin.lora_A["default"].weight.detach(), layer.lora_A.detach()
    # 20,000 draws: the standard deviation of a uniform variable is known to 0.3 %.
    assert float(mine.std()) == pytest.approx(float(theirs.std()), rel=0.02)
    assert float(mine.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=0.01)


def test_from_linear_takes_the_weight_over_and_freezes_it():
    plain = nn.Linear(IN, OUT).eval()
    layer = LoRALinear.from_linear(plain, r=R)
    assert layer.weight is plain.weight and layer.bias is plain.bias and not layer.training
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("kind", [LoRALinear, LoRAConv1D])
def test_a_layer_made_from_sizes(kind):
    torch.manual_seed(15)
    layer = kind(IN, OUT, r=R, lora_alpha=4.0).double()
    nn.init.normal_(layer.lora_B)
    assert layer.weight.shape == ((IN, OUT) if layer.fan_in_fan_out else (OUT, IN)) and not layer.weight.requires_grad
    x = torch.randn(N, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), written_out(layer, x), **LAYER_F64)
    assert "r=2" in repr(layer) and "lora_alpha=4.0" in repr(layer)


@pytest.mark.parametrize("settings, message", [({"r": 0}, "r is a"), ({"r": 1.5}, "r is a"), ({"r": -1}, "r is a")])
def test_ranks_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear(IN, OUT, **settings)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_dropout_out_of_range(p):
    with pytest.raises(ValueError, match="lora_dropout"):
        LoRALinear(IN, OUT, r=R, lora_dropout=p)


def test_lora_layers_names_a_shared_layer_once():
    model = nn.ModuleDict({"a": our_layer(), "b": nn.Sequential(our_layer())})
    model["c"] = model["a"]
    assert [name for name, _ in lora_layers(model)] == ["a", "b.0"]

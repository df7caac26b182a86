"""Per-sample gradients against N single-sample backwards (the definition) and against Opacus."""

import pytest
import torch
from models import FAMILIES, adapted
from tolerances import PER_SAMPLE_F32, PER_SAMPLE_F64
from torch import nn

from lalora_kernels.nn import LoRALinear, lora_layers, set_active
from lalora_kernels.privacy.checks import per_sample_gradients, single_sample_gradients
from lalora_kernels.privacy.trees import to_double

PHASES = ["A", "B", "AB"]


def largest_relative_error(found, expected):
    assert found.keys() == expected.keys() and found
    scale = max(g.norm() for g in expected.values())
    return max(
        float((found[n].double() - expected[n].double()).norm() / max(expected[n].norm(), 1e-3 * scale)) for n in found
    )


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_float64_equals_single_backwards(family, phase):
    torch.manual_seed(1)
    model, batch, loss = adapted(family)
    set_active(model, phase)
    expected = single_sample_gradients(model, batch, loss)
    assert {n.rsplit(".")[-1] for n in expected} >= {f"lora_{f}" for f in phase} | {"weight"}
    assert largest_relative_error(per_sample_gradients(model, batch, loss), expected) < PER_SAMPLE_F64


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_close_to_single_backwards(family, phase):
    torch.manual_seed(2)
    model, batch, loss = adapted(family, dtype=torch.float32)
    set_active(model, phase)
    found = per_sample_gradients(model, batch, loss)
    batch64 = to_double(batch)
    expected = single_sample_gradients(model.double(), batch64, loss)
    assert largest_relative_error(found, expected) < PER_SAMPLE_F32


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_equals_opacus(family, factor):
    """The same factors as plain nn.Linear children, as PEFT holds them, under Opacus' hooks."""
    from opacus import GradSampleModule

    class Plain(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base = nn.Linear(layer.in_features, layer.out_features, dtype=layer.weight.dtype).requires_grad_(False)
            self.base.weight, self.base.bias = layer.weight, layer.bias
            self.a = nn.Linear(layer.in_features, layer.r, bias=False, dtype=layer.weight.dtype)
            self.b = nn.Linear(layer.r, layer.out_features, bias=False, dtype=layer.weight.dtype)
            self.a.weight.data, self.b.weight.data = layer.lora_A.data.clone(), layer.lora_B.data.clone()
            self.a.requires_grad_(factor == "A"), self.b.requires_grad_(factor == "B")
            self.scaling = layer.scaling

        def forward(self, x):
            return self.base(x) + self.scaling * self.b(self.a(x))

    torch.manual_seed(3)
    model, batch, loss = adapted(family, norms=False)
    set_active(model, factor)
    found = per_sample_gradients(model, batch, loss)
    for name, layer in list(lora_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Plain(layer))
    wrapped = GradSampleModule(model, loss_reduction="mean")
    loss(wrapped, batch).backward()
    expected = {
        n.removeprefix("_module.").replace(".a.weight", ".lora_A").replace(".b.weight", ".lora_B"): p.grad_sample
        for n, p in wrapped.named_parameters()
        if p.requires_grad
    }
    assert largest_relative_error(found, expected) < PER_SAMPLE_F64


def test_toggling_a_factor_after_recording_simply_works():
    torch.manual_seed(4)
    model, batch, loss = adapted("mlp")
    for phase in ("B", "A", "B", "AB"):
        set_active(model, phase)
        expected = single_sample_gradients(model, batch, loss)
        assert largest_relative_error(per_sample_gradients(model, batch, loss), expected) < PER_SAMPLE_F64


def test_a_module_called_twice_accumulates_before_its_norm():
    torch.manual_seed(5)
    model, batch, _ = adapted("mlp")
    model.fc2.lora_B.data.normal_()

    def twice(model, batch):
        x, y = batch
        h = model.act(model.fc1(x))
        return nn.functional.cross_entropy(
            model.head(model.fc2(h) + model.fc2(h.flip(1))) + model.head(model.fc2(h)), y
        )

    for phase in PHASES:
        set_active(model, phase)
        expected = single_sample_gradients(model, batch, twice)
        assert largest_relative_error(per_sample_gradients(model, batch, twice), expected) < PER_SAMPLE_F64


def test_a_layer_between_axes_of_no_size():
    """A batch of pictures without rows: every record's gradient is zero, as autograd's is."""
    torch.manual_seed(7)
    model = nn.Sequential(LoRALinear(6, 6, r=2, dtype=torch.float64), LoRALinear(6, 3, r=2, dtype=torch.float64))
    batch = (torch.randn(4, 0, 5, 6, dtype=torch.float64),)

    def loss(model, batch):
        return model(batch[0]).sum()

    found = per_sample_gradients(model, batch, loss)
    assert found.keys() == single_sample_gradients(model, batch, loss).keys() and len(found) == 4
    assert all(g.shape[0] == 4 and not g.any() for g in found.values())


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_weights(padding_idx):
    torch.manual_seed(6)
    model = nn.Sequential()
    model.embedding = nn.Embedding(6, 5, padding_idx=padding_idx, dtype=torch.float64)
    model.head = nn.Linear(5, 2, dtype=torch.float64)
    batch = (torch.randint(0, 6, (4, 9)), torch.randint(0, 2, (4,)))

    def loss(model, batch):
        return nn.functional.cross_entropy(model.head(model.embedding(batch[0])).tanh().sum(1), batch[1])

    expected = single_sample_gradients(model, batch, loss)
    assert largest_relative_error(per_sample_gradients(model, batch, loss), expected) < PER_SAMPLE_F64

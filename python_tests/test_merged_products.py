"""A layer with many rows multiplies by W0 + s B A, one with few by its parts: the same map, the same gradients."""

import pytest
import torch
from tolerances import LAYER_F32, LAYER_F64

from lalora_kernels import autograd
from lalora_kernels.nn import LoRAConv1D, LoRALinear

FEW, MANY = 2, 64  # records of 3 positions; 3 m n / (m + n) rows lie between
N_IN, N_OUT, R = 20, 12, 3


@pytest.fixture
def merged(monkeypatch):
    """Whether each forward merged, in order."""
    seen = []
    decide = autograd._merging_pays
    monkeypatch.setattr(autograd, "_merging_pays", lambda *a: seen.append(decide(*a)) or seen[-1])
    return seen


@pytest.mark.parametrize("kind", [LoRALinear, LoRAConv1D])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, LAYER_F32), (torch.float64, LAYER_F64)])
@pytest.mark.parametrize("active", ["A", "B", "AB", ""])
@pytest.mark.parametrize("records", [FEW, MANY])
def test_output_and_every_gradient(merged, kind, dtype, tolerance, active, records):
    torch.manual_seed(0)
    layer = kind(N_IN, N_OUT, R, lora_alpha=2.0, dtype=dtype)
    torch.nn.init.normal_(layer.lora_B)
    layer.lora_A.requires_grad_("A" in active), layer.lora_B.requires_grad_("B" in active)
    x = torch.randn(records, 3, N_IN, dtype=dtype, requires_grad=True)
    dy = torch.randn(records, 3, N_OUT, dtype=dtype)
    y = layer(x)
    y.backward(dy)
    assert merged == [records == MANY]

    W, b, A, B, x64 = (
        t.detach().double().requires_grad_() for t in (layer._weight_mn(), layer.bias, layer.lora_A, layer.lora_B, x)
    )
    want = x64 @ W.t() + b + 2.0 / R * (x64 @ A.t()) @ B.t()
    want.backward(dy.double())
    torch.testing.assert_close(y.double(), want, **tolerance)
    torch.testing.assert_close(x.grad.double(), x64.grad, **tolerance)
    for factor, p, p64 in (("A", layer.lora_A, A), ("B", layer.lora_B, B)):
        if factor in active:
            torch.testing.assert_close(p.grad.double(), p64.grad, **tolerance)
        else:
            assert p.grad is None


def test_half_precision_and_dropout_keep_the_parts_apart(merged):
    layer = LoRALinear(N_IN, N_OUT, R, lora_dropout=0.5, dtype=torch.bfloat16)
    layer(torch.randn(MANY, 3, N_IN, dtype=torch.bfloat16))
    assert merged == []  # dropped-out inputs go through A alone
    layer.eval()(torch.randn(MANY, 3, N_IN, dtype=torch.bfloat16))
    assert merged == [False]

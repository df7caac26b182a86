"""A layer with many rows multiplies by W0 + s B A, one with few by its parts: the same map, the same gradients."""

import pytest
import torch
from tolerances import LAYER_F32, LAYER_F64
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
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


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.last = nn.Linear(N_IN, N_OUT), nn.Linear(N_OUT, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.fc(x)).mean(1))


def clipped_sum(records, x, y, physical):
    """The first ``records`` of them, of a release without noise, whatever the state makes of their gradients."""
    torch.manual_seed(0)
    model = lk.adapt(Positions(), r=2, lora_alpha=2, target_modules=["fc", "last"], verbose=False)
    with torch.no_grad():  # a server's: B A = 0 exactly, and x A^T B^T is nothing but rounding
        u, m = (torch.randint(-9, 10, (n,)) / 8.0 for n in (N_IN, N_OUT))
        model.fc.lora_A.copy_(torch.stack([u, 3 * u]))
        model.fc.lora_B.copy_(torch.stack([3 * 2.0**30 * m, -(2.0**30) * m], 1))
        model.last.lora_B.normal_()
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    optimizer, loader = lk.make_private(
        model, sgd, DataLoader(TensorDataset(x, y)), noise_multiplier=0.0, expected_batch_size=8, smoothing=None,
        loss_reduction="sum", method="dp-lora", physical_batch_size=physical, check=False,
    )  # fmt: skip
    loader.batch_sampler.draw = lambda: list(range(records))
    for a, b in loader.steps(1):
        nn.functional.cross_entropy(model(a), b, reduction="sum").backward()
        optimizer.step()
        if optimizer.stepped:  # fc's own gradient is 1e9 times too large to show the others'
            return 8 * torch.cat([p.grad.double().flatten() for p in model.last.parameters() if p.grad is not None])


@pytest.mark.parametrize("physical", [None, 16])
def test_one_record_more_does_not_change_how_the_others_are_computed(merged, physical):
    """Nor whether they merge: the records drawn are not to decide it where each one's share is bounded."""
    x, y = torch.randn(1, 3, N_IN).repeat(MANY, 1, 1), torch.zeros(MANY, dtype=torch.long)
    before = clipped_sum(1, x, y, physical)
    for records in range(2, 20):  # 3 m n / (m + n) rows of 3 positions are 8 records
        now = clipped_sum(records, x, y, physical)
        assert (now - before).norm() <= 1 + 1e-4, records
        before = now
    assert len(set(merged[0::2])) == len(set(merged[1::2])) == 1

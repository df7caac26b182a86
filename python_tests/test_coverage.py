"""What may train beside the adapters, and how models may call it, against N single-sample backwards."""

import importlib

import pytest
import torch
from test_per_sample import largest_relative_error
from tolerances import PER_SAMPLE_F32, PER_SAMPLE_F64
from torch import nn
from torch.utils.checkpoint import checkpoint

from lalora_kernels.nn import LoRALinear, set_active
from lalora_kernels.privacy.checks import per_sample_gradients, single_sample_gradients
from lalora_kernels.privacy.rules import RULES_BY_NAME

F = nn.functional


def check(model, batch, loss, tolerance=PER_SAMPLE_F64):
    model = model.double()
    expected = single_sample_gradients(model, batch, loss)
    assert all(g.abs().sum() > 0 for g in expected.values())
    assert largest_relative_error(per_sample_gradients(model, batch, loss), expected) < tolerance
    return expected


def classify(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def images(n=3, channels=4):
    return torch.randn(n, channels, 6, 5, dtype=torch.float64), torch.randint(0, 3, (n,))


class Pool(nn.Module):
    def forward(self, x):
        return x.flatten(2).tanh().sum(2)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, 2, padding="same", padding_mode="circular"),
        nn.GroupNorm(2, 4),
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.GroupNorm(4, 8)),
    ],
    ids=["conv", "circular", "group_norm", "both"],
)
def test_channels_first_modules(module):
    torch.manual_seed(0)
    model = nn.Sequential(module, Pool(), nn.LazyLinear(3))
    model(images()[0].float())
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.requires_grad_(False)
        if isinstance(m, nn.GroupNorm):
            nn.init.normal_(m.weight)
    check(model, images(), classify)


@pytest.mark.parametrize("norm", [nn.RMSNorm(5), nn.RMSNorm((7, 5)), nn.LayerNorm((7, 5)), nn.LayerNorm(5, bias=False)])
def test_norms_over_the_last_axes(norm):
    torch.manual_seed(1)
    nn.init.normal_(norm.weight)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.Flatten(), nn.Linear(35, 3))
    check(model, (torch.randn(3, 7, 4, dtype=torch.float64), torch.randint(0, 3, (3,))), classify)


def test_timms_channel_norms():
    from timm.layers import LayerNorm2d

    torch.manual_seed(2)
    norm = LayerNorm2d(4)
    nn.init.normal_(norm.weight)
    check(nn.Sequential(norm, Pool(), nn.Linear(4, 3)), images(), classify)


@pytest.mark.parametrize("name", [n for n in RULES_BY_NAME if n.startswith("transformers.models.")])
def test_transformers_norms(name):
    module, _, kind = name.rpartition(".")
    torch.manual_seed(2)
    norm = getattr(importlib.import_module(module), kind)(5)
    nn.init.normal_(norm.weight)
    check(
        nn.Sequential(nn.Linear(4, 5), norm, nn.Flatten(), nn.Linear(35, 3)),
        (torch.randn(3, 7, 4, dtype=torch.float64), torch.randint(0, 3, (3,))),
        classify,
        tolerance=PER_SAMPLE_F32,  # transformers normalizes in float32 whatever the model is
    )


def test_biases_alone():
    """BitFit (2106.10199): every bias trains, no weight does."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), LoRALinear.from_linear(nn.Linear(5, 3), r=2))
    model.requires_grad_(False)
    for m in model:
        if getattr(m, "bias", None) is not None:
            m.bias.requires_grad_(True)
    expected = check(model, (torch.randn(4, 6, 4, dtype=torch.float64).sum(1), torch.randint(0, 3, (4,))), classify)
    assert set(expected) == {"0.bias", "1.bias", "3.bias"}


def test_hugging_face_conv1d_as_a_head():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 5), Conv1D(3, 5), nn.Tanh())
    sequences = (torch.randn(3, 7, 4, dtype=torch.float64), torch.randint(0, 3, (3,)))
    check(model, sequences, lambda model, batch: F.cross_entropy(model(batch[0]).sum(1), batch[1]))


@pytest.mark.parametrize("long", [False, True])
def test_a_full_weight_at_many_positions(long):
    """Gram where 2 T^2 <= m n, direct otherwise."""
    torch.manual_seed(5)
    T = 23 if long else 3
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    batch = (torch.randn(4, T, 6, dtype=torch.float64), torch.randint(0, 3, (4,)))
    expected = check(model, batch, lambda model, batch: F.cross_entropy(model(batch[0]).sum(1), batch[1]))
    assert (2 * T * T <= 6 * 5) != long and len(expected) == 4


class Embedded(nn.Module):
    """Token embeddings, and position embeddings looked up and projected once for the whole batch."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(11, 6), nn.Embedding(8, 6)
        self.project = LoRALinear.from_linear(nn.Linear(6, 6), r=2)
        nn.init.normal_(self.project.lora_B)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        positions = self.project(self.position(torch.arange(ids.shape[1])[None]))
        return self.head((self.token(ids) + positions).tanh().sum(1))


@pytest.mark.parametrize("phase", ["A", "B"])
def test_inputs_that_broadcast(phase):
    torch.manual_seed(6)
    model = Embedded()
    set_active(model, phase)
    check(model, (torch.randint(0, 11, (3, 8)), torch.randint(0, 3, (3,))), classify)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("phase", ["A", "B", "AB"])
def test_gradient_checkpointing(phase, reentrant):
    torch.manual_seed(7)
    block = nn.Sequential(LoRALinear.from_linear(nn.Linear(5, 5), r=2), nn.LayerNorm(5), nn.GELU())
    nn.init.normal_(block[0].lora_B)
    model = nn.Sequential(nn.Linear(5, 5), block, nn.Linear(5, 3))
    set_active(model, phase)
    batch = (torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 3, (4,)))
    plain = check(model, batch, classify)

    def checkpointed(model, batch):
        hidden = checkpoint(model[1], model[0](batch[0]), use_reentrant=reentrant)
        return F.cross_entropy(model[2](hidden), batch[1])

    found = per_sample_gradients(model, batch, checkpointed)
    assert largest_relative_error(found, plain) < PER_SAMPLE_F64


def test_a_layer_called_under_no_grad_is_not_recorded():
    torch.manual_seed(8)
    model = nn.Sequential(LoRALinear.from_linear(nn.Linear(5, 5), r=2), nn.Linear(5, 3))
    nn.init.normal_(model[0].lora_B)

    def teacher(model, batch):
        with torch.no_grad():
            target = model(batch[0]).detach().softmax(1)
        return F.cross_entropy(model(batch[0]), 0.5 * target + 0.5 * F.one_hot(batch[1], 3))

    check(model, (torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 3, (4,))), teacher)


class Reader(nn.Module):
    """Causal: a position sees its own document up to itself."""

    def __init__(self):
        super().__init__()
        self.embed, self.qk = nn.Embedding(11, 6), LoRALinear.from_linear(nn.Linear(6, 6), r=2)
        self.head = nn.Linear(6, 11)
        nn.init.normal_(self.qk.lora_B)

    def forward(self, ids, documents):
        x = self.embed(ids)
        same = (documents[:, :, None] == documents[:, None, :]).tril()
        scores = (self.qk(x) @ x.mT).masked_fill(~same, -1e9)
        return self.head(x + scores.softmax(-1) @ x)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_padded_and_packed_sequences_with_ignore_index(layout, reduction):
    """One record is a row: of one document and padding, or of several documents, whose first tokens nobody predicts."""
    torch.manual_seed(14)
    ids = torch.randint(0, 11, (4, 9))
    if layout == "padded":
        documents = (torch.arange(9) >= torch.tensor([[9], [4], [1], [6]])).long()
        targets = ids.masked_fill(documents == 1, -100)
    else:
        documents = torch.tensor([[0] * 9, [0] * 3 + [1] * 6, [0] + [1] * 4 + [2] * 4, [0] * 8 + [1]])
        first = torch.ones_like(documents, dtype=torch.bool)
        first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        targets = ids.masked_fill(first, -100)

    def loss(model, batch):
        ids, documents, targets = batch
        each = F.cross_entropy(model(ids, documents).mT, targets, ignore_index=-100, reduction="none").sum(1)
        return each.sum() if reduction == "sum" else (each / (targets != -100).sum(1)).mean()

    model = Reader().double()
    batch = (ids, documents, targets)
    expected = single_sample_gradients(model, batch, loss)
    assert all(g.abs().sum() > 0 for g in expected.values())
    found = per_sample_gradients(model, batch, loss, loss_reduction=reduction)
    assert largest_relative_error(found, expected) < PER_SAMPLE_F64


def test_several_forwards_before_one_backward():
    torch.manual_seed(9)
    model = nn.Sequential(LoRALinear.from_linear(nn.Linear(5, 5), r=2), nn.GELU(), nn.Linear(5, 3))
    nn.init.normal_(model[0].lora_B)

    def two_views(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + F.cross_entropy(model(batch[0].flip(1)), batch[1])

    check(model, (torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 3, (4,))), two_views)


def test_a_convolutions_weight_is_not_covered():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), Pool(), nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match="0.weight is trainable, but no rule.*Conv2d"):
        per_sample_gradients(model, images(), classify)

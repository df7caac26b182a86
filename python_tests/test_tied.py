"""One tensor in several modules: its per-sample gradient is the sum over its uses, and is clipped as one."""

import copy

import pytest
import torch
from test_per_sample import largest_relative_error
from test_private_step import private, written_out
from tolerances import PER_SAMPLE_F64, PRIVATE_STEP_F64, SENSITIVITY_F32
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lalora_kernels.nn import LoRAConv2d, LoRAEmbedding, LoRALinear, set_active
from lalora_kernels.privacy.checks import check_per_sample, per_sample_gradients, single_sample_gradients
from lalora_kernels.privacy.make_private import make_private

F = nn.functional
CLIPPINGS = ["flat", "per_layer", "automatic"]


class Language(nn.Module):
    """The head is the embedding; a second table and a second reader of the first one beside them."""

    def __init__(self, uses: str):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.mix.requires_grad_(False)
        self.other = nn.Embedding(9, 4)
        if "head" in uses:
            self.head.weight = self.embed.weight
        if "other" in uses:
            self.other.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids)).tanh() + self.other(ids.flip(1)))


def tokens(n: int = 4, T: int = 5):
    ids = torch.randint(0, 9, (n, T))
    return ids, torch.randint(0, 9, (n, T))


def per_record(model, batch):
    """The mean over records of each record's own mean over its positions."""
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1).mean()


class Shared(nn.Module):
    """Layers that share one factor, or both."""

    def __init__(self, kind: str, factors: str):
        super().__init__()
        make = {
            "linear": lambda: LoRALinear(6, 6, r=2, lora_alpha=3),
            "conv": lambda: LoRAConv2d(6, 6, 1, r=2, lora_alpha=3),
            "embedding": lambda: LoRAEmbedding(9, 6, r=2, lora_alpha=3),
        }[kind]
        self.kind, self.first, self.second, self.head = kind, make(), make(), nn.Linear(6, 3)
        for factor in factors:
            name = self.first.names[factor]
            setattr(self.second, name, getattr(self.first, name))
        for layer in (self.first, self.second):
            nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)

    def forward(self, x):
        if self.kind == "embedding":
            h = self.first(x).tanh() + self.second(x.flip(1))
        else:
            h = self.second(self.first(x).tanh())
        return self.head(h.flatten(2).sum(2) if self.kind == "conv" else h.sum(1))


def shared_records(kind: str, n: int = 4):
    x = {
        "linear": lambda: torch.randn(n, 5, 6, dtype=torch.float64),
        "conv": lambda: torch.randn(n, 6, 2, 2, dtype=torch.float64),
        "embedding": lambda: torch.randint(0, 9, (n, 5)),
    }[kind]()
    return x, torch.randint(0, 3, (n,))


def classify(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def check(model, batch, loss):
    expected = single_sample_gradients(model, batch, loss)
    assert all(g.any() for g in expected.values())
    assert largest_relative_error(per_sample_gradients(model, batch, loss), expected) < PER_SAMPLE_F64
    return expected


@pytest.mark.parametrize("uses", [["head"], ["other"], ["head", "other"]])
def test_an_embedding_tied_to_the_head_equals_single_backwards(uses):
    torch.manual_seed(0)
    model = Language(uses).double()
    expected = check(model, tokens(), per_record)
    assert ("head.weight" in expected) == ("head" not in uses)
    check_per_sample(model, tokens(), per_record)


@pytest.mark.parametrize("phase", ["A", "B", "AB"])
@pytest.mark.parametrize("factors", ["A", "B", "AB"])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_a_factor_in_two_layers_equals_single_backwards(kind, factors, phase):
    torch.manual_seed(1)
    model = Shared(kind, factors).double()
    set_active(model, phase)
    check(model, shared_records(kind), classify)


def test_scales_and_biases_in_two_modules():
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.LayerNorm(5), nn.Linear(5, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 5), nn.Linear(5, 3)
    )
    model[3].weight, model[4].bias = model[0].weight, model[1].bias
    expected = check(model.double(), (torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 3, (4,))), classify)
    assert "3.weight" not in expected and "4.bias" not in expected


def test_gpt2_with_its_tied_head():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(vocab_size=17, n_positions=8, n_embd=12, n_layer=1, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config).double().eval().requires_grad_(False)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.transformer.wte.weight.requires_grad_(True)
    ids = torch.randint(0, 17, (3, 6))

    def loss(model, batch):
        logits = model(input_ids=batch).logits[:, :-1].transpose(1, 2)
        return F.cross_entropy(logits, batch[:, 1:], reduction="none").mean(1).mean()

    check(model, ids, loss)


def steps_equal_the_formula(model, data, loss, **kwargs):
    twin = copy.deepcopy(model)
    opt, loader = private(model, data, max_grad_norm=0.2, sample_rate=1.0, smoothing=None, method="dp-lora", **kwargs)
    set_active(twin, "AB")
    for batch in loader.steps(2):
        loss(model, batch).backward()
        opt.step()
        opt.zero_grad()
    for _ in range(2):
        grads = written_out(
            twin, data.tensors, loss, clipping=kwargs["clipping"], C=0.2, smoothing=False, divisor=len(data)
        )
        with torch.no_grad():
            for n, p in twin.named_parameters():
                if n in grads:
                    p -= 0.5 * grads[n]
    for (n, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, **PRIVATE_STEP_F64, msg=n)


@pytest.mark.parametrize("physical", [None, 3])
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_private_steps_with_a_tied_head_equal_the_formula(clipping, physical, monkeypatch):
    # The norm of a sum of products is raised by its rounding in float32; the formula knows nothing of that.
    monkeypatch.setattr("lalora_kernels.privacy.rules.SLACK", 0.0)
    monkeypatch.setattr("lalora_kernels.privacy.recorders.SLACK", 0.0)
    torch.manual_seed(4)
    model = Language(["head", "other"]).double()
    data = TensorDataset(*tokens(6))
    steps_equal_the_formula(model, data, per_record, clipping=clipping, physical_batch_size=physical)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_private_steps_with_a_shared_factor_equal_the_formula(clipping, kind, monkeypatch):
    monkeypatch.setattr("lalora_kernels.privacy.rules.SLACK", 0.0)
    monkeypatch.setattr("lalora_kernels.privacy.recorders.SLACK", 0.0)
    torch.manual_seed(5)
    steps_equal_the_formula(
        Shared(kind, "A").double(), TensorDataset(*shared_records(kind, 6)), classify, clipping=clipping
    )


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "head"])
def test_one_record_moves_a_shared_tensor_by_C_at_most(kind, clipping):
    """Large gradients, float32: clipped per use, a tensor of two uses would move by up to 2 C."""
    torch.manual_seed(6)
    if kind == "head":
        model, data, loss = Language(["head", "other"]), TensorDataset(*tokens(1)), per_record
    else:
        model, loss = Shared(kind, "AB"), classify
        data = TensorDataset(*(t.float() if t.is_floating_point() else t for t in shared_records(kind, 1)))
    C = 1e-3
    opt, loader = private(
        model.float(), data, max_grad_norm=C, sample_rate=1.0, smoothing=None, method="dp-lora", clipping=clipping,
        batch_size=1,
    )  # fmt: skip
    (batch,) = loader.steps(1)
    loss(model, batch).backward()
    opt.step()
    norm = float(torch.cat([s.released.flatten().double() for s in opt.engine.active]).norm())
    assert C * (1 - 1e-3) <= norm <= C * (1 + SENSITIVITY_F32)


# ---------------------------------------------------------------- refused


def test_uses_that_cannot_be_added_up_are_refused_by_both_names():
    model = nn.Sequential()
    model.adapted, model.plain = LoRALinear(6, 4, r=2), nn.Linear(6, 2, bias=False)
    model.plain.weight = model.adapted.lora_A
    with pytest.raises(
        ValueError, match=r"plain.weight \(full weight\) and adapted.lora_A \(factor A\) are one.*untie"
    ):
        per_sample_gradients(model, torch.randn(2, 6), lambda m, b: m.plain(b).sum())


def test_a_weight_that_is_tied_after_make_private_is_refused():
    torch.manual_seed(7)
    model = Language([])
    opt, loader = private(model, TensorDataset(*tokens()))
    model.head.weight = model.embed.weight
    with pytest.raises(RuntimeError, match="head.weight was replaced or tied.*call make_private again"):
        next(iter(loader.steps(1)))


def test_a_weight_that_is_untied_after_make_private_is_refused():
    torch.manual_seed(8)
    model = Language(["head"])
    opt, loader = private(model, TensorDataset(*tokens()))
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone(), requires_grad=False)
    with pytest.raises(RuntimeError, match="head.weight was replaced or tied"):
        next(iter(loader.steps(1)))


def test_a_frozen_module_that_is_tied_to_a_trained_one_afterwards_is_refused():
    torch.manual_seed(9)
    model = Language([])
    model.head.requires_grad_(False)
    opt, loader = private(model, TensorDataset(*tokens()), check=False, sample_rate=1.0)
    model.head.weight = model.embed.weight
    with pytest.raises(RuntimeError, match="embed.weight received a gradient that is not the engine's"):
        for batch in loader.steps(1):
            per_record(model, batch).backward()


def test_an_optimizer_that_holds_a_tensor_twice_is_refused():
    """A tied tensor listed by both names would be stepped on twice with one release."""
    model = Language(["head"])
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = torch.optim.SGD([model.embed.weight, model.head.weight, model.other.weight], 0.1)
    with pytest.raises(ValueError, match="the optimizer holds embed.weight twice"):
        make_private(model, optimizer, DataLoader(TensorDataset(*tokens()), batch_size=2), noise_multiplier=1.0)

"""Losses that a model returns beside its logits: those that tie records together are refused where a backward reaches
them, and nowhere else."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.nn import factor_parameters
from lalora_kernels.privacy.own_loss import COPIES, LOSS_ORDERS, reductions, tied, without_rows

F = nn.functional
N, T, V = 10, 6, 17
LENGTHS = torch.arange(N) % (T - 2) + 2


def step(model, loss, data, **settings):
    """One private step on all of ``data``; the optimizer."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    settings = {"noise_multiplier": 1.0, "sample_rate": 1.0, **settings}
    optimizer, loader = lk.make_private(model, optimizer, DataLoader(TensorDataset(*data), batch_size=N), **settings)
    for batch in loader.steps(1):
        loss(model, *batch).backward()
        optimizer.step()
    return optimizer


# ---------------------------------------------------------------- transformers'


def mixtral(aux: bool):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=aux,
    )  # fmt: skip
    model = lk.adapt(MixtralForCausalLM(config), r=2, target_modules=["v_proj"], verbose=False)
    for _, p in factor_parameters(model):
        p.data.add_(0.1 * torch.randn_like(p))
    return model.train(), [torch.randint(0, V, (N, T))]  # of one length: a mean over tokens is one over records


def own(model, x):
    return model(input_ids=x, labels=x).loss


def of_logits(model, x):
    return lk.record_losses(model(input_ids=x, labels=x).logits, x, shift=True).mean()


class TestAMixtureOfExperts:
    """transformers adds a thousandth of a term that balances the experts over all tokens of the batch."""

    def test_its_loss_is_refused_by_the_terms_name(self):
        model, data = mixtral(aux=True)
        with pytest.raises(
            ValueError, match=r"^aux_loss( and loss)?, which the model returns, .*output_router_logits = False"
        ):
            step(model, own, data)

    def test_backwards_of_single_records_say_the_same(self):
        model, (x,) = mixtral(aux=True)
        with pytest.raises(ValueError, match="v_proj.lora_B differ .*the loss couples records"):
            lk.check_per_sample(model, (x[:3],), lambda m, b: own(m, *b))
        lk.check_per_sample(model, (x[:3],), lambda m, b: of_logits(m, *b))

    @pytest.mark.parametrize("aux, loss", [(True, of_logits), (False, own)])
    def test_what_the_message_advises_trains(self, aux, loss):
        model, data = mixtral(aux)
        assert step(model, loss, data).per_sample_checked


# ---------------------------------------------------------------- any model's


class Pixels(nn.Module):
    """A segmenter: its loss is of logits that are enlarged; the gradient of those it returns is no cross-entropy's."""

    def __init__(self, reduction="mean", dropout=0.0):
        super().__init__()
        self.net, self.reduction, self.dropout = nn.Linear(4, 3), reduction, dropout

    def forward(self, x, y):
        z = self.net(F.dropout(x, self.dropout, self.training))
        wide = F.interpolate(z.transpose(1, 2), scale_factor=2, mode="linear")
        return {"loss": F.cross_entropy(wide, y, ignore_index=255, reduction=self.reduction), "logits": z}


def pixels(ragged: bool):
    torch.manual_seed(1)
    y = torch.randint(0, 3, (N, 2 * T))
    if ragged:
        y[torch.arange(2 * T) >= 2 * LENGTHS[:, None]] = 255
    return torch.randn(N, T, 4), y


def returned(model, x, y):
    return model(x, y)["loss"]


def segmenter(*settings):
    return lk.adapt(Pixels(*settings), r=2, target_modules=["net"], verbose=False)


def test_a_loss_that_the_logits_do_not_show():
    with pytest.raises(ValueError, match="^loss, which the model returns, divides by a count over the whole batch"):
        step(segmenter(), returned, pixels(True))
    assert step(segmenter(), returned, pixels(True), check="loss")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reduction, ragged", [("mean", False), ("sum", True)])
def test_a_loss_of_each_records_own_passes(reduction, ragged, dropout):
    assert step(segmenter(reduction, dropout), returned, pixels(ragged), loss_reduction=reduction).per_sample_checked


class InTraining(nn.Module):
    """Decorrelates the features over the batch, and in train mode alone."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.net, self.dropout = nn.Linear(4, 3), dropout

    def forward(self, x):
        z = F.dropout(self.net(x), self.dropout, self.training)
        return (z, (z.T @ z).square().mean() if self.training else z.new_zeros(()))


def with_term(model, x):
    z, term = model(x)
    return F.mse_loss(z, torch.ones_like(z)) + term


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("train", [True, False])
def test_a_term_of_train_mode(train, dropout):
    model = lk.adapt(InTraining(dropout).train(train), r=2, target_modules=["net"], verbose=False)
    if train:
        with pytest.raises(ValueError, match=r"^\[1\], which the model returns"):
            step(model, with_term, [torch.randn(N, 4)])
    else:
        assert step(model, with_term, [torch.randn(N, 4)]).per_sample_checked


def test_it_is_refused_before_anything_is_released_and_the_model_stays_usable():
    model = segmenter()
    x, y = pixels(True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer, loader = lk.make_private(
        model, optimizer, DataLoader(TensorDataset(x, y), batch_size=N), noise_multiplier=1.0, sample_rate=1.0
    )
    batch = next(loader.steps(2))
    with pytest.raises(ValueError, match="^loss, which"):
        returned(model, *batch).backward()
    assert optimizer.ledger.steps == 0
    labels = batch[1][:, ::2].where(batch[1][:, ::2] < 3, -100)
    lk.record_losses(model(*batch)["logits"], labels, shift=False).mean().backward()
    optimizer.step()
    assert optimizer.ledger.steps == 1


# ---------------------------------------------------------------- of numbers alone

VALUES = torch.tensor([0.3, 2.5], dtype=torch.float64)
COUNTS = torch.tensor([3.0, 5.0], dtype=torch.float64)
OUTPUTS = {
    "a mean": (lambda v, c: v.mean(), False),
    "a sum": (lambda v, c: v.sum(), False),
    "a sum, divided": (lambda v, c: v.sum() / 64, False),
    "no record's": (lambda v, c: torch.tensor(7.0), False),
    "a mean over tokens": (lambda v, c: (v * c).sum() / c.sum(), True),
    "the largest": (lambda v, c: v.max(), True),
    "a variance": (lambda v, c: v.var(), True),
    "a contrast": (lambda v, c: torch.logsumexp(v, 0), True),
    "a small term": (lambda v, c: v.mean() + 1e-4 * v.square().mean().sqrt(), True),
    "each layer's": (lambda v, c: torch.stack([v.mean(), v.max()]), True),
    "not a number": (lambda v, c: v.max() * torch.nan, False),
    "rows": (lambda v, c: v - v.mean(), False),  # which the check of the outputs sees
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_ties_records(name):
    output, ties = OUTPUTS[name]
    found = tied([{"value": output(VALUES[list(order)], COUNTS[list(order)])} for order in LOSS_ORDERS])
    assert found == ({"value"} if ties else set())


@pytest.mark.parametrize(
    "output, kind",
    [
        (lambda v, c: v.mean(), "mean"),
        (lambda v, c: v.sum(), "sum"),
        (lambda v, c: v.sum() / 64, "sum"),
        (lambda v, c: v.var(unbiased=False), None),
        (lambda v, c: torch.tensor(7.0), None),
        (lambda v, c: v.sum() * torch.nan, None),
        (lambda v, c: v.mean() + len(v), None),
    ],
)
def test_how_a_loss_takes_records(output, kind):
    found = reductions([{"value": output(VALUES[list(order)], COUNTS[list(order)])} for order in COPIES])
    assert found == ({} if kind is None else {"value": kind})


class Pair(NamedTuple):
    loss: torch.Tensor
    rest: list


def test_names_are_where_a_value_stands():
    one, rows, whole = torch.ones(()), torch.ones(4, 2), torch.ones(3)
    found = dict(without_rows({"a": Pair(one, [rows, one, {"b": whole}]), "n": 3, "i": one.long()}, 4))
    assert list(found) == ["a.loss", "a.rest[1]", "a.rest[2].b"]
    assert [name for name, _ in without_rows(one, 4)] == ["the output"]
    assert [name for name, _ in without_rows(Pair(one, []), 4)] == ["loss"]
    assert not list(without_rows(rows, 4))

"""check_per_sample names what mixes records."""

from types import SimpleNamespace

import models
import pytest
import torch
from models import FAMILIES, adapted
from torch import nn

import lalora_kernels as lk
from lalora_kernels.nn import LoRALinear
from lalora_kernels.privacy.checks import check_per_sample, per_sample_gradients, single_sample_gradients

F = nn.functional


def classify(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def chain(middle: nn.Module) -> nn.Sequential:
    model = nn.Sequential()
    model.first = LoRALinear.from_linear(nn.Linear(6, 8), r=2)
    model.middle = middle
    model.last = LoRALinear.from_linear(nn.Linear(8, 3), r=2)
    return model


def records(n: int = 4) -> tuple:
    return torch.randn(n, 6), torch.randint(0, 3, (n,))


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_models_pass(family):
    torch.manual_seed(0)
    model, batch, loss = adapted(family, dtype=torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    check_per_sample(model, batch, loss)
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())


class BatchMean(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class SequenceFirst(nn.Module):
    """A layer that sees (T, N, n)."""

    def __init__(self):
        super().__init__()
        self.inner = LoRALinear.from_linear(nn.Linear(8, 8), r=2)

    def forward(self, x):
        return self.inner(x.view(len(x), 2, 8 // 2).repeat(1, 1, 2).transpose(0, 1)).transpose(0, 1).sum(1)


class TopOneRouter(nn.Module):
    """A mixture of experts with a capacity shared by the batch."""

    def forward(self, x):
        keep = torch.zeros_like(x)
        keep[x.sum(1).topk(min(2, len(x))).indices] = 1.0
        return x * keep


@pytest.mark.parametrize(
    "middle, name",
    [(BatchMean(), "middle"), (SequenceFirst(), "middle.inner"), (TopOneRouter(), "middle")],
)
def test_names_the_layer_that_mixes(middle, name):
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=rf"^{name}: .*depends on the other records"):
        check_per_sample(chain(middle), records(), classify)


def test_batch_norm_in_train_mode_is_refused_and_in_eval_mode_is_not():
    torch.manual_seed(2)
    model = chain(nn.BatchNorm1d(8).requires_grad_(False))
    with pytest.raises(ValueError, match="middle.*BatchNorm1d"):
        per_sample_gradients(model, records(), classify)
    with pytest.raises(ValueError, match="^middle"):
        check_per_sample(model, records(), classify)
    model.middle.eval()
    check_per_sample(model, records(), classify)


def test_a_loss_that_couples_records_is_named():
    def contrastive(model, batch):
        z = F.normalize(model(batch[0]), dim=1)
        return F.cross_entropy(z @ z.t(), torch.arange(len(z)))

    torch.manual_seed(3)
    with pytest.raises(ValueError, match="the loss couples records"):
        check_per_sample(chain(nn.ReLU()), records(), contrastive)


def test_a_wrong_reduction_is_named():
    def summed(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    torch.manual_seed(4)
    check_per_sample(chain(nn.ReLU()), records(), summed, loss_reduction="sum")
    with pytest.raises(ValueError, match="loss_reduction='mean'"):
        check_per_sample(chain(nn.ReLU()), records(), summed)


class ByLength(nn.Module):
    """Rows in order of what they hold, put back behind the layer."""

    def __init__(self, descending):
        super().__init__()
        self.descending, self.inner = descending, LoRALinear.from_linear(nn.Linear(8, 8), r=2)

    def forward(self, x):
        order = x.sum(1).argsort(descending=self.descending)
        return self.inner(x[order])[order.argsort()]


@pytest.mark.parametrize("descending", [False, True])
def test_two_records_that_are_in_order_already_show_a_sort(descending):
    torch.manual_seed(6)
    with pytest.raises(ValueError, match="^middle.inner: .*depends on the other records"):
        check_per_sample(chain(ByLength(descending)), records(2), classify)


def test_an_input_that_requires_a_gradient_is_given_none():
    x, y = records(2)
    check_per_sample(chain(nn.ReLU()), (x.requires_grad_(True), y), classify)
    assert x.grad is None


def test_a_table_of_positions_without_a_batch_axis_is_named():
    class Positions(nn.Module):
        def __init__(self, length):
            super().__init__()
            self.table, self.length = nn.Embedding(length, 8), length

        def forward(self, x):
            return (x.unsqueeze(1) + self.table(torch.arange(self.length))).mean(1)

    for length, message in ((5, "table saw .5, 8.*frozen .positions pass with a batch axis"), (4, "arange.T..None.")):
        with pytest.raises(ValueError, match=message):
            check_per_sample(chain(Positions(length)), records(2), classify)


def test_one_record_cannot_show_mixing():
    with pytest.raises(ValueError, match="two records"):
        check_per_sample(chain(nn.ReLU()), records(1), classify)


def test_a_parameter_used_outside_its_module_is_refused():
    torch.manual_seed(5)
    model = chain(nn.ReLU())
    model.head = nn.Linear(3, 3)

    def penalized(model, batch):
        out = model.head(model.last(model.middle(model.first(batch[0]))))
        return F.cross_entropy(out, batch[1]) + model.head.weight.square().sum()

    with pytest.raises(RuntimeError, match="head.weight received a gradient"):
        per_sample_gradients(model, records(), penalized)


def test_an_uncovered_parameter_is_refused_by_name():
    model = chain(nn.PReLU())
    with pytest.raises(ValueError, match="middle.weight is trainable, but no rule.*PReLU.*freeze"):
        per_sample_gradients(model, records(), classify)


class TestModelsThatCannotBeCopied:
    def test_an_activation_that_an_object_keeps(self):
        model = chain(nn.GELU())
        model.kept = [model.first(records()[0])]
        check_per_sample(model, records(), classify)  # an attribute's, or in a list or a dict of one, is
        model.kept = SimpleNamespace(h=model.kept[0])
        with pytest.raises(RuntimeError, match=r"cannot be copied \(Only Tensors created .*should keep h\.detach\(\)"):
            check_per_sample(model, records(), classify)

    def test_no_memory_for_float64(self):
        """2^50 numbers that take the memory of one, until they are converted."""
        model = chain(nn.GELU())
        model.register_buffer("table", torch.zeros(1).expand(2**50))
        with pytest.raises(RuntimeError, match="in float64, 8 bytes a weight, for which there is no memory"):
            check_per_sample(model, records(), classify)


def text_batch(vocabulary: int = 37, n: int = 3) -> dict:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(1, vocabulary, (n, 8)), "labels": torch.randint(0, 3, (n,))}


def own_loss(model, batch):
    return model(**batch).loss


@pytest.mark.parametrize("seed", range(4))
def test_a_gradient_that_is_zero_but_for_rounding_is_no_difference(seed):
    """Of an attention key's bias: softmax does not see what it adds to every score. 1e-21 beside the others' 1e-6."""
    torch.manual_seed(seed)
    model, batch, loss = models.bert()
    model = lk.adapt(model, r=2, target_modules="qv", modules_to_save=["key", "classifier"], verbose=False)
    gradients = single_sample_gradients(model.double().eval(), batch, loss)
    assert 0 < max(float(g.norm()) for name, g in gradients.items() if name.endswith("key.bias")) < 1e-15
    check_per_sample(model, batch, loss)


def test_mixtures_of_experts_are_checked_by_their_plain_experts():
    """transformers' default, a grouped product, has no float64."""
    from transformers import MixtralConfig, MixtralForSequenceClassification

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=37, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = MixtralForSequenceClassification(config)
    model = lk.adapt(model, r=2, target_modules="qv", modules_to_save=["score"], verbose=False)
    before = model.config._experts_implementation
    check_per_sample(model, text_batch(), own_loss)
    assert model.config._experts_implementation == before != "eager"


class Routed(nn.Module):
    """An expert for the positions whose first feature is positive; the others pass."""

    def __init__(self):
        super().__init__()
        self.first, self.expert = LoRALinear(4, 4, r=2), LoRALinear(4, 4, r=2)

    def forward(self, x):
        y, chosen = self.first(x).clone(), x[..., 0] > 0
        y[chosen] = y[chosen] + self.expert(x[chosen])
        return y


@pytest.mark.parametrize(
    "chosen, message",
    [
        ((1, 5), "^expert: the output for one record depends on the other records"),  # with two more of the first: 8
        ((1, 3), r"^expert saw \(6, 4\), which does not divide into the batch's 4 records"),
    ],
)
def test_an_expert_that_trains_on_the_positions_of_all_records_is_named(chosen, message):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4)
    x[..., 0] = torch.where(torch.arange(5) < torch.tensor(chosen)[:, None], 1.0, -1.0)
    with pytest.raises(ValueError, match=message):
        check_per_sample(Routed(), (x,), lambda m, b: m(*b).square().sum(), loss_reduction="sum")


def test_a_layer_whose_one_output_for_all_records_is_repeated_is_named():
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3,
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, share_att_key=True,
        norm_rel_ebd="layer_norm", max_position_embeddings=16,
    )  # fmt: skip
    model = lk.adapt(DebertaV2ForSequenceClassification(config), r=2, target_modules="qv", verbose=False)
    with pytest.raises(ValueError, match=r"attention.self.query_proj is given one input for all records.*leave it out"):
        check_per_sample(model, text_batch(), own_loss)


def test_a_layer_whose_one_output_for_all_records_is_a_table_is_named():
    from transformers import Swinv2Config, Swinv2ForImageClassification

    torch.manual_seed(0)
    config = Swinv2Config(
        image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4, num_labels=3
    )  # fmt: skip
    model = Swinv2ForImageClassification(config)
    model = lk.adapt(model, r=2, target_modules=["continuous_position_bias_mlp.2"], verbose=False)
    batch = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match=r"continuous_position_bias_mlp.2 is given one input for all records"):
        check_per_sample(model, batch, own_loss)

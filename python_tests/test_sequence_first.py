"""Layers that are given positions first and records second, as Longformer's and XLNet's: found by the first batch."""

import copy

import pytest
import torch
from small import bert_folder, text_tsv
from test_private_step import private, written_out
from tolerances import PRIVATE_STEP_F64
from torch import nn
from torch.utils.data import TensorDataset

import lalora_kernels as lk
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.run import Run, prepare
from lalora_kernels.nn import LoRAEmbedding, LoRALinear, set_active
from lalora_kernels.privacy.checks import check_per_sample

F = nn.functional
CLIPPINGS = ["flat", "per_layer", "automatic"]


class Turned(nn.Module):
    """Every kind of rule between the two transpositions."""

    def __init__(self):
        super().__init__()
        self.embed, self.first = LoRAEmbedding(9, 6, r=2), LoRALinear(6, 8, r=2)
        self.norm, self.rms, self.mix, self.head = nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)
        for layer in (self.embed, self.first):
            nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
        self.double()

    def middle(self, h):
        return h

    def forward(self, ids):
        h = self.first(self.embed(ids.t()))  # (T, N, 8)
        h = self.rms(self.mix(self.middle(self.norm(h.tanh()))).tanh())
        return self.head(h.transpose(0, 1).mean(1))


def records(T: int = 5, N: int = 6):
    return torch.randint(0, 9, (N, T)), torch.randint(0, 3, (N,))


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def step(model, batch, **settings):
    optimizer, loader = private(model, TensorDataset(*batch), sample_rate=1.0, **settings)
    for part in loader.steps(1):
        loss_of(model, part).backward()
        optimizer.step()
    return optimizer


def compare(model, batch, active, settings, **loader):
    """One noiseless step, against clipped sums of backwards of single records."""
    twin = copy.deepcopy(model)
    set_active(twin, active)
    expected = written_out(twin, batch, loss_of, smoothing=None, divisor=len(batch[1]), **settings)
    schedule = lk.Schedule("mine", lambda round_index, step: active)
    clipping = {"clipping": settings["clipping"], "max_grad_norm": settings["C"]}
    optimizer = step(model, batch, method=schedule, smoothing=None, **clipping, **loader)
    released = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert released.keys() == expected.keys()
    for name, grad in released.items():
        torch.testing.assert_close(grad, expected[name], **PRIVATE_STEP_F64, msg=name)
    return optimizer


@pytest.mark.parametrize("T", [5, 6, 1, 7])  # 6: as many positions as records
@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("active", ["AB", "A", "B"])
def test_released_gradients_are_the_clipped_sums_of_single_records(T, clipping, active):
    torch.manual_seed(T)
    model = Turned()
    model.mix.weight.requires_grad_(False)  # the norm of a full weight's gradient is raised by what rounding may add
    compare(model, records(T), active, {"clipping": clipping, "C": 0.3})


@pytest.mark.parametrize("T", [5, 6, 1])
def test_the_gradients_of_all_that_trains(T):
    torch.manual_seed(T)
    optimizer = compare(Turned(), records(T), "AB", {"clipping": "flat", "C": 1e6})
    assert optimizer.per_sample_checked
    turned = {r.name for r in optimizer.engine.recorders if r.batch_axis}
    assert turned == {"embed", "first", "norm", "rms", "mix"}


def test_physical_batches():
    torch.manual_seed(0)
    compare(Turned(), records(5, 12), "AB", {"clipping": "flat", "C": 1e6}, physical_batch_size=5)


class FirstToken(Turned):
    """A layer that is given one position, the same for all records (Longformer's global attention to [CLS])."""

    def __init__(self):
        super().__init__()
        self.one, self.all = LoRALinear(8, 8, r=2).double(), LoRALinear(8, 8, r=2).double()
        self.register_buffer("token", torch.randn(5, 1, 8, dtype=torch.float64))

    def middle(self, h):
        same = self.token.expand(5, h.shape[1], 8)
        return h + self.one(same[:1]) + self.all(same)


def test_what_is_the_same_for_all_records_has_their_axis_by_their_number():
    torch.manual_seed(0)
    optimizer = compare(FirstToken(), records(), "AB", {"clipping": "flat", "C": 1e6})
    turned = {r.name for r in optimizer.engine.recorders if r.batch_axis}
    assert turned == {"embed", "first", "norm", "rms", "mix", "one", "all"}


class Places(Turned):
    """``mix`` is given positions for all records, too; ``places`` has as many of them as the check has records."""

    def __init__(self, T):
        super().__init__()
        self.places = LoRALinear(4, 8, r=2).double()
        self.register_buffer("of_mix", torch.randn(T, 1, 8, dtype=torch.float64))
        self.register_buffer("of_places", torch.randn(1, 3, 4, dtype=torch.float64))

    def middle(self, h):
        places = self.places(self.of_places).sum(1)  # (1, 8), and a row for each record in a private step
        return h + self.mix(self.of_mix) + places


@pytest.mark.parametrize("T", [5, 6, 3])
def test_positions_for_all_records(T):
    torch.manual_seed(T)
    optimizer = compare(Places(T), records(T), "AB", {"clipping": "flat", "C": 1e6})
    assert {r.name for r in optimizer.engine.recorders if r.batch_axis} == {"embed", "first", "norm", "rms", "mix"}


class NowAndThen(Turned):
    """``later`` runs in no batch at first: Longformer's global attention where no record asks for it."""

    def __init__(self):
        super().__init__()
        self.later, self.asked = LoRALinear(8, 8, r=2).double(), False

    def middle(self, h):
        return self.later(h) if self.asked else h


def test_a_layer_that_did_not_run_is_refused_where_others_have_positions_first():
    with pytest.raises(ValueError, match="^later: did not run in the first batch, .* name it in exclude_modules"):
        step(NowAndThen(), records())


class Mixing(Turned):
    def middle(self, h):
        return h + h.mean(1, keepdim=True)


class BothWays(Turned):
    """One module has the records along the first axis, and then along the second."""

    def middle(self, h):
        return h + self.mix(h.transpose(0, 1)).transpose(0, 1)


class InEvalMode(Turned):
    def forward(self, ids):
        if self.training:
            return super().forward(ids)
        return self.head(self.rms(self.mix(self.norm(self.first(self.embed(ids))))).mean(1))


def test_records_that_mix_there_are_refused():
    with pytest.raises(ValueError, match=r": the output for one record depends on the other records of the batch"):
        step(Mixing(), records())


@pytest.mark.parametrize("T", [5, 6])
def test_a_module_with_records_along_one_axis_and_the_other_is_refused(T):
    with pytest.raises(ValueError, match=r"mix: .* or its first axis is not the batch"):
        step(BothWays(), records(T))


@pytest.mark.parametrize("T", [5, 6])  # with as many positions as records no shape would tell
@pytest.mark.parametrize("training", [True, False])
def test_another_axis_in_the_other_mode_is_refused(T, training):
    model = InEvalMode().train(training)
    optimizer, loader = private(model, TensorDataset(*records(T)), sample_rate=1.0)
    for go_on in (False, True):
        for part in loader.steps(1):
            if go_on:
                model.train(not training)
                with pytest.raises(ValueError, match="mix, norm, rms: positions come before records there in one mode"):
                    model(part[0])
            else:
                loss_of(model, part).backward()
                optimizer.step()
    assert optimizer.ledger.steps == 1


def test_later_batches_have_the_records_where_the_first_had_them():
    model = Turned()
    optimizer, loader = private(model, TensorDataset(*records()), sample_rate=1.0)
    (part,) = loader.steps(1)
    model(part[0])
    with pytest.raises(ValueError, match=r"mix saw \(5, 7, 8\), where the first batch had its records along the sec"):
        model.mix._recorder.fold(torch.randn(5, 7, 8, dtype=torch.float64))


def test_batches_that_could_not_show_it_stay_no_secret():
    """Of records that are all alike the first batch takes T rows for N records; the next one tells."""
    model, (ids, labels) = Turned(), records(6)
    optimizer, loader = private(model, TensorDataset(ids[:1].expand(6, 6), labels[:1].expand(6)), sample_rate=1.0)
    for part in loader.steps(1):
        loss_of(model, part).backward()
        optimizer.step()
    assert not optimizer.per_sample_checked
    with pytest.raises(RuntimeError, match="could not show; their gradients were taken apart wrongly"):
        for part in loader.steps(1):
            model(ids[: len(part[0])])


def test_whoever_checks_by_hand_is_refused_such_a_layer():
    """make_private would not know of it with check=False."""
    with pytest.raises(ValueError, match="embed: .* or its first axis is not the batch"):
        check_per_sample(Turned(), records(), loss_of)
    with pytest.raises(ValueError, match=r"rms saw \(5, 8\), which does not divide into the batch's 6 records"):
        step(Turned(), records(), check="loss")


def longformer():
    from transformers import LongformerConfig, LongformerForSequenceClassification

    return LongformerForSequenceClassification(
        LongformerConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
            max_position_embeddings=20, attention_window=[4, 4], pad_token_id=1,
        )
    )  # fmt: skip


def xlnet():
    from transformers import XLNetConfig, XLNetForSequenceClassification

    return XLNetForSequenceClassification(XLNetConfig(vocab_size=30, d_model=8, n_layer=2, n_head=2, d_inner=12))


@pytest.mark.parametrize("make", [longformer, xlnet])
def test_models_of_transformers_train(make):
    """With their dropout; the first batch compares them with single records in float64."""
    torch.manual_seed(0)
    model = make()
    lk.adapt(model, r=2, target_modules="all-linear", verbose=False)
    ids = torch.randint(3, 30, (6, 8))
    optimizer, loader = private(model, TensorDataset(ids, torch.ones_like(ids), ids[:, 0] % 2), sample_rate=1.0)
    for ids, mask, labels in loader.steps(2):
        logits = model(input_ids=ids, attention_mask=mask).logits
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.per_sample_checked and any(r.batch_axis for r in optimizer.engine.recorders)


def test_lalora_train_whose_clients_check_nothing_refuses_them(tmp_path):
    folder = bert_folder(tmp_path / "model")
    longformer().save_pretrained(folder)
    config = make_config({
        "model": folder, "dataset": text_tsv(tmp_path / "t.tsv"), "clients": 2, "rounds": 1, "batch_size": 16,
        "max_length": 16, "partition": "iid", "targets": "all-linear", "device": "cpu",
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"attention\.self\.key, .*: positions come before records"):
        Run.start(prepare(config), tmp_path / "run")

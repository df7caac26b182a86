"""What a private step refuses late, in the middle of a run, and how a refusal leaves the model."""

import copy
import math

import pytest
import torch
from test_checks import BatchMean, chain, classify
from test_private_step import private, toy, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lalora_kernels.nn import LoRALinear
from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.privacy.shuffled import ShuffledLoader


def images(n: int = 8):
    return TensorDataset(torch.randn(n, 6), torch.randint(0, 3, (n,)))


def test_what_opacus_has_wrapped_already():
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = chain(nn.Identity())
    plain = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    wrapped = DPOptimizer(plain, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4)
    loader = DataLoader(images(), batch_size=4)
    with pytest.raises(TypeError, match="DPOptimizer is Opacus'.*pass its original_optimizer"):
        make_private(model, wrapped, loader, noise_multiplier=1.0)
    with pytest.raises(TypeError, match="GradSampleModule is Opacus'.*pass the model that it wraps"):
        make_private(GradSampleModule(copy.deepcopy(model), strict=False), plain, loader, noise_multiplier=1.0)


def test_opacus_batch_memory_manager():
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    optimizer, loader = private(chain(nn.Identity()), images())
    with (
        pytest.raises(AttributeError, match=r"no num_workers. A DataLoader made of it .*physical_batch_size=\.\.\."),
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer),
    ):
        pass
    with pytest.raises(AttributeError, match="'PrivateLoader' object has no attribute 'shuffle'"):
        assert loader.shuffle


class TestTheModel:
    @pytest.mark.parametrize("between", ["the parts of a batch", "a backward and its step"])
    def test_what_is_frozen_within_a_logical_batch(self, between):
        """Its sum would be of some records and not of others."""
        model = chain(nn.ReLU())
        opt, loader = private(model, images(), sample_rate=1.0, physical_batch_size=4)
        batches = loader.steps(1)
        classify(model, next(batches)).backward()
        if between == "the parts of a batch":
            opt.step()
        next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
        with pytest.raises(RuntimeError, match="the trainable tensors changed (within a logical|between the) batch"):
            next(batches) if between == "the parts of a batch" else opt.step()
        assert opt.ledger.steps == 0

    @pytest.mark.parametrize("check", [True, "loss", False])
    def test_a_batch_norm_that_goes_back_to_train_mode(self, check):
        """As model.train() does at the head of every epoch."""
        torch.manual_seed(0)
        model = chain(nn.BatchNorm1d(8).requires_grad_(False)).eval()
        opt, loader = private(model, images(), sample_rate=1.0, check=check)
        train(model, classify, opt, loader, 1)
        model.train()
        with pytest.raises(ValueError, match=r"middle \(BatchNorm1d\) mixes the records of a batch in train mode"):
            train(model, classify, opt, loader, 1)
        assert opt.ledger.steps == 1

    @pytest.mark.parametrize("how", ["unfrozen", "added"])
    def test_what_trains_later_is_refused_in_no_optimizer_either(self, how):
        """A second, plain one may hold it, and step on what nothing clips."""
        model = chain(nn.Linear(8, 8).requires_grad_(False))
        opt, loader = private(model, images(), sample_rate=1.0)
        train(model, classify, opt, loader, 1)
        if how == "unfrozen":
            model.middle.weight.requires_grad_(True)
        else:
            model.middle.gain = nn.Parameter(torch.ones(8))
        name = "weight" if how == "unfrozen" else "gain"
        with pytest.raises(RuntimeError, match=rf"^middle\.{name} was added or unfrozen after make_private.*freeze it"):
            train(model, classify, opt, loader, 1)
        assert opt.ledger.steps == 1

    def test_two_precisions(self):
        model, data, _ = toy()
        model.fc1.float()
        with pytest.raises(ValueError, match="some trainable parameters are float64 and some are not"):
            private(model, data)

    def test_rows_that_only_add_up_to_whole_records(self):
        """Six rows of two positions are no four records, though they fill four of three."""

        class Regrouped(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = LoRALinear.from_linear(nn.Linear(6, 3), r=2)

            def forward(self, x):
                return self.inner(x.reshape(6, 2, 6)).reshape(4, 9)

        model = Regrouped()
        data = TensorDataset(torch.randn(4, 3, 6), torch.randint(0, 3, (4,)))
        opt, loader = private(model, data, sample_rate=1.0, check=False)
        with pytest.raises(
            ValueError, match=r"inner saw \(6, 2, 3\), which does not divide into the batch's 4 records"
        ):
            train(model, classify, opt, loader, 1)

    def test_one_that_was_refused_is_as_it_was(self):
        model, data, loss = toy()
        model.act.extra = nn.Bilinear(2, 2, 2).double()
        before = copy.deepcopy(model)
        with pytest.raises(ValueError, match="act.extra.weight is trainable, but no rule"):
            private(model, data)
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
        loss(model, data[:]).backward()  # an ordinary one, which no private optimizer hears of
        model.zero_grad()
        model.act.extra.requires_grad_(False)
        opt, loader = private(model, data)
        train(model, loss, opt, loader, 1)


class TestTheBatch:
    def test_the_first_with_two_records_to_compare_is_checked_whenever_it_comes(self):
        torch.manual_seed(0)
        data = images(4)
        data.tensors[0][1:] = math.nan
        model = chain(BatchMean())
        opt, loader = private(model, data, sample_rate=1.0)
        with pytest.warns(UserWarning, match="4 record"):  # the mean spreads them
            train(model, classify, opt, loader, 1)
        assert not opt.per_sample_checked
        data.tensors[0][1:] = torch.randn(3, 6)
        with pytest.raises(ValueError, match=r"^middle: .*depends on the other records"):
            train(model, classify, opt, loader, 1)

    def test_a_logical_batch_that_is_left_half_way(self):
        model, data, loss = toy()
        opt, loader = private(model, data, sample_rate=1.0, physical_batch_size=4)
        loss(model, next(iter(loader.steps(1)))).backward()
        opt.step()
        with pytest.raises(RuntimeError, match="left before its last physical batch and is lost"):
            next(iter(loader.steps(1)))
        assert opt.ledger.steps == 0
        train(model, loss, opt, loader, 1)
        assert opt.ledger.steps == 1


class TestTheBatchOfAShuffledLoader:
    @pytest.mark.parametrize(
        "collate, sizes",
        [
            (lambda records: (torch.zeros(len(records), 6), torch.zeros(len(records) - 1)), r"'\[0\]': 4, '\[1\]': 3"),
            (lambda records: {"x": torch.zeros(4, 6), "scale": torch.tensor(2.0)}, "'x': 4, 'scale': 0"),
            (lambda records: torch.tensor(2.0), "'': 0"),
            (lambda records: ["a text"] * len(records), ""),
        ],
        ids=["a row less", "no rows beside rows", "no rows", "no tensor"],
    )
    def test_needs_one_row_a_record_in_every_tensor(self, collate, sizes):
        """By how many a row is a record's is what its gradient is folded and clipped by."""
        announced = []
        loader = ShuffledLoader(DataLoader(images(), batch_size=4, collate_fn=collate), on_batch=announced.append)
        with pytest.raises(ValueError, match=rf"no common first dimension \({{{sizes}}}\)"):
            next(iter(loader))
        assert not announced

    def test_each_is_a_logical_one_and_steps_go_over_as_many_passes_as_they_take(self):
        announced = []
        loader = ShuffledLoader(DataLoader(images(12), batch_size=5, shuffle=True), on_batch=announced.append)
        for count, sizes in ((7, [5, 5, 2, 5, 5, 2, 5]), (3, [5, 5, 2]), (0, [])):
            assert [len(x) for x, _ in loader.steps(count)] == sizes
            assert [(i.rows, i.valid, i.first, i.last) for i in announced] == [(n, n, True, True) for n in sizes]
            announced.clear()
        assert loader.expected_batch_size == 5.0 and loader.sample_rate == 5 / 12
        with pytest.raises(ValueError, match="the loader yields no batch"):
            next(ShuffledLoader(DataLoader(images(3), batch_size=4, drop_last=True)).steps(1))
        with pytest.raises(ValueError, match="has no batch_size"):
            ShuffledLoader(DataLoader(images(), batch_size=None))

"""What the checks of a private step would not see if they hung on train mode, on one call, or on the sites alone."""

import copy
import threading

import pytest
import torch
from test_checks import BatchMean, chain, classify
from test_private_step import private, toy, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.nn import LoRALinear
from lalora_kernels.privacy.ledger import BudgetExceeded, Ledger

F = nn.functional


def make(model, batch_size=8, records=8, **kwargs):
    data = TensorDataset(torch.randn(records, 6), torch.randint(0, 3, (records,)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    kwargs = {"noise_multiplier": 1.0, "sample_rate": 1.0} | kwargs
    return lk.make_private(model, optimizer, DataLoader(data, batch_size=batch_size), **kwargs)


def step(model, optimizer, loader, loss=classify, steps=1):
    for batch in loader.steps(steps):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def two_views(model, batch):
    x, y = batch
    return F.cross_entropy(model(torch.cat([x, x + 1])), torch.cat([y, y]))


def a_sum(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


class TestEvalMode:
    """How ``from_pretrained`` hands a model over."""

    @pytest.mark.parametrize(
        "middle, loss, message",
        [
            (BatchMean(), classify, "^middle: .*depends on the other records"),
            (nn.ReLU(), two_views, "given 16 rows, but the loader's batch has 8 records"),
            (nn.ReLU(), a_sum, "pass loss_reduction='sum'"),
        ],
    )
    def test_what_mixes_records_is_refused_all_the_same(self, middle, loss, message):
        model = chain(middle).eval()
        optimizer, loader = make(model)
        with pytest.raises(ValueError, match=message):
            step(model, optimizer, loader, loss)
        assert optimizer.ledger.steps == 0

    def test_a_mean_taken_off_the_output(self):
        """One record alone has no gradient then, nor have two whose outputs are projected alike."""
        model = nn.Sequential(LoRALinear.from_linear(nn.Linear(6, 3), r=2), BatchMean()).eval()
        optimizer, loader = make(model)
        with pytest.raises(ValueError, match="^1: .*depends on the other records"):
            step(model, optimizer, loader)

    def test_what_does_not_trains(self):
        model = chain(nn.ReLU()).eval()
        optimizer, loader = make(model)
        step(model, optimizer, loader, steps=2)
        assert optimizer.per_sample_checked and optimizer.loss_reduction_checked and optimizer.ledger.steps == 2

    def test_the_first_forward_is_measured(self):
        model = chain(nn.ReLU()).eval()
        optimizer, loader = make(model, physical_batch_size="auto", memory_budget=1e9)
        step(model, optimizer, loader)
        assert loader.batch_sampler.physical_batch_size > 1

    def test_an_evaluation_between_backward_and_step_belongs_under_no_grad(self):
        model = chain(nn.ReLU())
        optimizer, loader = make(model)
        (batch,) = loader.steps(1)
        classify(model, batch).backward()
        with torch.no_grad():
            model.eval()(torch.randn(3, 6))
        with pytest.raises(ValueError, match=r"given 3 rows.*evaluate under torch.no_grad\(\)"):
            model(torch.randn(3, 6))
        optimizer.step()


class TrainingMean(nn.Module):
    def forward(self, x):
        return x - x.mean(0) if self.training else x


class Centre(nn.Module):
    """A buffer that follows the activations, as DINO's centre and a vector quantizer's codes do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.centre.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return F.dropout(x, 0.5, self.training)


class TestTrainMode:
    """What only happens there is not seen by a check in eval mode."""

    @pytest.mark.parametrize(
        "middle, message",
        [
            (TrainingMean(), "^middle: the output for one record depends on the other records.*in train mode alone"),
            (Centre(), r"^the buffer middle.centre follows the records of a batch"),
        ],
    )
    def test_what_mixes_there_is_refused(self, middle, message):
        model = chain(middle)
        optimizer, loader = make(model)
        with pytest.raises(ValueError, match=message):
            step(model, optimizer, loader)
        assert optimizer.ledger.steps == 0

    @pytest.mark.parametrize("middle", [TrainingMean(), Centre()])
    def test_and_trains_in_eval_mode(self, middle):
        model = chain(middle)
        model.middle.eval()
        optimizer, loader = make(model)
        step(model, optimizer, loader)
        assert optimizer.per_sample_checked and optimizer.ledger.steps == 1

    @pytest.mark.parametrize("middle", [nn.Dropout(0.5), Counting()])
    def test_dropout_and_counters_pass(self, middle):
        model = chain(middle)
        optimizer, loader = make(model)
        torch.manual_seed(3)
        step(model, optimizer, loader)
        assert optimizer.per_sample_checked

    def test_the_check_leaves_generator_and_buffers_alone(self):
        model = chain(Counting())
        optimizer, loader = make(model)
        (batch,) = loader.steps(1)
        before = torch.get_rng_state()
        with torch.no_grad():
            plain = copy.deepcopy(model)(batch[0])
        torch.set_rng_state(before)
        assert torch.equal(model(batch[0]), plain) and model.middle.calls == 1


class TestGradientsThatNothingClips:
    """The wrapped optimizer steps on whatever stands in p.grad."""

    @pytest.mark.parametrize("late", [False, True])
    def test_a_tensor_unfrozen_within_a_step(self, late):
        model = chain(nn.Linear(8, 8).requires_grad_(False))
        data = TensorDataset(torch.randn(8, 6), torch.randint(0, 3, (8,)))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        optimizer, loader = lk.make_private(
            model, optimizer, DataLoader(data, batch_size=8), noise_multiplier=1.0, sample_rate=1.0
        )
        step(model, optimizer, loader)
        (batch,) = loader.steps(1)
        weight = model.middle.weight
        before, how = weight.detach().clone(), "has a gradient that" if late else ".*"
        if late:
            classify(model, batch).backward()
            weight.requires_grad_(True).square().sum().backward()
        with pytest.raises(RuntimeError, match=f"middle.weight {how} ?nothing clips or noises.*freeze it"):
            if not late:
                weight.requires_grad_(True)
                classify(model, batch).backward()
            optimizer.step()
        assert torch.equal(model.middle.weight, before) and optimizer.ledger.steps == 1

    @pytest.mark.parametrize("trained", [False, True])
    def test_one_from_before_make_private(self, trained):
        model, data, loss = toy()
        name = "fc1.lora_A" if trained else "fc1.weight"
        stale = dict(model.named_parameters())[name]
        stale.grad = torch.ones_like(stale)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with pytest.raises(ValueError, match=rf"^{name} has a gradient from before.*optimizer.zero_grad\(\) first"):
            lk.make_private(model, optimizer, DataLoader(data, batch_size=4), noise_multiplier=1.0)
        optimizer.zero_grad()
        lk.make_private(model, optimizer, DataLoader(data, batch_size=4), noise_multiplier=1.0)

    @pytest.mark.parametrize("take_away", [lk.merge_and_unload, lk.unadapt])
    def test_adapters_are_not_taken_from_a_private_model(self, take_away):
        model = chain(nn.ReLU())
        optimizer, loader = make(model)
        with pytest.raises(RuntimeError, match=r"^first belongs to a private optimizer; call its detach\(\) first"):
            take_away(model)
        step(model, optimizer, loader)

    def test_a_layer_that_was_taken_out_by_other_means(self):
        model = chain(nn.ReLU())
        optimizer, loader = make(model)
        model.first = nn.Linear(6, 8)
        with pytest.raises(RuntimeError, match="^first was taken out of the model"):
            step(model, optimizer, loader)


@pytest.mark.parametrize("method", ["la-lora-2-1", "la-lora-10-10", "rolora"])
def test_a_factor_that_trains_late_and_is_not_in_the_optimizer(method):
    model, data, _ = toy()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if p.requires_grad and "lora_A" not in n], 0.1)
    with pytest.raises(ValueError, match="lora_A trains but is not in the optimizer"):
        lk.make_private(model, optimizer, DataLoader(data, batch_size=4), noise_multiplier=1.0, method=method)


def test_a_factor_that_trains_later_than_any_period_is_refused_before_it_is_charged():
    model, data, loss = toy()
    late = lk.Schedule("late", lambda r, s: "A" if s == 99 else "B")
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if p.requires_grad and "lora_A" not in n], 0.1)
    optimizer, loader = lk.make_private(
        model, optimizer, DataLoader(data, batch_size=4), noise_multiplier=1.0, method=late
    )
    optimizer.local_step = 99
    with pytest.raises(ValueError, match="lora_A trains but is not in the optimizer"):
        train(model, loss, optimizer, loader, 1)
    assert optimizer.ledger.steps == 0


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_optimizers_that_cannot_take_one_dense_gradient_are_refused_before_a_release(kind):
    model, data, _ = toy()
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot take a private step.*use"):
        private(model, data, optimizer=kind)


class TestOneLedger:
    def test_charges_in_threads_are_all_held(self, monkeypatch):
        monkeypatch.setattr("sys.setswitchinterval", lambda s: None)
        ledger = Ledger()
        many = [threading.Thread(target=lambda: [ledger.charge(1.0, 0.5) for _ in range(2000)]) for _ in range(4)]
        for t in many:
            t.start()
        for t in many:
            t.join()
        assert ledger.steps == 8000

    def phases(self, **kwargs):
        model, data, loss = toy()
        plain = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        first, loader = lk.make_private(
            model, plain, DataLoader(data, batch_size=4), noise_multiplier=1.0, target_delta=1e-3
        )
        train(model, loss, first, loader, 5)
        first.detach()
        ledger = Ledger(**kwargs)
        ledger.load_state_dict(first.ledger.state_dict())
        return model, data, loss, ledger

    def test_a_second_phase_is_calibrated_to_what_the_first_left(self):
        model, data, loss, ledger = self.phases()
        plain = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        second, loader = lk.make_private(
            model, plain, DataLoader(data, batch_size=4), ledger=ledger, target_epsilon=30.0, target_delta=1e-3, steps=4
        )
        train(model, loss, second, loader, 4)
        assert second.ledger.steps == 9 and 29.9 < second.get_epsilon() <= 30.0
        with pytest.raises(BudgetExceeded):
            train(model, loss, second, loader, 1)

    def test_another_budget_than_the_ledgers_is_refused(self):
        model, data, _ = toy()
        ledger = Ledger(target_epsilon=8.0, target_delta=1e-3)
        with pytest.raises(ValueError, match="the ledger has the budget epsilon 8, .* was asked for epsilon 1, "):
            private(model, data, noise_multiplier=None, ledger=ledger, target_epsilon=1.0, target_delta=1e-3, steps=3)
        assert ledger.target_epsilon == 8.0

    def test_a_private_state_in_a_plain_optimizer_is_refused(self):
        model, data, loss = toy()
        opt, loader = private(model, data, noise_multiplier=1.0)
        train(model, loss, opt, loader, 3)
        stored = opt.state_dict()
        opt.detach()
        plain = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
        plain.load_state_dict(stored)
        with pytest.raises(ValueError, match="forgotten; call make_private first and load the state into"):
            lk.make_private(model, plain, DataLoader(data, batch_size=4), noise_multiplier=1.0)
        opt, loader = private(model, data, noise_multiplier=1.0, ledger=lk.Ledger())
        opt.load_state_dict(stored)
        assert opt.ledger.steps == 3 and list(opt.param_groups[0]) == list(plain.defaults | {"params": 0})


def test_epochs_are_passes_of_the_private_loader():
    """58 records by 16 are 3 whole batches, and 3.6 expected draws of one sixteenth: 4 steps."""
    model, data, loss = toy(58)
    asked = {"target_epsilon": 3.0, "target_delta": 1e-3}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    plain = DataLoader(data, batch_size=16, drop_last=True)
    opt, loader = lk.make_private(model, optimizer, plain, epochs=2, **asked)
    for _ in range(2):
        for batch in loader:
            loss(model, batch).backward()
            opt.step()
            opt.zero_grad()
    assert opt.ledger.steps == 8 and 2.99 < opt.get_epsilon() <= 3.0
    opt.detach()
    for wrong in ({"epochs": 0}, {"epochs": 2, "steps": 8}):
        with pytest.raises(ValueError, match="epochs is a whole number >= 1, and given instead of steps"):
            lk.make_private(model, optimizer, plain, ledger=opt.ledger, **asked, **wrong)


def test_the_loader_of_a_detached_optimizer_says_so():
    model, data, loss = toy()
    opt, loader = private(model, data)
    opt.detach()
    with pytest.raises(RuntimeError, match="this loader's optimizer was detached"):
        next(iter(loader))


def test_stepped_says_which_physical_batch_released():
    model, data, loss = toy(12)
    opt, loader = private(model, data, sample_rate=1.0, physical_batch_size=5)
    told = []
    for batch in loader.steps(2):
        loss(model, batch).backward()
        opt.step()
        told.append(opt.stepped)
    assert told == [False, False, True] * 2


def test_the_check_in_float64_is_not_the_forced_backends():
    model = chain(nn.ReLU())
    with lk.use_backend("cpp"):
        optimizer, loader = make(model)
        step(model, optimizer, loader)
    assert optimizer.per_sample_checked


def test_an_lstm_that_is_frozen_mixes_nothing():
    """Its state is (layers, N, n): no batch axis first, and nothing of the loss comes of it."""

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.r = nn.LSTM(8, 8, batch_first=True).requires_grad_(False)

        def forward(self, x):
            return self.r(x.unsqueeze(1))[0].squeeze(1)

    model = chain(Frozen())
    optimizer, loader = make(model)
    step(model, optimizer, loader)
    assert optimizer.per_sample_checked

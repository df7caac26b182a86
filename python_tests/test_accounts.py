"""What a loop may not do to the account: skip a batch, begin anew, count a record once that is there twice."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import lalora_kernels as lk

F = nn.functional


def records(n: int = 40) -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(n, 6), torch.randint(0, 3, (n,)))


def network() -> nn.Module:
    torch.manual_seed(1)
    return lk.adapt(nn.Sequential(nn.Linear(6, 3)), r=2, target_modules=["0"], verbose=False)


def private(model, data=None, **settings):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = DataLoader(records() if data is None else data, batch_size=8)
    return lk.make_private(model, optimizer, loader, **{"noise_multiplier": 1.0, "target_delta": 1e-5, **settings})


def train(model, optimizer, loader, steps):
    for x, y in loader.steps(steps):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


class TestSkippedBatches:
    @pytest.mark.parametrize("physical", [None, 3])
    def test_by_the_loss(self, physical):
        model = network()
        optimizer, loader = private(model, physical_batch_size=physical, sample_rate=0.5)
        batches = loader.steps(3)
        model(next(batches)[0])
        with pytest.raises(
            RuntimeError, match="no optimizer.step\\(\\) followed.*call backward and step on every batch"
        ):
            next(batches)
        assert optimizer.ledger.steps == 0

    def test_afterwards_it_goes_on(self):
        model = network()
        optimizer, loader = private(model)
        model(next(loader.steps(1))[0])
        with pytest.raises(RuntimeError, match="no optimizer.step"):
            next(loader.steps(1))
        train(model, optimizer, loader, 2)
        assert optimizer.ledger.steps == 2

    @pytest.mark.parametrize("physical", [None, 3])
    def test_between_backward_and_step_as_by_ctrl_c(self, physical):
        """Said once; the noise-free release of the step after it holds nothing of the batch that was left."""
        model = network()
        settings = {"noise_multiplier": 0.0, "sample_rate": 1.0, "max_grad_norm": 1e6, "method": "dp-lora"}
        optimizer, loader = private(model, physical_batch_size=physical, **settings)
        x, y = next(loader.steps(1))
        F.cross_entropy(model(x), y).backward()
        with pytest.raises(RuntimeError, match="not stepped.*run it again: that batch is forgotten now"):
            next(loader.steps(1))
        plain = copy.deepcopy(model)
        for x, y in loader.steps(1):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        whole = records()[:]
        F.cross_entropy(plain(whole[0]), whole[1]).backward()
        for p, q in zip(model.parameters(), plain.parameters()):
            if q.requires_grad:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        assert optimizer.ledger.steps == 1

    def test_evaluation_over_the_private_loader_is_no_skip(self):
        model = network()
        optimizer, loader = private(model)
        with torch.no_grad():
            for x, _ in loader.steps(3):
                model(x)
        train(model, optimizer, loader, 2)
        assert optimizer.ledger.steps == 2


class TestASecondTraining:
    def test_is_refused_without_the_first_ones_ledger(self):
        model = network()
        optimizer, loader = private(model)
        train(model, optimizer, loader, 3)
        first = optimizer.get_epsilon()
        optimizer.detach()
        with pytest.raises(ValueError, match=r"privately already \(3 releases\).*Pass ledger=optimizer\.ledger"):
            private(model)
        again, loader = private(model, ledger=optimizer.ledger)
        train(model, again, loader, 3)
        assert again.ledger.steps == 6 and again.get_epsilon() > first

    def test_on_other_records_has_a_ledger_of_its_own(self):
        model = network()
        optimizer, loader = private(model)
        train(model, optimizer, loader, 3)
        optimizer.detach()
        again, loader = private(model, ledger=lk.Ledger())
        again.detach()
        with pytest.raises(ValueError, match=r"privately already \(3 releases\)"):  # whatever began since
            private(model)
        again, loader = private(model, ledger=again.ledger)
        train(model, again, loader, 1)
        assert again.ledger.steps == 1

    def test_of_another_adapter_over_what_the_first_was_merged_into(self):
        """ReLoRA: what the first phase learned is in the base weights of the second."""
        model = network()
        optimizer, loader = private(model)
        train(model, optimizer, loader, 3)
        optimizer.detach()
        lk.adapt(lk.merge_and_unload(model), r=2, target_modules=["0"], verbose=False)
        with pytest.raises(ValueError, match=r"privately already \(3 releases\)"):
            private(model)
        again, loader = private(model, ledger=optimizer.ledger)
        train(model, again, loader, 1)
        assert again.ledger.steps == 4
        again.detach()
        lk.adapt(lk.unadapt(model), r=2, target_modules=["0"], verbose=False)
        with pytest.raises(ValueError, match=r"privately already \(4 releases\)"):
            private(model)

    def test_is_none_where_nothing_was_released_or_the_model_is_another(self):
        model = network()
        private(model)[0].detach()
        optimizer, loader = private(model)
        train(model, optimizer, loader, 1)
        optimizer.detach()
        with pytest.raises(ValueError, match=r"privately already \(1 releases\)"):  # nor does the unused one hide it
            private(model)
        assert private(copy.deepcopy(model))[0].ledger.steps == 0


class TestCopiesOfRecords:
    @pytest.mark.parametrize(
        "copies",
        [
            lambda data: Subset(data, [0, 1, 2, 2]),
            lambda data: Subset(Subset(data, [5, 6, 6, 7]), [0, 1, 2]),
            lambda data: ConcatDataset([data, data]),
            lambda data: ConcatDataset([Subset(data, range(20)), Subset(data, range(19, 40))]),
        ],
        ids=["subset", "nested", "concat", "overlap"],
    )
    def test_are_refused(self, copies):
        with pytest.raises(ValueError, match="holds records more than once, and k copies of a record cost k times its"):
            private(network(), copies(records()), sample_rate=0.5)

    @pytest.mark.parametrize(
        "parts",
        [
            lambda data: Subset(data, range(0, 40, 3)),
            lambda data: ConcatDataset([Subset(data, range(20)), Subset(data, range(20, 40)), records(5)]),
        ],
        ids=["subset", "concat"],
    )
    def test_parts_are_not(self, parts):
        _, loader = private(network(), parts(records()), sample_rate=0.5)
        assert loader.expected_batch_size == len(loader.dataset) / 2


def test_sigma_is_what_the_ledger_is_charged():
    optimizer, _ = private(network())
    with pytest.raises(AttributeError):
        optimizer.noise_multiplier = 0.1


def test_so_is_the_sampling_rate():
    """A batch size that grows during training would be drawn at a rate that nobody is charged for."""
    _, loader = private(network(), sample_rate=0.1)
    for owner in (loader, loader.batch_sampler):
        with pytest.raises(AttributeError):
            owner.sample_rate = 0.5
    assert loader.sample_rate == loader.batch_sampler.sample_rate == 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda privacy: privacy.pop("ledger"), "lacks ledger"),
        (lambda privacy: privacy.pop("round"), "lacks round"),
        (lambda privacy: privacy.update(local_step=1.5), r"not \[1, 1.5\]"),
        (lambda privacy: privacy.update(round="2"), r"not \['2', 3\]"),
    ],
)
def test_a_damaged_state_is_refused_before_anything_of_it_is_taken(change, message):
    model = network()
    optimizer, loader = private(model)
    train(model, optimizer, loader, 2)
    state = copy.deepcopy(optimizer.state_dict())
    change(state["privacy"])
    fresh, _ = private(network())
    with pytest.raises(ValueError, match=f'the "privacy" of this checkpoint .*{message}.*restore it from a copy'):
        fresh.load_state_dict(state)
    assert fresh.ledger.steps == 0 and fresh.local_step == 1


def test_steps_beside_a_noise_multiplier_are_refused():
    with pytest.raises(ValueError, match="beside noise_multiplier they would limit nothing.*iterate loader.steps"):
        private(network(), steps=3)


@pytest.mark.parametrize("unmerged", [False, True])
@pytest.mark.parametrize("layer", ["linear", "embedding"])
def test_a_merge_by_peft_keeps_the_account(layer, unmerged):
    """The base weights hold what was learned; without the layer nothing else would tell."""
    from lalora_kernels.privacy.accounts import note, refuse_second_account

    class Spent:
        steps = 1

    first = nn.Linear(4, 4) if layer == "linear" else nn.Embedding(5, 4)
    base = nn.Sequential(first, nn.Linear(4, 3))
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = lk.patch_peft(peft.get_peft_model(base, config))
    note([p for p in model.parameters() if p.requires_grad], Spent())
    if unmerged:
        model.merge_adapter()
        model.unmerge_adapter()
        plain = model.unload()
    else:
        plain = model.merge_and_unload()
    with pytest.raises(ValueError, match="trained privately already"):
        refuse_second_account(plain.parameters())
    refuse_second_account(plain[1].parameters())

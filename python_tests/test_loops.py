"""Loops that go on where a batch was lost, run ahead of it or come back to it; models that change meanwhile."""

import pytest
import torch
from test_accounts import network, private, records, train
from test_checks import BatchMean, chain
from torch import nn
from torch.utils.data import TensorDataset

import lalora_kernels as lk

F = nn.functional
KNOWN = {"noise_multiplier": 0.0, "sample_rate": 1.0, "method": "dp-lora", "max_grad_norm": 1e-2, "smoothing": None}


def with_a_head():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    return lk.adapt(model, r=2, target_modules=["0"], modules_to_save=["1"], verbose=False)


class TestAStepThatFailed:
    """Sums were made before the ledger was asked: a second step on the same batch would add them once more."""

    @pytest.mark.parametrize("physical", [None, 4])
    def test_a_second_step_on_a_batch_that_the_budget_refused(self, physical):
        model = with_a_head()
        ledger = lk.Ledger(target_epsilon=1e-3, target_delta=1e-5)
        optimizer, loader = private(
            model, records(8), ledger=ledger, noise_multiplier=1.0, sample_rate=1.0, physical_batch_size=physical
        )
        batches = loader.steps(1)
        with pytest.raises(lk.BudgetExceeded):
            for x, y in batches:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        ledger.target_epsilon = 1e3
        with pytest.raises(RuntimeError, match="without a new batch of the private loader"):
            optimizer.step()
        assert ledger.steps == 0 and all(p.grad is None for p in model.parameters())
        train(model, optimizer, loader, 1)
        assert ledger.steps == 1

    def test_the_next_batch_holds_nothing_of_the_one_that_was_interrupted(self, monkeypatch):
        """By Ctrl-C, while epsilon was computed."""
        data, sums = records(8), []
        for interrupted in (False, True):
            model = with_a_head()
            optimizer, loader = private(model, data, **KNOWN)
            if interrupted:
                x, y = next(loader.steps(1))
                F.cross_entropy(model(x), y).backward()
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(optimizer.engine, "charge", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
                    optimizer.step()
            for x, y in loader.steps(1):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            sums.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert torch.equal(*sums)


class Middle(nn.Module):
    """One layer that is used, and one that only adapts."""

    def __init__(self, layer):
        super().__init__()
        self.middle, self.other = layer, nn.Linear(2, 2)

    def forward(self, x):
        return self.middle(x)


@pytest.mark.parametrize("kind", ["adapter", "head", "norm", "embedding", "convolution"])
def test_a_loss_of_an_earlier_batch_is_not_backpropagated_again(kind):
    """Between two physical batches no weight changes, so that torch's own check of versions sees nothing."""
    layers = {
        "adapter": (nn.Linear(6, 3), {"target_modules": ["middle"]}),
        "head": (nn.Linear(6, 3), {"target_modules": ["other"], "modules_to_save": ["middle"]}),
        "norm": (nn.LayerNorm(6), {"target_modules": ["other"], "modules_to_save": ["middle"]}),
        "embedding": (nn.Embedding(9, 3), {"target_modules": ["middle"]}),
        "convolution": (nn.Conv2d(6, 3, 1), {"target_modules": ["middle"]}),
    }
    torch.manual_seed(0)
    layer, settings = layers[kind]
    model = Middle(layer)
    lk.adapt(model, r=2, verbose=False, **settings)
    x = torch.randint(0, 9, (8, 2)) if kind == "embedding" else torch.randn(8, 6, *[2] * 2 * (kind == "convolution"))
    optimizer, loader = private(
        model, TensorDataset(x), sample_rate=1.0, physical_batch_size=4, check=False, loss_reduction="sum"
    )
    running = 0.0
    with pytest.raises(RuntimeError, match="in the graph of an earlier batch, whose rows are other records.*loss.item"):
        for (x,) in loader.steps(1):
            running = running + model(x).square().sum()
            running.backward(retain_graph=True)
            optimizer.step()


class TestABatchThatWasPassedOver:
    @staticmethod
    def ahead(batches):
        """As loops do that copy the next batch to a card while this one is computed."""
        batches = iter(batches)
        now = next(batches)
        for following in batches:
            yield now
            now = following
        yield now

    @pytest.mark.parametrize("check", [True, False])
    @pytest.mark.parametrize("physical", [None, 1])
    def test_fetched_ahead(self, physical, check):
        model = network()
        optimizer, loader = private(model, physical_batch_size=physical, sample_rate=1.0, check=check)
        with pytest.raises(RuntimeError, match="passed over before this one.*fetched ahead"):
            for x, y in self.ahead(loader.steps(2)):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        assert optimizer.ledger.steps == 0
        train(model, optimizer, loader, 2)  # an iteration of its own
        assert optimizer.ledger.steps == 2

    @pytest.mark.parametrize("physical", [None, 3])
    def test_skipped_for_its_size(self, physical):
        model = network()
        optimizer, loader = private(model, physical_batch_size=physical)
        with pytest.raises(RuntimeError, match="skipped for what is in it"):
            for i, (x, y) in enumerate(loader.steps(3)):
                if i:
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()

    def test_by_a_model_that_is_called_in_parts(self):
        model = network()
        optimizer, loader = private(model, check=False)
        batches = loader.steps(2)
        next(batches)
        x, y = next(batches)
        F.cross_entropy(model[0](x), y).backward()
        with pytest.raises(RuntimeError, match="passed over"):
            optimizer.step()

    def test_looking_at_all_of_them_is_no_skip(self):
        model = network()
        optimizer, loader = private(model, physical_batch_size=3)
        seen = sum(len(x) for x, _ in loader.steps(3))
        train(model, optimizer, loader, 2)
        assert seen and optimizer.ledger.steps == 2


def test_what_one_record_leaves_for_the_next_is_seen_where_each_is_a_batch():
    """No batch has two records to compare."""

    class Memory(nn.Module):
        state = torch.zeros(8)

        def forward(self, h):
            h, self.state = h + self.state, h.detach().mean(0)
            return h

    torch.manual_seed(0)
    model = chain(Memory())
    optimizer, loader = private(model, records(8), physical_batch_size=1, sample_rate=1.0)
    with pytest.raises(ValueError, match="middle: the output for one record depends on the other records"):
        train(model, optimizer, loader, 1)
    assert optimizer.ledger.steps == 0
    model = network()
    optimizer, loader = private(model, records(8), physical_batch_size=1)
    train(model, optimizer, loader, 3)
    assert optimizer.per_sample_checked


class TestAModelThatChanges:
    @pytest.mark.parametrize("middle, message", [
        (BatchMean(), "middle: the output for one record depends on the other records"),
        (nn.BatchNorm1d(8, affine=False), r"middle \(BatchNorm1d\) mixes the records"),
    ], ids=["mean", "norm"])  # fmt: skip
    def test_between_the_loaders_batch_and_its_forward(self, middle, message):
        torch.manual_seed(0)
        model = chain(nn.Identity())
        optimizer, loader = private(model, records(8), sample_rate=1.0)
        with pytest.raises(ValueError, match=message):
            for i, (x, y) in enumerate(loader.steps(2)):
                if i == 1:
                    model.middle = middle
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        assert optimizer.ledger.steps == 1

    def test_a_part_of_it_goes_to_train_mode(self):
        """The model's own flag says train mode all along."""

        class InTraining(BatchMean):
            def forward(self, x):
                return super().forward(x) if self.training else x

        torch.manual_seed(0)
        model = chain(InTraining()).train()
        model.middle.eval()
        optimizer, loader = private(model, records(8), sample_rate=1.0)
        train(model, optimizer, loader, 2)
        model.train()
        with pytest.raises(ValueError, match="middle: the output for one record depends"):
            train(model, optimizer, loader, 1)

    def test_a_batch_norm_of_a_compiled_model(self):
        """What is compiled is not looked into, but which modules it has is known."""
        torch.manual_seed(0)
        model = chain(nn.BatchNorm1d(8).requires_grad_(False)).eval()
        optimizer, loader = private(model, records(8), sample_rate=1.0)
        compiled = torch.compile(model, backend="aot_eager")
        train(compiled, optimizer, loader, 1)
        model.train()
        with pytest.raises(ValueError, match=r"middle \(BatchNorm1d\) mixes the records"):
            train(compiled, optimizer, loader, 1)

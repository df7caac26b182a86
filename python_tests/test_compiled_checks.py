"""What the checks of the first batches refuse in a model they refuse when it is compiled, too, in one graph."""

from functools import partial
from threading import Barrier, Event, Thread
from types import SimpleNamespace

import pytest
import torch
from test_checks import BatchMean, chain, classify
from test_own_loss_later import RAGGED, N, Net, batch
from test_own_loss_loop import taken
from test_padding import REFUSED, Words, padding_to, records
from test_sequence_first import Turned
from test_unseen import F, a_sum, make, step
from tolerances import COMPILED_F32
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.privacy.compiled import Carried, eagerly, read

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def anew():
    """Or what a test compiles after many others runs as it was written."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graph(model, backend="aot_eager", fullgraph=True):
    return torch.compile(model, fullgraph=fullgraph, backend=backend)


def weighted(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 5.0]))


class Broken(nn.Module):
    def forward(self, h):
        torch._dynamo.graph_break()
        return h


class Keeps(nn.Module):
    """Leaves what the batch has in the mean, or each record, where a loss could read it."""

    def __init__(self, shared):
        super().__init__()
        self.shared = shared

    def forward(self, h):
        self.kept = h.mean(0) if self.shared else h.mean(1)
        return h


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        "backend, kind",
        [("eager", "mixing"), ("eager", "sum"), ("eager", "weights"), ("aot_eager", "sum"), ("inductor", "weights")],
    )
    def test_by_the_same_name(self, backend, kind):
        middle, loss, message = {
            "mixing": (BatchMean(), classify, "^middle: .*depends on the other records"),
            "sum": (nn.ReLU(), a_sum, "pass loss_reduction='sum'"),
            "weights": (nn.ReLU(), weighted, "the loss divides by a count over the whole batch"),
        }[kind]
        optimizer, loader = make(model := chain(middle))
        with pytest.raises(ValueError, match=message):
            step(graph(model, backend), optimizer, loader, loss)
        assert optimizer.ledger.steps == 0

    def test_what_the_forward_keeps_where_a_loss_could_read_it(self):
        optimizer, loader = make(model := chain(Keeps(True)))
        with pytest.raises(ValueError, match=r"^middle\.kept, which the compiled model's forward keeps there, ties"):
            step(graph(model), optimizer, loader)

    def test_also_behind_a_break_of_the_graph(self):
        model = nn.Sequential(Broken(), chain(BatchMean()))
        optimizer, loader = make(model)
        with pytest.raises(ValueError, match=r"^1\.middle: .*depends on the other records"):
            step(graph(model, fullgraph=False), optimizer, loader)

    def test_also_of_batches_of_one_record(self):
        optimizer, loader = make(model := chain(BatchMean()), physical_batch_size=1)
        with pytest.raises(ValueError, match="^middle: .*depends on the other records"):
            step(graph(model), optimizer, loader)

    def test_and_what_is_clean_trains(self):
        for middle, loss in ((nn.ReLU(), classify), (Keeps(False), classify)):
            optimizer, loader = make(model := chain(middle))
            step(graph(model), optimizer, loader, loss, steps=2)
            assert optimizer.per_sample_checked and optimizer.loss_reduction_checked and optimizer.ledger.steps == 2

    def test_a_layer_that_is_called_beside_the_model(self):
        """As in a loop that compiles nothing: a mean over the batch between two parts."""
        optimizer, loader = make(model := chain(nn.ReLU()))
        net = graph(model)

        def beside(_, batch):
            h = model.first(batch[0])
            return classify(net, batch) + model.last(h - h.mean(0)).square().mean()

        with pytest.raises(RuntimeError, match="^(first|last) was called, but not the model"):
            step(net, optimizer, loader, beside)

        def behind(_, batch):
            loss = classify(net, batch)
            return loss + model.last(model.middle(model.first(batch[0])) - 1).square().mean()

        optimizer.detach()
        optimizer, loader = make(model)
        torch.compiler.reset()
        with pytest.raises(RuntimeError, match="^last was called, but not the model"):
            step(net, optimizer, loader, behind)

    def test_a_generator_that_was_seeded(self):
        optimizer, loader = make(model := chain(nn.ReLU()))
        net = graph(model)
        for x, y in loader.steps(1):
            torch.manual_seed(0)
            with pytest.raises(RuntimeError, match="seed"):
                classify(net, (x, y))

    def test_what_the_padding_changes(self):
        model = lk.adapt(Words(masked=False), target_modules=["fc"], modules_to_save=[], r=2, verbose=False)
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        data = DataLoader(records([3, 9, 5, 4] * 4), batch_size=4, collate_fn=padding_to())
        optimizer, loader = lk.make_private(model, sgd, data, noise_multiplier=1.0)
        draws = iter([[0, 2, 3], [0, 1, 2]])
        loader.batch_sampler.draw = lambda: next(draws)
        net = graph(model)
        with pytest.raises(ValueError, match=REFUSED):
            for inputs, target in loader.steps(2):
                F.cross_entropy(net(**inputs), target).backward()
                optimizer.step()

    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("name", ["loss", "out"])
    def test_a_loss_of_the_models_own_where_a_backward_reaches_it(self, name, shared):
        """Its outputs are one graph's, whose backward runs for all of them."""
        model = lk.adapt(Net(shared), target_modules=["net"], r=2, verbose=False)
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        (x, target), valid = batch(RAGGED)[0], batch(RAGGED)[1]["valid"]
        data = DataLoader(TensorDataset(x, target, valid), batch_size=N)
        optimizer, loader = lk.make_private(model, sgd, data, noise_multiplier=1.0, sample_rate=1.0)
        net = graph(model)

        def train():
            for x, target, valid in loader.steps(1):
                net(x, target, valid=valid)[name].mean().backward()
                optimizer.step()

        if shared and name == "loss":
            with pytest.raises(ValueError, match="^loss, which the model returns, divides by a count"):
                train()
        else:
            train()
        assert optimizer.ledger.steps == (not shared or name == "out")

    def test_a_sum_that_the_model_returns_for_a_mean(self):
        with pytest.raises(ValueError, match="^loss, which the model returns, is a sum"):
            taken("sum", "mean", compiled=graph)
        with pytest.raises(ValueError, match="^loss, which the model returns, is a sum"):
            taken("sum", "mean", lambda loss, rows: loss / 5, compiled=graph)
        assert taken("sum", "mean", lambda loss, rows: loss / rows, compiled=graph) == 6
        assert taken("sum", "sum", compiled=graph) == 6


class Called(nn.Module):
    """Takes what people hand to a forward beside the batch."""

    def __init__(self):
        super().__init__()
        self.net = chain(nn.ReLU())

    def forward(self, x, scale=1.0, count=1, extra=None):
        return self.net(x) * scale * count


class TestTheArguments:
    def test_are_carried_as_they_were(self):
        a, b = torch.zeros(2), torch.ones(3)
        args, kwargs = (a, None, True, 3, [b, {"x": (1.5, "mlm")}], ()), {"labels": b, "return_dict": False, "k": -1}
        call = Carried(args, kwargs)
        found = read(call.form, call.tensors, call.ints, call.floats)
        assert str(found) == str((args, kwargs)) and found[0][0] is a and found[1]["labels"] is b and not call.refused

    def test_numbers_that_change_make_no_graph_anew(self):
        def graphs(*counts):
            made = []
            torch.compiler.reset()
            optimizer, loader = make(model := Called())
            net = torch.compile(model, fullgraph=True, backend=lambda g, _: made.append(g) or g.forward)
            for count in counts:
                step(partial(net, count=count), optimizer, loader)
            return len(made)

        assert graphs(*range(2, 10)) <= graphs(2, 3, 4, 3)

    @pytest.mark.parametrize("check", [True, "loss"])
    def test_what_cannot_be_carried_is_refused(self, check):
        optimizer, loader = make(model := Called(), check=check)
        net = graph(model)
        given = SimpleNamespace(a=1)
        if check is True:
            with pytest.raises(ValueError, match="was given a SimpleNamespace, which cannot be handed to the check"):
                step(partial(net, extra=given), optimizer, loader)
        else:
            step(partial(net, extra=given), optimizer, loader)

    @pytest.mark.parametrize("check", [True, "loss", False])
    def test_an_input_that_something_trainable_computes_is_refused(self, check):
        optimizer, loader = make(model := Called(), check=check)
        outside, net = nn.Linear(6, 6), graph(model)
        with pytest.raises(ValueError, match="an input of the compiled model requires a gradient"):
            step(lambda x: net(outside(x)), optimizer, loader)


def parameters_after(make_graph):
    """Of four steps; ``make_graph`` is called with a function that makes a model private."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(40, 6), torch.randint(0, 3, (40,)))
    model = chain(nn.ReLU())

    def private(model):
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        found.extend(
            lk.make_private(
                model, sgd, DataLoader(data, batch_size=8), noise_multiplier=1.0, noise=lk.NoiseSource.fixed(KEY)
            )
        )
        return model

    found: list = []
    step(make_graph(model, private), *found, steps=4)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_model_that_was_compiled_before_takes_the_same_steps_and_its_copies_are_not_compiled():
    graphs = []

    def backend(g, inputs):
        graphs.append([t.dtype for t in inputs if isinstance(t, torch.Tensor) and t.is_floating_point()])
        return g.forward

    before = parameters_after(lambda model, private: private(torch.compile(model, backend=backend)))
    assert graphs and all(t is torch.float32 for dtypes in graphs for t in dtypes)
    plain = parameters_after(lambda model, private: private(model))
    assert float((before - plain).norm() / plain.norm()) < COMPILED_F32


def test_positions_that_come_first_are_found():
    """By the first batch's check, before the backward of a graph that was made without it."""

    def trained(compiled):
        torch.manual_seed(0)
        model = Turned()
        ids, target = torch.randint(0, 9, (6, 5)), torch.randint(0, 3, (6,))
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        optimizer, loader = lk.make_private(
            model, sgd, DataLoader(TensorDataset(ids, target), batch_size=6), noise_multiplier=0.0, sample_rate=1.0,
            max_grad_norm=0.1,
        )  # fmt: skip
        net = graph(model) if compiled else model
        step(net, optimizer, loader, steps=2)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    eager, traced = trained(False), trained(True)
    assert float((eager - traced).norm() / eager.norm()) < COMPILED_F32


def test_checks_of_two_threads_leave_the_compiler_as_it_was():
    """Each would put back what it found: the second one what the first had set."""
    entered, left = Barrier(2), Event()

    @eagerly
    def first():
        entered.wait(10)

    @eagerly
    def second():
        entered.wait(10)
        left.wait(10)

    threads = [Thread(target=first), Thread(target=second)]
    for thread in threads:
        thread.start()
    threads[0].join()
    left.set()
    threads[1].join()
    graphs = []
    torch.compile(lambda x: x + 1, backend=lambda g, _: graphs.append(g) or g.forward)(torch.ones(2))
    assert graphs

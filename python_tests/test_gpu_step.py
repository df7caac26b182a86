"""What makes a step cheap on a card, shown without one: nothing waits for the device, and a graph can replay it."""

import contextlib
import warnings
from types import SimpleNamespace

import emulated
import pytest
import torch
from cases import F32
from tolerances import PRIVATE_STEP_F64
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lalora_kernels import cuda, dispatch, segments
from lalora_kernels.adapt import adapt
from lalora_kernels.nn import lora_layers
from lalora_kernels.privacy import graphs, reduction
from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.privacy.nonfinite import NonfiniteCount

KEY = bytes(range(32))
# What copies to the host or from it, or whose result's size only the device knows.
WAITS = {
    "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "_unique2", "unique_dim", "masked_select",
    "unique_consecutive", "index", "index_put", "index_put_", "_index_put_impl_", "lift_fresh", "lift_fresh_copy",
    "_pin_memory", "repeat_interleave", "bincount",
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Raises at every operation that would make the host wait, were the tensors on a card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in WAITS or (name == "_to_copy" and (kwargs or {}).get("device") is not None):
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Stands in for a CUDA graph: replays the same operations on the same memory, and nothing of Python's."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Words(nn.Module):
    """Every kind of recorder: an embedding, an adapted layer, a norm, a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 5)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.norm(self.fc(self.embed(ids)))).mean(1))


def words(dtype=torch.float64, **kwargs):
    """(model, private optimizer, loader of 12 records, backward)."""
    torch.manual_seed(0)
    model = adapt(
        Words(), r=2, target_modules=["fc"], modules_to_save=["embed", "norm", "head"], verbose=False
    ).to(dtype)  # fmt: skip
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    data = TensorDataset(torch.randint(0, 11, (12, 4)), torch.randint(0, 3, (12,)))
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    kwargs = {"noise_multiplier": 0.5, "max_grad_norm": 0.3, "sample_rate": 0.6, **kwargs}
    kwargs.setdefault("noise", NoiseSource.fixed(KEY))
    private = make_private(model, sgd, DataLoader(data, batch_size=6), **kwargs)
    return model, *private, lambda x, y: nn.functional.cross_entropy(model(x), y).backward()


@pytest.fixture
def emulated_release(monkeypatch):
    """Every operation that csrc/cuda has on the emulated machine, through the launcher that a card has."""
    monkeypatch.setattr(cuda, "_module", emulated.load(emulated.build()))
    monkeypatch.setattr(cuda, "_plans", {})
    module, _, dtypes = dispatch.BACKENDS["cuda"]
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", (module, ("cuda", "cpu"), dtypes))
    here = ("sample_grad_clip", "clip_reduce", "privatize")

    def choose(device, dtype, backend=None, op=""):
        return backend or ("cuda" if op in here else "reference")

    monkeypatch.setattr(dispatch, "choose", choose)


def host_reads(monkeypatch):
    def refuse(*_):
        raise AssertionError("the host reads a tensor")

    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)


@pytest.mark.parametrize("physical", [None, 4])
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("kernels", ["reference", "cuda"])
def test_nothing_in_a_step_waits_for_the_device(kernels, clipping, physical, monkeypatch, request):
    if kernels == "cuda":
        request.getfixturevalue("emulated_release")
    monkeypatch.setattr(NonfiniteCount, "_say", lambda *_: None)  # on a CPU it tells at once
    monkeypatch.setattr(NonfiniteCount, "add", lambda self, bad: setattr(self, "total", self.total + bad))
    backend = "reference" if kernels == "reference" else None
    _, optimizer, loader, backward = words(
        F32, clipping=clipping, physical_batch_size=physical, backend=backend, sample_rate=1.0, check=False
    )
    begin, watched = loader.on_batch, 0

    @contextlib.contextmanager
    def watching():
        """Once the workspace has its size for either factor, and the tables of addresses are built."""
        if optimizer.local_step <= 4:
            yield
            return
        with monkeypatch.context() as patch, NoWaiting():
            host_reads(patch)
            yield

    def watched_begin(batch):
        with watching():
            begin(batch)

    loader.on_batch = watched_begin
    for x, y in loader.steps(6):
        watched += optimizer.local_step > 4
        with watching():
            backward(x, y)
            optimizer.step()
        optimizer.zero_grad()
    assert watched >= 2 and optimizer._versions_count


def test_tables_do_not_depend_on_the_size_of_a_batch(emulated_release, monkeypatch):
    """A Poisson batch has another size every time; a table for each would cost more than the release."""
    build, built = segments._build, []
    monkeypatch.setattr(segments, "_build", lambda *args: built.append(args) or build(*args))
    monkeypatch.setattr(segments, "_tables", segments.OrderedDict())
    _, optimizer, loader, backward = words(F32, check=False, sample_rate=1.0)
    sizes = set()
    for rate in (1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.4, 0.6, 0.7, 0.3):
        loader.batch_sampler._sample_rate = rate
        for x, y in loader.steps(1):
            sizes.add(len(x))
            backward(x, y)
            optimizer.step()
            optimizer.zero_grad()
    assert len(sizes) > 3 and len(built) <= 4


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t[0] > 0),
        lambda t: t[[0, 1]],
        lambda t: t[t > 0],
        lambda t: torch.tensor([1.0, 2.0]),
        lambda t: t.unique(),
        lambda t: t.to("meta"),
    ],
)
def test_waiting_is_seen(wait):
    with pytest.raises(AssertionError, match="makes the host wait"), NoWaiting():
        wait(torch.randn(4))


@pytest.fixture
def tapes(monkeypatch):
    """Tapes in place of CUDA graphs; the list of those that were recorded."""
    made = []

    def record(backward, pool, device):
        made.append(Tape())
        with made[-1]:
            backward()
        return made[-1].replay, pool

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "warm_up", lambda backward, device: backward())
    return made


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("check", [True, False])
def test_a_replayed_step_is_the_ordinary_one(tapes, check, clipping, monkeypatch):
    """Of batches of many sizes, filled up to one; one graph for each factor."""
    monkeypatch.setattr(reduction, "WATCH", 0)  # the batches that the loss's check looks at are not replayed
    results = []
    for graphed in (False, True):
        model, optimizer, loader, backward = words(check=check, clipping=clipping, physical_batch_size=5)
        run, releases = optimizer.graph(backward, rows=5) if graphed else backward, []
        for x, y in loader.steps(8):
            run(x, y)
            optimizer.step()
            releases += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.zero_grad()
        results.append([*releases, *model.parameters()])
    assert len(tapes) == 2
    assert len(results[0]) == len(results[1])
    for plain, replayed in zip(*results, strict=True):
        torch.testing.assert_close(replayed, plain, **PRIVATE_STEP_F64)


@pytest.mark.parametrize("change", [
    lambda model: setattr(model, "norm", nn.Sequential(model.norm, nn.SiLU())),  # nothing of it trains
    lambda model: model.eval(),  # without the dropout of the rest
], ids=["module", "mode"])  # fmt: skip
def test_a_changed_model_is_captured_anew(tapes, change):
    """The graph that was captured before would go on with the old one."""
    results = []
    for graphed in (False, True):
        model, optimizer, loader, backward = words(sample_rate=1.0, check=False)
        model.fc = nn.Sequential(model.fc, nn.Dropout(1.0))  # of 1, so that no chance decides
        run = optimizer.graph(backward, rows=12) if graphed else backward
        for i, (x, y) in enumerate(loader.steps(8)):
            run(x, y)
            optimizer.step()
            if i == 3:
                change(model)
        results.append(list(model.parameters()))
    assert len(tapes) == 4  # two factors, twice
    for plain, replayed in zip(*results, strict=True):
        torch.testing.assert_close(replayed, plain, **PRIVATE_STEP_F64)


def test_a_layer_put_in_after_the_capture_is_checked(tapes):
    class BatchMean(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    model, optimizer, loader, backward = words(sample_rate=1.0)
    graphed = optimizer.graph(backward, rows=12)
    for i, (x, y) in enumerate(loader.steps(6)):
        if i == 5:
            with pytest.raises(ValueError, match="the output for one record depends on the other records"):
                graphed(x, y)
            break
        graphed(x, y)
        optimizer.step()
        if i == 4:
            model.norm = nn.Sequential(model.norm, BatchMean())


def test_graphs_refuse_what_they_cannot_hold(tapes):
    _, optimizer, loader, backward = words(clipping="per_layer")
    with pytest.raises(ValueError, match="per_layer"):
        optimizer.graph(backward, rows=5)
    _, optimizer, loader, backward = words(sample_rate=1.0)
    with pytest.raises(ValueError, match="rows is a whole number"):
        optimizer.graph(backward, rows=0)
    graphed = optimizer.graph(backward, rows=5)
    with pytest.raises(RuntimeError, match="outside a batch"):
        graphed(torch.zeros(5, 4, dtype=torch.long), torch.zeros(5, dtype=torch.long))
    x, y = next(iter(loader.steps(1)))
    with pytest.raises(ValueError, match="physical_batch_size=5"):
        graphed(x, y)
    with pytest.raises(ValueError, match=r"shapes \[\(3,\)\]"):
        optimizer.graph(backward, rows=12)(x, y[:3])


def test_a_replay_after_a_seed_of_the_loop_is_refused_though_it_calls_no_forward(tapes):
    _, optimizer, loader, backward = words(sample_rate=1.0, check=False, noise=NoiseSource())
    graphed = optimizer.graph(backward, rows=12)
    for i, (x, y) in enumerate(loader.steps(5)):
        if i == 4:
            torch.manual_seed(1)
            with pytest.raises(RuntimeError, match="seeded between the loader's batch"):
                graphed(x, y)
        else:
            graphed(x, y)
            optimizer.step()
    assert len(tapes) == 2  # one for each factor, so the last one would have been a replay


class Cards:
    """torch.cuda of two cards, as far as graphs.py calls it: what each call found current is noted."""

    class Stream(SimpleNamespace):
        def wait_stream(self, other):
            assert self.device == other.device, "streams of two cards"

    def __init__(self, monkeypatch):
        self.current, self.at, self.captured, self.replayed = 0, None, [], []
        for name in ("device", "stream", "current_stream", "graph", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)

    def new_stream(self, device=None):
        return self.Stream(device=self.current if device is None else torch.device(device).index)

    @contextlib.contextmanager
    def device(self, d):
        before, self.current = self.current, torch.device(d).index
        yield
        self.current = before

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.at = self.at, stream
        with self.device(f"cuda:{stream.device}"):
            yield
        self.at = before

    def current_stream(self, device=None):
        return self.new_stream(device)

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None):
        self.captured.append((self.current, stream))
        with self.stream(stream or self.Stream(device=0)):
            yield

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.replayed.append(self.current), pool=lambda: "pool")


def test_a_graph_is_captured_and_replayed_on_the_models_card(monkeypatch):
    """Captured on another card it would be empty, and each replay would release the first batch's gradients again."""
    cards, ran, device = Cards(monkeypatch), [], torch.device("cuda", 1)
    graphs.capture_stream.cache_clear()
    graphs.warm_up(lambda: ran.append(cards.at), device)
    for _ in range(2):
        replay, pool = graphs.record(lambda: ran.append(cards.at), None, device)
    replay()
    assert [stream.device for stream in ran] == [1, 1, 1] and cards.replayed == [1] and pool == "pool"
    assert [current for current, _ in cards.captured] == [1, 1]
    assert cards.captured[0][1] is cards.captured[1][1], "a pool is shared by captures of one stream"
    assert cards.current == 0
    graphs.capture_stream.cache_clear()


def test_a_model_on_two_devices_has_no_graph(tapes):
    _, optimizer, loader, backward = words(sample_rate=1.0, check=False)
    x, y = next(iter(loader.steps(1)))
    optimizer.engine.sites[-1].param = nn.Parameter(torch.empty(1, device="meta"))
    with pytest.raises(ValueError, match=r"optimizer.graph\(\) takes a model on one device.*cpu, meta"):
        optimizer.graph(backward, rows=12)(x, y)


def test_a_graph_of_ones_own_is_refused(monkeypatch):
    """A replay that the engine does not see would leave it with the gradients of another batch."""
    model, optimizer, loader, backward = words(check=False, sample_rate=1.0)
    x, y = next(iter(loader.steps(1)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(RuntimeError, match="optimizer.graph"):
        optimizer.engine.mark(optimizer.engine.active[0])


class OnCard(torch.Tensor):
    """A CPU tensor that says it were on a card."""

    device = torch.device("cuda")


def test_records_that_are_not_finite_are_told_later_without_waiting(monkeypatch):
    arrived, real = [False], torch.zeros

    class Event:
        def record(self):
            pass

        def query(self):
            return arrived[0]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: real(*a, **k))
    count = NonfiniteCount()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bad in (0, 2, 3):
            count.add(torch.tensor(bad).as_subclass(OnCard))  # the copy holds 0: the others came while it was away
        arrived[0] = True
        count.add(torch.tensor(0).as_subclass(OnCard))
    with pytest.warns(UserWarning, match=r"5 record\(s\)"):
        count.add(torch.tensor(1).as_subclass(OnCard))
    with pytest.warns(UserWarning, match=r"1 record\(s\)"):
        count.add(torch.tensor(0).as_subclass(OnCard))
    assert int(count.total) == 6


def test_what_a_graph_does_not_record_is_refused(monkeypatch):
    """Its replays would release the gradients of the batch that was captured, again and again."""
    _, optimizer, loader, _ = words(check=False, sample_rate=1.0)
    next(iter(loader.steps(1)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    optimizer.engine.graphing = True
    with pytest.raises(RuntimeError, match="outside of the graph that optimizer.graph"):
        optimizer.engine.mark(optimizer.engine.active[0])

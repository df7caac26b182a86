"""physical_batch_size="auto": the largest physical batch whose step fits the budget, and the same result."""

import sys

import pytest
import torch
from models import adapted
from tolerances import SPLIT_F32
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lalora_kernels.adapt import adapt
from lalora_kernels.nn import LoRALinear
from lalora_kernels.privacy import microbatch
from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.schedule import Schedule

KEY = bytes(range(32))
WIDTH, RECORDS = 64, 24


def network(dropout: float = 0.0):
    """Large enough a record that memory is its activations: 64 positions of 64 features in four layers."""
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout), nn.GELU())]
    return adapt(nn.Sequential(*layers, nn.Linear(WIDTH, 3)), r=4, target_modules="all-linear", verbose=False)


def private(model, physical="auto", method="la-lora", **kwargs):
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(RECORDS, 64, WIDTH), torch.randint(0, 3, (RECORDS, 64)))
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    return make_private(
        model, sgd, DataLoader(data, batch_size=RECORDS), method=method, noise_multiplier=0.5, sample_rate=1.0,
        physical_batch_size=physical, noise=NoiseSource.fixed(KEY), **kwargs,
    )  # fmt: skip


def step(model, optimizer, batch) -> None:
    x, y = batch
    nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(model, optimizer, loader, steps: int) -> list[int]:
    """The sizes of the physical batches."""
    sizes = []
    for batch in loader.steps(steps):
        sizes.append(len(batch[0]))
        step(model, optimizer, batch)
    return sizes


def peak_of(physical: int) -> int:
    """What the step that takes most allocates, at a physical batch size given as a number."""
    most = 0
    for factors in "BA":
        model = network()
        optimizer, loader = private(model, physical, Schedule("one", lambda r, s, f=factors: f), check=False)
        loader.batch_sampler.source.words(1)  # thousands of draws ahead, which are not the step's
        batches = iter(loader.steps(1))

        def whole(model=model, optimizer=optimizer, batches=batches):
            for batch in batches:
                step(model, optimizer, batch)

        most = max(most, microbatch.peak_bytes(whole, torch.device("cpu")))
    return most


def test_what_was_held_before_and_is_freed_meanwhile_does_not_count():
    """torch keeps the sizes that it saw in an earlier measurement, and tells them of what came to lie there since."""
    device, held = torch.device("cpu"), []

    def freed_and_taken():
        held.clear()
        held.append(torch.empty(10))

    for elements in range(30_000, 30_040):
        microbatch.peak_bytes(lambda: held.append(torch.empty(elements)), device)  # noqa: B023
        held.clear()
        held.append(torch.empty(elements))  # often at the same address
        assert microbatch.peak_bytes(freed_and_taken, device) == 40
        held.clear()


def test_the_largest_that_fits():
    """By what ordinary steps at fixed sizes allocate, measured here."""
    peaks = {n: peak_of(n) for n in (4, 5, 6, 7, 8)}
    for n in (5, 6, 7):
        budget = (peaks[n] + peaks[n + 1]) / 2
        model = network()
        optimizer, loader = private(model, memory_budget=budget, check=False)
        sizes = train(model, optimizer, loader, 2)
        assert loader.physical_batch_size == n
        assert sizes[0] == 1 and set(sizes[1:-1]) <= {n, (RECORDS - 1) % n, RECORDS % n}


def test_it_is_the_step_of_any_other_size():
    results = []
    for physical, budget in ((None, None), ("auto", peak_of(4)), ("auto", None)):
        model = network()
        optimizer, loader = private(model, physical, memory_budget=budget)
        train(model, optimizer, loader, 4)
        assert loader.physical_batch_size is None if physical is None else loader.physical_batch_size >= 3
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    assert (results[0] - start).norm() > 0.1
    for other in results[1:]:
        assert (other - results[0]).norm() <= SPLIT_F32 * (results[0] - start).norm()


def test_measuring_leaves_no_trace():
    """Random numbers, buffers, gradients, what trains and the ledger are as they were."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x

    drawn, a_first = [], Schedule("A first", lambda r, s: "A" if s % 2 else "B")
    for physical in ("auto", 1):
        model = network(dropout=0.5)
        model.append(Counting())
        optimizer, loader = private(model, physical, a_first, check=False)
        (x, y) = next(iter(loader.steps(1)))
        torch.manual_seed(3)
        drawn.append(model(x).detach())
        assert model[-1].calls == 1 and optimizer.ledger.steps == 0
        assert [p.requires_grad for p in (model[0].lora_A, model[0].lora_B)] == [True, False]
        assert all(p.grad is None for p in model.parameters())
        assert all(m.recorder.engine is optimizer.engine for m in model.modules() if isinstance(m, LoRALinear))
    assert torch.equal(*drawn)


def test_a_forward_that_was_replaced_by_a_function_is_measured_on_the_copy():
    """As TRL's SFTTrainer does; run on the model itself it would be recorded into the batch."""
    results = []
    for replaced in (False, True):
        model = network()
        if replaced:
            model.forward = lambda x, forward=model.forward: forward(x)
        optimizer, loader = private(model, memory_budget=peak_of(4))
        train(model, optimizer, loader, 2)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


def test_every_factor_that_trains_is_measured():
    """With A active a layer keeps what a norm made: a size that fits B's steps alone would be too large."""
    sizes = {}
    for method in ("ffa-lora", "la-lora", "dp-lora"):
        torch.manual_seed(0)
        layers = [m for _ in range(6) for m in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))]
        model = adapt(nn.Sequential(*layers, nn.Linear(WIDTH, 3)), r=2, target_modules="all-linear", verbose=False)
        optimizer, loader = private(model, method=method, memory_budget=2_000_000)
        train(model, optimizer, loader, 1)
        sizes[method] = loader.physical_batch_size
    assert sizes["dp-lora"] <= sizes["la-lora"] + 1 and 1.2 * sizes["la-lora"] < sizes["ffa-lora"]


def test_one_record_that_does_not_fit():
    model = network()
    optimizer, loader = private(model, memory_budget=10_000)
    with pytest.raises(RuntimeError, match=r"one record takes 0.\d MB.*budget of 0.0 MB; raise memory_budget"):
        train(model, optimizer, loader, 1)
    assert optimizer.ledger.steps == 0


def test_a_family_with_dictionaries_and_masks():
    torch.manual_seed(0)
    model, batch, loss = adapted("bert", n=12, dtype=torch.float32)
    data = [{k: v[i] for k, v in batch.items()} for i in range(12)]
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    optimizer, loader = make_private(
        model, sgd, DataLoader(data, batch_size=12), noise_multiplier=0.5, sample_rate=1.0, physical_batch_size="auto"
    )
    sizes = []
    for part in loader.steps(2):
        sizes.append(len(part["labels"]))
        loss(model, part).backward()
        optimizer.step()
    assert sizes == [1, 11, 12] and optimizer.per_sample_checked


def test_what_is_refused():
    with pytest.raises(ValueError, match="memory_budget is a finite number > 0"):
        private(network(), memory_budget=0)
    with pytest.raises(ValueError, match="goes by; give both"):
        private(network(), physical=4, memory_budget=1e6)
    with pytest.raises(ValueError, match="physical_batch_size is a whole number"):
        private(network(), physical="largest")
    model = network()
    optimizer, loader = private(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="was not called or is compiled; give it a number"):
        for batch in loader.steps(1):
            step(compiled, optimizer, batch)


def test_free_memory(tmp_path, monkeypatch):
    """What /proc says, or a container's smaller limit, without the cache that would be dropped."""
    files = {
        "/proc/meminfo": ["MemTotal: 9000 kB", "MemAvailable: 4000 kB"],
        "/sys/fs/cgroup/memory.max": ["3000000"],
        "/sys/fs/cgroup/memory.current": ["2000000"],
        "/sys/fs/cgroup/memory.stat": ["anon 5", "inactive_file 250000"],
    }
    monkeypatch.setattr(microbatch, "_lines", lambda path: files.get(path, []))
    cpu = torch.device("cpu")
    assert microbatch.free_bytes(cpu) == 1_250_000
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert microbatch.free_bytes(cpu) == 4_096_000
    files.clear()
    with pytest.raises(RuntimeError, match="give memory_budget"):
        microbatch.free_bytes(cpu)
    monkeypatch.undo()
    if sys.platform == "linux":
        assert 1 << 20 < microbatch.free_bytes(cpu) < 1 << 50

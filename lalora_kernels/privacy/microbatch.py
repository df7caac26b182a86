"""``physical_batch_size="auto"``: the largest physical batch whose step fits a memory budget.

At the model's first private forward, steps of one, two and three placeholder records are taken on a copy of the model
that shares its parameters, and their peaks of memory noted; from two on the peak is linear in the records, since
activations and per-sample gradients have a row for each (of a single record some views need no copy). The first
physical batch holds one record, so that nothing large is tried before. A logical batch is only split: noise, ledger and
result are those of any other physical size.
"""

import copy
import gc
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_kernels.nn import set_active
from lalora_kernels.privacy.engine import Engine
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.privacy.sampling import BatchInfo, PoissonBatchSampler
from lalora_kernels.privacy.trees import leaves, tree_map
from lalora_kernels.privacy.twin import rebind
from lalora_kernels.schedule import Schedule

CGROUPS = (  # of a container, versions 2 and 1: its limit, its usage, and what of that is cache to be dropped
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
SHARE = 0.5  # of the memory that is free at the first step, where no budget is given


class AutoBatch:
    """Measures once, then sets the sampler's ``physical_batch_size``.

    Args:
        sampler: of the private loader; starts at one record a physical batch.
        budget: bytes that a step may take above model and optimizer; None: SHARE of what is free.
        schedule: of the factors that it trains in turn, the set that takes most counts.
    """

    def __init__(self, sampler: PoissonBatchSampler, budget: float | None, schedule: Schedule):
        self.sampler, self.budget = sampler, budget
        self.factors = sorted({schedule.active(r, s) for r in range(1, 5) for s in range(1, 65)})

    def measure(self, engine: Engine, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """From a forward's arguments, whose first record stands for all. Raises RuntimeError where one does not fit."""
        device = engine.sites[0].param.device
        budget = SHARE * free_bytes(device) if self.budget is None else self.budget
        size = sys.maxsize
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            for factors in self.factors:
                one, two, three = self._peaks(engine, model, args, kwargs, factors, device)
                if one > budget:
                    raise RuntimeError(
                        f"a step of one record takes {one / 1e6:,.1f} MB, more than the memory budget of "
                        f"{budget / 1e6:,.1f} MB; raise memory_budget, free memory, or train fewer layers"
                    )
                if three > two:
                    size = min(size, 2 + math.floor((budget - two) / (three - two)) if two <= budget else 1)
        self.sampler.physical_batch_size = size

    def _peaks(
        self, engine: Engine, model: nn.Module, args: tuple, kwargs: dict, factors: str, device: torch.device
    ) -> tuple[int, int, int]:
        memo: dict[int, Any] = {id(p): p for p in model.parameters()}
        twin = copy.deepcopy(model, memo)
        rebind(model, twin, memo)
        other = Engine(
            twin,
            clipping=engine.clipping,
            max_grad_norm=engine.max_grad_norm,
            noise_std=0.0,
            noise=NoiseSource(),
            divisor=1.0,
            smoothing=engine.smoothing,
            loss_reduction="sum",
            charge=lambda: None,  # nothing leaves this function
            backend=engine.backend,
        )
        try:
            set_active(twin, factors)

            def steps(rows: int) -> Callable[[], None]:
                return lambda: _two_physical_batches(other, twin, args, kwargs, rows)

            steps(1)()  # libraries' own buffers, which are there from then on
            peaks = []
            for rows in (1, 2, 3):
                other._buffers.clear()
                peaks.append(peak_bytes(steps(rows), device))
            return peaks[0], peaks[1], peaks[2]
        finally:
            other.detach()  # what trains is again what trained before


def _two_physical_batches(engine: Engine, model: nn.Module, args: tuple, kwargs: dict, rows: int) -> None:
    """One logical batch in two parts, as it is when it is split: with the running sum and the released gradient."""
    for first in (True, False):
        engine.begin(BatchInfo(rows=rows, valid=rows, first=first, last=not first))
        # The first record, ``rows`` times.
        inputs = tree_map(lambda t: torch.cat([t[:1].detach()] * rows) if t.dim() else t, (args, kwargs))
        _stand_in(model(*inputs[0], **inputs[1])).backward()
        engine.finish()
    for site in engine.sites:
        site.param.grad = site.released = site.S = None  # or the next one would free it, which counts for less


def _stand_in(outputs: Any) -> Tensor:
    """A scalar that keeps what a cross-entropy along the last axis of each output keeps."""
    terms = [F.log_softmax(t, -1).sum() if t.dim() else t for t in leaves(outputs) if t.requires_grad]
    return torch.stack(terms).sum()


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most that ``run`` holds at once of ``device``'s memory, above what is held before, by torch's allocations."""
    gc.collect()  # what is freed meanwhile, but was held before, would count against it
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if torch.autograd.profiler._is_profiler_enabled:
        raise RuntimeError('physical_batch_size="auto" measures with torch\'s profiler, which is in use; give a number')
    # It reports every start on stderr, but where this is set when it first starts.
    quiet = "KINETO_LOG_LEVEL" not in os.environ
    try:
        if quiet:
            os.environ["KINETO_LOG_LEVEL"] = "6"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
    finally:
        if quiet:
            del os.environ["KINETO_LOG_LEVEL"]
    level = peak = 0
    held: dict[int, int] = {}  # address -> bytes
    for _, address, size in sorted(_allocations(profiled.profiler.kineto_results.experimental_event_tree())):
        # What is freed may have been there before: torch then tells the size of what it last saw at that address.
        level += size if size > 0 else -held.pop(address, 0)
        if size > 0:
            held[address] = size
        peak = max(peak, level)
    return peak


def _allocations(events: list) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of each block taken, and freed with bytes < 0, in these profiled events and below them."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            block = event.extra_fields
            yield event.start_time_ns, block.ptr, block.alloc_size


def free_bytes(device: torch.device) -> int:
    """What this process could still take, its container's limit included. Raises RuntimeError where nothing tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found = [1024 * n for key, n in _fields("/proc/meminfo") if key == "MemAvailable:"]
    for folder, limit, usage, cache in CGROUPS:
        most, now = _lines(f"{folder}/{limit}"), _lines(f"{folder}/{usage}")
        if most and now and most[0].isdigit():
            found.append(int(most[0]) - int(now[0]) + sum(n for k, n in _fields(f"{folder}/memory.stat") if k == cache))
    if not found:
        raise RuntimeError("this system does not tell how much memory is free; give memory_budget, in bytes")
    return max(min(found), 0)


def _fields(path: str) -> list[tuple[str, int]]:
    words = [line.split() for line in _lines(path)]
    return [(w[0], int(w[1])) for w in words if len(w) > 1 and w[1].isdigit()]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

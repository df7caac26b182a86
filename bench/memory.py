"""The memory of one contender's step, in a process of its own: ``python memory.py MODEL TARGETS R CONTENDER``.

Prints JSON, all in bytes above what the process holds with model and optimizer built:
``rss``     peak resident memory over two steps (the first in this process);
``peak``    peak of torch's own allocations over two steps of a contender that has taken none;
``forward`` torch's allocations where the first backward begins: what the forward kept, the batch included.
``model``   bytes of parameters and buffers.
"""

import ctypes
import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from contenders import BACKWARD, CONTENDERS, Contender, LaLora
from torch.profiler import ProfilerActivity, profile
from zoo import Spec

OURS = {"ours": "BA", "ours, B active": "B", "ours, A active": "A"}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def make(spec: Spec, name: str) -> Contender:
    return LaLora(spec, factors=OURS[name]) if name in OURS else CONTENDERS[name](spec)


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.M).group(1))


def peak_resident(run: Callable[[], object]) -> int | None:
    """Peak resident memory of ``run`` above what is resident before it; None where the system does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")  # the peak becomes what is resident now
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def allocations(run: Callable[[], object]) -> tuple[int, int | None]:
    """(peak of torch's CPU allocations in ``run``, their level at its first mark ``BACKWARD``), above the start."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    marks = [e.start_ns() for e in events if e.name() == BACKWARD]
    level = peak = 0
    at_mark = None
    for when, change in changes:
        if marks and at_mark is None and when >= min(marks):
            at_mark = level
        level += change
        peak = max(peak, level)
    return peak, at_mark


def main(model: str, targets: str, r: str, name: str) -> dict:
    spec = Spec(model, targets, int(r))
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # the libraries' threads and buffers are not the step's

    def steps(contender: Contender) -> Callable[[], None]:
        return lambda: (contender.step(), contender.step())

    contender = make(spec, name)
    held = sum(t.numel() * t.element_size() for t in (*contender.model.parameters(), *contender.model.buffers()))
    rss = peak_resident(steps(contender))
    del contender
    peak, forward = allocations(steps(make(spec, name)))
    return {"model": held, "rss": rss, "peak": peak, "forward": forward}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))

"""What every benchmark stands on: checks first, then all contenders of a case timed in turn, round by round."""

import gc
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
MIN_SECONDS = 0.02  # a call shorter than this is repeated within a round, until the clock's and the loop's share is nil
GEMM = 1536  # side of the square product that measures the machine's rate
LOAD_AT_START = os.getloadavg()
LIBRARIES = ("torch", "opacus", "peft", "transformers", "numpy")


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, in float64; infinite where got is not finite."""
    want = want.double()
    error = float((got.double() - want).norm() / want.norm().clamp(min=1e-300))
    return error if math.isfinite(error) else math.inf


class Race:
    """One case. ``check`` every contender, then ``run``; ``record`` is what the report is made of.

    A round times each contender once, one after the other, so that whatever else the machine does hits all of them; a
    figure is the median over rounds of the ratio within a round.
    """

    def __init__(self, benchmark, rounds: int, name: str, group: str):
        self.benchmark, self.rounds = benchmark, rounds
        self.record: dict = {"name": name, "group": group, "facts": {}, "checks": {}, "seconds": {}, "failed": None}
        benchmark.group = group
        benchmark.extra_info = self.record

    def facts(self, **facts) -> None:
        """What the report needs beside the times: shapes, bytes, operations."""
        self.record["facts"].update(facts)

    def check(self, contender: str, got: Tensor, want: Tensor, tolerance: float) -> None:
        """Fail the case, untimed, where the contender's result is not the wanted one."""
        error = relative_error(got, want)
        self.record["checks"][contender] = max(error, self.record["checks"].get(contender, 0.0))
        if not error <= tolerance:
            self.fail(f"{contender} is off by {error:.2g}, more than {tolerance:.2g}: not timed")

    def fail(self, why: str) -> None:
        self.record["failed"] = why
        pytest.fail(why, pytrace=False)

    def run(
        self,
        ours: Callable[[], object],
        others: Mapping[str, Callable[[], object]],
        *,
        repeat: bool = True,
        parts: Mapping[str, list[float]] | None = None,
    ) -> None:
        """Time ``ours`` and ``others`` in turn. ``repeat``: short calls are repeated within a round.

        ``parts``: lists to which ``ours`` itself appends the seconds of its parts, one entry a round.
        """
        gc.collect()
        calls = {name: _calls(f) if repeat else 1 for name, f in {"ours": ours, **others}.items()}
        times: dict[str, list[float]] = {name: [] for name in others}
        names = list(others)

        def others_in_turn() -> None:
            names.append(names.pop(0))  # another one goes first in every round
            for name in names:
                times[name].append(_time(others[name], calls[name]))

        for kept in (parts or {}).values():
            kept.clear()
        with torch.no_grad() if repeat else torch.enable_grad():
            self.benchmark.pedantic(
                lambda: _time(ours, calls["ours"]),
                setup=others_in_turn if names else None,
                rounds=self.rounds,
                warmup_rounds=1,
            )
        mine = [t / calls["ours"] for t in self.benchmark.stats.stats.data]
        seconds = {"ours": mine, **{k: v[-self.rounds :] for k, v in {**times, **(parts or {})}.items()}}
        self.record["seconds"] = {k: [float(f"{t:.5g}") for t in v] for k, v in seconds.items()}
        self.record["calls"] = calls["ours"]
        self.record["rounds"] = self.rounds


def _time(f: Callable[[], object], calls: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        f()
    return (time.perf_counter() - start) / calls


def _calls(f: Callable[[], object]) -> int:
    _time(f, 1)
    return max(1, math.ceil(MIN_SECONDS / max(min(_time(f, 1) for _ in range(3)), 1e-6)))


# ---------------------------------------------------------------- the machine's limits, measured beside the contenders


def reading(nbytes: int) -> Callable[[], object]:
    """Reads ``nbytes`` once: torch's sum, the fastest reader of float32 in this library."""
    t = torch.ones(nbytes // 4)
    return lambda: t.sum()


def copying(nbytes: int) -> Callable[[], object]:
    """Reads ``nbytes`` and writes as many."""
    source, target = torch.ones(nbytes // 4), torch.empty(nbytes // 4)
    return lambda: target.copy_(source)


def gemm(dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """2 GEMM^3 operations, large enough for the library's best rate."""
    a, b, c = (torch.ones(GEMM, GEMM, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=c)


# ---------------------------------------------------------------- where it ran


def cpu_name() -> str:
    """The CPU's marketing name, family and model."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", text, re.M))
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def commit() -> dict:
    """What is measured; LALORA_COMMIT where the tree is a copy of that commit, without a history of its own."""
    if named := os.environ.get("LALORA_COMMIT"):
        return {"commit": named, "uncommitted_changes": False}
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""


def _openmp() -> list[str]:
    """OpenMP runtimes in this process: more than one, and their waiting threads disturb each other."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    return sorted({Path(p).name for p in re.findall(r"\S*/(?:libgomp|libomp|libiomp5)\S*", maps.read_text())})


def machine() -> dict:
    """What the figures depend on. No paths and no host name."""
    from lalora_kernels import native

    compiled = native.require()
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": compiled.isa(),
        "compiler": compiled.compiler,
        "openmp": _openmp(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "load_at_start": [round(x, 2) for x in LOAD_AT_START],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in LIBRARIES},
        **commit(),
    }

"""Whole private steps on a card against PEFT's and Opacus': rows of gpu_run.py."""

import gc
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from contenders import Contender, LaLora, OpacusGhost, OpacusHooks, Peft
from gpu_ops import medians, missing, noise_seconds, race, row
from report import Ratio, ratio
from zoo import MODELS, Spec

CASES = [
    Spec(model, targets, 16, batch, "cuda", torch.bfloat16)
    for model, batch in (("roberta-128", 32), ("vit-b", 64), ("swin-b", 32), ("llama-1b", 8))
    for targets in ("qv", "all-linear")
]
TINY = [Spec("tiny-vit", "qv", 4, 3), Spec("tiny-llama", "all-linear", 4, 3)]
ROUND = Spec("swin-b", "qv", 16, 32, "cuda", torch.float32)  # as the paper's: float32
STEPS_A_ROUND = 8
PLAIN = {
    "PEFT": Peft,
    "PEFT, factors in bfloat16": lambda spec: Peft(spec, float32_factors=False),
}
PRIVATE = {"Opacus hooks": OpacusHooks, "Opacus ghost": OpacusGhost}
# Methods that the comparison should have: (module to look for, what stands in the row).
ABSENT = {"fastDP": "fastDP", "FlashDP": "flashdp"}


class Entry:
    """One contender, built, and the peak memory of its steps above what the card held before it was built."""

    def __init__(self, make: Callable[[], Contender], device: str):
        gc.collect()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        self.contender = make()
        self.run = getattr(self.contender, "cycle", self.contender.step)
        self.run()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.run()
            torch.cuda.synchronize()
        self.peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0


def enter(makes: dict[str, Callable[[], Contender]], device: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Those that run, and why the others do not."""
    entries, failures = {}, {}
    a = torch.ones(256, 256, device=device, requires_grad=True)
    (a @ a).sum().backward()  # the libraries' workspaces, of this thread and of backward's, are no contender's
    for name, make in makes.items():
        try:
            entries[name] = Entry(make, device)
        except ImportError as error:
            failures[name] = f"not installed: {error.name}"
        except Exception as error:  # a contender's own failure is a row, not the end of the run
            failures[name] = f"failed: {type(error).__name__}: {str(error)[:120]}"
    return entries, failures


def compare_memory(what: str, case: str, name: str, ours: int, theirs: int, target: float, at_least: bool) -> dict:
    value = Ratio([theirs / max(ours, 1)] if at_least else [ours / max(theirs, 1)])
    return row(what, case, name, value, target, at_least, bytes={"ours": ours, name: theirs})


def step_rows(spec: Spec, backends: dict[str, ModuleType], rounds: int) -> Iterator[dict]:
    case, device = f"{MODELS[spec.model][0]}, {spec.targets}", spec.device
    makes = {name: lambda kind=kind: kind(spec) for name, kind in {**PLAIN, **PRIVATE}.items()}
    entries, failures = enter({"ours": lambda: LaLora(spec), **makes}, device)
    for name, why in failures.items():
        yield missing("step", case, name, why)
    for name, module in ABSENT.items():
        here = importlib.util.find_spec(module) is not None
        yield missing("step", case, name, "installed, but not run: no contender here" if here else "not installed")
    ours = entries.get("ours")
    if ours is None:
        return
    times = race(device, {name: e.run for name, e in entries.items()}, rounds, host=True)
    times["ours"] = [t / len(ours.contender.factors) for t in times["ours"]]  # a cycle: one step of each factor
    facts = {"seconds": medians(times), "batch": spec.batch, "r": spec.r}
    plain = [name for name in PLAIN if name in entries]
    if plain:
        best = min(plain, key=lambda name: statistics.median(times[name]))
        yield row("step", case, best, ratio(times["ours"], times[best]), 1.05, False, **facts)
        small = min(plain, key=lambda name: entries[name].peak)
        floor = entries[small].peak
        yield compare_memory("step memory", case, small, ours.peak, floor, 1.0, False)
    for name in PRIVATE:
        if name in entries:
            yield row("step", case, name, ratio(times[name], times["ours"]), 2.0, True, **facts)
            if plain:  # extra: what privacy adds to PEFT's
                extra = entries[name].peak - floor
                yield compare_memory("extra memory", case, name, max(ours.peak - floor, 0), extra, 3.0, True)
    sites = [s for s in ours.contender.optimizer.engine.sites if not s.name.endswith("lora_A")]
    for name, ops in backends.items():
        noise = noise_seconds(ops, sum(s.param.numel() for s in sites), device, rounds)
        share = Ratio([noise / t for t in times["ours"]])
        yield row("noise", case, "its step", share, 0.02, False, backend=name)


def round_rows(spec: Spec, rounds: int) -> Iterator[dict]:
    """One client's local steps: LA-LoRA here, DP-LoRA (both factors) with Opacus."""
    case, device = f"round of {STEPS_A_ROUND} steps, {MODELS[spec.model][0]}, CIFAR-100's shape, float32", spec.device
    entries, failures = enter({"ours": lambda: LaLora(spec), "Opacus hooks": lambda: OpacusHooks(spec)}, device)
    for name, why in failures.items():
        yield missing("round", case, name, why)
    if failures:
        return

    def round_of(e: Entry) -> Callable[[], None]:
        return lambda: [e.contender.step() for _ in range(STEPS_A_ROUND)]

    times = race(device, {name: round_of(e) for name, e in entries.items()}, rounds, host=True)
    facts = {"seconds": medians(times), "batch": spec.batch}
    yield row("round", case, "Opacus hooks", ratio(times["ours"], times["Opacus hooks"]), 0.5, False, **facts)
    ours, theirs = (entries[name].peak for name in ("ours", "Opacus hooks"))
    yield compare_memory("round memory", case, "Opacus hooks", ours, theirs, 0.5, False)

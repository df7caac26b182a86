"""Whole private steps on a card against PEFT's, Opacus' and two recipes' (recipes.py): rows of gpu_run.py."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import torch
from contender import Contender, plain_name
from contenders import CONTENDERS, LaLora, OpacusHooks, Peft, expected, one_gradient, typical_norm
from gpu_ops import medians, missing, noise_seconds, race, row, why
from harness import relative_error
from report import Ratio, ratio
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import MODELS, Spec, loss_of

CASES = [
    Spec(model, targets, 16, batch, "cuda", torch.bfloat16)
    for targets in ("qv", "all-linear")
    for model, batch in (("roberta-128", 32), ("llama-1b", 8), ("swin-b", 32), ("vit-b", 64))
]
TINY = [Spec("tiny-vit", "qv", 4, 3), Spec("tiny-llama", "all-linear", 4, 3), Spec("tiny-swin", "all-linear", 4, 3)]
TOLERANCE = 1e-4  # of the check: float32
ROUND = Spec("swin-b", "qv", 16, 32, "cuda", torch.float32)  # as the paper's: float32
STEPS_A_ROUND = 8
CASE_SECONDS = 9  # of timing a case; at least 3 rounds
GRAPHED = "ours, graph"
# While a graph is captured transformers builds a mask also where there is nothing to mask, and with it attention is
# float32's. This order was tried against that; it changes the Llama's alone, and not for the better.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
NOTHING = 1 << 20  # bytes: less counts as this, so that no ratio is with 0
OURS = {"flat": "ours", "per_layer": "ours, per layer"}
PLAIN = {
    "PEFT": Peft,
    "PEFT, factors in bfloat16": lambda spec: Peft(spec, float32_factors=False),
}
PRIVATE = {n: kind for n, kind in CONTENDERS.items() if kind.clipping is not None and n != "torch.func vmap"}


class LaLoraGraphed(LaLora):
    """Forward and backward replayed as a CUDA graph, by ``optimizer.graph``."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.replayed = self.optimizer.graph(lambda x, y: loss_of(self.model(x).logits, y).backward(), spec.batch)

    def step(self) -> None:
        with sdpa_kernel(ATTENTION, set_priority=True):
            self.replayed(*next(self.batches))
        self.optimizer.step()
        self.optimizer.zero_grad()


class PeftGraphed(Peft):
    """The same for ordinary LoRA."""

    def __init__(self, spec: Spec):
        super().__init__(spec, float32_factors=False)
        self.place = [t.clone() for t in next(self.batches)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.backward()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.backward()

    def backward(self) -> None:
        self.sgd.zero_grad()
        with sdpa_kernel(ATTENTION, set_priority=True):
            loss_of(self.model(self.place[0]).logits, self.place[1]).backward()

    def step(self) -> None:
        for place, t in zip(self.place, next(self.batches)):
            place.copy_(t)
        self.graph.replay()
        self.sgd.step()


def one_by_one(spec: Spec) -> dict[str, torch.Tensor]:
    """name -> (N, *shape), each record's gradient of its own loss, from as many backwards of PEFT's model."""
    peft = Peft(spec)
    x, y = next(peft.batches)
    trained = {plain_name(n): p for n, p in peft.model.named_parameters() if p.requires_grad}
    each = []
    for i in range(len(y)):
        loss = loss_of(peft.model(x[i : i + 1]).logits, y[i : i + 1])
        each.append(torch.autograd.grad(loss, list(trained.values())))
    return {n: torch.stack(g) for n, g in zip(trained, zip(*each))}


def wrong(device: str) -> dict[str, str]:
    """Contender -> why it is not timed, of those whose noiseless gradient on small models is not the formula's."""
    found: dict[str, str] = {}
    for tiny in TINY:
        spec = replace(tiny, device=device)
        G = one_by_one(spec)
        clip = typical_norm(G)

        def note(name: str, contender: Contender, want: dict[str, torch.Tensor], spec: Spec = spec) -> None:
            got = one_gradient(contender)
            flat = (torch.cat([g[n].double().flatten() for n in want]) for g in (got, want))
            if not (error := relative_error(*flat)) <= TOLERANCE:
                found.setdefault(name, f"off by {error:.2g} on {spec}: not timed")

        for name, kind in {"PEFT": Peft, **PRIVATE}.items():
            try:
                note(name, kind(spec, noise=0.0, clip=clip), expected(G, clip, clipping=kind.clipping))
            except Exception as error:
                found.setdefault(name, why(error))
        for clipping, name in OURS.items():
            try:
                ours = LaLora(spec, noise=0.0, clip=clip, smoothing=None, clipping=clipping)
                ours.sgd.param_groups[0]["lr"] = 0.0  # so that the second step is taken at the same place
                for frozen in ("lora_A", "lora_B"):  # B comes first
                    note(name, ours, expected(G, clip, lambda n, frozen=frozen: not n.endswith(frozen), clipping))
            except Exception as error:
                found.setdefault(name, why(error))
    return found


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
        start = time.perf_counter()
        self.run()
        if device == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - start
        self.peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0


def enter(makes: dict[str, Callable[[], Contender]], device: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Those that run, and why the others do not."""
    entries, failures = {}, {}
    a = torch.ones(256, 256, device=device, requires_grad=True)
    (a @ a).sum().backward()  # the libraries' workspaces, of this thread and of backward's, are no contender's
    for name, make in makes.items():
        try:
            entries[name] = Entry(make, device)
        except Exception as error:  # a contender's own failure is a row, not the end of the run
            failures[name] = why(error)
    return entries, failures


def compare_memory(what: str, case: str, name: str, ours: int, theirs: int, target: float, at_least: bool) -> dict:
    value = Ratio([theirs / max(ours, NOTHING)] if at_least else [ours / max(theirs, NOTHING)])
    return row(what, case, name, value, target, at_least, bytes={"ours": ours, name: theirs})


def step_rows(
    spec: Spec, backends: dict[str, ModuleType], rounds: int, refused: dict[str, str] | None = None
) -> Iterator[dict]:
    """``refused``: contenders that ``wrong`` found, which are rows without a figure."""
    case, device, refused = f"{MODELS[spec.model][0]}, {spec.targets}", spec.device, refused or {}
    makes = {name: lambda clipping=clipping: LaLora(spec, clipping=clipping) for clipping, name in OURS.items()}
    makes |= {name: lambda kind=kind: kind(spec) for name, kind in {**PLAIN, **PRIVATE}.items()}
    if device == "cuda":
        makes |= {GRAPHED: lambda: LaLoraGraphed(spec), "PEFT, graph": lambda: PeftGraphed(spec)}
    right = {name: make for name, make in makes.items() if name.partition(", factors")[0] not in refused}
    entries, failures = enter(right, device)
    for name, reason in {**refused, **failures}.items():
        yield missing("step", case, name, reason)
    if "ours" not in entries:
        return
    rounds = min(rounds, max(3, int(CASE_SECONDS / sum(e.seconds for e in entries.values()))))
    times = race(device, {name: e.run for name, e in entries.items()}, rounds, host=True)
    for name in (*OURS.values(), GRAPHED):
        if name in entries:  # a cycle: one step of each factor
            times[name] = [t / len(entries[name].contender.factors) for t in times[name]]
    facts = {"seconds": medians(times), "batch": spec.batch, "r": spec.r}
    plain = [name for name in PLAIN if name in entries]
    ours = entries["ours"]
    if plain:
        best = min(plain, key=lambda name: statistics.median(times[name]))
        yield row("step", case, best, ratio(times["ours"], times[best]), 1.05, False, **facts)
        small = min(plain, key=lambda name: entries[name].peak)
        floor = entries[small].peak
        yield compare_memory("step memory", case, small, ours.peak, floor, 1.0, False)
    if GRAPHED in entries and "PEFT, graph" in entries:
        both = ratio(times[GRAPHED], times["PEFT, graph"])
        yield row("step, both as graphs", case, "PEFT, graph", both, 1.05, False, **facts)
    for name, kind in PRIVATE.items():
        mine = OURS[kind.clipping]  # what clips by layers is compared with ours that does
        if name in entries and mine in entries:
            yield row("step", case, name, ratio(times[name], times[mine]), 2.0, True, **facts)
            if GRAPHED in entries and kind.clipping == "flat":
                speed = ratio(times[name], times[GRAPHED])
                yield row("step, ours as a graph", case, name, speed, 2.0, True, **facts)
            if plain:  # extra: what privacy adds to PEFT's
                mine_extra, extra = (max(entries[n].peak - floor, 0) for n in (mine, name))
                yield compare_memory("extra memory", case, name, mine_extra, extra, 3.0, True)
    sites = [s for s in ours.contender.optimizer.engine.sites if not s.name.endswith("lora_A")]
    for name, ops in backends.items():
        noise = noise_seconds(ops, sum(s.param.numel() for s in sites), device, rounds)
        share = Ratio([noise / t for t in times["ours"]])
        yield row("noise", case, "its step", share, 0.02, False, backend=name)


def round_rows(spec: Spec, rounds: int, refused: dict[str, str] | None = None) -> Iterator[dict]:
    """One client's local steps: LA-LoRA here, DP-LoRA (both factors) with Opacus."""
    case, device = f"round of {STEPS_A_ROUND} steps, {MODELS[spec.model][0]}, CIFAR-100's shape, float32", spec.device
    makes = {"ours": lambda: LaLora(spec), "Opacus hooks": lambda: OpacusHooks(spec)}
    refused = {name: why for name, why in (refused or {}).items() if name in makes}
    entries, failures = ({}, refused) if refused else enter(makes, device)
    for name, reason in failures.items():
        yield missing("round", case, name, reason)
    if failures:
        return

    def round_of(e: Entry) -> Callable[[], None]:
        return lambda: [e.contender.step() for _ in range(STEPS_A_ROUND)]

    times = race(device, {name: round_of(e) for name, e in entries.items()}, rounds, host=True)
    facts = {"seconds": medians(times), "batch": spec.batch}
    yield row("round", case, "Opacus hooks", ratio(times["ours"], times["Opacus hooks"]), 0.5, False, **facts)
    ours, theirs = (entries[name].peak for name in ("ours", "Opacus hooks"))
    yield compare_memory("round memory", case, "Opacus hooks", ours, theirs, 0.5, False)

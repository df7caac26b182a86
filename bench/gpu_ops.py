"""Operations on a card against its copy bandwidth, torch.randn and the best PyTorch composition: rows of gpu_run.py.

``device="cpu"`` runs the same code on tiny shapes, on Triton's interpreter and the emulated machine.
"""

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

import baselines
import torch
from report import Ratio, ratio

KEY = bytes(range(32))
SCALING = 0.5
SHAPES = [(16, 512, 4096, 16), (64, 197, 768, 16), (8, 2048, 4096, 64)]  # (N, T, m, r)
SMALL = [(32, 128, 768, 16), (32, 49, 1024, 16)]
TINY = [(2, 5, 24, 4)]
FLUSH = 1 << 28  # bytes: several times the L2 of any card so far
AHEAD = 4_000_000  # cycles that the card sleeps while the host enqueues what is timed


def race(device: str, contenders: Mapping[str, Callable], rounds: int, host: bool = False) -> dict[str, list[float]]:
    """Seconds of every contender, one call a round, in turn, another one first each time; one round to warm up.

    On a card between CUDA events, the L2 flushed before. ``host``: what the host does counts too (whole steps); else
    the card sleeps until all launches are enqueued, so that only its own time counts.
    """
    names, times = list(contenders), {name: [] for name in contenders}
    if device == "cpu":
        for i in range(rounds + 1):
            for name in names:
                start = time.perf_counter()
                contenders[name]()
                if i:
                    times[name].append(time.perf_counter() - start)
        return times
    flush, events = torch.empty(FLUSH, dtype=torch.uint8, device=device), []
    for i in range(rounds + 1):
        for name in names:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            if host:
                torch.cuda.synchronize()
            else:
                torch.cuda._sleep(AHEAD)
            start.record()
            contenders[name]()
            end.record()
            if i:
                events.append((name, start, end))
        names.append(names.pop(0))
        torch.cuda.synchronize()
    for name, start, end in events:
        times[name].append(start.elapsed_time(end) / 1e3)
    return times


def row(what: str, case: str, against: str, value: Ratio, target: float, at_least: bool, **facts) -> dict:
    """One line of the table: a ratio of medians within a round, with its quartiles, and the bound on it."""
    low, high = min(value.values), max(value.values)
    if len(value.values) >= 4:
        low, _, high = statistics.quantiles(value.values, n=4, method="inclusive")
    met = value.median >= target if at_least else value.median <= target
    bound = f"{'≥' if at_least else '≤'} {target:g}"
    figures = {"median": value.median, "low": low, "high": high}
    return {"what": what, "case": case, "against": against, **figures, "target": bound, "met": met, **facts}


def missing(what: str, case: str, against: str, why: str) -> dict:
    """A line without a figure."""
    return {"what": what, "case": case, "against": against, "median": None, "met": None, "note": why}


def why(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"not installed: {error.name}"
    return f"failed: {type(error).__name__}: {str(error)[:120]}"


def working(what: str, case: str, device: str, contenders: Mapping[str, Callable]) -> tuple[dict, list[dict]]:
    """Those that run, and a row for each that does not."""
    running, failed = {}, []
    for name, call in contenders.items():
        try:
            call()
            if device != "cpu":
                torch.cuda.synchronize()  # or the next one is blamed
            running[name] = call
        except Exception as error:  # a contender's own failure is a row, not the end of the run
            failed.append(missing(what, case, name, why(error)))
    return running, failed


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: float(f"{statistics.median(t):.4g}") for name, t in times.items()}


def copying(nbytes: int, device: str) -> Callable:
    """Reads ``nbytes`` and writes as many."""
    source = torch.ones(max(nbytes // 4, 1), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def share_of_copy(times: list[float], moved: int, copies: list[float], copied: int) -> Ratio:
    """Bandwidth over the copy's, which moves ``copied`` bytes there and back."""
    return Ratio([(moved / t) / (2 * copied / c) for t, c in zip(times, copies)])


def privatize_rows(backends: dict[str, ModuleType], device: str, rounds: int) -> Iterator[dict]:
    """Llama-7B, q and v of 32 layers, r = 16, N = 32."""
    tiny = device == "cpu"
    layers, wide, r, N = (2, 24, 4, 3) if tiny else (64, 4096, 16, 32)
    for factor, shape, dim in (("B", (wide, r), 0), ("A", (r, wide), 1)):
        G = [torch.randn(N, *shape, device=device) for _ in range(layers)]
        out = [torch.empty(shape, device=device) for _ in range(layers)]
        weights = torch.rand(1, N, device=device).expand(layers, N)
        read = 4 * sum(g.numel() for g in G)
        stream = dict(key=KEY, release=1, tensor_index=range(layers), smooth_dim=[dim] * layers, divisor=float(N))

        def call(ops, noise_std, G=G, out=out, weights=weights, stream=stream):
            ops.privatize(G, [None] * len(G), weights, out, noise_std=noise_std, **stream)

        contenders = {name: lambda ops=ops: call(ops, 1.0) for name, ops in backends.items()}
        contenders |= {f"{name}, no noise": lambda ops=ops: call(ops, 0.0) for name, ops in backends.items()}
        case, copy = f"Llama-7B q,v r=16 N=32, {factor}", copying(read, device)
        running, failed = working("privatize", case, device, contenders)
        yield from failed
        times = race(device, {**running, "copy": copy}, rounds)
        for name in (name for name in backends if name in running):
            share = share_of_copy(times[name], read + read // N, times["copy"], read)
            yield row("privatize", case, "copy", share, 0.8, True, backend=name, seconds=medians(times))


def sample_grad_rows(backends: dict[str, ModuleType], device: str, rounds: int) -> Iterator[dict]:
    """bfloat16; B's gradient, and A's. ``SMALL`` shapes are those of layers that the cluster kernel serves."""
    for N, T, m, r in TINY if device == "cpu" else SHAPES + SMALL:
        for factor in "BA":
            case = f"({N}, {T}, {m}, {r}) bf16, {factor}"
            if not backends:
                yield missing("sample_grad", case, "copy", "no kernels passed")
                continue
            make = dict(device=device, dtype=torch.bfloat16)
            dy, B = torch.randn(N, T, m, **make), torch.randn(m, r, **make)
            h, x = (torch.randn(N, T, r, **make), None) if factor == "B" else (None, torch.randn(N, T, m, **make))
            G = torch.empty((N, m, r) if factor == "B" else (N, r, m), device=device)
            given = {"h": h, "G_B": G} if factor == "B" else {"x": x, "G_A": G}
            read = 2 * (dy.numel() + (x if h is None else h).numel())
            others = baselines.sample_grad(dy, B, SCALING, h, x)

            ours = {
                name: lambda ops=ops, dy=dy, B=B, given=given: ops.sample_grad(dy, B, SCALING, **given)
                for name, ops in backends.items()
                if name == "triton" or r <= 16  # what a cluster holds of these
            }
            running, failed = working("sample_grad", case, device, {**ours, **others})
            yield from failed
            times = race(device, {**running, "copy": copying(read, device)}, rounds)
            for name in (name for name in ours if name in running):
                share = share_of_copy(times[name], read, times["copy"], read)
                facts = {"backend": name, "seconds": medians(times), "host": host_seconds(device, ours[name])}
                yield row("sample_grad", case, "copy", share, 0.7, True, **facts)
                if left := [other for other in others if other in running]:
                    best = min(left, key=lambda other: statistics.median(times[other]))
                    speed = ratio(times[best], times[name])
                    yield row("sample_grad", case, f"PyTorch ({best})", speed, 2.0, True, **facts)


def host_seconds(device: str, call: Callable) -> float:
    """Median time that a call takes the host, which does not wait for the card."""
    times = []
    for _ in range(1 if device == "cpu" else 50):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    if device != "cpu":
        torch.cuda.synchronize()
    return float(f"{statistics.median(times):.3g}")


def normal_rows(backends: dict[str, ModuleType], device: str, rounds: int) -> Iterator[dict]:
    count = 1 << (10 if device == "cpu" else 26)
    for name, ops in backends.items():

        def ours(ops=ops):
            ops.chacha20_normal(count, key=KEY, release=1, tensor_index=0, device=device)

        case = f"2^{count.bit_length() - 1} normals"
        running, failed = working("chacha20_normal", case, device, {name: ours})
        yield from failed
        if not running:
            continue
        times = race(device, {"ours": ours, "torch.randn": lambda: torch.randn(count, device=device)}, rounds)
        speed = ratio(times["torch.randn"], times["ours"])
        yield row("chacha20_normal", case, "torch.randn", speed, 0.5, True, backend=name, seconds=medians(times))


def noise_seconds(ops: ModuleType, count: int, device: str, rounds: int) -> float:
    """Median time of ``count`` normals in one call."""
    times = race(
        device, {"": lambda: ops.chacha20_normal(count, key=KEY, release=1, tensor_index=0, device=device)}, rounds
    )
    return statistics.median(times[""])


def tuning_rows(device: str, rounds: int) -> Iterator[dict]:
    """What the pinned block sizes of ``sample_grad`` leave on the table: the fastest of the autotuner's short list."""
    from lalora_kernels.triton_ops import common

    module = importlib.import_module("lalora_kernels.triton_ops.sample_grad")
    for N, T, m, r in TINY if device == "cpu" else SHAPES:
        make = dict(device=device, dtype=torch.bfloat16)
        dy, B, h = torch.randn(N, T, m, **make), torch.randn(m, r, **make), torch.randn(N, T, r, **make)
        dz, wide = torch.empty_like(h), torch.zeros(N, T, r, device=device)
        G, configs = torch.empty(N, m, r, device=device), module.configs(common.chip(dy.device).arch, 2, max(r, 16))
        calls = {
            "B": lambda c, t=(dy, h, G, B, dz): module.thin_gradient(c, *t[:2], SCALING, t[2], False, *t[3:]),
            "dz": lambda c, t=(dy, B, dz, wide): module.rows_dz(c, *t[:2], SCALING, *t[2:]),
            "A": lambda c, t=(dy, wide, G): module.thin_gradient(c, *t[:2], 1.0, t[2], False),
        }
        for what, call in calls.items():
            times = race(device, {str(tuple(c)): lambda c=c, f=call: f(c) for c in configs if _fits(call, c)}, rounds)
            pinned = str(tuple(configs[_pinned(module, what, dy, r)]))
            best = min(times, key=lambda name: statistics.median(times[name]))
            gain = ratio(times.get(pinned, times[best]), times[best])
            facts = {"seconds": medians(times), "pinned": pinned}
            yield row("tuning", f"({N}, {T}, {m}, {r}) bf16, {what}", f"pinned: {best}", gain, 1.0, True, **facts) | {
                "met": None
            }


def _pinned(module: ModuleType, what: str, dy: torch.Tensor, r: int) -> int:
    """Which of the short list ``sample_grad`` takes unasked."""
    if what == "dz":
        return 0
    card, rb = module.chip(dy.device), max(r, 16)
    programs = len(dy) * module.cdiv(dy.shape[2], module.configs(card.arch, 2, rb)[0].features)
    return module.pinned(card.arch, 2, rb, what, programs, card.multiprocessors)


def _fits(call: Callable, config: tuple) -> bool:
    try:
        call(config)
    except Exception as error:  # a tile that this chip's shared memory does not hold
        if type(error).__name__ != "OutOfResources":
            raise
        return False
    return True

"""Question 6: time and memory of a private step, and bytes of a round, of each method here and of DP-LoRA in Opacus."""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lalora_kernels.dry_run import OPACUS, dry_run, shapes
from lalora_kernels.federated.config import Config
from lalora_kernels.federated.methods import METHODS, Method, get_method, products
from lalora_kernels.reproduce.runs import save_lines
from lalora_kernels.reproduce.stored import read_lines

CONTENDERS = (*METHODS, "la-lora-unfiltered", "fedsvd", "fedex-lora", "flora", "fedsa-lora", OPACUS)
RANKS = (4, 16, 64)
PASSES = 3


def round_bytes(config: Config, num_classes: int, kind: str | None) -> dict[str, int]:
    """Bytes that one client sends and is sent in a round of ``config.method``, in float32; a mean over two rounds.

    What all methods share, trained heads, is in both. Down: what the server's work of that round changed.
    """
    method, (state, _) = get_method(config.method), shapes(config, num_classes, kind)
    chosen = max(1, round(config.fraction * config.clients))
    up = sum(4 * t.numel() for r in (1, 2) for key, t in state.items() if method.travels(key, r)) // 2
    return {"up": up, "down": up if method.down is None else _down(method, state, chosen)}


def _down(method: Method, state: dict, clients: int) -> int:
    pairs = products(state)
    factors = {name for pair in pairs.values() for name in pair}
    heads = sum(t.numel() for key, t in state.items() if key not in factors)
    assert method.down is not None
    return 4 * (heads + sum(
        method.down(state[b].shape[0], state[a].shape[1], len(state[a]), clients) for a, b in pairs.values()
    ))  # fmt: skip


def timed_as(contender: str) -> str:
    """Whose client steps a contender's are: those of its schedule's method; what the server does is not timed."""
    return contender if contender == OPACUS else get_method(contender).schedule.name


TIMED = tuple(dict.fromkeys(map(timed_as, CONTENDERS)))


def complete(lines: Sequence[dict[str, Any]]) -> bool:
    """Whether every contender was measured in every pass at every rank."""
    return len(lines) == PASSES * len(RANKS) * len(TIMED)


def read_costs(path: Path) -> list[dict[str, Any]]:
    """What was measured so far; nothing where ``path`` is not there. Raises BadInput for a damaged line."""
    cure = "remove that line to measure it again"
    return read_lines(path, cure, "pass", "rank", "contender") if path.exists() else []


def measure(
    config: Config, num_classes: int, kind: str, path: Path, deadline: float | None
) -> Iterator[dict[str, Any]]:
    """One line for each pass, rank and contender of TIMED, each measured alone in a fresh process; what ``path`` holds
    is kept. Within a pass all of a rank follow each other, so that ratios are between neighbours in time."""
    lines = read_costs(path)
    there = {(line["pass"], line["rank"], line["contender"]) for line in lines}
    for key in itertools.product(range(PASSES), RANKS, TIMED):
        if key in there:
            continue
        if deadline is not None and time.time() >= deadline:
            return
        number, rank, contender = key
        at = dataclasses.replace(config, rank=rank, lora_alpha=None)
        line = {"pass": number, "rank": rank, "contender": contender, **dry_run(at, num_classes, kind, contender)}
        lines.append(line)
        save_lines(lines, path)
        yield line


def round_seconds(line: dict[str, Any], local_steps: int) -> float:
    """Time of one client's K steps: those of each factor in equal parts, as the four methods have them on average."""
    times = list(line["factors"].values())
    return local_steps * sum(times) / len(times)


def step_memory(line: dict[str, Any]) -> float:
    """Bytes of a step above what model and optimizer hold: on the device, else resident, else the process's peak."""
    return line["device"] or line["step"] or line["peak"] or math.nan


def _against_opacus(
    lines: Sequence[dict[str, Any]], contender: str, rank: int, value: Callable[[dict[str, Any]], float]
) -> tuple[float, list[float]] | str:
    """(median over passes of ``value``, its ratio to Opacus' in each pass), or why there is none."""
    at = {(line["pass"], line["contender"]): line for line in lines if line["rank"] == rank}
    mine = {number: line for (number, name), line in at.items() if name == timed_as(contender)}
    if errors := [line["error"] for line in mine.values() if "error" in line]:
        return errors[0][:60]
    if not mine:
        return "—"
    theirs = {number: line for (number, name), line in at.items() if name == OPACUS and "error" not in line}
    ratios = [value(line) / value(theirs[number]) for number, line in mine.items() if number in theirs]
    return statistics.median(map(value, mine.values())), ratios


def markdown(lines: Sequence[dict[str, Any]], config: Config, num_classes: int, kind: str) -> str:
    """Three tables by rank: seconds of a client's round, memory of a step, bytes of a round."""
    about = (
        f"Medians over {PASSES} passes, each contender's steps in a fresh process; in parentheses the ratio to DP-LoRA "
        "in Opacus in the same pass, median [least, most]. FedSVD's client steps are FFA-LoRA's, those of FedEx-LoRA, "
        "FLoRA and FedSA-LoRA DP-LoRA's: they differ in what the server does and what travels."
    )
    K = config.local_steps
    measured = [
        (f"Seconds of one client's round, K = {K}", lambda line: round_seconds(line, K), 1.0),
        ("MB that a step needs above model and optimizer", step_memory, 1e6),
    ]
    tables = [_table(title, [
        [_name(c), *(_cell(_against_opacus(lines, c, rank, value), unit, c) for rank in RANKS)] for c in CONTENDERS
    ]) for title, value, unit in measured]  # fmt: skip
    sent = []
    for c in CONTENDERS:
        row = [_name(c)]
        for rank in RANKS:
            method = "dp-lora" if c == OPACUS else c
            at = dataclasses.replace(config, rank=rank, lora_alpha=None, method=method)
            row.append(" / ".join(f"{n / 1e6:.2f}" for n in round_bytes(at, num_classes, kind).values()))
        sent.append(row)
    tables.append(_table("MB that a client sends / is sent in a round, float32", sent))
    return "## Cost of a round\n\n" + "\n\n".join(tables) + f"\n\n{about}\n"


def figure(lines: Sequence[dict[str, Any]], config: Config, path: Path) -> None:
    """Time of a round and memory of a step over DP-LoRA's in Opacus, by rank: medians with least and most."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    fig, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    shown = [
        ("a client's round, seconds", lambda line: round_seconds(line, config.local_steps)),
        ("a step, bytes above the model", step_memory),
    ]
    for axes, (title, value) in zip(panels, shown):
        for k, contender in enumerate(name for name in TIMED if name != OPACUS):
            found = {i: _against_opacus(lines, contender, rank, value) for i, rank in enumerate(RANKS)}
            ratios = {i: one[1] for i, one in found.items() if not isinstance(one, str) and one[1]}
            middle = [statistics.median(r) for r in ratios.values()]
            spread = (
                [m - min(r) for m, r in zip(middle, ratios.values())],
                [max(r) - m for m, r in zip(middle, ratios.values())],
            )
            where = [i + 0.1 * (k - (len(TIMED) - 2) / 2) for i in ratios]
            axes.errorbar(where, middle, spread, fmt="o", capsize=3, label=contender)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(RANKS)), [f"r = {rank}" for rank in RANKS])
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("ratio to DP-LoRA in Opacus")
    panels[0].set_ylim(bottom=0)
    panels[1].legend(fontsize=8, loc="lower right")
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    pyplot.close(fig)


def _name(contender: str) -> str:
    return "dp-lora in Opacus" if contender == OPACUS else contender


def _cell(found: tuple[float, list[float]] | str, unit: float, contender: str) -> str:
    if isinstance(found, str):
        return found
    value, ratios = found
    shown = f"{value / unit:.3g}"
    if contender == OPACUS or not ratios:
        return shown
    return f"{shown} ({statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}])"


def _table(title: str, rows: Sequence[Sequence[str]]) -> str:
    head = ["method", *(f"r = {rank}" for rank in RANKS)]
    lines = [f"{title}:", "", "| " + " | ".join(head) + " |", "|---|" + "---:|" * len(RANKS)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])

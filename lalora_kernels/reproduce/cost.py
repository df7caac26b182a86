"""Question 6: time and memory of a private step, and bytes of a round, of each method here and of DP-LoRA in Opacus."""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lalora_kernels.dry_run import OPACUS, dry_run, shapes
from lalora_kernels.federated.config import Config
from lalora_kernels.federated.methods import METHODS, Method, get_method, products
from lalora_kernels.reproduce.runs import save_lines

CONTENDERS = (*METHODS, "fedsvd", "fedex-lora", "flora", "fedsa-lora", OPACUS)


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


def measure(
    config: Config, num_classes: int, kind: str, ranks: Sequence[int], path: Path, deadline: float | None
) -> Iterator[dict[str, Any]]:
    """One line for each contender and rank, each measured alone in a fresh process; what ``path`` holds is kept."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    there = {(line["contender"], line["rank"]) for line in lines}
    for rank in ranks:
        for contender in CONTENDERS:
            if (contender, rank) in there:
                continue
            if deadline is not None and time.time() >= deadline:
                return
            at = dataclasses.replace(config, rank=rank, lora_alpha=None)
            line = {"contender": contender, "rank": rank, **dry_run(at, num_classes, kind, contender)}
            method = "dp-lora" if contender == OPACUS else contender
            line["bytes"] = round_bytes(dataclasses.replace(at, method=method), num_classes, kind)
            lines.append(line)
            save_lines(lines, path)
            yield line


def round_seconds(line: dict[str, Any], local_steps: int) -> float:
    """Time of one client's K steps: those of each factor in equal parts, as the four methods have them on average."""
    times = list(line["factors"].values())
    return local_steps * sum(times) / len(times)


def markdown(lines: Sequence[dict[str, Any]], local_steps: int) -> str:
    """Seconds a client's round and memory a step, by rank."""
    ranks = sorted({line["rank"] for line in lines})
    at = {(line["contender"], line["rank"]): line for line in lines}
    head = ["method", *(f"r = {rank}: s, MB, MB up, MB down" for rank in ranks)]
    out = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(ranks)]
    for contender in CONTENDERS:
        row = []
        for rank in ranks:
            line = at.get((contender, rank))
            if line is None or "error" in line:
                row.append("—" if line is None else line["error"][:60])
                continue
            memory = line["device"] or line["step"] or line["peak"] or 0
            sent = line["bytes"]
            row.append(
                f"{round_seconds(line, local_steps):.2f}, {memory / 1e6:.0f}, {sent['up'] / 1e6:.2f}, "
                f"{sent['down'] / 1e6:.2f}"
            )
        name = "dp-lora in Opacus" if contender == OPACUS else contender
        out.append(f"| {name} | " + " | ".join(row) + " |")
    about = (
        f"Seconds of one client's round (K = {local_steps}), memory of a step above model and optimizer, what it "
        "sends and is sent in a round."
    )
    return "## Cost of a round\n\n" + "\n".join(out) + f"\n\n{about}\n"

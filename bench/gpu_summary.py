"""What the README shows of a card's results: ``python bench/gpu_summary.py bench/results/gpu-sm_90.json``.

One row a target: over its cases the median and the worst.
"""

import json
import statistics
import sys
from pathlib import Path

MEANS = {  # what and whether "times ours" is the better the larger, of the figures in a row
    "sample_grad": "`sample_grad`", "privatize": "`privatize`", "chacha20_normal": "`chacha20_normal`",
    "noise": "noise", "step": "step", "step, both as graphs": "step, both as CUDA graphs",
    "step, ours as a graph": "step, ours as a CUDA graph", "step memory": "a step's memory",
    "extra memory": "memory above PEFT's", "round": "round, float32", "round memory": "round's memory, float32",
}  # fmt: skip


def against(row: dict) -> str:
    """The group of what it is compared with: PyTorch's compositions are one, PEFT's two dtypes too."""
    return row["against"].partition(" (")[0].partition(",")[0]


def summary(result: dict) -> str:
    """Markdown."""
    groups: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        if row["met"] is not None and row["what"] in MEANS:
            key = row["what"], against(row), row.get("backend", ""), row["target"]
            groups.setdefault(key, []).append(row)
    lines = [
        f"{result['device']}; torch {result['torch']}, Triton {result['triton']}, PEFT {result['peft']}, Opacus "
        f"{result['opacus']}, transformers {result['transformers']}; commit {result['commit']}; {result['date']}.",
        "",
        "| figure | median of the cases | worst case | wanted | cases that meet it |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (what, other, backend, target), rows in groups.items():
        at_least = target.startswith("≥")
        values = [row["median"] for row in rows]
        worst, met = (min if at_least else max)(values), sum(row["met"] for row in rows)
        if other == "copy":
            figure = f"share of the copy's bandwidth ({backend})"
        elif what == "noise":
            figure = f"share of a step ({backend})"
        else:
            unit = "times less than" if "memory" in what else "times faster than"
            figure = f"{unit} {other}" if at_least else f"over that of {other}"
            figure += f" ({backend})" if backend else ""
        wanted = target.replace("≥", "at least").replace("≤", "at most")
        figures = f"{statistics.median(values):.3g} | {worst:.3g}"
        lines.append(f"| {MEANS[what]}: {figure} | {figures} | {wanted} | {met} of {len(rows)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(summary(json.loads(Path(sys.argv[1]).read_text())), end="")

"""From results to numbers: mean ± sd, paired differences with confidence intervals, one table and figure a question."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cell:
    """Accuracy of one arm at one ε in percent: ``sd`` is the sample's, 0 of one seed."""

    mean: float
    sd: float
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.sd:.1f}" if len(self.seeds) > 1 else "")


@dataclass(frozen=True)
class Difference:
    """Mean over common seeds of (arm − the arm compared with), in points, with Student's t interval of 95 %."""

    mean: float
    low: float
    high: float
    seeds: tuple[int, ...]

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if self.mean == self.low == self.high == 0:
            return "the same"  # an arm that is what it is compared with by another name
        if len(self.seeds) < 2:
            return f"{self.mean:+.1f} (one seed)"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]" + (" *" if self.clear else "")


Grid = dict[tuple[str, float], dict[int, float]]  # (arm, ε) -> seed -> accuracy in percent


def gather(results: Iterable[Mapping[str, Any]]) -> Grid:
    """Accuracies by arm, ε and seed."""
    grid: Grid = {}
    for r in results:
        grid.setdefault((r["arm"], float(r["epsilon"])), {})[r["seed"]] = 100 * r["accuracy"]
    return grid


def cell(values: Mapping[int, float]) -> Cell:
    """Mean and sample standard deviation over seeds."""
    import numpy as np

    found = list(values.values())
    return Cell(float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else 0.0, tuple(sorted(values)))


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """Paired by seed, which deals the same records to the same clients; None without a common seed."""
    import numpy as np
    from scipy import stats

    seeds = tuple(sorted(set(one) & set(other)))
    if not seeds:
        return None
    d = np.array([one[s] - other[s] for s in seeds])
    if len(seeds) == 1:
        return Difference(float(d[0]), -math.inf, math.inf, seeds)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)))
    return Difference(float(d.mean()), float(d.mean()) - half, float(d.mean()) + half, seeds)


def label(epsilon: float) -> str:
    """ "ε = 3"; without noise "ε = ∞"."""
    return "ε = ∞" if math.isinf(epsilon) else f"ε = {epsilon:g}"


def markdown(title: str, results: Sequence[Mapping[str, Any]], arms: Sequence[str], against: str, note: str) -> str:
    """The table of a question: accuracy of each arm and its difference from ``against``; — where runs are missing."""
    grid = gather(results)
    epsilons = sorted({e for _, e in grid})
    if not grid:
        return f"## {title}\n\nNo run is complete yet.\n"
    columns = [label(e) for e in epsilons] + [f"− {against}, {label(e)}" for e in epsilons]
    lines = ["| arm | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for arm in arms:
        row = [str(cell(grid[arm, e])) if (arm, e) in grid else "—" for e in epsilons]
        for e in epsilons:
            d = difference(grid[arm, e], grid[against, e]) if (arm, e) in grid and (against, e) in grid else None
            row.append("" if arm == against else "—" if d is None else str(d))
        lines.append(f"| {arm} | " + " | ".join(row) + " |")
    before = cell({i: 100 * r["accuracy_before"] for i, r in enumerate(results)})
    seeds = sorted({r["seed"] for r in results})
    about = (
        f"Test accuracy in percent, mean ± standard deviation over seeds {', '.join(map(str, seeds))}; differences are "
        f"paired by seed, with Student's t interval of 95 % (*: it excludes 0). Before fine-tuning: {before.mean:.1f}."
    )
    fewer = [
        f"{arm} at {label(e)} {', '.join(map(str, sorted(grid[arm, e])))}"
        for arm, e in itertools.product(arms, epsilons)
        if len(grid.get((arm, e), seeds)) < len(seeds)
    ]
    about += f" Of fewer seeds: {'; '.join(fewer)}." if fewer else ""
    return f"## {title}\n\n" + "\n".join(lines) + f"\n\n{about} {note}\n"


def measures(results: Sequence[Mapping[str, Any]]) -> str:
    """Question 5's second table: means over seeds and rounds; nothing where nothing was measured."""
    found: dict[tuple[str, float], list[Mapping[str, float]]] = {}
    for result in results:
        if "measures" in result:
            found.setdefault((result["arm"], float(result["epsilon"])), []).append(result["measures"])
    if not found:
        return ""
    names = list(next(iter(found.values()))[0])
    lines = ["| arm | ε | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for (arm, epsilon), values in found.items():
        means = [sum(v[name] for v in values) / len(values) for name in names]
        shown = ["—" if math.isnan(mean) else f"{mean:.3g}" for mean in means]
        lines.append(f"| {arm} | {label(epsilon)} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n\nMeans over seeds and rounds; reproduce/measures.py says what each is.\n"


def figure(title: str, results: Sequence[Mapping[str, Any]], arms: Sequence[str], path: Path) -> None:
    """Accuracy over ε with the standard deviation, one line an arm; where ε is one or two and arms are many, bars."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    grid = gather(results)
    epsilons = sorted({e for _, e in grid})
    arms = [arm for arm in arms if any((arm, e) in grid for e in epsilons)]
    fig, axes = pyplot.subplots(figsize=(7, max(3.2, 0.32 * len(arms)) if len(epsilons) < 3 else 3.6))
    if len(epsilons) < 3:
        height = 0.8 / len(epsilons)
        for k, e in enumerate(epsilons):
            have = [(i, cell(grid[arm, e])) for i, arm in enumerate(arms) if (arm, e) in grid]
            where = [i + (k - (len(epsilons) - 1) / 2) * height for i, _ in have]
            axes.barh(where, [c.mean for _, c in have], height, xerr=[c.sd for _, c in have], label=label(e))
        axes.set_yticks(range(len(arms)), arms)
        axes.invert_yaxis()
        axes.set_xlabel("test accuracy, %")
    else:
        for arm in arms:
            have = [(i, cell(grid[arm, e])) for i, e in enumerate(epsilons) if (arm, e) in grid]
            axes.errorbar([i for i, _ in have], [c.mean for _, c in have], [c.sd for _, c in have],
                          marker="o", capsize=3, label=arm)  # fmt: skip
        axes.set_xticks(range(len(epsilons)), [label(e) for e in epsilons])
        axes.set_ylabel("test accuracy, %")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    pyplot.close(fig)

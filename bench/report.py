"""Results to Markdown: ``python bench/report.py RESULTS.json [--summary]``.

Every ratio is taken within a round and then summed up: median (lower quartile - upper quartile).
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

GROUPS = ["ops", "step", "memory", "growth"]
LIMITS = ("read", "gemm", "copy", "base products")  # contenders that only measure the machine
OTHERS = ("Opacus hooks", "Opacus ghost", "torch.func vmap", "fastDP's recipe", "FlashDP's recipe")  # private steps
MB = 1e6


class Ratio:
    """Ratios of the rounds."""

    def __init__(self, values: Sequence[float]):
        self.values = list(values)
        self.median = statistics.median(self.values)

    def __str__(self) -> str:
        if len(self.values) < 4:
            return f"{self.median:.2f} ({min(self.values):.2f} - {max(self.values):.2f})"
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return f"{self.median:.2f} ({low:.2f} - {high:.2f})"


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    return Ratio([a / b for a, b in zip(numerator, denominator)])


def best(seconds: dict[str, list[float]]) -> str:
    """The fastest contender that is not ours."""
    others = {k: v for k, v in seconds.items() if k != "ours" and k not in LIMITS}
    return min(others, key=lambda k: statistics.median(others[k]))


def ms(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


class Report:
    """``targets`` collects (figure's name, case, value, bound, whether at least) while the sections are written."""

    def __init__(self, result: dict):
        self.result, self.targets = result, []
        self.done = [c for c in result["cases"] if not c["failed"]]
        self.failed = [c for c in result["cases"] if c["failed"]]

    def cases(self, group: str, test: Callable[[dict], bool] = lambda facts: True) -> list[dict]:
        return [c for c in self.done if c["group"] == group and test(c["facts"])]

    def target(self, what: str, case: str, value: float, bound: float, *, at_least: bool) -> None:
        self.targets.append((what, case, value, bound, at_least))

    # ------------------------------------------------------------ operations

    def _speed_up(self, case: dict) -> tuple[str, Ratio]:
        name = best(case["seconds"])
        return name, ratio(case["seconds"][name], case["seconds"]["ours"])

    def gradients(self, op: str) -> str:
        cases, rows, ups, shares = self.cases("ops", lambda f: f["op"] == op), [], [], []
        if not cases:
            return ""
        for c in cases:
            s, f = c["seconds"], c["facts"]
            name, up = self._speed_up(c)
            share, side = roofline_share(c)
            ups.append(up.median), shares.append(share.median)
            shape = str(tuple(f["shape"]))
            rows.append([shape, f["factor"], ms(s["ours"]), f"{ms(s[name])} ({name})", up, share, side])
        mean = math.exp(statistics.fmean(map(math.log, ups)))
        head = [
            "N, T, m or n, r",
            "active",
            "ms",
            "best composition, ms",
            "times faster",
            "share of roofline",
            "bound by",
        ]
        text = table(head, rows)
        if op == "sample_grad":
            self.target(
                f"`{op}`, times faster than the best composition, geometric mean", "all", mean, 1.5, at_least=True
            )
            for row, up, share in zip(rows, ups, shares):
                case = f"{row[0]}, {row[1]} active"
                self.target(f"`{op}`, times faster than the best composition", case, up, 1.0, at_least=True)
                self.target(f"`{op}`, share of roofline", case, share, 0.6, at_least=True)
        return f"### `{op}`\n\n{text}\n\nGeometric mean: {mean:.2f} times the best composition.\n"

    def streams(self, op: str, limit: str) -> str:
        cases, rows = self.cases("ops", lambda f: f["op"] == op), []
        for c in cases:
            s, f = c["seconds"], c["facts"]
            name, up = self._speed_up(c)
            rate = f["copy_bytes" if limit == "copy" else "read_bytes"]
            share = Ratio([f["bytes"] / o / (rate / m) for o, m in zip(s["ours"], s[limit])])
            what = f["model"] + (f", {f['factor']} active" if "factor" in f else "")
            rows.append([what, ms(s["ours"]), f"{ms(s[name])} ({name})", up, share])
            if op == "privatize":
                self.target("`privatize`, times faster than the best composition", what, up.median, 6.0, at_least=True)
                self.target("`privatize`, share of copy bandwidth", what, share.median, 0.7, at_least=True)
        if not rows:
            return ""
        head = ["step", "ms", "best composition, ms", "times faster", f"share of {limit} bandwidth"]
        return f"### `{op}`, N = 16\n\n{table(head, rows)}\n"

    def normals(self) -> str:
        text = ""
        for c in self.cases("ops", lambda f: f["op"] == "chacha20_normal"):
            s = c["seconds"]
            ups = {name: ratio(s[name], s["ours"]) for name in s if name != "ours"}
            rows = [[name, ms(s[name]), up] for name, up in ups.items()]
            text = f"### `chacha20_normal`, {c['facts']['count']:,} normals in {ms(s['ours'])} ms\n\n"
            text += table(["against", "ms", "times faster"], rows) + "\n"
            for name, bound in (("torch.randn", 1.0), ("Opacus secure_mode", 8.0)):
                what = f"`chacha20_normal`, times faster than {name}"
                self.target(what, "2^24 normals", ups[name].median, bound, at_least=True)
        return text

    # ------------------------------------------------------------ steps

    def steps(self) -> str:
        rows = []
        for c in self.cases("step", lambda f: "base_flops" not in f):
            s, f = c["seconds"], c["facts"]
            mine = [t / 2 for t in s["ours"]]
            what = f"{f['model']} {f['targets']} r={f['r']}"
            to_peft = ratio(mine, s["PEFT, not private"])
            others = {n: ratio(s[n], mine) if n in s else "" for n in OTHERS}
            rows.append([what, ms(s["ours, B active"]), ms(s["ours, A active"]), ms(s["PEFT, not private"]), to_peft])
            rows[-1] += others.values()
            self.target("private step, time over PEFT's (not private)", what, to_peft.median, 0.97, at_least=False)
            all_linear = f["targets"] == "all-linear"
            for name, up in others.items():
                if name not in s:  # an older result
                    continue
                bound = {"Opacus hooks": 1.2, "Opacus ghost": 1.8}.get(name, 1.0) if all_linear else 1.0
                layers = "all-linear" if all_linear else "q,v"
                self.target(f"private step, {layers}, times faster than {name}", what, up.median, bound, at_least=True)
        if not rows:
            return ""
        head = ["model", "B active, ms", "A active, ms", "PEFT, not private, ms", "mean of B and A over PEFT"]
        head += [f"times faster than {OTHERS[0]}", *(f"than {name}" for name in OTHERS[1:])]
        return f"### One private step\n\n{table(head, rows)}\n"

    def rounds(self) -> str:
        rows = []
        for c in self.cases("step", lambda f: "base_flops" in f):
            s, f = c["seconds"], c["facts"]
            mine = [t / 2 for t in s["ours"]]
            what = f"{f['what']}, all-linear r={f['r']}"
            hooks, ghost = (ratio(mine, s[n]) for n in ("Opacus hooks", "Opacus ghost"))
            base = ratio(s["base products"], mine)
            rows.append([what, ms(mine), hooks, ghost, base])
            self.target("round, time over DP-LoRA in Opacus hooks", what, hooks.median, 0.8, at_least=False)
            self.target("round, time over DP-LoRA in Opacus ghost", what, ghost.median, 0.5, at_least=False)
        if not rows:
            return ""
        head = ["model", "LA-LoRA, ms a step", "over DP-LoRA, hooks", "over DP-LoRA, ghost"]
        head += ["share that is the frozen layers' own products"]
        return f"### Time of a round against DP-LoRA (A and B) in Opacus\n\n{table(head, rows)}\n"

    def memory(self) -> str:
        rows = []
        for c in self.cases("memory"):
            b, f = c["bytes"], c["facts"]
            what = f"{f['model']} {f['targets']} r={f['r']}"
            for name, m in b.items():
                cells = (m["rss"], m["peak"], m["forward"], m["model"])
                rows.append([what, name, *("" if v is None else f"{v / MB:.0f}" for v in cells)])
            self._memory_targets(what, b, f)
        if not rows:
            return ""
        head = ["model", "step", "resident", "allocated by torch", "of it kept by the forward", "model itself"]
        return f"### Peak memory above the model's own, MB, a fresh process each\n\n{table(head, rows)}\n"

    def _memory_targets(self, what: str, b: dict, f: dict) -> None:
        peft = b.get("PEFT, not private")
        if peft and f["targets"] == "all-linear" and f["model"] in ("bert", "vit"):
            for factor, bound in (("B", 0.6), ("A", 0.8)):
                mine = b[f"ours, {factor} active"]
                for kind, label in (("rss", "peak memory, resident"), ("forward", "memory kept by the forward")):
                    if mine[kind] is not None:
                        share = mine[kind] / peft[kind]
                        self.target(f"{label}, {factor} active, over PEFT's", what, share, bound, at_least=False)
        for name in ("Opacus hooks", "Opacus ghost"):
            for kind in ("rss", "peak"):
                if b["ours"][kind] is not None:
                    label = "resident" if kind == "rss" else "allocated"
                    share = b["ours"][kind] / b[name][kind]
                    self.target(f"peak memory, {label}, over {name}", what, share, 0.5, at_least=False)

    def growth(self) -> str:
        rows = []
        for c in self.cases("growth"):
            s, f = c["seconds"], c["facts"]
            grown = {k: Ratio([b / (k * a) for a, b in zip(s["ours"], s[f"x{k}"])]) for k in (2, 4, 8)}
            wanted = f["gradient_bytes_wanted"]
            extra = max(f["gradient_bytes"][k] / wanted[k] for k in wanted)
            rows.append([f["size"], f["factor"], ms(s["ours"]), *grown.values(), f"{extra:.3f}"])
            worst = max(g.median for g in grown.values())
            what = f"in {f['size']}, {f['factor']} active"
            self.target("growth, time over linear", what, worst, 1.15, at_least=False)
            self.target("growth, G's memory over 4 N r f bytes", what, extra, 1.01, at_least=False)
        if not rows:
            return ""
        head = ["size", "active", "ms at x1", "x2: time over twice", "x4", "x8", "G's memory over 4 N r f bytes"]
        return f"### Growth of what privacy adds (N = 8, T = 128, r = 8, 4 layers of 768)\n\n{table(head, rows)}\n"

    # ------------------------------------------------------------ all of it

    def head(self) -> str:
        m = self.result["machine"]
        rounds = min((c["rounds"] for c in self.done if "rounds" in c), default=0)
        return (
            f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads ({m['instruction_set']}); torch {m['torch']}, "
            f"Opacus {m['opacus']}, PEFT {m['peft']}, transformers {m['transformers']}, Python {m['python']}; "
            f"OMP_WAIT_POLICY {m['omp_wait_policy']}; commit {m['commit']}"
            f"{' with uncommitted changes' if m['uncommitted_changes'] else ''}; {self.result['date']}.\n\n"
            f"Contenders take turns in one process, after the results of each were checked; a ratio is the median over "
            f"{rounds} or more rounds of the ratio within a round (quartiles in parentheses).\n"
        )

    def sections(self) -> list[str]:
        sections = [
            self.gradients("sample_grad"),
            self.gradients("sample_grad, bfloat16"),
            self.gradients("sample_grad_clip"),
            self.streams("privatize", "copy"),
            self.streams("clip_reduce", "read"),
            self.normals(),
            self.steps(),
            self.rounds(),
            self.memory(),
            self.growth(),
        ]
        if self.failed:
            rows = [[c["group"], c["name"], c["failed"].replace("|", "/").replace("\n", " ")] for c in self.failed]
            sections.append(f"### Failed, not timed\n\n{table(['group', 'case', 'why'], rows)}\n")
        return [s for s in sections if s]

    def summary(self) -> str:
        """One row a target: over its cases the median and the worst. Call it after ``sections``."""
        rows = []
        for (what, bound), cases in self._by_target().items():
            values, at_least = [c[2] for c in cases], cases[0][4]
            met = sum(v >= bound if at_least else v <= bound for v in values)
            worst = min(values) if at_least else max(values)
            wanted = f"{'at least' if at_least else 'at most'} {bound:g}"
            rows.append([what, f"{statistics.median(values):.2f}", f"{worst:.2f}", wanted, f"{met} of {len(values)}"])
        return table(["figure", "median of the cases", "worst case", "wanted", "cases that meet it"], rows) + "\n"

    def missed(self) -> str:
        rows = [[what, case, f"{v:.2f}", f"{bound:g}"] for what, case, v, bound, up in self.targets
                if (v < bound if up else v > bound)]  # fmt: skip
        return f"### Missed\n\n{table(['figure', 'case', 'measured', 'wanted'], rows)}\n" if rows else ""

    def _by_target(self) -> dict[tuple[str, float], list[tuple]]:
        grouped: dict[tuple[str, float], list[tuple]] = {}
        for target in self.targets:
            grouped.setdefault((target[0], target[3]), []).append(target)
        return grouped


def roofline_share(case: dict) -> tuple[Ratio, str]:
    """Time at the machine's limits, measured in the same round, over ours; and which limit that is."""
    f, s = case["facts"], case["seconds"]
    memory = [f["bytes"] * t / f["read_bytes"] for t in s["read"]]
    products = [f["flops"] * t / f["gemm_flops"] for t in s["gemm"]]
    share = Ratio([max(a, b) / o for a, b, o in zip(memory, products, s["ours"])])
    return share, "reading" if statistics.median(memory) > statistics.median(products) else "GEMM"


def markdown(result: dict) -> str:
    """Everything."""
    report = Report(result)
    sections = report.sections()
    return "\n".join([report.head(), report.summary(), *sections, report.missed()])


def summary(result: dict) -> str:
    """The machine and one row a target: what the README shows."""
    report = Report(result)
    report.sections()
    return f"{report.head()}\n{report.summary()}"


if __name__ == "__main__":
    print((summary if "--summary" in sys.argv else markdown)(json.loads(Path(sys.argv[1]).read_text())), end="")

"""What ``bench/gpu.sh`` runs once everything is built: tests on the card, then benchmarks, then the verdict.

    python bench/gpu_run.py [--dry] [--out FOLDER] [--minutes 8] [--only tests ops steps tuning compile]

Writes gpu-<family>.json and .md into bench/results and, of kernels all of whose tests passed, the proof into
lalora_kernels/proven.json: commit both. All of it goes to ``--out`` as well, as it comes. ``--dry`` needs no card:
Triton interpreted and compiled, the CUDA kernels emulated, tiny shapes, and nothing is proven.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "python_tests")]
import gpu_outcomes  # noqa: E402
from gpu_outcomes import STEPS  # noqa: E402

from lalora_kernels import gpu  # noqa: E402
from lalora_kernels.files import write_atomic  # noqa: E402

BACKENDS = {"cuda": "lalora_kernels.cuda", "triton": "lalora_kernels.triton_ops"}
TESTS = ROOT / "python_tests/test_gpu_card.py"
PROVEN = ROOT / "lalora_kernels/proven.json"
RESULTS, DRY_RESULTS = ROOT / "bench/results", ROOT / "build/gpu-dry"
GROUPS = ("compile", "tests", "ops", "steps", "tuning")
# Tests by what their names hold; without steps nothing is proven, so Triton's, the longest, are last.
TESTED = {"cuda": "cuda.", STEPS: "not cuda. and not triton.", "triton": "triton."}
TEST_SECONDS = 240  # a group's at most


class Run:
    """The result in the making; ``save`` after each part, so that what is cut off keeps what it has.

    ``out``: a folder of the caller's, which gets all that is written, beside the folder where it belongs.
    """

    def __init__(self, dry: bool, out: Path | None, minutes: float):
        spent = float(os.environ.get("LALORA_GPU_SPENT", "0"))  # by gpu.sh, building
        self.dry, self.out, self.end = dry, out, time.monotonic() + 60 * minutes - spent
        self.folders = [DRY_RESULTS if dry else RESULTS, *([out] if out else [])]
        self.result: dict = {"dry": dry, **about(dry), "passed": {}, "tests": {}, "rows": [], "seconds": {}}
        self.result["broken"] = []

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, rows: Iterable[dict]) -> None:
        for row in rows:
            if self.dry:
                row["met"] = None
            self.result["rows"].append(row)
            print(line(row), flush=True)
        self.save()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What goes wrong within is a row with its reason, not the end of the run."""
        from gpu_ops import missing, why

        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.result["broken"].append(what)
            self.add([missing(what, "-", "all", why(error))])

    def save(self) -> Path:
        for folder in self.folders:
            path = folder / f"gpu-{self.result['family']}.json"
            write_atomic(path, json.dumps(self.result, indent=1) + "\n")
            write_atomic(path.with_suffix(".md"), markdown(self.result))
        return path


def about(dry: bool) -> dict:
    import torch
    from harness import commit

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {
        "device": "none: a dry run" if dry else torch.cuda.get_device_name(),
        "family": "dry" if dry else gpu.family(),
        **commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("triton", "peft", "transformers", "opacus")},
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


# ---------------------------------------------------------------- tests


def run_tests(run: Run) -> None:
    """A pytest for each backend and one for whole steps: one that hangs or dies takes no other's proof along."""
    for group, chosen in TESTED.items():
        start, notes = time.monotonic(), run.folders[-1] / f"tests-{group}.jsonl"
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", str(TESTS), "-q", "-k", chosen, "-p", "gpu_outcomes"]
        command += ["-p", "no:cacheprovider"]
        if not run.dry and importlib.util.find_spec("xdist"):
            command += ["-n", str(min(os.cpu_count() or 1, 12))]  # Triton compiles on the host
        environment = {**os.environ, "LALORA_GPU_DRY": "1" if run.dry else "0", "LALORA_GPU_OUTCOMES": str(notes)}
        environment["TRITON_INTERPRET"] = "1" if run.dry else "0"
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "bench"), os.environ.get("PYTHONPATH"))))
        code: int | str = "out of time"
        with suppress(subprocess.TimeoutExpired):
            code = subprocess.run(
                command, env=environment, cwd=ROOT, timeout=max(min(run.left() - 60, TEST_SECONDS), 1)
            ).returncode
        kernels, failed = gpu_outcomes.read(notes)
        run.result["tests"][group] = {"exit": code, "failed": failed, "kernels": kernels}
        if group in BACKENDS:
            run.result["passed"][group] = sorted(name.partition(".")[2] for name, good in kernels.items() if good)
        run.result["seconds"][f"tests {group}"] = round(time.monotonic() - start)
        run.save()
        if not run.dry:
            prove(run)  # what is cut off keeps what was proven until then


def prove(run: Run) -> None:
    """Lift the mark of what passed, on this family of cards; what failed there loses an older proof.

    Whole steps must have passed too, or nothing is lifted. Tests that were cut off prove nothing and refute nothing.
    """
    tests, family = run.result["tests"], run.result["family"]
    steps = tests.get(STEPS, {}).get("kernels", {}).get(STEPS)
    proven = json.loads(PROVEN.read_text())
    for name, good in ((n, g) for t in tests.values() for n, g in t["kernels"].items() if n != STEPS):
        backend, _, op = name.partition(".")
        families = proven.setdefault(backend, {}).setdefault(op, {})
        if good and steps:
            families[family] = f"gpu-{family}.json"
        elif good is False:
            families.pop(family, None)
    proven = {b: {op: f for op, f in ops.items() if f} for b, ops in proven.items()}
    text = json.dumps({b: ops for b, ops in proven.items() if ops}, indent=1, sort_keys=True) + "\n"
    write_atomic(PROVEN, text)
    if run.out:
        write_atomic(run.out / PROVEN.name, text)
    gpu.proven.cache_clear()  # from here on dispatch chooses what the benchmarks are to measure


# ---------------------------------------------------------------- benchmarks


def backends(run: Run, op: str) -> dict:
    """The modules whose ``op`` passed."""
    return {b: importlib.import_module(m) for b, m in BACKENDS.items() if op in run.result["passed"].get(b, [])}


def run_ops(run: Run) -> None:
    import gpu_ops

    device, rounds, start = ("cpu", 1, time.monotonic()) if run.dry else ("cuda", 30, time.monotonic())
    for op, rows in (
        ("privatize", gpu_ops.privatize_rows),
        ("sample_grad", gpu_ops.sample_grad_rows),
        ("chacha20_normal", gpu_ops.normal_rows),
    ):
        with run.attempt(op):
            run.add(rows(backends(run, op), device, rounds))
    run.result["seconds"]["ops"] = round(time.monotonic() - start)


def run_steps(run: Run) -> None:
    import torch
    from gpu_ops import missing, why

    try:
        import gpu_steps
    except ImportError as error:
        run.add([missing("step", "all", "PEFT", why(error))])
        return

    from lalora_kernels import dispatch

    start, rounds = time.monotonic(), 1 if run.dry else 10
    device = "cpu" if run.dry else "cuda"
    run.result["serves"] = {op: row[device, torch.bfloat16] for op, row in dispatch.explain((device,)).items()}
    try:
        refused = gpu_steps.wrong(device)  # correctness first
    except ImportError as error:
        run.add([missing("step", "all", "PEFT", why(error))])
        return
    noise = backends(run, "chacha20_normal")
    cases = [
        (lambda s=s: gpu_steps.step_rows(s, noise, rounds, refused), s)
        for s in (gpu_steps.TINY if run.dry else gpu_steps.CASES)
    ]
    last = gpu_steps.TINY[0] if run.dry else gpu_steps.ROUND
    # The round after one case of each model: what comes last is what a slow machine goes without.
    cases.insert(len(cases) // 2, (lambda: gpu_steps.round_rows(last, min(rounds, 5), refused), last))
    for rows, spec in cases:
        if run.left() < 30:
            run.add([missing("step", f"{spec}", "all", "not run: out of time")])
        else:
            with run.attempt(f"step {spec}"):
                run.add(rows())
        if not run.dry:
            torch.cuda.empty_cache()
        run.result["seconds"]["steps"] = round(time.monotonic() - start)
        run.save()


def run_tuning(run: Run) -> None:
    """Last: it says what to pin next, and meets no target."""
    import gpu_ops

    start = time.monotonic()
    if "sample_grad" in run.result["passed"].get("triton", []) and run.left() > 30:
        run.add(gpu_ops.tuning_rows("cpu" if run.dry else "cuda", 1 if run.dry else 15))
    run.result["seconds"]["tuning"] = round(time.monotonic() - start)


def run_compile(run: Run) -> None:
    """Of a dry run: one configuration of each Triton kernel for sm_90."""
    start = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench/gpu_compile.py"), "--only", "triton", "--quick", "--archs", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    run.result["compile"] = {"exit": done.returncode, "kernels": done.stdout.count("| sm_90 ")}
    run.result["seconds"]["compile"] = round(time.monotonic() - start)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)


# ---------------------------------------------------------------- report

HEAD = ("what", "case", "against", "median", "quartiles", "target", "met")


def cells(row: dict) -> list[str]:
    against = row["against"] + (f" ({row['backend']})" if "backend" in row else "")
    if row["median"] is None:
        return [row["what"], row["case"], against, "-", "-", "-", row["note"]]
    spread = f"{row['low']:.3g} - {row['high']:.3g}"
    return [
        row["what"],
        row["case"],
        against,
        f"{row['median']:.3g}",
        spread,
        row["target"],
        {True: "yes", False: "NO", None: "-"}[row["met"]],
    ]


def line(row: dict) -> str:
    return "  ".join(cells(row))


def markdown(result: dict) -> str:
    fields = ("device", "family", "commit", "torch", "cuda", "triton", "peft", "opacus", "date")
    lines = ["# bench/gpu.sh", "", ", ".join(f"{f} {result[f]}" for f in fields), ""]
    if result["dry"]:
        lines += ["A dry run: no card, tiny shapes. The figures mean nothing and nothing is proven.", ""]
    for group, tests in result["tests"].items():
        passed = [name.partition(".")[2] or "all" for name, good in tests["kernels"].items() if good]
        cut = [name for name, good in tests["kernels"].items() if good is None]
        lines.append(f"- {group} passed: {', '.join(sorted(passed)) or 'nothing'}")
        lines += [f"  - failed: {name}" for name in tests["failed"][:20]]
        lines += [f"  - did not end, or all skipped: {', '.join(cut)}"] * bool(cut)
    if "serves" in result:
        lines.append(f"- in whole steps: {', '.join(f'{op} {name}' for op, name in result['serves'].items())}")
    lines += ["", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in result["rows"]]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--out", type=Path, help="a copy here of all that is written, as it comes")
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("LALORA_GPU_MINUTES", "8")))
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS))
    args = parser.parse_args()
    if args.dry:
        os.environ.update(TRITON_INTERPRET="1", LALORA_GPU_DRY="1")
    import torch

    if not args.dry and not torch.cuda.is_available():
        print("no CUDA device; without one: bash bench/gpu.sh --dry", file=sys.stderr)
        return 2
    if args.dry:
        import emulated

        from lalora_kernels import cuda

        cuda._module = emulated.load(emulated.build())
    run = Run(args.dry, args.out, args.minutes)
    parts = {"compile": run_compile, "tests": run_tests, "ops": run_ops, "steps": run_steps, "tuning": run_tuning}
    for name in GROUPS if args.dry else GROUPS[1:]:
        if name in args.only:
            with run.attempt(name):
                parts[name](run)
    path = run.save()
    for notes in run.folders[-1].glob("tests-*.jsonl"):
        notes.unlink()
    print("\n" + re.sub(r"(?s)^# .*?\n\n", "", path.with_suffix(".md").read_text()))
    judged = [row["met"] for row in run.result["rows"] if row["met"] is not None]
    if judged:
        print(f"{sum(judged)} of {len(judged)} targets met; commit {path.name}, its .md and {PROVEN.relative_to(ROOT)}")
    print(f"{path}: " + ", ".join(f"{k} {v} s" for k, v in run.result["seconds"].items()))
    codes = [t["exit"] for t in (*run.result["tests"].values(), run.result.get("compile", {"exit": 0}))]
    return 1 if any(codes) or run.result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())

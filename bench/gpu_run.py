"""What ``bench/gpu.sh`` runs once everything is built: tests on the card, then benchmarks, then the verdict.

    python bench/gpu_run.py [--dry] [--out FOLDER] [--minutes 8] [--only tests ops steps tuning compile]

Writes gpu-<family>.json and .md into bench/results and, of kernels all of whose tests passed, the proof into
lalora_kernels/proven.json: commit both. ``--dry`` needs no card: Triton interpreted and compiled, the CUDA kernels
emulated, tiny shapes, and nothing is proven.
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
import xml.etree.ElementTree as xml
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "python_tests")]
BACKENDS = {"cuda": "lalora_kernels.cuda", "triton": "lalora_kernels.triton_ops"}
TESTS = ROOT / "python_tests/test_gpu_card.py"
PROVEN = ROOT / "lalora_kernels/proven.json"
GROUPS = ("compile", "tests", "ops", "steps", "tuning")


class Run:
    """The result in the making; ``save`` after each part, so that what is cut off keeps what it has."""

    def __init__(self, dry: bool, out: Path, minutes: float):
        spent = float(os.environ.get("LALORA_GPU_SPENT", "0"))  # by gpu.sh, building
        self.dry, self.out, self.end = dry, out, time.monotonic() + 60 * minutes - spent
        self.result: dict = {"dry": dry, **about(dry), "passed": {}, "tests": {}, "rows": [], "seconds": {}}

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, rows: Iterable[dict]) -> None:
        for row in rows:
            if self.dry:
                row["met"] = None
            self.result["rows"].append(row)
            print(line(row), flush=True)

    def save(self) -> Path:
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"gpu-{self.result['family']}.json"
        path.write_text(json.dumps(self.result, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(self.result))
        return path


def about(dry: bool) -> dict:
    import torch
    from harness import _git

    from lalora_kernels import gpu

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {
        "device": "none: a dry run" if dry else torch.cuda.get_device_name(),
        "family": "dry" if dry else gpu.family(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("triton", "peft", "transformers", "opacus")},
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


# ---------------------------------------------------------------- tests


def run_tests(run: Run) -> None:
    """One pytest for each backend, so that one that hangs or dies takes no other's proof along."""
    for backend in BACKENDS:
        start, report = time.monotonic(), run.out / f"tests-{backend}.xml"
        run.out.mkdir(parents=True, exist_ok=True)
        report.unlink(missing_ok=True)
        chosen = "cuda" if backend == "cuda" else "not cuda"  # the steps' tests go with Triton's
        command = [sys.executable, "-m", "pytest", str(TESTS), "-q", "-k", chosen]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        if not run.dry and importlib.util.find_spec("xdist"):
            command += ["-n", str(min(os.cpu_count() or 1, 12))]  # Triton compiles on the host
        environment = {**os.environ, "LALORA_GPU_DRY": "1" if run.dry else "0"}
        environment["TRITON_INTERPRET"] = "1" if run.dry else "0"
        try:
            code = subprocess.run(
                command, env=environment, cwd=ROOT, timeout=max(min(run.left() - 60, 240), 1)
            ).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
        tested, failed, steps = outcomes(report) if report.exists() else ({}, ["no report"], None)
        ops = {op for name in tested for b, _, op in [name.partition(".")] if b == backend and tested[name]}
        run.result["passed"][backend] = sorted(ops)
        run.result["tests"][backend] = {"exit": code, "failed": failed, "kernels": tested, "steps": steps}
        run.result["seconds"][f"tests {backend}"] = round(time.monotonic() - start)
        run.save()


def outcomes(report: Path) -> tuple[dict[str, bool], list[str], bool | None]:
    """Kernel -> whether all of its tests that ran passed, at least one of them; names of tests that failed; whether
    all tests of whole steps, which are about no one kernel, passed (None: none ran)."""
    tested, failed, steps = {}, [], None
    for case in xml.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        bad = case.find("failure") is not None or case.find("error") is not None
        if bad:
            failed.append(case.get("name"))
        kernels = [prop.get("value") for prop in case.iter("property") if prop.get("name") == "kernel"]
        for kernel in kernels:
            tested[kernel] = tested.get(kernel, True) and not bad
        if not kernels:
            steps = steps is not False and not bad
    return tested, failed, steps


def prove(run: Run) -> None:
    """Lift the mark of what passed, on this family of cards; what failed there loses an older proof.

    Whole steps must have passed too, or no kernel has.
    """
    found = [t["steps"] for t in run.result["tests"].values() if t["steps"] is not None]
    if not found or not all(found):
        run.result["passed"] = {backend: [] for backend in BACKENDS}
    path, family = run.save(), run.result["family"]
    proven = json.loads(PROVEN.read_text())
    for backend, tested in ((b, t["kernels"]) for b, t in run.result["tests"].items()):
        for name, good in tested.items():
            families = proven.setdefault(backend, {}).setdefault(name.partition(".")[2], {})
            if good and name.partition(".")[2] in run.result["passed"][backend]:
                families[family] = path.name
            else:
                families.pop(family, None)
    proven = {b: {op: f for op, f in ops.items() if f} for b, ops in proven.items()}
    PROVEN.write_text(json.dumps({b: ops for b, ops in proven.items() if ops}, indent=1, sort_keys=True) + "\n")
    from lalora_kernels import gpu

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
        run.add(rows(backends(run, op), device, rounds))
    run.result["seconds"]["ops"] = round(time.monotonic() - start)
    run.save()


def run_steps(run: Run) -> None:
    try:
        import gpu_steps
    except ImportError as error:
        run.add([missing("step", "all", "PEFT", f"not installed: {error.name}")])
        return
    import torch

    from lalora_kernels import dispatch

    start, rounds = time.monotonic(), 1 if run.dry else 10
    device = "cpu" if run.dry else "cuda"
    run.result["serves"] = {op: dispatch.choose(device, torch.bfloat16, op=op) for op in dispatch.OPS}
    try:
        refused = gpu_steps.wrong(device)  # correctness first
    except ImportError as error:
        run.add([missing("step", "all", "PEFT", f"not installed: {error.name}")])
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
    run.save()


def missing(*row: str) -> dict:
    return dict(zip(("what", "case", "against", "note"), row), median=None, met=None)


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
    for backend, tests in result["tests"].items():
        lines.append(f"- {backend} passed: {', '.join(result['passed'][backend]) or 'nothing'}")
        lines += [f"  - failed: {name}" for name in tests["failed"][:20]]
    if "serves" in result:
        lines.append(f"- in whole steps: {', '.join(f'{op} {name}' for op, name in result['serves'].items())}")
    lines += ["", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in result["rows"]]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--out", type=Path, help="default: bench/results; of a dry run build/gpu-dry")
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
    run = Run(args.dry, args.out or ROOT / ("build/gpu-dry" if args.dry else "bench/results"), args.minutes)
    if args.dry and "compile" in args.only:
        run_compile(run)
    if "tests" in args.only:
        run_tests(run)
        if not args.dry:
            prove(run)
    if "ops" in args.only:
        run_ops(run)
    if "steps" in args.only:
        run_steps(run)
    if "tuning" in args.only:
        run_tuning(run)
    path = run.save()
    for report in run.out.glob("tests-*.xml"):
        report.unlink()
    print("\n" + re.sub(r"(?s)^# .*?\n\n", "", path.with_suffix(".md").read_text()))
    judged = [row["met"] for row in run.result["rows"] if row["met"] is not None]
    if judged:
        print(f"{sum(judged)} of {len(judged)} targets met; commit {path.name}, its .md and {PROVEN.relative_to(ROOT)}")
    print(f"{path}: " + ", ".join(f"{k} {v} s" for k, v in run.result["seconds"].items()))
    broken = [b for b, t in run.result["tests"].items() if t["exit"]] + (
        ["compile"] if run.result.get("compile", {}).get("exit") else []
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""``make planted``: every fault in a copy of the package, the tests that should notice it, and a table of the outcome.

python -m planted [--out FILE.md] [NAME ...], from python_tests. Exit code 1 where a fault is not caught.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from planted.fault import Fault
from planted.faults import FAULTS

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("lalora_kernels", "python_tests", "csrc", "build", "setup.py", "pyproject.toml")
LIMIT_S = 600


def copy_of_the_product(folder: Path) -> None:
    """With build/ and its times, so that ninja builds again only what a fault touches."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__", ".pytest_cache", ".hypothesis")
            shutil.copytree(source, folder / name, ignore=skip, copy_function=shutil.copy2)
        elif source.exists():
            shutil.copy2(source, folder / name)


def environment(folder: Path) -> dict[str, str]:
    # The copy's package, not the installed one, also in the processes that tests start.
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit code and output, up to the first failure."""
    paths = [f"python_tests/{name}" for name in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", *paths]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return -1, f"no answer in {LIMIT_S} s"
    return done.returncode, done.stdout + done.stderr


def plant(fault: Fault, folder: Path) -> None:
    path = folder / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: {fault.old!r} stands {text.count(fault.old)} times in {fault.file}")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    if fault.native:
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        env = {**environment(folder), "MAX_JOBS": "1", "LALORA_NO_CUDA": "1"}
        done = subprocess.run(build, cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{fault.name}: does not compile\n{done.stdout}{done.stderr}")


def caught_by(fault: Fault) -> tuple[str | None, float, str]:
    """(test that failed, or None; seconds; pytest's output). An error outside a test does not count as caught."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        folder = Path(name)
        copy_of_the_product(folder)
        plant(fault, folder)
        code, output = run_tests(folder, fault.tests)
    failed = re.findall(r"^(?:FAILED|ERROR) python_tests/(\S+::\S+)", output, re.MULTILINE)
    return (failed[0] if code == 1 and failed else None), time.monotonic() - began, output


def main() -> int:
    parser = argparse.ArgumentParser(prog="planted", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of faults' names (default: all)")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    chosen = [f for f in FAULTS if not args.names or any(part in f.name for part in args.names)]
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        copy_of_the_product(Path(name))
        code, output = run_tests(Path(name), tuple(sorted({t for f in chosen for t in f.tests})))
    if code:
        print(f"{output}\nthe suite fails without any fault; nothing can be said")
        return 1
    lines = ["| fault | file | caught by | seconds |", "|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    missed = 0
    for fault in chosen:
        test, seconds, output = caught_by(fault)
        missed += test is None
        lines.append(f"| {fault.name} | `{fault.file}` | {f'`{test}`' if test else '**not caught**'} | {seconds:.0f} |")
        print(lines[-1], flush=True)
        if test is None:
            print(output[-1500:], file=sys.stderr)
    lines.append(f"\n{len(chosen) - missed} of {len(chosen)} planted faults are caught.")
    print(lines[-1])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("# Planted faults\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""``make sanitize``: kernels and fuzzer under AddressSanitizer with UBSan, kernels again under ThreadSanitizer.

python sanitize.py [--plant] [address] [thread]. With --plant each build has to find a fault put into a copy of its
source. Exit code 1 where a test fails, a sanitizer reports, or a fault goes unseen.

Seen: csrc/cpu and csrc/bindings.cpp, and the memory that torch allocates for them. Not seen: torch, Python and libgomp,
which are not instrumented; csrc/cpu/tsan.h tells ThreadSanitizer what libgomp promises.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from planted.__main__ import ROOT, copy_of_the_product

TESTS = ("test_backends.py", "test_privatize.py", "test_chacha20_normal.py")
FUZZ = ("test_fuzz_files.py", "test_fuzz_operations.py", "test_fuzzing.py")
COMMON = "-O1 -g1 -fno-omit-frame-pointer"
LIMIT_S = 3600
STOPPED = 66  # exit code of a process that a sanitizer ended; pytest's own are below 6


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in ``file``; ``tests`` (pytest -k) run into it, and the report says ``says``."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    says: str


@dataclass(frozen=True)
class Sanitizer:
    flags: str
    libraries: tuple[str, ...]  # loaded before Python, which is not linked with them
    options: dict[str, str]
    tests: tuple[str, ...]
    faults: tuple[Fault, ...]


SANITIZERS = {
    "address": Sanitizer(
        "-fsanitize=address,undefined -fno-sanitize-recover=all",
        ("libasan.so", "libstdc++.so"),  # ASan looks for the throw that it intercepts when it starts
        {
            "ASAN_OPTIONS": f"detect_leaks=0:exitcode={STOPPED}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={STOPPED}",
        },
        (*TESTS, *FUZZ),  # for FUZZ_MINUTES, where that is set
        (
            Fault(
                "a read past the end of a gradient",
                "csrc/cpu/privatize.cpp",
                "for (int64_t e = 0; e < count; ++e) {\n        float sum",
                "for (int64_t e = 0; e <= count; ++e) {\n        float sum",
                "test_privatize",
                "heap-buffer-overflow",
            ),
            Fault(
                "a vector stored where it is not aligned",
                "csrc/cpu/chacha20_normal.cpp",
                "store(out + e + k * W, v[k]);",
                "*(vf*)(out + e + k * W) = v[k];",
                "test_chacha20_normal",
                "misaligned address",
            ),
        ),
    ),
    "thread": Sanitizer(
        "-fsanitize=thread -Wl,--wrap=GOMP_parallel -Wl,--wrap=GOMP_barrier",
        ("libtsan.so",),
        {"TSAN_OPTIONS": f"halt_on_error=1:ignore_noninstrumented_modules=1:exitcode={STOPPED}"},
        TESTS,
        (
            Fault(
                "a sum begun before all gradients are there",
                "csrc/cpu/sample_grad_clip.cpp",
                "#pragma omp for schedule(static)\n            for (int64_t task = 0; task < here * c.count",
                "#pragma omp for schedule(static) nowait\n            for (int64_t task = 0; task < here * c.count",
                "test_sample_grad_clip",
                "data race",
            ),
            Fault(
                "two calls that share their scratch memory",
                "csrc/cpu/isa.cpp",
                "thread_local Buffer buffers",
                "Buffer buffers",
                "test_two_python_threads",
                "data race",
            ),
        ),
    ),
}


def build(source: Path, target: Path, sanitizer: Sanitizer) -> None:
    """The package of ``source`` with instrumented kernels, in ``target``."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(target)]
    env = {**os.environ, "LALORA_CXXFLAGS": f"{COMMON} {sanitizer.flags}", "LALORA_NO_CUDA": "1", "CXX": "g++"}
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nthe instrumented kernels do not build")


def environment(package: Path, sanitizer: Sanitizer) -> dict[str, str]:
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in sanitizer.libraries
    ]
    return {
        **os.environ,
        **sanitizer.options,
        "PYTHONPATH": str(package),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LD_PRELOAD": ":".join(found),
        "OMP_NUM_THREADS": "3",  # one would race with nobody
    }


def run(package: Path, sanitizer: Sanitizer, *arguments: str, **kwargs) -> subprocess.CompletedProcess:
    """pytest on the kernels' tests, once it is sure that it has the right kernels: Python looks first where it runs."""
    env = environment(package, sanitizer)
    which = "from lalora_kernels import native; print(native.require().__file__)"
    loaded = subprocess.run([sys.executable, "-c", which], env=env, cwd=package, capture_output=True, text=True)
    if not loaded.stdout.startswith(str(package)):
        raise SystemExit(f"{loaded.stdout}{loaded.stderr}\nthe instrumented kernels do not load")
    paths = [str(ROOT / "python_tests" / name) for name in sanitizer.tests]
    options = ["-q", "-x", "--timeout", "0", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    command = [sys.executable, "-m", "pytest", *options, *arguments, *paths]
    return subprocess.run(command, cwd=package, env=env, text=True, timeout=LIMIT_S, **kwargs)


def clean(name: str, sanitizer: Sanitizer) -> bool:
    """Whether the tests pass and nothing is reported."""
    package = ROOT / "build" / "sanitized" / name
    build(ROOT, package, sanitizer)
    return run(package, sanitizer).returncode == 0


def found(fault: Fault, sanitizer: Sanitizer) -> bool:
    """Whether the sanitizer, and not a test, stops on the fault."""
    with tempfile.TemporaryDirectory(prefix="sanitize-") as name:
        copy, package = Path(name) / "source", Path(name) / "package"
        copy.mkdir()
        copy_of_the_product(copy)
        path = copy / fault.file
        text = path.read_text(encoding="utf-8")
        if text.count(fault.old) != 1:
            raise SystemExit(f"{fault.name}: {fault.old!r} stands {text.count(fault.old)} times in {fault.file}")
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        build(copy, package, sanitizer)
        done = run(package, sanitizer, "-k", fault.tests, "-s", capture_output=True)
    seen = done.returncode == STOPPED and fault.says in done.stdout + done.stderr
    if not seen:
        print(done.stdout[-1500:], done.stderr[-1500:], file=sys.stderr)
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*SANITIZERS, []], help="default: both")
    parser.add_argument("--plant", action="store_true", help="show that each build finds a fault")
    args = parser.parse_args()
    ok = True
    for name, sanitizer in SANITIZERS.items():
        if args.names and name not in args.names:
            continue
        if args.plant:
            for fault in sanitizer.faults:
                seen = found(fault, sanitizer)
                print(f"{name}: {fault.name} ({fault.file}): {'found' if seen else 'NOT FOUND'}", flush=True)
                ok &= seen
        else:
            passed = clean(name, sanitizer)
            print(f"{name}: {'clean' if passed else 'FAILED'}", flush=True)
            ok &= passed
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

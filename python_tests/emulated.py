"""The CUDA kernels on the emulated machine of csrc/cuda/emulate: the module ``_cuda_emulated``, built at first use."""

import fcntl
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "-x c++ -std=c++17 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -DLALORA_EMULATE".split()


def build(sources: Path = ROOT / "csrc", folder: Path | None = None) -> Path:
    """The module's file, up to date with every source under ``sources``; one process at a time."""
    import pybind11

    folder = folder or ROOT / "build" / f"emulated-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = [p for p in (*sources.glob("*.h"), *sources.glob("cuda/**/*")) if p.is_file()]
        newest = max(p.stat().st_mtime for p in files)
        if target.exists() and target.stat().st_mtime > newest:
            return target
        units = [*(sources / "cuda").glob("*.cu"), *(sources / "cuda").glob("**/*.cpp")]
        include = [sources / "cuda/emulate", pybind11.get_include(), sysconfig.get_path("include")]
        compiler = os.environ.get("CXX", "g++")

        def compile_unit(unit: Path) -> Path:
            made = folder / f"{unit.stem}.o"
            command = [compiler, *FLAGS, *(f"-I{i}" for i in include), "-c", str(unit), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
            return made

        with ThreadPoolExecutor(2) as pool:
            objects = [str(o) for o in pool.map(compile_unit, units)]
        subprocess.run([compiler, "-shared", *objects, "-o", str(target)], check=True)
    return target


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

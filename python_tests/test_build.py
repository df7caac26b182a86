"""The build as a fresh machine does it: no torch, only a C++ compiler; nothing that did not change is built again."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import dist
import pytest

from lalora_kernels import dispatch, native

ROOT = Path(__file__).resolve().parent.parent
FAST = "-O0 -Wno-unused"  # the last -O wins; correctness of the optimised build is every other test's matter
# _C under its own name, without the package (which imports torch).
IMPORT = (
    "import importlib.util, sys\n"
    "spec = importlib.util.spec_from_file_location('_C', sys.argv[1])\n"
    "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
    "print([name for name, _ in module.isas()], module.isa(), 'torch' in sys.modules)\n"
)


# pybind11's part of a module takes the compiler longest.
BARE = "#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_C, m) { m.doc() = LALORA_COMPILER; }\n"


def copy_sources(folder: Path, *slugs: str) -> None:
    """The build's files and csrc, of the CPU's operations ``slugs`` alone, which nothing calls."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "csrc/bindings.cpp").write_text(BARE)
    for path in (folder / "csrc/cpu").glob("*.cpp"):
        if path.stem not in slugs:
            path.unlink()
    (folder / "lalora_kernels").mkdir()
    (folder / "lalora_kernels/__init__.py").write_text("")
    poison = folder / "poison"
    poison.mkdir()
    (poison / "torch.py").write_text("raise ImportError('the build imported torch')\n")


def build(folder: Path, **env: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder / "poison"), "LALORA_CXXFLAGS": FAST, **env}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def compiled(done: subprocess.CompletedProcess) -> set[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return {Path(p).name for p in re.findall(r"\] (?:cxx|link|nvcc|nvlink) (\S+)", done.stdout)}


def foreign(path: Path) -> list[str]:
    """The object's functions that the linker may take for another instruction set's too: code for AVX-512 would run on
    every machine."""
    symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    isa = path.name.split(".")[1]
    return [s for s in symbols.splitlines() if re.search(r" W ", s) and f"lalora::{isa}::" not in s]


def test_a_fresh_build_and_a_second_one(tmp_path):
    """Builds without torch, all instruction sets; then nothing, then what depends on one changed header."""
    copy_sources(tmp_path, "isa", "chacha20_normal")
    objects = {f"chacha20_normal.{isa}.o" for isa, _ in native.require().isas()}
    assert compiled(build(tmp_path, LALORA_NO_CUDA="1")) == objects | {"isa.o", "bindings.o", "_C.so"}
    assert not compiled(build(tmp_path, LALORA_NO_CUDA="1"))
    header = tmp_path / "csrc/cpu/noise.h"
    header.write_text(header.read_text() + "\n")
    assert compiled(build(tmp_path, LALORA_NO_CUDA="1")) == objects | {"_C.so"}
    for name in objects:
        (path,) = (tmp_path / "build").rglob(name)
        assert not foreign(path), name


def test_no_instruction_set_lends_another_its_functions():
    """The objects that the installed module was linked from."""
    folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}" / "_C"
    if not folder.exists():
        pytest.skip("the package was not built in this folder")
    for slug in {p.stem for p in (ROOT / "csrc/cpu").glob("*.cpp")} - {"isa"}:
        for isa, _ in native.require().isas():
            assert not foreign(folder / f"{slug}.{isa}.o"), (slug, isa)


def test_the_module_needs_no_torch():
    done = subprocess.run([sys.executable, "-c", IMPORT, native.require().__file__], capture_output=True, text=True)
    isas = [name for name, _ in native.require().isas()]
    assert done.stdout.startswith(str(isas)) and done.stdout.strip().endswith("False"), done.stderr


def test_no_compiler(tmp_path):
    copy_sources(tmp_path)
    done = build(tmp_path, PATH=str(tmp_path), CXX="")
    assert done.returncode
    assert "apt install g++" in done.stderr


def test_a_compiler_error_is_shown(tmp_path):
    copy_sources(tmp_path)
    (tmp_path / "csrc/cpu/isa.cpp").write_text("#error broken on purpose\n")
    done = build(tmp_path, LALORA_NO_CUDA="1")
    assert done.returncode and "broken on purpose" in done.stdout + done.stderr
    assert "building the kernels failed" in done.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_cuda_sources_become_a_module_that_needs_no_driver(tmp_path):
    copy_sources(tmp_path)
    shutil.rmtree(tmp_path / "csrc/cuda", ignore_errors=True)
    (tmp_path / "csrc/cuda").mkdir()
    (tmp_path / "csrc/cuda/twice.cu").write_text(
        "#include <cuda_runtime.h>\n"
        '#include "../chacha20.h"\n'
        '#include "../clip.h"\n'
        "__global__ void normals(float* out, uint32_t w) {\n"
        "    const float normal = lalora::normal_from_words<lalora::ScalarOps>(w, w, w, w);\n"
        "    out[threadIdx.x] = normal + lalora::clip_factor(1, 1, 1);\n"
        "}\n"
        "int launch(float* out) { normals<<<1, 32>>>(out, 7u); return (int)cudaGetLastError(); }\n"
    )
    (tmp_path / "csrc/cuda/bindings.cpp").write_text(
        "#include <pybind11/pybind11.h>\n"
        "int launch(float*);\n"
        'PYBIND11_MODULE(_cuda, m) { m.def("launch", [] { return launch(nullptr); }); }\n'
    )
    first = compiled(build(tmp_path, LALORA_CUDA_ARCHS="80"))
    assert {"twice.o", "_cuda.so"} <= first
    assert not compiled(build(tmp_path, LALORA_CUDA_ARCHS="80"))
    code = "import sys; sys.path.insert(0, sys.argv[1]); from lalora_kernels import _cuda; print(_cuda.launch())"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().isdigit(), done.stderr


def test_no_torch_header():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_the_report():
    """python -m lalora_kernels: version, features, devices, a backend for each operation."""
    done = subprocess.run([sys.executable, "-m", "lalora_kernels"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for expected in ("lalora_kernels", "compiled for", "CPU features", "threads", "devices", *dispatch.OPS):
        assert expected in done.stdout
    assert native.require().isa() in done.stdout


def test_the_report_says_when_the_kernels_cannot_run():
    environment = {**os.environ, "LALORA_CPU_ISA": "avx1024"}
    done = subprocess.run([sys.executable, "-m", "lalora_kernels"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "avx1024" in done.stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says what belongs to the sources; this is no checkout")
def test_sdist_and_wheel_hold_what_is_needed_and_no_more(tmp_path):
    """The lists of files alone; ``make dist`` builds, installs and steps."""
    sources, out = tmp_path / "sources", tmp_path / "out"
    for name in dist.tracked():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, sources / name)
    (sources / "docs/api").mkdir()
    (sources / "docs/api/index.html").write_text("made by make docs")
    for command in (["sdist", "-d", out], ["build_py", "-d", out / "lib"]):
        done = subprocess.run([sys.executable, "setup.py", "-q", *command], cwd=sources, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (sdist,) = out.glob("*.tar.gz")
    names = dist.sdist_names(sdist)
    assert not dist.wrong_in_sdist(names)
    assert dist.wrong_in_sdist([n for n in names if n != "csrc/lalora.h"]) == ["missing csrc/lalora.h"]
    library = [str(p.relative_to(out / "lib")) for p in (out / "lib").rglob("*") if p.is_file()]
    compiled = f"lalora_kernels/_C.{sys.implementation.cache_tag}-x86_64-linux-gnu.so"
    assert not dist.wrong_in_wheel([*library, compiled, "lalora_kernels-0.1.0.dist-info/METADATA"])
    assert dist.wrong_in_wheel(library) == ["missing lalora_kernels/_C"]
    assert dist.wrong_in_wheel([*library, compiled, "csrc/lalora.h"]) == ["too much: csrc/lalora.h"]


def test_one_openmp_runtime():
    """torch and the kernels share torch's: two pools of threads in one process would contend for the cores."""
    code = (
        "import torch; from lalora_kernels import native; native.require()\n"
        "print(*sorted({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split()[-1]}), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    runtimes = [line for line in done.stdout.split() if re.search(r"lib[gi]?omp\d?[-.]", Path(line).name)]
    assert len(runtimes) == 1, done.stdout

"""Builds csrc/ with ninja: in parallel, and on a second build only what changed (objects stay in build/<tag>/).

No torch is needed to build. Environment: CXX and NVCC name the compilers, LALORA_CXXFLAGS adds flags (a build of its
own), LALORA_CUDA_ARCHS lists the GPU targets ("80;90a"), LALORA_NO_CUDA=1 leaves the CUDA module out.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CPU_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=fast -fno-math-errno -Wall -Wextra"
ISA_FLAGS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = "-mavx2 -mfma"
    ISA_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma"
    ISA_FLAGS["avx512bf16"] = ISA_FLAGS["avx512"] + " -mavx512bf16"
COMMON = ("isa",)  # csrc/cpu sources that are compiled once, for any CPU


def find_cxx() -> str:
    for name in [os.environ.get("CXX"), "g++", "clang++", "c++"]:
        path = name and shutil.which(name)
        if path:
            return path
    raise CompileError(
        "lalora_kernels needs a C++17 compiler with OpenMP and found none. Install one (Debian, Ubuntu: "
        "apt install g++; Fedora: dnf install gcc-c++; conda: conda install gxx) or name it in CXX."
    )


def instruction_sets(cxx: str) -> dict[str, str]:
    """Name and flags of those that this compiler knows (bfloat16 products: g++ 10)."""
    known = {}
    for isa, flags in ISA_FLAGS.items():
        probe = [cxx, *flags.split(), "-x", "c++", "-E", os.devnull]
        if not flags or subprocess.run(probe, capture_output=True).returncode == 0:
            known[isa] = flags
    return known


def find_nvcc() -> str | None:
    if os.environ.get("LALORA_NO_CUDA"):
        return None
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("NVCC"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in (c and shutil.which(c) for c in candidates) if path), None)


def cuda_sources() -> list[Path]:
    folder = ROOT / "csrc/cuda"
    return sorted(folder.glob("*.cu")) if (folder / "bindings.cpp").exists() else []


def gencode(archs: str) -> str:
    return " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs.replace(",", ";").split(";") if a)


class Ninja:
    """A build.ninja in the making; paths are relative to the repository's root."""

    def __init__(self, folder: Path):
        self.folder, self.lines = folder, []

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, out: str, rule: str, inputs: list[str], **variables: str) -> str:
        self.lines.append(f"build {out}: {rule} {' '.join(inputs)}")
        self.lines += [f"  {k} = {v}" for k, v in variables.items()]
        return out

    def run(self, target: str, env: dict[str, str]) -> None:
        import ninja

        path = ROOT / self.folder / "build.ninja"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"builddir = {self.folder}\n" + "\n".join(self.lines) + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        program = Path(ninja.BIN_DIR) / "ninja"
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [str(program), *jobs, "-f", str(path.relative_to(ROOT)), target]
        if subprocess.run(command, cwd=ROOT, env=env).returncode:
            raise CompileError("building the kernels failed; the compiler's messages stand above")


class build_kernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cxx, flags = find_cxx(), os.environ.get("LALORA_CXXFLAGS", "")
        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        if flags:
            tag += "-" + hashlib.sha256(flags.encode()).hexdigest()[:8]
        module = ext.name.rpartition(".")[2]
        folder = Path("build") / tag / module
        ninja = Ninja(folder)
        version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
        ninja.rule("cxx", f"{cxx} {CPU_FLAGS} {flags} $flags -MMD -MF $out.d -c $in -o $out", depfile=True)
        ninja.rule("link", f"{cxx} -shared -fopenmp {flags} $in -o $out")
        target = f"{folder}/{module}.so"
        build = self.cuda_module if module == "_cuda" else self.cpu_module
        build(ninja, folder, target, cxx, version)
        # The headers' place differs between isolated builds: in the command line it would rebuild everything.
        import pybind11

        include = [pybind11.get_include(), sysconfig.get_path("include")]
        env = {**os.environ, "CPLUS_INCLUDE_PATH": os.pathsep.join(include)}
        ninja.run(target, env)
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = out.with_name(f".{out.name}.{os.getpid()}")  # a running process keeps the file that it has mapped
        shutil.copyfile(ROOT / target, staged)
        os.replace(staged, out)

    @staticmethod
    def cpu_module(ninja: Ninja, folder: Path, target: str, cxx: str, compiler: str) -> None:
        isas = instruction_sets(cxx)
        compiled = " ".join(f"-DLALORA_WITH_{isa}" for isa in isas)
        quoted = "-DLALORA_COMPILER='\"" + compiler.replace("$", "$$").replace("'", "") + "\"'"
        objects = [ninja.build(f"{folder}/bindings.o", "cxx", ["csrc/bindings.cpp"], flags=quoted)]
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            slug, path = source.stem, f"csrc/cpu/{source.name}"
            if slug in COMMON:
                objects.append(ninja.build(f"{folder}/{slug}.o", "cxx", [path], flags=compiled))
                continue
            for isa, isa_flags in isas.items():
                objects.append(
                    ninja.build(f"{folder}/{slug}.{isa}.o", "cxx", [path], flags=f"-DLALORA_ISA={isa} {isa_flags}")
                )
        ninja.build(target, "link", objects)

    @staticmethod
    def cuda_module(ninja: Ninja, folder: Path, target: str, cxx: str, compiler: str) -> None:
        """csrc/cuda; the runtime is static, so a machine without a driver can import the module."""
        nvcc = find_nvcc()
        archs = gencode(os.environ.get("LALORA_CUDA_ARCHS", "80;90a"))
        options = f"-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden --expt-relaxed-constexpr {archs}"
        ninja.rule("nvcc", f"{nvcc} {options} -MMD -MF $out.d -c $in -o $out", depfile=True)
        ninja.rule("nvlink", f"{nvcc} -shared --cudart=static {archs} $in -o $out")
        objects = []
        for source in [ROOT / "csrc/cuda/bindings.cpp", *cuda_sources()]:
            objects.append(ninja.build(f"{folder}/{source.stem}.o", "nvcc", [f"csrc/cuda/{source.name}"]))
        ninja.build(target, "nvlink", objects)


extensions = [Extension("lalora_kernels._C", [])]
if find_nvcc() and cuda_sources():
    extensions.append(Extension("lalora_kernels._cuda", []))

setup(ext_modules=extensions, cmdclass={"build_ext": build_kernels})

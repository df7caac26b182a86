"""``make peft-tests``: PEFT's own tests of LoRA's layers, from its source distribution, with our forwards.

Patched, every layer of LoRA that ``patch_peft`` serves gets our class as soon as PEFT has made it; layers that it
refuses (DoRA and other variants, quantized bases, other base layers) stay PEFT's. What did not pass is run again by
PEFT alone: a test that passes then is a fault, which the command names and ends with 1. Tests that need a download or a
GPU fail or are skipped both times; what diffusers and datasets would give to them is a stand-in.
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
FILE = "tests/test_custom_models.py"
OTHERS = "adalora glora gralora randlora tinylora unilora vblora delora velora"  # other tuners; -k knows no capitals
PATCHED = "LALORA_PATCHED"  # set in the run with the patch
OUTCOMES: dict[str, str] = {}
SWAPPED: Counter[str] = Counter()
FORWARDS: Counter[str] = Counter()
LEFT: Counter[str] = Counter()  # why patch_peft refuses a layer


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
    from peft.tuners.lora import LoraLayer, LoraModel

    from lalora_kernels.peft_layers import CLASSES, Patched
    from lalora_kernels.peft_patch import _refusal

    inject = LoraModel.inject_adapter

    def injected(self, model, *args, **kwargs):
        done = inject(self, model, *args, **kwargs)
        for module in model.modules():
            if not isinstance(module, LoraLayer) or isinstance(module, Patched):
                continue
            if why := _refusal(module, CLASSES):
                LEFT[why] += 1
            else:
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
    found = {"outcomes": OUTCOMES, "swapped": SWAPPED, "forwards": FORWARDS, "left": LEFT}
    Path(os.environ["LALORA_RESULT"]).write_text(json.dumps(found))


def run(source: Path, patched: bool, which: list[str]) -> dict:
    """The outcomes of one run by test, and what was swapped; ``which``: pytest's arguments."""
    result = source / f"result-{patched}.json"
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    (source / "tests/__init__.py").touch()
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "LALORA_RESULT": str(result)}
    env[PATCHED] = "1" if patched else ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_own", "-p", "no:cacheprovider", "-o", "addopts="]
    subprocess.run([*command, "--tb=no", "--timeout=300", *which], cwd=source, env=env)
    return json.loads(result.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--also", default="", metavar="EXPRESSION", help="narrow pytest's -k by this")
    args = parser.parse_args()
    release = version("peft")
    chosen = f"lora and not ({' or '.join(OTHERS.split())})" + (f" and ({args.also})" if args.also else "")
    with tempfile.TemporaryDirectory(prefix="peft-tests-") as name:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "peft", "-d", name]
        subprocess.run([*command, f"peft=={release}"], check=True)
        (archive,) = Path(name).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(name, filter="data")
        source = archive.with_name(re.sub(r"\.tar\.gz$", "", archive.name))
        ours = run(source, True, [FILE, "-k", chosen])
        failed = sorted(test for test, outcome in ours["outcomes"].items() if outcome != "passed")
        (source / "again.txt").write_text("".join(f"{test}\n" for test in failed))
        alone = run(source, False, ["@again.txt"])["outcomes"] if failed else {}
    lost = [test for test in failed if alone.get(test) == "passed"]
    print(f"PEFT {release}, {FILE}, -k {chosen!r}, patched: {dict(Counter(ours['outcomes'].values()))}")
    print(f"layers with our class: {ours['swapped']}; calls of our forwards: {ours['forwards']}")
    for why, count in sorted(ours["left"].items(), key=lambda item: -item[1]):
        print(f"{count} layers left to PEFT: {why}")
    print(f"what did not pass, by PEFT alone: {dict(Counter(alone.values()))}")
    for test in lost:
        print(f"passes without the patch and not with it: {test}")
    return 1 if lost or not ours["forwards"] else 0


if __name__ == "__main__":
    sys.exit(main())

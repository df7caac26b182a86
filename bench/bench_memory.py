"""Peak memory of a step, every contender in a fresh process. Memory does not vary as time does: one run each."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from contenders import CONTENDERS
from memory import OURS
from zoo import MODELS, Spec

SPECS = [
    *(Spec(model, targets, 16) for model in ("bert", "vit") for targets in ("qv", "all-linear")),
    *(Spec(model, "all-linear", 16) for model in ("swin", "roberta")),
]
LARGE = ("swin", "roberta")  # compared with DP-LoRA in Opacus


@pytest.mark.parametrize("spec", SPECS, ids=str)
def bench_memory(race, spec):
    race.facts(model=spec.model, what=MODELS[spec.model][0], targets=spec.targets, r=spec.r, batch=spec.batch)
    names = [*OURS, *(n for n in CONTENDERS if spec.model not in LARGE or n != "torch.func vmap")]

    def measure() -> dict[str, dict]:
        with ThreadPoolExecutor(2) as pool:  # two at a time: their memory does not mind
            return dict(zip(names, pool.map(lambda name: _child(spec, name), names)))

    race.record["bytes"] = race.benchmark.pedantic(measure, rounds=1)


def _child(spec: Spec, name: str) -> dict:
    command = [sys.executable, str(Path(__file__).with_name("memory.py")), spec.model, spec.targets, str(spec.r), name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name}: {result.stderr.strip().splitlines()[-1][:300]}")
    return json.loads(result.stdout.splitlines()[-1])

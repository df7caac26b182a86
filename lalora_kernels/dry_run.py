"""What one private step takes on this machine, in time and memory: measured, in a process of its own.

``python -m lalora_kernels.dry_run`` reads a job as JSON from its input and writes one JSON object; ``dry_run`` runs it.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lalora_kernels.adapt import saved_modules, unadapt
from lalora_kernels.data import BadInput
from lalora_kernels.federated.client import Client, base_rate, get_state
from lalora_kernels.federated.config import Config, make_config
from lalora_kernels.federated.methods import get_method
from lalora_kernels.federated.task import adapt_classifier, device_of
from lalora_kernels.memory import peak_device_memory, peak_memory, start_peak
from lalora_kernels.models import Classifier, first_line
from lalora_kernels.nn import lora_layers
from lalora_kernels.placeholders import placeholder_model, placeholder_records
from lalora_kernels.privacy.ledger import Ledger
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.schedule import Schedule

STEPS = 3  # of each active factor that are timed, after one that warms up
OPACUS = "opacus"


def dry_run(config: Config, num_classes: int, kind: str | None, contender: str) -> dict[str, Any]:
    """One contender's steps in a fresh process: a method's name, or "opacus", DP-LoRA on PEFT's layers.

    A batch is exactly ``config.batch_size`` placeholders. Returns "factors" (active factor -> median seconds a step),
    "peak" (bytes, the whole process at its largest), "step" (bytes above what model and optimizer hold; None where the
    system does not tell) and "device" (bytes on a CUDA device, or None); or "error", one line that says why not.
    """
    config = config if contender == OPACUS else dataclasses.replace(config, method=contender)
    job = {
        "settings": json.loads(config.to_json()), "num_classes": num_classes, "kind": kind, "contender": contender,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "lalora_kernels.dry_run"], input=json.dumps(job), capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}" + " (out of memory?)" * (done.returncode == -9)}
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(lines[-1])


def measure(config: Config, num_classes: int, kind: str | None, contender: str) -> dict[str, Any]:
    """What ``dry_run`` returns, in this process."""
    torch.manual_seed(0)
    classifier = placeholder_model(
        config.model, num_classes, kind=kind, weights=config.weights, image_size=config.image_size,
        max_length=config.max_length,
    )  # fmt: skip
    adapt_classifier(config, classifier)
    records: Any = placeholder_records(classifier, config.batch_size, num_classes)  # a list does for a Dataset
    if contender == OPACUS:
        classifier.model = _peft_model(config, classifier)
    classifier.model.to(device_of(config.device)).train()
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # the libraries' threads and buffers are not the step's
    steps = _opacus(config, classifier, records) if contender == OPACUS else _private(config, classifier, records)
    held = start_peak()
    times: dict[str, list[float]] = {}
    for factors, seconds in steps:
        times.setdefault(factors, []).append(seconds)
    peak = peak_memory()
    return {
        "factors": {factors: statistics.median(found[-STEPS:]) for factors, found in times.items()},
        "peak": peak,
        "step": None if held is None or peak is None else peak - held,
        "device": peak_device_memory(next(classifier.model.parameters()).device),
    }


def _private(config: Config, classifier: Classifier, records: Dataset) -> Iterator[tuple[str, float]]:
    """(active factor, seconds) of each private step. Every factor that the run will train has ``STEPS`` + 1 of its own:
    in the schedule's order A would come after 25 steps of B in la-lora-25-25, and never in four."""
    method = get_method(config.method)
    client = Client("dry run", records, 1.0, Ledger(), NoiseSource())
    rounds, steps = range(1, config.rounds + 1), range(1, config.local_steps + 1)
    for factors in dict.fromkeys(method.schedule.active(t, k) for t in rounds for k in steps):
        alone = dataclasses.replace(method, schedule=_only(factors))
        optimizer, batches = client.private_step(classifier, alone, config, 1)
        optimizer.start_round(1)
        began = _clock(classifier)
        for batch in batches.steps(STEPS + 1):
            step = optimizer.local_step
            classifier.loss(classifier.to_device(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if optimizer.local_step > step:  # the logical batch is complete
                now = _clock(classifier)
                yield factors, now - began
                began = now
        optimizer.detach()


def _only(factors: str) -> Schedule:
    return Schedule(f"{factors} only", lambda round, step: factors)


def _opacus(config: Config, classifier: Classifier, records: Dataset) -> Iterator[tuple[str, float]]:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = GradSampleModule(classifier.model, batch_first=True, loss_reduction="sum", strict=False)
    kind: Callable = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.SGD
    optimizer = DPOptimizer(
        kind([p for p in model.parameters() if p.requires_grad], lr=base_rate(config)),
        noise_multiplier=1.0, max_grad_norm=config.max_grad_norm, expected_batch_size=config.batch_size,
    )  # fmt: skip
    loader = DataLoader(records, config.physical_batch_size or config.batch_size, collate_fn=classifier.collate)
    for _ in range(STEPS + 1):
        began = _clock(classifier)
        for i, batch in enumerate(loader):
            classifier.loss(classifier.to_device(batch), model).backward()
            optimizer.signal_skip_step(i + 1 < len(loader))
            optimizer.step()
            optimizer.zero_grad()
        yield "AB", _clock(classifier) - began


def _peft_model(config: Config, classifier: Classifier) -> nn.Module:
    """PEFT's layers in the places of ours."""
    import peft

    model = classifier.model
    settings = {"target_modules": [name for name, _ in lora_layers(model)], "modules_to_save": saved_modules(model)}
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    return peft.get_peft_model(unadapt(model), peft.LoraConfig(r=config.rank, lora_alpha=alpha, **settings))


def _clock(classifier: Classifier) -> float:
    device = next(classifier.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def shapes(config: Config, num_classes: int, kind: str | None) -> tuple[dict[str, Tensor], str]:
    """The tensors that a federation moves, by name, and what the model classifies. Raises BadInput or ValueError."""
    classifier = placeholder_model(
        config.model, num_classes, kind=kind, weights=config.weights, image_size=config.image_size,
        max_length=config.max_length,
    )  # fmt: skip
    adapt_classifier(config, classifier)
    return get_state(classifier.model), classifier.kind


if __name__ == "__main__":
    job = json.loads(sys.stdin.read())
    try:
        print(json.dumps(measure(make_config(job.pop("settings")), **job)))
    except BadInput as error:
        print(json.dumps({"error": str(error)}))
    except ModuleNotFoundError as error:
        print(json.dumps({"error": f"{error.name} is not installed"}))
    except Exception as error:  # whatever a contender cannot do with this model is its result
        print(json.dumps({"error": f"{type(error).__name__}: {first_line(error)}"}))

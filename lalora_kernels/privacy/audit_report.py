"""``lalora audit``: the attacks of audit.py and audit_run.py on the embedded default, as a table and as JSON."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lalora_kernels
from lalora_kernels.data import BadInput, Records
from lalora_kernels.federated.client import base_rate
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.run import prepare
from lalora_kernels.files import write_atomic
from lalora_kernels.privacy.audit import StepAudit, audit_privatize
from lalora_kernels.privacy.audit_run import RunAudit, audit_run

STEPS = ((None, "inverted"), ("binomial5", "inverted"), ("binomial5", "projection"))
RECORDS = 500  # of one client of the embedded default
NAME = "audit-cpu"


def audit_all(
    *,
    draws: int = 100_000,
    canaries: int = 4000,
    steps: int = 100,
    epsilons: tuple[float, ...] = (3.0, 8.0),
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[list[StepAudit], list[RunAudit]]:
    """Every attack once. ``draws`` releases of each hypothesis of the step audits; ``steps`` private steps a run audit
    on ``RECORDS`` MNIST records, batch and rate those of the default, ``canaries`` Dirac canaries or, fewer, RECORDS
    mislabelled records. Raises BadInput for sizes that do not fit."""
    if draws < 1 or steps < 1 or canaries < 2:
        raise BadInput("--draws and --steps are at least 1, --canaries at least 2")
    singles = [
        audit_privatize(
            smoothing=smoothing, statistic=statistic, draws=draws,
            progress=partial(progress, f"one release, {i} of {len(STEPS)}"),
        )
        for i, (smoothing, statistic) in enumerate(STEPS, 1)
    ]  # fmt: skip
    runs = []
    for kind in ("dirac", "mislabelled"):
        for epsilon in epsilons:
            config = make_config({"device": "cpu", "epsilon": epsilon})
            task = prepare(config)
            chosen = np.random.default_rng(config.seed).permutation(len(task.data.train))[:RECORDS]
            index = torch.from_numpy(chosen)
            images = task.data.train.inputs
            assert isinstance(images, Tensor)  # MNIST's
            records = Records(images[index], task.data.train.labels[index])
            try:
                runs.append(
                    audit_run(
                        task.classifier, records, kind=kind, steps=steps, target_epsilon=epsilon, lr=base_rate(config),
                        canaries=canaries if kind == "dirac" else min(canaries, len(records)),
                        sample_rate=config.batch_size / RECORDS, max_grad_norm=config.max_grad_norm,
                        progress=partial(progress, f"one run, {kind} canaries"),
                    )
                )  # fmt: skip
            except ValueError as error:
                raise BadInput(str(error)) from error
    return singles, runs


def table(singles: list[StepAudit], runs: list[RunAudit]) -> str:
    """Both lists as Markdown."""
    lines = [
        "One release, with and without one record of norm C. μ is the trade-off curve's parameter; every lower bound",
        f"is wrong with probability at most {1 - singles[0].confidence:g}.",
        "",
        "| filter | attack | draws | σ | μ shown ≥ | μ claimed | share | ε shown ≥ | at most | ε claimed | δ |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {a.smoothing or 'none'} | {a.statistic} | {a.draws:,} | {a.noise_multiplier:g} | {a.mu:.3f} | "
        f"{a.mu_theory:.3f} | {a.mu / a.mu_theory:.1%} | {a.epsilon:.2f} | {a.epsilon_most:.2f} | "
        f"{a.epsilon_theory:.2f} | {a.delta:g} |"
        for a in singles
    ]
    lines += [
        "",
        "A run of the embedded default, canaries in or out by a coin (2305.08846):",
        "",
        "| canaries | number | steps | q | σ | right guesses | ε shown ≥ | at most | ε claimed | δ |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {a.kind} | {a.canaries:,} | {a.steps} | {a.sample_rate:g} | {a.noise_multiplier:.3f} | "
        f"{a.correct} of {a.guesses} | {a.epsilon:.2f} | {a.epsilon_most:.2f} | {a.epsilon_theory:.2f} | {a.delta:g} |"
        for a in runs
    ]
    return "\n".join([*lines, "", *_verdict([*singles, *runs])])


def _verdict(audits: list[StepAudit | RunAudit]) -> list[str]:
    broken = sum(a.broken for a in audits)
    lines = [f"**{broken} claims are refuted.**" if broken else "No claim is refuted."]
    if small := sum(a.epsilon_most <= a.epsilon_theory for a in audits):
        lines += [
            "",
            f"Too small to refute what is claimed, and so no evidence for it: {small} of {len(audits)} attacks. With "
            f'so few draws or canaries even an attack that is never wrong shows the ε under "at most" and no more. '
            f"Larger --draws and --canaries show more (of mislabelled records there are {RECORDS}).",
        ]
    return lines


def make_folder(folder: str | Path) -> None:
    """Raises BadInput where ``folder`` cannot be made, which is to be known before minutes of attacks."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder} cannot be made a folder ({error.strerror}); give another --out") from error


def write(singles: list[StepAudit], runs: list[RunAudit], folder: str | Path) -> list[Path]:
    """``audit-cpu.json`` and ``audit-cpu.md`` in ``folder``, which is made; returns their paths."""
    make_folder(folder)
    folder = Path(folder)
    about: dict[str, Any] = {
        "versions": {"lalora_kernels": lalora_kernels.__version__, "torch": torch.__version__},
        "one_release": [a.as_dict() for a in singles],
        "one_run": [a.as_dict() for a in runs],
    }
    paths = [folder / f"{NAME}.json", folder / f"{NAME}.md"]
    write_atomic(paths[0], json.dumps(about, indent=1, allow_nan=False) + "\n")
    write_atomic(paths[1], f"# Audit\n\n{table(singles, runs)}\n")
    return paths

"""Rounds in TensorBoard and in Weights & Biases, through their own writers.

What may leave the machine is sorted before it gets there: test accuracy and loss (of the server's public records), ε,
bytes, and what was computed from noised gradients. What was computed on private data (metrics.jsonl's ``not_private``;
accuracy and loss where the test records were set aside from the private ones) is logged only where somebody asks for
it, and so is ``seconds``: how long a round took depends on how many records its clients drew.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lalora_kernels.data import BadInput, need
from lalora_kernels.federated.diagnostics import NOT_PRIVATE, PRIVATE_TEST, QUANTILES
from lalora_kernels.federated.run import Run
from lalora_kernels.models import first_line

KINDS = ("tensorboard", "wandb")
FOLDER = "tensorboard"  # in the run folder
PROJECT = "lalora"


@dataclass(frozen=True)
class Source:
    """The run that is logged: its folder, its settings as config.json has them, what names it for good, past rounds."""

    folder: Path
    settings: dict[str, Any]
    id: str
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, run: Run) -> "Source":
        """A run in this process."""
        first = run.clients[0].ledger.id  # drawn at the start, kept since
        return cls(run.folder, json.loads(run.task.config.to_json()), first, run.at.history)

    @classmethod
    def read(cls, folder: Path) -> "Source":
        """The run of a Flower server's folder; its rounds are yet to be told."""
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(folder, about["settings"], about["run"])


def check(kinds: Sequence[str]) -> None:
    """Raise BadInput, saying what to install, for a writer that is not there; to be called before anything else."""
    for kind in kinds:
        need({"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[kind], f"'lalora_kernels[{kind}]'")


def scalars(record: dict[str, Any], private: bool = False) -> dict[str, float]:
    """A round's record as flat names and numbers; ``private``: also those computed on private data, under that name."""
    found = {name: record.get(name) for name in ("bytes_sent", "bytes_down")}
    public_test = not record.get(PRIVATE_TEST)
    if public_test or private:
        at = "" if public_test else f"{NOT_PRIVATE}/"
        found |= {f"{at}{name}": record.get(name) for name in ("accuracy", "loss")}
    found["epsilon/largest"] = record["epsilon"]
    for client, epsilon in enumerate(record.get("epsilons", [])):
        found[f"epsilon/client {client}"] = epsilon
    for client, note in record.get("diagnostics", {}).items():
        found |= _quantiles(f"released norm over noise/client {client}", note.get("released"))
    if private:
        found[f"{NOT_PRIVATE}/seconds"] = record["seconds"]
        for client, note in record.get(NOT_PRIVATE, {}).get("clients", {}).items():
            found |= _quantiles(f"{NOT_PRIVATE}/norm over C/client {client}", note["norms"])
            for name in ("clipped", "drawn", "seconds", "peak_memory"):
                found[f"{NOT_PRIVATE}/{name}/client {client}"] = note[name]
    return {name: value for name, value in found.items() if value is not None}


def _quantiles(name: str, values: Sequence[float] | None) -> dict[str, float]:
    return {f"{name}/{100 * q:.0f}%": value for q, value in zip(QUANTILES, values or ())}


class Loggers:
    """Context manager: opens the writers with the rounds that are there already, takes each new one, closes them.

    Raises BadInput where a writer does not start.
    """

    def __init__(self, kinds: Sequence[str], run: Source, private: bool = False):
        self.run, self.private = run, private
        self.writers: list[TensorBoard | WandB] = []
        for kind in kinds:
            try:
                self.writers.append(TensorBoard(run) if kind == "tensorboard" else WandB(run))
            except Exception as error:  # each writer raises its own: no account, no network, a folder that is read-only
                self.close()
                raise BadInput(f"--{kind}: {first_line(error)}") from error

    def __enter__(self) -> "Loggers":
        for record in self.run.history:
            self(record)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, record: dict[str, Any]) -> None:
        for writer in self.writers:
            writer.write(record["round"], scalars(record, self.private))

    def close(self) -> None:
        """Flush and close every writer."""
        for writer in self.writers:
            writer.close()
        self.writers = []


class TensorBoard:
    """Event files in RUN/tensorboard; a resumed run writes its rounds anew, and TensorBoard drops the older ones.

    Every event bears the time at which the file was opened: its own would be the round's.
    """

    def __init__(self, run: Source):
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.opened = SummaryWriter(run.folder / FOLDER, purge_step=0), time.time()
        self.writer.add_text("settings", f"```json\n{json.dumps(run.settings, indent=2)}\n```")

    def write(self, round: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name.replace(" ", "_"), value, round, walltime=self.opened)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """One Weights & Biases run, the same after a resume. WANDB_MODE=offline is respected.

    Everything that its client would collect by itself (the process's memory and time, console output, code, the
    machine) is switched off: that depends on private data, or is nobody's business. It stamps each round with the time
    at which it came, which cannot be switched off.
    """

    def __init__(self, run: Source):
        import wandb

        settings = wandb.Settings(
            x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True, console="off", disable_git=True,
            disable_code=True, save_code=False, x_save_requirements=False, silent=True,
        )  # fmt: skip
        identity = hashlib.sha256(run.id.encode()).hexdigest()[:16]
        self.run = wandb.init(
            project=PROJECT, name=Path(run.folder).resolve().name, id=identity, resume="allow", dir=str(run.folder),
            config=run.settings, settings=settings,
        )  # fmt: skip

    def write(self, round: int, values: dict[str, float]) -> None:
        if round >= self.run.step:  # after a resume, it has the rounds before
            self.run.log(values, step=round)

    def close(self) -> None:
        self.run.finish()


def both(first: Callable[[dict], None], second: Callable[[dict], None]) -> Callable[[dict], None]:
    """A callback that calls both."""

    def call(record: dict) -> None:
        first(record)
        second(record)

    return call

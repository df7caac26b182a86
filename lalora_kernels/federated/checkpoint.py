"""The state of a run on disk: one safetensors file that is replaced in one step, never a pickle.

Tensors "state/NAME" are the global state after the last complete round; "update/CLIENT/NAME" are what clients of the
round in progress have trained; "kept/CLIENT/NAME" are factors that a method leaves with their client. Round, history,
counters and the run's settings are JSON in the file's metadata. Ledgers are kept beside it, in ``ledger.json``, and
written first: a crash between the two files leaves a ledger that is ahead of the weights.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lalora_kernels.data import BadInput
from lalora_kernels.federated.config import Config, make_config
from lalora_kernels.files import tensor_digest, write_atomic

FILE = "checkpoint.safetensors"
# Settings that may be edited in config.json: where things lie (fingerprints compare what is there) and what computes.
MOVABLE = ("model", "weights", "dataset", "test_dataset", "device", "physical_batch_size")


@dataclass
class Checkpoint:
    """Where a run stands: ``round`` rounds are complete; ``updates`` (client -> tensors) belong to the next one."""

    round: int
    state: dict[str, Tensor]
    updates: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # as in metrics.jsonl, from round 0: before
    seconds: float = 0.0  # of all sessions so far
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)  # client -> what diagnostics.py says of its update
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # client -> its own factors, once it has trained
    settings: dict[str, Any] = field(default_factory=dict)  # of the start; {} in files of versions that kept none

    def config(self, path: Path, settings: Any) -> Config:
        """The settings that ``path``, the run's config.json, holds. Raises BadInput, by their names, for those that are
        not those of the start, before it asks whether they fit: the cure is to put them back."""
        if isinstance(settings, Mapping):
            now = json.loads(Config().to_json()) | dict(settings)
            other = [name for name in self.settings if name not in MOVABLE and self.settings[name] != now.get(name)]
            if other:
                told = ", ".join(f"{name} is {now.get(name)!r}, not {self.settings[name]!r}" for name in other)
                raise BadInput(
                    f"{path}: {told}: these are not the settings that this run was started with; put them back, or "
                    f"start a new run"
                )
        return make_config(settings, path)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the run folder's checkpoint in one step."""
    tensors = {f"state/{key}": value for key, value in checkpoint.state.items()}
    for kind, clients in (("update", checkpoint.updates), ("kept", checkpoint.kept)):
        for client, own in clients.items():
            tensors |= {f"{kind}/{client}/{key}": value for key, value in own.items()}
    tensors = {key: tensors[key].contiguous() for key in sorted(tensors)}
    names = ("round", "history", "seconds", "notes", "settings")
    rest = json.dumps({name: getattr(checkpoint, name) for name in names})
    write_atomic(folder / FILE, save(tensors, metadata={"lalora": rest, "sha256": _digest(tensors, rest)}))


def _digest(tensors: dict[str, Tensor], rest: str) -> str:
    return hashlib.sha256(f"{tensor_digest(tensors)} {rest}".encode()).hexdigest()


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read it back. Raises BadInput for a folder without one, and for a file that is not what was written."""
    path = folder / FILE
    if not path.is_file():
        raise BadInput(f"{folder}: nothing to resume, {FILE} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            about = file.metadata() or {}
        if about["sha256"] != _digest(tensors, about["lalora"]):
            raise ValueError("its contents do not match its checksum")
        checkpoint = Checkpoint(state={}, **json.loads(about["lalora"]))
        if type(checkpoint.round) is not int or checkpoint.round < 0 or not isinstance(checkpoint.history, list):
            raise ValueError("round or history is not one")
        if not isinstance(checkpoint.settings, dict):
            raise ValueError("settings are none")
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "state":
                checkpoint.state[name] = value
            else:
                client, _, name = name.partition("/")
                clients = {"update": checkpoint.updates, "kept": checkpoint.kept}[kind]
                clients.setdefault(int(client), {})[name] = value
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        cure = "restore it from a copy, or start a new run"
        raise BadInput(f"{path} is corrupt or truncated ({error}); {cure}") from error
    return checkpoint

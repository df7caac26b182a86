"""A client that answers a server's messages: its data, policy, ledger and noise stay in its own folder.

    HOME/policy.toml                what this client allows (policy.Policy); without it nothing is
    HOME/client.toml                where its data and base model lie, and its device; absent: a part of public data
    HOME/client.log                 what went wrong, in full; of this nothing travels
    HOME/ledgers/DATA/              what was ever released from these records, over all runs and servers: lifetime.py
    HOME/runs/RUN/                  the state this client was sent last, its last answer

The ledger is written before an update leaves. An update is kept, and sent again when its round is asked for again:
a lost message or a restarted server costs no privacy.
"""

import dataclasses
import functools
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Subset

from lalora_kernels.data import BadInput
from lalora_kernels.federated.client import Client, get_state
from lalora_kernels.federated.config import Config, make_config, read_toml
from lalora_kernels.federated.guard import schema, why_other
from lalora_kernels.federated.lifetime import LEDGER, claim, find, record_hashes, refuse_lost, source_hash
from lalora_kernels.federated.lock import RunLock
from lalora_kernels.federated.methods import get_method
from lalora_kernels.federated.plan import participation
from lalora_kernels.federated.policy import Policy, Refused
from lalora_kernels.federated.task import Task, prepare, refuse_unfit
from lalora_kernels.federated.wire import pack, settings_digest, state_digest, unpack, upcast
from lalora_kernels.files import write_atomic
from lalora_kernels.privacy.accountant import get_noise_multiplier, refuse_delta
from lalora_kernels.privacy.ledger import BudgetExceeded, Ledger
from lalora_kernels.privacy.noise import NoiseSource

LOCAL = ("dataset", "test_dataset", "text_column", "label_column", "model", "weights", "device", "physical_batch_size")
KEPT, STATE = "run.json", "state.safetensors"
PATIENCE = 600.0  # seconds that a message waits while another of this client's is worked on
TEST_KEY = "test_key"  # 64 hex digits; for tests: a run with a fixed key reports no epsilon


class Node:
    """Client number ``client`` of a federation, with its own folder ``home``."""

    def __init__(self, home: str | Path, client: int):
        self.home, self.client = Path(home), int(client)
        self.home.mkdir(parents=True, exist_ok=True)

    def answer(self, blob: bytes, on_step: Callable[[], None] = lambda: None) -> bytes:
        """The reply to one message of a server: the method's tensors, or only a status.

        Never raises for anything that the message holds or that goes wrong here: the reason is in the client's own log,
        and one fixed word travels.
        """
        about: dict[str, Any] = {}
        try:
            sent, about = unpack(blob)
            tensors, wire = self._train(sent, about, on_step)
        except Refused as refusal:
            self._log(logging.WARNING, f"round {about.get('round')!r:.20}: {refusal.status}: {refusal}")
            return self._reply(about, refusal.status, {})
        except BudgetExceeded as error:
            self._log(logging.WARNING, f"round {about.get('round')!r:.20}: {error}")
            return self._reply(about, "budget", {})
        except Exception as error:  # whatever it is, its text may tell of the data, so it stays here
            self._log(logging.ERROR, f"{type(error).__name__}: {error}", exc_info=True)
            return self._reply(about, "failed", {})
        return self._reply(about, "ok", tensors, wire)

    def _reply(
        self, about: Mapping[str, Any], status: str, tensors: Mapping[str, Tensor], wire: str = "float32"
    ) -> bytes:
        run, number = about.get("run"), about.get("round")
        return pack(tensors, {"run": run, "round": number, "client": self.client, "status": status}, wire)

    def _train(self, sent: dict, about: dict, on_step: Callable[[], None]) -> tuple[Mapping[str, Tensor], str]:
        config, run, number = self._read(about)
        policy = self._policy(config)
        # One message at a time: Flower sends it again when a client reconnects, whose first answer is still being made.
        lock = RunLock(self.home / "ledgers", PATIENCE)
        try:
            return self._alone(sent, about, config, run, number, policy, on_step), config.wire
        finally:
            lock.release()

    def _alone(
        self,
        sent: dict,
        about: dict,
        config: Config,
        run: str,
        number: int,
        policy: Policy,
        on_step: Callable[[], None],
    ) -> Mapping[str, Tensor]:
        """The round's update, made now or stored before; to be called with the lock of this client's ledgers."""
        ledgers, folder = self.home / "ledgers", self.home / "runs" / run
        refuse_lost(ledgers, self.home / "runs", KEPT)
        kept = _Kept.read(folder / KEPT)
        if kept.settings not in ("", digest := settings_digest(about["settings"])):
            raise Refused("settings", "the settings of this run are not those of its first round")
        task = self._task(config, about)
        task.refuse_once(self.client)
        kept.refuse_others(self, len(task.records))
        hashes = record_hashes(task.task.data.train, task.records.indices) | {source_hash(task.task.config.dataset)}
        lifetime = find(ledgers, hashes)
        book = _Book.open(lifetime / LEDGER, policy)
        charged, reply = book.rounds.get(run, []), folder / f"reply-{number}.safetensors"
        if number in charged and (stored := _read_tensors(reply)) is not None:
            return stored
        if number <= max([0, *charged]):
            raise Refused("lost" if number == charged[-1] else "stale", f"{charged} are done")
        turns = [i + 1 for i, chosen in enumerate(participation(config)) if self.client in chosen]
        if number not in turns:
            raise Refused("budget", f"round {number} is not one of this client's turns: {turns}")
        state = self._state(task, folder, upcast(sent, config.wire), about, config)
        policy.check_state(state)
        client = self._client(task, book, kept, config, policy, len(turns))
        client.max_grad_norm = kept.max_grad_norm
        update = client.train_round(task.task.classifier, get_method(config.method), config, number, state, on_step)
        book.rounds[run] = [*charged, number]
        claim(lifetime, hashes)
        book.save(client)  # what it cost, before what it bought
        kept.settings, kept.noise_multiplier = digest, client.noise_multiplier
        kept.max_grad_norm = client.max_grad_norm
        kept.client, kept.records = self.client, len(task.records)
        kept.ledger, kept.ledger_steps = book.ledger.id, book.ledger.steps
        write_atomic(folder / KEPT, json.dumps(dataclasses.asdict(kept)) + "\n")
        write_atomic(folder / STATE, save({k: state[k].contiguous() for k in sorted(state)}))
        write_atomic(reply, save({k: update[k].contiguous() for k in sorted(update)}))
        for old in charged:
            (folder / f"reply-{old}.safetensors").unlink(missing_ok=True)
        return update

    def _policy(self, config: Config) -> Policy:
        try:
            policy = Policy.read(self.home)
        except BadInput as error:
            raise Refused("policy", str(error)) from error
        policy.check(config)
        return policy

    def _read(self, about: dict) -> tuple[Config, str, int]:
        try:
            run, number = about["run"], about["round"]
            if not re.fullmatch(r"[0-9a-f]{16}", run) or type(number) is not int or number < 1:
                raise ValueError("run or round is not one")
            config = make_config(about["settings"])
            if not 0 <= self.client < config.clients or number > config.rounds:
                raise ValueError(f"client {self.client} or round {number} is outside this run")
        except (KeyError, TypeError, ValueError) as error:
            raise Refused("settings", f"{type(error).__name__}: {error}") from error
        return config, run, number

    def _task(self, config: Config, about: dict) -> "_Local":
        path = self.home / "client.toml"
        local = read_toml(path) if path.exists() else {}
        if strange := sorted(set(local) - set(LOCAL)):
            raise BadInput(f"{path}: {strange[0]!r} is not one of {', '.join(LOCAL)}")
        alone: dict[str, Any] = {}
        if "dataset" in local:  # all of its training records are this client's
            alone = {"clients": 1, "fraction": 1.0, "partition": "iid", "min_records": config.batch_size}
            # which columns of a private file are read is not the server's choice
            alone |= {"test_dataset": None, "text_column": None, "label_column": None}
            return _prepare(dataclasses.replace(config, **(alone | local)), 0)
        task = _prepare(dataclasses.replace(config, **local), self.client)
        if about.get("data") != (found := task.task.fingerprints["data"]):
            # a deal of other data than the server's own is by a shuffle of what may be private: no ε is true of it
            raise Refused(
                "schema",
                f"{config.dataset!r} here is {found}, the server's data is {about.get('data')!r:.70}; where this "
                f"client has records of its own, name their file as dataset in {path}",
            )
        return task

    def _state(self, task: "_Local", folder: Path, sent: dict, about: dict, config: Config) -> dict[str, Tensor]:
        """The server's whole state: what was sent, over what this client was sent before, over the public start."""
        if differences := why_other(schema(task.start), about.get("schema")):
            raise Refused("schema", f"{differences}; this client needs the server's model, and data of its classes")
        if about.get("base") != (base := task.task.fingerprints["base model"]):
            raise Refused("schema", f"base here is {base}, the server says {about.get('base')!r:.70}")
        if set(sent) - set(task.start) or any(sent[k].shape != task.start[k].shape for k in sent):
            raise Refused("schema", "tensors came that the schema does not have")
        known = _read_tensors(folder / STATE) or task.start
        state = {key: sent.get(key, known.get(key, start)) for key, start in task.start.items()}
        if about.get("state") != state_digest(state, config.wire):
            raise Refused("resync", "the state is not complete")
        return state

    def _client(
        self, task: "_Local", book: "_Book", kept: "_Kept", config: Config, policy: Policy, turns: int
    ) -> Client:
        """This client with the σ that its own q and its own number of steps ask for. Raises Refused for a round that
        policy or budget do not bear to its end."""
        q, sigma = config.batch_size / len(task.records), kept.noise_multiplier
        if sigma is None:
            sigma = 0.0
            if config.private:
                sigma = get_noise_multiplier(
                    target_epsilon=config.epsilon, target_delta=config.delta, sample_rate=q,
                    steps=config.local_steps * turns,
                )  # fmt: skip
        policy.check_noise(sigma)
        try:
            refuse_delta(policy.delta, len(task.records))
        except ValueError as error:
            raise Refused("policy", str(error)) from error
        left = book.ledger.remaining_steps(sigma, q)
        if left is not None and left < config.local_steps:
            raise Refused("budget", f"{left} steps of sigma {sigma:g} are left, a round has {config.local_steps}")
        key = self.home / TEST_KEY
        noise = NoiseSource.fixed(bytes.fromhex(key.read_text())) if key.exists() else NoiseSource()
        noise.load_state_dict(book.noise)
        return Client(str(self.client), task.records, sigma, book.ledger, noise, book.nonfinite_samples)

    def _log(self, level: int, text: str, exc_info: bool = False) -> None:
        logger = logging.getLogger(f"lalora.client.{self.home}")
        if not logger.handlers:
            handler = RotatingFileHandler(self.home / "client.log", maxBytes=1 << 20, backupCount=2)
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logger.addHandler(handler)
            logger.propagate = False
        logger.log(level, text, exc_info=exc_info)


@dataclasses.dataclass
class _Kept:
    """What a client remembers of a run: the settings of its first round, the σ that they led to, adaptive C; its number
    and its records then; the ledger, and how many releases that had."""

    settings: str = ""
    noise_multiplier: float | None = None
    max_grad_norm: float | None = None
    client: int | None = None
    records: int | None = None
    ledger: str = ""
    ledger_steps: int = 0

    def refuse_others(self, node: Node, records: int) -> None:
        """Raises Refused for another client's number, and for records of another number, than this run began with."""
        if self.client not in (None, node.client):
            raise Refused(
                "settings",
                f"{node.home} has answered this run as client {self.client} and is asked as client {node.client}; give "
                f"each client a --home of its own: one home for two would pay this run's ε twice",
            )
        if self.records not in (None, records):
            raise Refused(
                "schema",
                f"this client had {self.records} records when this run began and has {records} now, and σ is for the "
                f"first number; put the data back as they were, or wait for the next run",
            )

    @classmethod
    def read(cls, path: Path) -> "_Kept":
        return cls(**json.loads(path.read_text())) if path.exists() else cls()


@dataclasses.dataclass
class _Book:
    """One data set's ledger file: releases, the noise's next number, and the rounds of each run that they were for."""

    path: Path
    ledger: Ledger
    noise: dict[str, int]
    nonfinite_samples: int
    rounds: dict[str, list[int]]

    @classmethod
    def open(cls, path: Path, policy: Policy) -> "_Book":
        """The stored book under the policy's budget, as it is now. Raises LedgerError for one that was edited."""
        book = cls(path, Ledger(), {"next_release": 0}, 0, {})
        if path.exists():
            stored = json.loads(path.read_text())
            book.ledger.load_state_dict(stored["ledger"])
            book.noise, book.rounds = stored["noise"], stored["rounds"]
            book.nonfinite_samples = stored["nonfinite_samples"]
        # the budget is the policy's of today; what was spent stays spent
        bounded = math.isfinite(policy.max_epsilon)
        book.ledger.target_epsilon, book.ledger.target_delta = policy.max_epsilon if bounded else None, policy.delta
        return book

    def save(self, client: Client) -> None:
        book = {
            "ledger": client.ledger.state_dict(), "noise": client.noise.state_dict(),
            "nonfinite_samples": client.nonfinite_samples, "rounds": self.rounds,
        }  # fmt: skip
        write_atomic(self.path, json.dumps(book, indent=2) + "\n")


@dataclasses.dataclass
class _Local:
    """A loaded task as one client sees it. ``start`` is the public state of round 0."""

    task: Task
    records: Subset
    start: dict[str, Tensor]
    checked: list

    def refuse_once(self, client: int) -> None:
        """``task.refuse_unfit`` before the first step of a process."""
        if not self.checked:
            trial = Client(str(client), self.records, 1.0, Ledger(), NoiseSource())
            refuse_unfit(self.task, trial)
            self.checked.append(True)


def _prepare(config: Config, part: int) -> _Local:
    """The task, loaded once a process: simulated clients share one base model."""
    task, start, checked = _loaded(config)
    records = Subset(task.data.train, task.parts[part].tolist())
    return _Local(task, records, start, checked)


def _read_tensors(path: Path) -> dict[str, Tensor] | None:
    """What a safetensors file holds; None where it is missing, or damaged, which is no worse."""
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        return None


@functools.lru_cache(maxsize=1)
def _loaded(config: Config) -> tuple[Task, dict[str, Tensor], list]:
    task = prepare(config)
    return task, get_state(task.classifier.model), []

"""The server of a federation whose clients are elsewhere: rounds over any transport, in a folder that can be resumed.

    RUN/config.json, metrics.jsonl, checkpoint.safetensors, adapter/   as of the in-process run
    RUN/updates/ROUND/CLIENT     the valid replies of the round in progress, so that none is held in memory
    RUN/result.json              how the last session ended

What decides about updates is ``guard``; what a client does is ``node``; a transport only carries bytes.
"""

import contextlib
import dataclasses
import json
import math
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import lalora_kernels
from lalora_kernels.data import BadInput
from lalora_kernels.federated.checkpoint import FILE as CHECKPOINT
from lalora_kernels.federated.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lalora_kernels.federated.client import get_state, set_state
from lalora_kernels.federated.config import Config, make_config
from lalora_kernels.federated.diagnostics import PRIVATE_TEST
from lalora_kernels.federated.guard import Outcome, QuorumLost, Rules, refuse_lost_rounds, schema, why_refused
from lalora_kernels.federated.lock import RunLock
from lalora_kernels.federated.methods import Method, get_method
from lalora_kernels.federated.plan import participation
from lalora_kernels.federated.run import ADAPTER, CONFIG, METRICS, read_json, write_metrics
from lalora_kernels.federated.server import Server
from lalora_kernels.federated.spool import Spool
from lalora_kernels.federated.task import QUIET, Task, Watch, prepare
from lalora_kernels.federated.wire import (
    STATUS,
    WireError,
    group,
    lacking,
    pack,
    size_limit,
    state_digest,
    unpack,
)
from lalora_kernels.files import remove_temporaries, write_atomic
from lalora_kernels.peft_io import save_adapter

UPDATES, RESULT = "updates", "result.json"


class BudgetSpent(RuntimeError):
    """So many clients' own budgets are spent that no round that is left can have its quorum."""


class Transport(Protocol):
    """Carries messages to clients by number."""

    def exchange(self, messages: Mapping[int, bytes], timeout: float) -> Iterator[tuple[int, bytes | None]]:
        """Deliver each message; yield (client, reply) as replies come, (client, None) for one that failed there.

        Ends when all have answered or after ``timeout`` seconds; who is not there does not occur. What comes may be
        anything that a client chose to send.
        """


@dataclass
class Coordinator:
    """A run and its folder, as ``Run`` is for clients in this process. ``train`` brings it to its end over a transport.

    ``sizes``: the clients' public record counts, for ``average = "size"``; ``timeout``: seconds that a round may take.
    """

    folder: Path
    task: Task
    id: str
    sizes: list[int]
    timeout: float
    at: Checkpoint
    lock: RunLock
    changed: dict[str, int] = field(default_factory=dict)  # group -> the last round that changed it
    known: dict[int, int] = field(default_factory=dict)  # client -> the round up to which it has seen all changes
    private_test: bool = False  # the test records were set aside from those that are dealt to the clients

    @classmethod
    def start(
        cls,
        task: Task,
        folder: str | Path,
        sizes: list[int] | None = None,
        timeout: float = 600.0,
        watch: Watch = QUIET,
    ) -> "Coordinator":
        """Make the run folder and measure the model as it is. ``sizes`` default to those of the dealt public data.

        Raises BadInput for a folder that holds a run already or a lost one's replies, for sizes that are not one a
        client, and for a task that another run has trained.
        """
        folder, config = Path(folder), task.config
        if get_method(config.method).in_process_only:
            raise BadInput(f"{config.method} changes more than travels, and runs in one process only: lalora train")
        private_test = sizes is None and task.data.set_aside  # with sizes the clients hold records of their own
        sizes = [len(part) for part in task.parts] if sizes is None else list(sizes)
        if not _are_sizes(sizes, config.clients):
            raise BadInput(f"--sizes are {config.clients} whole numbers, one a client; got {sizes}")
        task.refuse_trained()
        with RunLock(folder).released_on_error() as lock:
            if (folder / CONFIG).exists():
                raise BadInput(f"{folder} holds a run already; --resume {folder} continues it, another --out is new")
            if any((folder / UPDATES).glob("*")):
                raise BadInput(
                    f"{folder / UPDATES} holds replies to a run that lost its {CONFIG}; restore that file, or "
                    f"choose another --out"
                )
            state = get_state(task.classifier.model)
            settings = json.loads(config.to_json())
            at = Checkpoint(0, state, settings=settings)
            run = cls(folder, task, secrets.token_hex(8), sizes, timeout, at, lock, private_test=private_test)
            run._record(Server(get_method(config.method), state), Outcome([]), {}, 0.0, watch)
            run._save()
            about = {
                "run": run.id,
                "settings": settings,
                "sizes": sizes,
                "timeout": timeout,
                "fingerprints": task.fingerprints,
                "versions": {"lalora_kernels": lalora_kernels.__version__, "torch": torch.__version__},
            }
            write_atomic(folder / CONFIG, json.dumps(about, indent=2) + "\n")
        return run

    @classmethod
    def resume(cls, folder: str | Path, watch: Watch = QUIET) -> "Coordinator":
        """Pick a run up after its last complete round; replies of the round in progress that were stored still count.

        Raises BadInput for a folder that is no such run or in use, for a damaged config.json, for settings that were
        edited (but for ``checkpoint.MOVABLE``), and for data or a base model that changed.
        """
        folder = Path(folder)
        if not (folder / CONFIG).exists():
            raise BadInput(f"{folder}: not a run that can be resumed, {CONFIG} is missing")
        with RunLock(folder).released_on_error() as lock:
            remove_temporaries(folder, (CONFIG, METRICS, CHECKPOINT, RESULT))
            about, at = read_json(folder / CONFIG), load_checkpoint(folder)
            try:
                config = at.config(folder / CONFIG, about["settings"])
                task = prepare(config, watch, dealt="partition" in about["fingerprints"])
                for what, found in task.fingerprints.items():
                    if about["fingerprints"][what] != found:
                        raise BadInput(f"{folder}: the {what} is not the one that this run was started with")
                _refuse_damaged(about, config, folder / CONFIG)
                run = cls(folder, task, about["run"], about["sizes"], about["timeout"], at, lock)
                run.private_test = any(PRIVATE_TEST in record for record in at.history)
            except (KeyError, TypeError) as error:
                raise BadInput(f"{folder} is not a run with Flower: {type(error).__name__} {error}") from error
            method = get_method(task.config.method)
            for record in at.history[1:]:
                run._remember(method, record["round"], record)
            write_metrics(folder, at)  # a crash may have left it behind
        return run

    @property
    def done(self) -> bool:
        """Whether every round is complete."""
        return self.at.round >= self.task.config.rounds

    def train(self, transport: Transport, watch: Watch = QUIET) -> None:
        """Run the rounds that are left; ``result.json`` says how it ended, also where it raises.

        Raises QuorumLost after three rounds in a row without a quorum, BudgetSpent where the clients' budgets leave
        none. The folder is resumable at any moment.
        """
        if not self.lock.held:
            raise RuntimeError(f"this run has ended; Coordinator.resume({str(self.folder)!r}) continues it")
        self._result("running")
        try:
            while not self.done:
                self._round(transport, watch)
            self._save_adapter()
            self._result("finished")
        except (QuorumLost, BudgetSpent) as error:
            self._save_adapter()
            self._result("stopped", str(error))
            raise
        except KeyboardInterrupt:
            self._result("interrupted", f"--resume {self.folder} continues it")
            raise
        except BaseException as error:
            self._result("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            self.lock.release()

    def _round(self, transport: Transport, watch: Watch) -> None:
        config, number = self.task.config, self.at.round + 1
        began, chosen = time.monotonic(), participation(config)[self.at.round]
        server = Server(get_method(config.method), self.at.state, Rules.of(config))
        spool = Spool(self.folder / UPDATES / str(number), chosen)
        traffic = _Traffic()
        asked = [client for client in chosen if client not in spool]
        for client in set(chosen) - set(asked):
            traffic.status[client] = "ok"
        again = self._exchange(transport, server, number, spool, traffic, {c: self.known.get(c, 0) for c in asked})
        if again:  # these lack part of the state: they get all of it
            self._exchange(transport, server, number, spool, traffic, dict.fromkeys(again, -1))
        weights = {c: float(self.sizes[c]) if config.average == "size" else 1.0 for c in spool}
        outcome = server.aggregate(number, spool, weights, len(chosen))
        outcome.dropped.update(traffic.dropped)
        for client in chosen:
            if client not in outcome.accepted and client not in outcome.dropped:
                status = traffic.status.get(client)
                outcome.dropped[client] = "no answer in time" if status is None else STATUS[status]
        self.at = dataclasses.replace(self.at, round=number, state=server.state)
        self._record(server, outcome, traffic.as_dict(), time.monotonic() - began, watch)
        self._remember(server.method, number, self.at.history[-1])
        self._save()
        spool.remove()
        if not outcome.moved:
            self._refuse_spent(server.rules)
        refuse_lost_rounds(self.at.history)

    def _refuse_spent(self, rules: Rules) -> None:
        """Raises BudgetSpent where rounds are left, and none of them has a quorum without the clients whose last word
        was that their budget is spent."""
        said = {client: status for record in self.at.history for client, status in record["statuses"].items()}
        spent = {int(client) for client, status in said.items() if status == "budget"}
        left = participation(self.task.config)[self.at.round :]
        if left and all(len(set(chosen) - spent) < rules.needed(len(chosen)) for chosen in left):
            raise BudgetSpent(
                f"round {self.at.round}: {len(spent)} of {self.task.config.clients} clients refused, their privacy "
                f"budget is spent, and no round that is left has a quorum without them"
            )

    def _exchange(
        self,
        transport: Transport,
        server: Server,
        number: int,
        spool: Spool,
        traffic: "_Traffic",
        known: Mapping[int, int],
    ) -> list[int]:
        """One message to each client of ``known``, its reply into the spool; returns who asks for the whole state."""
        config, state = self.task.config, server.state
        about = {
            "run": self.id,
            "round": number,
            "settings": json.loads(config.to_json()),
            "schema": schema(state),
            "base": self.task.fingerprints["base model"],
            "data": self.task.fingerprints["data"],
            "state": state_digest(state, config.wire),
        }
        blobs = {past: pack(lacking(state, self.changed, past), about, config.wire) for past in set(known.values())}
        messages = {client: blobs[past] for client, past in known.items()}
        traffic.down += sum(map(len, messages.values()))
        reference, again = server.reference(number), []
        for client, reply in transport.exchange(messages, self.timeout) if messages else ():
            if client not in messages or client in spool:
                continue
            traffic.up += len(reply or b"")
            status, why, update = self._open(reply, client, number, reference)
            traffic.status[client] = status
            if status == "resync" and known[client] >= 0:
                again.append(client)
            elif why is None and status == "ok":
                why = why_refused(update, reference, server.rules)
            if why is not None:
                traffic.dropped[client] = why
            elif status == "ok":
                spool.add(client, update)
        return again

    def _open(
        self, reply: bytes | None, client: int, number: int, reference: Mapping[str, Tensor]
    ) -> tuple[str, str | None, dict[str, Tensor]]:
        """(status, why it is dropped unless it is not, tensors) of what a client sent."""
        if reply is None:
            return "failed", None, {}
        try:
            update, about = unpack(reply, self.task.config.wire, size_limit(reference))
        except WireError as error:
            return "failed", str(error), {}
        if about.get("run") != self.id or about.get("round") != number or about.get("client") != client:
            return "failed", "it answers another run, round or client", {}
        status = about.get("status")
        if not isinstance(status, str) or status not in STATUS:
            return "failed", "its status is unknown", {}
        return status, None, update

    def _remember(self, method: Method, number: int, record: Mapping[str, Any]) -> None:
        """What ``record`` of a round says about who has seen what."""
        for client, status in record["statuses"].items():
            if status == "ok":
                self.known[int(client)] = number - 1
        if record["moved"]:
            for key in self.at.state:
                if method.travels(key, number):
                    self.changed[group(key)] = number

    def _record(self, server: Server, outcome: Outcome, traffic: dict, seconds: float, watch: Watch) -> None:
        began = time.monotonic()
        accuracy, loss = server.evaluate(self.task.classifier, self.task.data.test)
        self.at.seconds += seconds + time.monotonic() - began
        record = {
            "round": self.at.round,
            "accuracy": accuracy,
            "loss": loss if math.isfinite(loss) else None,
            "epsilon": None,  # each client's own ledger has it; it does not travel
            "clients": outcome.accepted,
            "dropped": {str(client): why for client, why in sorted(outcome.dropped.items())},
            "moved": outcome.moved,
            "bytes_sent": traffic.get("up", 0),
            "bytes_down": traffic.get("down", 0),
            "statuses": traffic.get("statuses", {}),
            "seconds": round(self.at.seconds, 3),
        }
        if self.private_test:
            record[PRIVATE_TEST] = True
        self.at.history.append(record)
        watch.on_round(record)

    def _save(self) -> None:
        save_checkpoint(self.folder, self.at)
        write_metrics(self.folder, self.at)

    def _save_adapter(self) -> None:
        set_state(self.task.classifier.model, self.at.state)
        save_adapter(self.task.classifier.model, self.folder / ADAPTER, self.task.config.model)

    def _result(self, outcome: str, why: str = "") -> None:
        text = json.dumps({"outcome": outcome, "why": why, "round": self.at.round})
        write_atomic(self.folder / RESULT, text + "\n")


def _are_sizes(sizes: object, clients: int) -> bool:
    return isinstance(sizes, list) and len(sizes) == clients and all(type(n) is int and n >= 1 for n in sizes)


def _refuse_damaged(about: Mapping[str, Any], config: Config, path: Path) -> None:
    """Raises BadInput for what a server needs of its own in config.json, beside settings and fingerprints."""
    timeout = about["timeout"]
    for name, fits, wanted in (
        ("run", re.fullmatch("[0-9a-f]{16}", str(about["run"])), "16 hexadecimal digits"),
        ("sizes", _are_sizes(about["sizes"], config.clients), f"{config.clients} whole numbers, one a client"),
        ("timeout", type(timeout) in (int, float) and 0 < timeout < math.inf, "a number of seconds"),
    ):
        if not fits:
            raise BadInput(f"{path}: {name} should be {wanted}, not {about[name]!r:.70}; restore it from a copy")


def read_sizes(text: str) -> list[int] | None:
    """Record counts with commas, "" for none. Raises BadInput for what is no whole number."""
    try:
        return [int(number) for number in text.split(",")] if text else None
    except ValueError:
        raise BadInput(f"--sizes are whole numbers with commas between, as 1200,800,950; got {text!r}") from None


def serve(folder: str | Path, settings: str, sizes: str, timeout: float, transport: Transport) -> None:
    """Start a run with ``settings`` (JSON), or resume the folder's where they are empty, and bring it to its end.

    ``sizes``: record counts with commas, or "" for those of the dealt public data. However it ends, ``result.json``
    says so, but for a folder that another process uses, whose word it is; raises what went wrong.
    """
    try:
        if settings:
            config, counts = make_config(json.loads(settings)), read_sizes(sizes)
            run = Coordinator.start(prepare(config, dealt=counts is None), folder, counts, timeout)
        else:
            run = Coordinator.resume(folder)
    except Exception as error:
        with contextlib.suppress(BadInput):
            lock = RunLock(Path(folder))
            text = json.dumps({"outcome": "failed", "why": f"{type(error).__name__}: {error}", "round": None})
            write_atomic(Path(folder) / RESULT, text + "\n")
            lock.release()
        raise
    run.train(transport)


@dataclass
class _Traffic:
    """Whole messages, headers included, in bytes; what each client that answered said; what was dropped and why."""

    down: int = 0
    up: int = 0
    status: dict[int, str] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        statuses = {str(client): status for client, status in sorted(self.status.items())}
        return {"down": self.down, "up": self.up, "statuses": statuses}

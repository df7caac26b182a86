"""The in-process federation: one model object, each client's private steps in turn, a folder that can be resumed."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Subset

import lalora_kernels
from lalora_kernels.data import BadInput
from lalora_kernels.federated.checkpoint import FILE as CHECKPOINT
from lalora_kernels.federated.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lalora_kernels.federated.client import Client, get_state, set_state
from lalora_kernels.federated.config import Config
from lalora_kernels.federated.diagnostics import NOT_PRIVATE, PRIVATE_TEST
from lalora_kernels.federated.guard import Outcome, QuorumLost, Rules, refuse_lost_rounds
from lalora_kernels.federated.lock import RunLock
from lalora_kernels.federated.methods import Method, get_method, merged_weights
from lalora_kernels.federated.plan import ClientPlan, Plan, make_plan, read_plan
from lalora_kernels.federated.server import Server, evaluate, update_bytes
from lalora_kernels.federated.task import QUIET, Task, Watch, prepare, refuse_unfit
from lalora_kernels.files import remove_temporaries, uninterrupted, write_atomic
from lalora_kernels.peft_io import save_adapter
from lalora_kernels.privacy.ledger import Ledger, LedgerError
from lalora_kernels.privacy.noise import NoiseSource

AS_IT_WAS = "put it back as it was, or start a new run, whose ε adds to this one's"
CONFIG, METRICS, LEDGERS, ADAPTER = "config.json", "metrics.jsonl", "ledger.json", "adapter"
ADAPTERS = "adapters"  # instead of one adapter, of a method that leaves a factor with each client: one folder a client
MERGED = "merged.safetensors"  # instead of an adapter, of a method that folds: the weights that changed, s B A included


@dataclass
class Run:
    """A run and its folder. ``start`` makes one, ``resume`` finds one again; ``train`` brings it to its end.

    From then until ``train`` returns or raises, no other process can use the folder.
    """

    folder: Path
    task: Task
    plan: Plan
    clients: list[Client]
    at: Checkpoint
    lock: RunLock

    @classmethod
    def start(
        cls, task: Task, folder: str | Path, noise: Callable[[int], NoiseSource] | None = None, watch: Watch = QUIET
    ) -> "Run":
        """Calibrate, make the run folder and measure the model as it is.

        ``noise`` gives a client's NoiseSource; only tests need it, since a fixed key is worth no ε. Raises BadInput for
        a folder that holds a run already, for a task that another run has trained, and as ``make_plan`` does.
        """
        folder = Path(folder)
        with RunLock(folder).released_on_error() as lock:
            return cls._start(task, folder, noise, watch, lock)

    @classmethod
    def _start(
        cls, task: Task, folder: Path, noise: Callable[[int], NoiseSource] | None, watch: Watch, lock: RunLock
    ) -> "Run":
        if (folder / CONFIG).exists():
            raise BadInput(f"{folder} holds a run already; --resume {folder} continues it, another --out starts anew")
        if (folder / LEDGERS).exists() and any(ledger.steps for ledger in read_ledgers(folder).values()):
            raise BadInput(
                f"{folder} holds the ledger of a run that lost its {CONFIG}; restore that file, or choose another --out"
            )
        task.refuse_trained()
        plan = make_plan(task.config, [len(part) for part in task.parts])
        clients = [_client(task, one, _ledger(task.config), noise) for one in plan.clients]
        refuse_unfit(task, clients[0])
        method = get_method(task.config.method)
        state, rules = get_state(task.classifier.model, method.folds), Rules.of(task.config)
        server = Server(method, state, rules, task.config.scaling)
        server.refuse_unfit()
        settings = json.loads(task.config.to_json())
        run = cls(folder, task, plan, clients, Checkpoint(0, server.state, settings=settings), lock)
        run._record(0, server, Outcome([]), 0, 0.0, watch)
        about = {
            "settings": settings,
            "plan": plan.as_dict(),
            "fingerprints": task.fingerprints,
            "versions": {"lalora_kernels": lalora_kernels.__version__, "torch": torch.__version__},
        }
        run._save()
        write_atomic(folder / CONFIG, json.dumps(about, indent=2) + "\n")
        return run

    @classmethod
    def resume(cls, folder: str | Path, watch: Watch = QUIET) -> "Run":
        """Pick a run up where its folder says it stands: same weights, same ledgers, fresh noise keys.

        A client whose ledger is ahead of the stored weights (a crash between the two files) has spent its share of
        that round: its update is lost and it is left out of that round's mean. Raises BadInput for a folder that is not
        a run or that another process uses, for files that are missing, damaged or edited (but for settings that are
        ``checkpoint.MOVABLE``), for a ledger that is behind the weights, and for data or base weights that are not
        those of the start.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such run folder")
        if not (folder / CONFIG).exists():
            raise BadInput(f"{folder}: not a run that can be resumed, {CONFIG} is missing")
        with RunLock(folder).released_on_error() as lock:
            remove_temporaries(folder, (CONFIG, METRICS, LEDGERS, CHECKPOINT))
            return cls._resume(folder, watch, lock)

    @classmethod
    def _resume(cls, folder: Path, watch: Watch, lock: RunLock) -> "Run":
        about, at, books = read_json(folder / CONFIG), load_checkpoint(folder), read_json(folder / LEDGERS)
        try:
            config = at.config(folder / CONFIG, about["settings"])
            task = prepare(config, watch)
            for what, found in task.fingerprints.items():
                if about["fingerprints"][what] != found:
                    raise BadInput(f"{folder}: the {what} is not the one that this run was started with; {AS_IT_WAS}")
            plan = read_plan(about["plan"], config, [len(part) for part in task.parts])
            clients = _with_ledgers(task, plan, folder, books)
            run = cls(folder, task, plan, clients, at, lock)
            run._refuse_strange_ledgers()
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise BadInput(f"{folder} is not a complete run: {type(error).__name__} {error}") from error
        write_metrics(folder, at)  # a crash may have left it behind
        return run

    def _refuse_strange_ledgers(self) -> None:
        """Whatever the stored weights cost is in the ledgers, at each client's own noise, rate, clipping rule and C."""
        config, steps = self.task.config, self.task.config.local_steps
        adaptive = config.clipping == "adaptive"  # C moves
        rule = "flat, adaptive" if adaptive else config.clipping
        for client, one in zip(self.clients, self.plan.clients):
            owed = self.plan.steps_before(one.client, self.at.round + 1, steps)
            owed += steps * (one.client in self.at.updates)
            if client.ledger.steps < owed:
                raise BadInput(
                    f"{self.folder / LEDGERS}: client {one.client} has {client.ledger.steps} releases on record, but "
                    f"the stored weights hold {owed}; this is an older ledger, restore the one that goes with the "
                    f"checkpoint"
                )
            if any((e.noise_multiplier, e.sample_rate, e.clipping) != (one.noise_multiplier, one.sample_rate, rule)
                   or not (adaptive or e.max_grad_norm == config.max_grad_norm)
                   for e in client.ledger.entries):  # fmt: skip
                raise BadInput(
                    f"{self.folder / LEDGERS}: the ledger of client {one.client} holds releases that are not this "
                    f"client's; restore both {LEDGERS} and {CONFIG} from a copy"
                )

    @property
    def done(self) -> bool:
        """Whether every round is complete."""
        return self.at.round >= self.task.config.rounds

    @property
    def weights(self) -> Path:
        """Where ``train`` leaves what was trained: the adapter; of a method that folds the merged weights; of one that
        leaves a factor with each client a folder of adapters, named by their clients' numbers."""
        method = get_method(self.task.config.method)
        return self.folder / (MERGED if method.folds else ADAPTERS if method.keeps else ADAPTER)

    def train(self, watch: Watch = QUIET) -> None:
        """Run the rounds that are left; the folder is resumable at any moment, however this ends.

        Once: after it ended, ``resume`` continues, since another process may have gone on in the meantime.
        """
        if not self.lock.held:
            raise RuntimeError(f"this run has ended; Run.resume({str(self.folder)!r}) continues it")
        try:
            self._train(watch)
        except QuorumLost:
            self._save_weights()  # of the last round that had one, which is paid for
            raise
        finally:
            self.lock.release()

    def _train(self, watch: Watch) -> None:
        config, method = self.task.config, get_method(self.task.config.method)
        refuse_lost_rounds(self.at.history)  # of a run that was resumed: before the next one is paid for
        while not self.done:
            began = time.monotonic()
            number, chosen = self.at.round + 1, self.plan.participation[self.at.round]
            server = Server(method, self.at.state, Rules.of(config), config.scaling)
            for i in chosen:
                if i in self.at.updates or self._spent_already(i, number):
                    for _ in range(config.local_steps):
                        watch.on_step()
                    continue
                state = self._state_of(i)
                update = self.clients[i].train_round(
                    self.task.classifier, method, config, number, state, watch.on_step
                )
                own = get_state(self.task.classifier.model) if method.keeps else {}
                self.at.updates[i] = update | {key: value for key, value in own.items() if method.stays(key)}
                self.at.notes[str(i)] = {"public": self.clients[i].public, NOT_PRIVATE: self.clients[i].not_private}
                self.at.seconds += time.monotonic() - began
                began = time.monotonic()
                with uninterrupted():  # between the two the update would be paid for and lost
                    self._save_ledgers()  # what it cost, before what it bought
                    save_checkpoint(self.folder, self.at)
            weights = {i: float(len(self.task.parts[i])) if config.average == "size" else 1.0 for i in self.at.updates}
            updates, owns = self._parted(method)
            watch.on_updates(number, updates, weights)
            outcome = server.aggregate(number, updates, weights, len(chosen))
            kept = self.at.kept | {i: own for i, own in owns.items() if outcome.moved and i in outcome.accepted}
            sent = sum(map(update_bytes, updates.values()))
            self.at = dataclasses.replace(self.at, round=number, state=server.state, updates={}, kept=kept)
            self._record(number, server, outcome, sent, time.monotonic() - began, watch)
            self._save()
            refuse_lost_rounds(self.at.history)
        self._save_weights()

    def _save_weights(self) -> None:
        config, method = self.task.config, get_method(self.task.config.method)
        for i in range(len(self.clients) if method.keeps else 0):
            set_state(self.task.classifier.model, self._state_of(i))
            save_adapter(self.task.classifier.model, self.weights / str(i), config.model)
        set_state(self.task.classifier.model, self.at.state)
        if method.folds:  # the factors alone are not the model
            write_atomic(self.weights, save(merged_weights(self.at.state, config.scaling)))
        elif not method.keeps:
            save_adapter(self.task.classifier.model, self.weights, config.model)

    def _state_of(self, client: int) -> dict[str, Tensor]:
        """What a client's model holds: the server's state, with the factors that are this client's own."""
        return self.at.state | self.at.kept.get(client, {})

    def _parted(self, method: Method) -> tuple[dict[int, dict[str, Tensor]], dict[int, dict[str, Tensor]]]:
        """(what each client of the round sends, what stays with it); a factor with NaN or Inf stays as it was."""
        updates: dict[int, dict[str, Tensor]] = {}
        owns: dict[int, dict[str, Tensor]] = {}
        for i, update in self.at.updates.items():
            own = {key: value for key, value in update.items() if method.stays(key)}
            updates[i] = {key: value for key, value in update.items() if key not in own}
            if own and all(value.isfinite().all() for value in own.values()):
                owns[i] = own
        return updates, owns

    def _evaluate(self, server: Server) -> tuple[float, float]:
        """(accuracy, loss) on the test records; where clients have models of their own, the means over all clients."""
        task, own = self.task, sorted(self.at.kept)
        strangers = len(self.clients) - len(own)  # of one model: none of them has trained yet
        found = [server.evaluate(task.classifier, task.data.test)] * strangers if strangers else []
        for i in own:
            set_state(task.classifier.model, self._state_of(i))
            found.append(evaluate(task.classifier, task.data.test))
        if not own:
            return found[0]
        accuracies, losses = zip(*found)
        return sum(accuracies) / len(found), sum(losses) / len(found)

    def _spent_already(self, client: int, number: int) -> bool:
        """Whether the ledger holds this round's steps though no update of it is stored."""
        before = self.plan.steps_before(client, number, self.task.config.local_steps)
        return self.clients[client].ledger.steps > before

    def epsilons(self) -> list[float | None]:
        """ε that each client has spent at the run's δ; None where none can be claimed (no noise, or a test key)."""
        if not self.task.config.private:
            return [None] * len(self.clients)
        return [None if c.ledger.refusals else c.ledger.epsilon(self.task.config.delta) for c in self.clients]

    def _record(self, number: int, server: Server, outcome: Outcome, sent: int, seconds: float, watch: Watch) -> None:
        began = time.monotonic()
        accuracy, loss = self._evaluate(server)
        self.at.seconds += seconds + time.monotonic() - began
        epsilons = self.epsilons()
        known = [e for e in epsilons if e is not None]
        notes, self.at.notes = self.at.notes, {}
        record: dict[str, Any] = {
            "round": number,
            "accuracy": accuracy,
            "loss": loss if math.isfinite(loss) else None,
            "epsilon": max(known) if len(known) == len(epsilons) else None,
            "epsilons": epsilons,
            "clients": outcome.accepted,
            "dropped": {str(client): why for client, why in outcome.dropped.items()},
            "moved": outcome.moved,
            "bytes_sent": sent,
            "seconds": round(self.at.seconds, 3),
            "diagnostics": {client: note["public"] for client, note in notes.items()},
            NOT_PRIVATE: {"clients": {client: note[NOT_PRIVATE] for client, note in notes.items()}},
        }
        if self.task.data.set_aside:
            record[PRIVATE_TEST] = True
        if not number:
            record[NOT_PRIVATE]["labels"] = self._label_counts()
        self.at.history.append(record)
        watch.on_round(record)

    def _label_counts(self) -> dict[str, Any]:
        """How many records of each class every client holds."""
        data, counts = self.task.data, {}
        for client, part in zip(self.clients, self.task.parts):
            counts[client.name] = torch.bincount(data.train.labels[part.tolist()], minlength=len(data.classes)).tolist()
        return {"classes": data.classes, "clients": counts}

    def _save_ledgers(self) -> None:
        books = {
            c.name: {
                "epsilon": epsilon,
                "nonfinite_samples": c.nonfinite_samples,  # exact, so for the client's own eyes
                "max_grad_norm": c.max_grad_norm,
                "ledger": c.ledger.state_dict(),
                "noise": c.noise.state_dict(),
            }
            for c, epsilon in zip(self.clients, self.epsilons())
        }
        about = {"delta": self.task.config.delta, "clients": books}
        write_atomic(self.folder / LEDGERS, json.dumps(about, indent=2) + "\n")

    def _save(self) -> None:
        self._save_ledgers()
        save_checkpoint(self.folder, self.at)
        write_metrics(self.folder, self.at)


def _ledger(config: Config) -> Ledger:
    return Ledger(target_epsilon=config.epsilon, target_delta=config.delta) if config.private else Ledger()


def _client(task: Task, plan: ClientPlan, ledger: Ledger, noise: Callable[[int], NoiseSource] | None) -> Client:
    records = Subset(task.data.train, task.parts[plan.client].tolist())
    source = NoiseSource() if noise is None else noise(plan.client)
    return Client(str(plan.client), records, plan.noise_multiplier, ledger, source)


def _with_ledgers(task: Task, plan: Plan, folder: Path, books: Mapping[str, Any]) -> list[Client]:
    """The clients with what they have spent and the numbers that their noise has used, under fresh keys."""
    try:
        ledgers, clients = read_ledgers(folder, books), []
        for one in plan.clients:
            name = str(one.client)
            ledger = _ledger(task.config)
            ledger.load_state_dict(ledgers[name].state_dict())
            client = _client(task, one, ledger, None)
            client.noise.load_state_dict(books["clients"][name]["noise"])
            client.nonfinite_samples = int(books["clients"][name]["nonfinite_samples"])
            if (bound := books["clients"][name].get("max_grad_norm")) is not None:
                client.max_grad_norm = float(bound)
            clients.append(client)
    except (ValueError, OverflowError) as error:  # a LedgerError is one
        raise BadInput(f"{folder / LEDGERS}: {error}") from error
    return clients


def read_ledgers(folder: Path, books: Mapping[str, Any] | None = None) -> dict[str, Ledger]:
    """Every client's ledger by name, from the run folder. Raises BadInput for a file that is missing or no run's,
    LedgerError, naming the client, where a hash chain does not hold."""
    books = read_json(folder / LEDGERS) if books is None else books
    try:
        stored = {name: book["ledger"] for name, book in books["clients"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder / LEDGERS} is not a run's ledger file: {type(error).__name__} {error}") from error
    ledgers = {name: Ledger() for name in stored}
    for name, ledger in ledgers.items():
        try:
            ledger.load_state_dict(stored[name])
        except LedgerError as error:
            raise LedgerError(f"client {name}: {error}") from None
    return ledgers


def write_metrics(folder: Path, at: Checkpoint) -> None:
    """metrics.jsonl as the checkpoint has it."""
    write_atomic(folder / METRICS, "".join(json.dumps(record) + "\n" for record in at.history))


def read_json(path: Path) -> Any:
    """A file of the run folder. Raises BadInput where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path.parent}: not a run that can be resumed, {path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        cure = "restore it from a copy, or start a new run"
        raise BadInput(f"{path} is corrupt or truncated ({error}); {cure}") from error

"""The account of what was released: every release on record before it happens, a budget that refuses the step too many,
and a file that shows whether it was changed."""

import functools
import json
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from lalora_kernels.files import write_atomic
from lalora_kernels.privacy.accountant import (
    MAX_STEPS,
    NEIGHBORING_RELATIONS,
    Release,
    check_delta,
    check_epsilon,
    check_noise_multiplier,
    compute_epsilon,
    max_steps,
    merge_releases,
    show_bound,
)
from lalora_kernels.privacy.entries import HEADER, begins, chain
from lalora_kernels.privacy.entries import LedgerEntry as LedgerEntry
from lalora_kernels.privacy.ledger_file import LedgerError as LedgerError
from lalora_kernels.privacy.ledger_file import LedgerFile, read_sole, refuse_folder, refuse_open
from lalora_kernels.privacy.sampling import check_sample_rate

FORMAT, VERSION = "lalora-ledger", 1
_LOCK = threading.RLock()  # of all ledgers, which clients in threads may share: a charge is read, changed and written


Method = TypeVar("Method", bound=Callable)


def _locked(method: Method) -> Method:
    @functools.wraps(method)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _LOCK:
            return method(*args, **kwargs)

    return cast(Method, alone)


class BudgetExceeded(RuntimeError):
    """The next release would cost more than the budget; nothing was released and nothing charged."""


class Ledger:
    """Every release of one data holder, and the ε of all of them together.

    Args:
        target_epsilon: a budget; ``charge`` refuses the release that would exceed it. None: count only.
        target_delta: the budget's δ, and the default of ``epsilon``.
        neighboring_relation: of budget and ``epsilon``: "add_or_remove_one" record, or "replace_one".

    The guarantee: while ``charge`` is called before each release, ``epsilon()`` bounds the loss of everything released,
    and never exceeds ``target_epsilon``. Changing σ or q between charges costs a fraction of a second each time; with
    both constant a charge is O(1).
    """

    def __init__(
        self,
        *,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        neighboring_relation: str = "add_or_remove_one",
    ) -> None:
        if target_epsilon is not None:
            target_epsilon = check_epsilon(target_epsilon, "target_epsilon")
            if target_delta is None:
                raise ValueError("target_epsilon needs a target_delta: the budget is the pair")
        if target_delta is not None:
            target_delta = check_delta(target_delta, "target_delta")
        if neighboring_relation not in NEIGHBORING_RELATIONS:
            raise ValueError(
                f"neighboring_relation is one of {', '.join(NEIGHBORING_RELATIONS)}; got {neighboring_relation!r}"
            )
        self.target_epsilon, self.target_delta = target_epsilon, target_delta
        self.neighboring_relation = neighboring_relation
        self.id = secrets.token_hex(8)  # tells two runs with equal entries apart
        self._file: LedgerFile | None = None
        self._entries: list[LedgerEntry] = []
        self._refusals: list[str] = []
        self._allowance: tuple[tuple, int] | None = None  # (σ, q, budget) and how many more such steps it bears

    @classmethod
    def at(
        cls, path: str | os.PathLike, *, target_epsilon: float | None = None, target_delta: float | None = None
    ) -> "Ledger":
        """The ledger of the file ``path``, or a new one: every charge is stored there before ``charge`` returns.

        So what a loop of your own releases is on record, whatever becomes of the process. Pass it to ``make_private``,
        in one process of several. Raises LedgerError for a file that ``load`` refuses or that names another budget, and
        where another process has it open; ``charge`` does where it was opened twice and the other one has charged.
        """
        ledger, file = cls(target_epsilon=target_epsilon, target_delta=target_delta), LedgerFile(path)
        asked = ledger._budget()
        if (stored := file.read()) is not None:
            ledger = _read(path, stored)
        if target_epsilon is not None and asked != ledger._budget():
            raise LedgerError(
                f"{path} has the budget {_show(ledger._budget())} and was asked for with {_show(asked)}; go on "
                f"with the stored one, or raise it knowingly: Ledger.at without a budget, then set target_epsilon"
            )
        ledger._file = file
        ledger._store()
        return ledger

    @property
    def path(self) -> Path | None:
        """The file where every charge is stored before its release, or None.

        To set it takes over what the file holds, as ``load_state_dict`` does, and closes it to other processes while
        this ledger is in use. Raises LedgerError where another process has it.
        """
        return None if self._file is None else self._file.path

    @path.setter
    @_locked
    def path(self, path: str | os.PathLike | None) -> None:
        if path is None:
            self._file = None
            return
        file = LedgerFile(path)
        if (stored := file.read()) is not None:
            self.load_state_dict(_read(path, stored).state_dict())
        self._file = file

    def _store(self) -> None:
        if self._file is not None:
            self._file.write(self._text())

    # ---------------------------------------------------------------- what was spent

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """In the order of the charges."""
        return tuple(self._entries)

    @property
    def steps(self) -> int:
        """Releases charged so far."""
        return sum(entry.count for entry in self._entries)

    @property
    def releases(self) -> tuple[Release, ...]:
        """(noise_multiplier, sample_rate, count) for each pair that occurs: what the accountants take."""
        return merge_releases((e.noise_multiplier, e.sample_rate, e.count) for e in self._entries)

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why no ε may be reported; empty where one may."""
        return tuple(self._refusals)

    @_locked
    def refuse_epsilon(self, reason: str) -> None:
        """From now on, and in what is saved, ``epsilon`` raises with ``reason``; there is no way back."""
        if reason not in self._refusals:
            self._refusals.append(str(reason))

    def epsilon(
        self, delta: float | None = None, *, accountant: str = "pld", neighboring_relation: str | None = None
    ) -> float:
        """ε spent so far at ``delta`` (default: target_delta), ``inf`` where a release had no noise.

        Raises LedgerError where none may be claimed (a fixed key, batches that were not Poisson samples), ValueError
        without a delta. ``accountant`` and ``neighboring_relation`` as in ``compute_epsilon``.
        """
        if self._refusals:
            raise LedgerError(f"no epsilon can be reported: {'; '.join(self._refusals)}")
        delta = self.target_delta if delta is None else delta
        if delta is None:
            raise ValueError("epsilon needs a delta, since this ledger has no target_delta")
        relation = self.neighboring_relation if neighboring_relation is None else neighboring_relation
        return compute_epsilon(self.releases, delta, accountant=accountant, neighboring_relation=relation)

    # ---------------------------------------------------------------- spending

    def remaining_steps(self, noise_multiplier: float, sample_rate: float) -> int | None:
        """Further releases of this kind that the budget bears; None without a budget."""
        if self.target_epsilon is None:
            return None
        return max_steps(
            target_epsilon=self.target_epsilon,
            target_delta=self.target_delta,  # type: ignore[arg-type]  # the budget is the pair
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            history=self.releases,
            neighboring_relation=self.neighboring_relation,
        )

    @_locked
    def charge(
        self,
        noise_multiplier: float,
        sample_rate: float,
        *,
        release: int | None = None,
        clipping: str = "flat",
        max_grad_norm: float | None = None,
        expected_batch_size: float | None = None,
        sampling: str = "poisson",
    ) -> None:
        """Record one release, to be called before it happens, also when its batch is empty.

        ``release`` is the noise source's number (default: the one after the last). Raises BudgetExceeded, and charges
        nothing, where the budget does not bear it; LedgerError for batches that are not Poisson samples under a budget;
        ValueError for arguments out of range.
        """
        last = self._entries[-1] if self._entries else None
        following = 0 if last is None else last.first_release + last.count
        entry = LedgerEntry(
            float(check_noise_multiplier(noise_multiplier)),
            float(check_sample_rate(sample_rate)),
            following if release is None else release,
            1,
            clipping,
            max_grad_norm,
            expected_batch_size,
            sampling,
        )
        if sampling != "poisson":
            reason = f"batches were drawn by {sampling!r} sampling, and only Poisson sampling is accounted for"
            if self.target_epsilon is not None:
                raise LedgerError(f"{reason}; use PrivateLoader, or a ledger without a budget")
            self.refuse_epsilon(reason)
        if self.target_epsilon is not None:
            self._draw_allowance(entry)
        if last is not None and entry == replace(last, first_release=following, count=1) and last.count < MAX_STEPS:
            self._entries[-1] = replace(last, count=last.count + 1)
        else:
            self._entries.append(entry)
        self._store()

    def _draw_allowance(self, entry: LedgerEntry) -> None:
        kind = entry.noise_multiplier, entry.sample_rate, *self._budget()
        left = self._allowance[1] if self._allowance is not None and self._allowance[0] == kind else 0
        if not left:
            left = self.remaining_steps(entry.noise_multiplier, entry.sample_rate) or 0
        if not left:
            spent = "" if self._refusals else f" ({self.steps} steps have spent {show_bound(self.epsilon())})"
            raise BudgetExceeded(
                f"step {self.steps + 1}, with noise_multiplier {entry.noise_multiplier:g} and sample_rate "
                f"{entry.sample_rate:g}, would exceed the budget {_show(self._budget())}{spent}; stop here, or plan "
                f"the run with more noise, fewer steps or a larger epsilon"
            )
        self._allowance = kind, left - 1

    # ---------------------------------------------------------------- storage

    @_locked
    def state_dict(self) -> dict[str, Any]:
        """JSON-ready: the header, the entries each with the hash of all up to it, and the last hash again."""
        state: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "id": self.id,
            "target_epsilon": self.target_epsilon,
            "target_delta": self.target_delta,
            "neighboring_relation": self.neighboring_relation,
            "refusals": list(self._refusals),
            "entries": [asdict(entry) for entry in self._entries],
        }
        hashes = chain(state)
        for raw, digest in zip(state["entries"], hashes[1:]):
            raw["hash"] = digest
        return {**state, "head": hashes[-1]}

    @_locked
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state`` says was spent; nothing that this ledger knows to be spent is forgotten.

        A ledger without entries adopts the state's. One that is the state's own continuation (a return to an earlier
        checkpoint) keeps its own entries. Raises LedgerError for a state that is not a ledger's, was edited, comes from
        another run while this one has charged, or names another budget.
        """
        other = self._parse(state)
        if self._entries and other.id != self.id:
            raise LedgerError(
                f"this ledger has charged {self.steps} releases of its own (run {self.id}) and cannot take over run "
                f"{other.id}; load the state into a new Ledger"
            )
        ours, theirs = self._budget(), other._budget()
        if self.target_epsilon is not None and other.target_epsilon is not None and ours != theirs:
            raise LedgerError(
                f"the stored ledger has the budget {_show(theirs)} and this run {_show(ours)}; resume with the "
                f"stored one, or raise it knowingly: load the ledger, then set target_epsilon"
            )
        if not begins(other._entries, self._entries):
            if not begins(self._entries, other._entries):
                raise LedgerError(f"two histories of run {self.id} disagree; restore the ledger from a copy")
            self._entries = list(other._entries)
        if self.target_epsilon is None and other.target_epsilon is not None:
            self.target_epsilon, self.target_delta, self.neighboring_relation = theirs
        self.target_delta = other.target_delta if self.target_delta is None else self.target_delta
        self.id, self._allowance = other.id, None
        for reason in other._refusals:
            self.refuse_epsilon(reason)

    @_locked
    def save(self, path: str | os.PathLike) -> None:
        """Write JSON to ``path``: the old file or the new one, never half of both, also after a crash.

        Raises LedgerError where that would lose an account: a file that another ledger has open or has charged in,
        that holds anything but a former state of this one, or that cannot be read.
        """
        place = Path(path).resolve()
        if self._file is not None and self._file.path == place:
            self._store()
            return
        refuse_open(place)
        if (stored := read_sole(place)) is not None:
            other = _read(path, stored)
            continues = other.id == self.id and begins(other._entries, self._entries)
            if not continues or not set(other._refusals) <= set(self._refusals):
                raise LedgerError(
                    f"{path} is the account of run {other.id}, {other.steps} releases, which would be lost: this "
                    f"ledger, of run {self.id} with {self.steps}, does not continue it; save to another path"
                )
        write_atomic(place, self._text())

    def _text(self) -> str:
        return json.dumps(self.state_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Ledger":
        """The ledger of a file. Raises LedgerError where it is missing, truncated, corrupt or edited.

        The hashes find damage and careless edits; they hold no secret, so they do not stop a forger.
        """
        refuse_folder(path)
        try:
            return _read(path, Path(path).read_bytes())
        except FileNotFoundError:
            raise LedgerError(
                f"{path}: there is no ledger, so what this run has spent is unknown; restore it from a copy, or start "
                f"a new run from public weights"
            ) from None

    @classmethod
    def _parse(cls, state: Any) -> "Ledger":
        cure = "restore the ledger from a copy"
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise LedgerError(f"this is not a ledger; {cure}")
        if repr(state.get("version")) != repr(VERSION):  # nor true, which equals 1 and hashes to something else
            raise LedgerError(
                f"the ledger has format version {state.get('version')!r} and this library reads {VERSION}; use the "
                f"library that wrote it"
            )
        try:
            header = {name: state[name] for name in (*HEADER, "entries", "head")}
            hashes = chain(header)
            stored = [raw["hash"] for raw in header["entries"]] + [header["head"]]
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise LedgerError(f"the ledger is incomplete ({type(error).__name__}: {error}); {cure}") from None
        if set(state) != set(header) or stored != hashes[1:] + hashes[-1:]:
            raise LedgerError(f"the ledger was changed after it was written: its hash chain does not hold; {cure}")
        try:
            ledger = cls(**{name: state[name] for name in ("target_epsilon", "target_delta", "neighboring_relation")})
            refusals = state["refusals"]
            if not isinstance(refusals, list) or not all(isinstance(s, str) for s in [state["id"], *refusals]):
                raise ValueError("id is a string, refusals are a list of them")
            if not isinstance(state["entries"], list):
                raise ValueError("entries are a list")
            ledger.id, ledger._refusals = state["id"], list(refusals)
            names = {field.name for field in fields(LedgerEntry)} | {"hash"}
            for raw in state["entries"]:
                if set(raw) != names:
                    raise ValueError(f"an entry has the fields {sorted(names)}, got {sorted(raw)}")
                ledger._entries.append(LedgerEntry(**{k: v for k, v in raw.items() if k != "hash"}))
        except (TypeError, ValueError) as error:
            raise LedgerError(f"the ledger holds values out of range ({error}); {cure}") from None
        return ledger

    def _budget(self) -> tuple[float | None, float | None, str]:
        return self.target_epsilon, self.target_delta, self.neighboring_relation


def _read(path: str | os.PathLike, stored: bytes) -> Ledger:
    try:
        state = json.loads(stored.decode())
    except (ValueError, RecursionError) as error:
        raise LedgerError(f"{path} is truncated or corrupt: {error}; restore it from a copy") from None
    try:
        return Ledger._parse(state)
    except LedgerError as error:
        raise LedgerError(f"{path}: {error}") from None


def _show(budget: tuple[float | None, float | None, str]) -> str:
    if budget[0] is None:
        return "none"
    return f"(epsilon {budget[0]:g}, delta {budget[1]:g}, {budget[2]})"

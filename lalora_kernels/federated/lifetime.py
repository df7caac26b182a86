"""Which of a client's lifetime ledgers holds what its records have cost, over all runs and servers.

    HOME/ledgers/DATA/ledger.json   every release from these records
    HOME/ledgers/DATA/inputs        SHA-256 of every record that was ever among them and of its file, 32 bytes each

A data set that shares a record with an earlier one is charged to the ledger of that one: a file that lost a line and
won another is no new budget. The file itself counts among them, since another column of it is about the same people.
What one record has cost is then at most what its ledger says. Who calls what is here holds HOME/ledgers/lock: of two
processes that looked at the same time, each would begin a ledger.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from lalora_kernels.data import Records
from lalora_kernels.federated.policy import Refused
from lalora_kernels.files import write_atomic
from lalora_kernels.privacy.ledger import LedgerError

LEDGER, RECORDS, SIZE = "ledger.json", "inputs", 32


def record_hashes(records: Records, indices: Iterable[int]) -> frozenset[bytes]:
    """``Records.digest`` of each: of its input alone, so that a record with another label is no other record."""
    return frozenset(records.digest(i) for i in indices)


def source_hash(dataset: str) -> bytes:
    """SHA-256 of the file that ``dataset`` names, of the name where it is none; different from any record's."""
    path = Path(dataset)
    content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else dataset
    return hashlib.sha256(f"source {content}".encode()).digest()


def find(ledgers: Path, hashes: frozenset[bytes]) -> Path:
    """The folder of the ledger to which a release from these records is to be charged; a new one where none holds any.

    A folder without a ledger is none: a crash came between ``claim`` and the first charge. Raises Refused where several
    ledgers hold some of the records, LedgerError for a ledger without its list of records.
    """
    folders = sorted(path.parent for path in ledgers.glob(f"*/{LEDGER}"))
    found = [folder for folder in folders if _read(folder) & hashes]
    if len(found) > 1:
        raise Refused(
            "budget",
            f"{' and '.join(folder.name for folder in found)} hold records of this data set, and what each of them "
            f"spent cannot be told apart any more; train on the records of one of them",
        )
    return found[0] if found else ledgers / hashlib.sha256(b"".join(sorted(hashes))).hexdigest()[:32]


def claim(folder: Path, hashes: frozenset[bytes]) -> None:
    """These records are among those of the ledger in ``folder`` from now on; before it is charged for them."""
    held = _read(folder) if (folder / LEDGER).exists() else frozenset()
    if not hashes <= held:
        write_atomic(folder / RECORDS, b"".join(sorted(hashes | held)))


def refuse_lost(ledgers: Path, runs: Path, file: str) -> None:
    """Raises LedgerError for a run that left ``runs``/RUN/``file``, whose cost stands in no ledger, which was deleted,
    or in one with fewer releases than it had then: an old copy; and for what cannot be read of either."""
    # the runs before the ledgers: another process writes in the other order
    left = {path.parent.name: _kept(path) for path in sorted(runs.glob(f"*/{file}"))}
    known: set[str] = set()
    steps: dict[str, int] = {}
    for path in ledgers.glob(f"*/{LEDGER}"):
        try:
            book = json.loads(path.read_text())
            known |= book["rounds"].keys()
            steps[book["ledger"]["id"]] = sum(entry["count"] for entry in book["ledger"]["entries"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LedgerError(f"{path} is damaged ({type(error).__name__}: {error}); restore it from a copy") from error
    for run, kept in left.items():
        had, has = kept.get("ledger_steps", 0), steps.get(kept.get("ledger", ""), 0)
        if run not in known:
            raise LedgerError(
                f"this client took part in run {run}, and no ledger in {ledgers} holds what that has cost; put the "
                f"ledger back from a copy: without it the same records would be given a second budget"
            )
        if has < had:
            raise LedgerError(
                f"the ledger of run {run} in {ledgers} holds {has} releases, and had {had} when that run was answered: "
                f"it is an old copy, and what came after it would be forgotten; put back a newer one. Where none "
                f"is left, these records' ε is not known any more and they can take part in nothing"
            )


def _kept(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise LedgerError(
            f"{path} is damaged, and says how much the ledger must hold; put it back from a copy as new as the ledger"
        )
    return found


def _read(folder: Path) -> frozenset[bytes]:
    path = folder / RECORDS
    raw = path.read_bytes() if path.exists() else b""
    if not raw or len(raw) % SIZE:
        raise LedgerError(f"{path}, the list of the records that {folder / LEDGER} is for, is missing or damaged")
    return frozenset(raw[i : i + SIZE] for i in range(0, len(raw), SIZE))

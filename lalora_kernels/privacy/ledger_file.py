"""The file of a ledger: of one process at a time, and never written over what somebody else has charged in it."""

import os
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

from lalora_kernels.files import write_atomic
from lalora_kernels.lock import FileLock, InUse

_held: WeakValueDictionary[Path, FileLock] = WeakValueDictionary()  # of this process, whose ledgers may share a file
_opening = Lock()  # of threads


def _hold(place: Path) -> FileLock:
    with _opening:
        lock = _held.get(place)
        if lock is None:
            lock = _held[place] = FileLock(place.with_name(place.name + ".lock"))
        return lock


class LedgerError(ValueError):
    """A ledger that cannot be trusted, or a claim that it does not support."""


def refuse_folder(path: str | os.PathLike) -> None:
    """Raise LedgerError where ``path`` is a folder."""
    if Path(path).is_dir():
        raise LedgerError(f"{path} is a folder; give the ledger's file, such as {Path(path, 'ledger.json')}")


def read_sole(path: Path) -> bytes | None:
    """What ``path`` holds, None where there is no such file. Raises LedgerError for a folder and for a file of two
    names: to replace one leaves the other as it was, and whoever opens that spends the budget again."""
    refuse_folder(path)
    if not path.exists():
        return None
    if path.stat().st_nlink > 1:
        raise LedgerError(
            f"{path} has another name (a hard link), under which its releases would be forgotten; find it with "
            f"find -samefile and delete it, or make it a copy of its own with cp"
        )
    return path.read_bytes()


def refuse_open(path: Path) -> None:
    """Raise LedgerError where a ledger, of this or another process, has the file ``path`` open; it is resolved."""
    lock = path.with_name(path.name + ".lock")
    if not lock.exists():  # it was never open, and is not given a lock for one reading
        return
    if path in _held:
        raise LedgerError(f"{path} is the file of another ledger in this process; save to another path")
    LedgerFile(path)


class LedgerFile:
    """``path``, from now on closed to other processes (PATH.lock) until no ledger of this one needs it.

    Raises LedgerError for a folder and where another process holds it, OSError where the folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike):
        # Resolved once: a later chdir would move a relative path, and a replaced link leaves its file behind.
        self.path, self._process = Path(path).resolve(), os.getpid()
        refuse_folder(path)
        try:
            self._lock = _hold(self.path)
        except InUse as error:
            raise LedgerError(
                f"{path} is in use by process {error.holder}; two processes on one ledger would spend its budget "
                f"twice. Wait for that one or stop it"
            ) from error
        self._known: set[bytes] = set()

    def read(self) -> bytes | None:
        """What it holds, which ``write`` may then replace; None where there is no such file. Raises LedgerError for a
        file of two names (hard links), of which ``write`` would renew one."""
        stored = read_sole(self.path)
        self._known = set() if stored is None else {stored}
        return stored  # an empty file is a damaged one, not a new one

    def write(self, text: str) -> None:
        """Replace what was read or written last. Raises LedgerError where it is not that any more."""
        if os.getpid() != self._process:
            raise LedgerError(f"{self.path} belongs to process {self._process}, of which this is a copy; charge there")
        if self.path.exists() and self.path.read_bytes() not in self._known:
            raise LedgerError(
                f"{self.path} was written by somebody else since this ledger wrote it (was it opened a second time?), "
                f"and what that charged would be lost; open it once, Ledger.at({str(self.path)!r}), and pass that one "
                f"ledger to every make_private"
            )
        self._known.add(text.encode())  # before: Ctrl-C may come when it is written
        write_atomic(self.path, text)
        self._known = {text.encode()}

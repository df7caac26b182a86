"""One process at a time on a run folder: two that resume it would both spend what is left of the budget."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lalora_kernels.data import BadInput

FILE = "lock"


def refuse_in_use(folder: Path) -> None:
    """Raise BadInput where another process holds ``folder``: for who writes beside a run without holding it."""
    if (folder / FILE).exists():
        RunLock(folder).release()


class RunLock:
    """Holds ``folder``/lock for this process until ``release``, or until the process ends, however it ends.

    The operating system keeps the lock (flock), so a file that a killed process left behind locks nobody out. Raises
    BadInput where another holder is alive, naming its process and host, and where the folder cannot be written.
    """

    def __init__(self, folder: Path):
        path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise BadInput(f"{folder} cannot be written ({error.strerror}); a run keeps its state there") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._handle, 200, 0).decode(errors="replace").strip() or "unknown"
            self.release()
            raise BadInput(
                f"{folder} is in use by process {holder}; two processes on one run would spend its budget twice. Wait "
                f"for that one or stop it"
            ) from error
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    @property
    def held(self) -> bool:
        """Whether ``release`` was not called yet."""
        return self._handle is not None

    @contextmanager
    def released_on_error(self) -> Iterator["RunLock"]:
        """Within the block an exception gives the lock back; otherwise it stays."""
        try:
            yield self
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let others in. The file stays: to delete it would let two processes lock two files of one name."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.release()

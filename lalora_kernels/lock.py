"""Locks that the operating system keeps (flock): what a killed process leaves behind locks nobody out."""

import os
import socket
from pathlib import Path
from typing import Any, NoReturn


class InUse(OSError):
    """Another process holds the lock; ``holder`` says which, on which host."""

    def __init__(self, path: Path, holder: str):
        super().__init__(f"{path} is in use by process {holder}")
        self.holder = holder


class FileLock:
    """Holds the file ``path`` until ``release``, or until the process ends, however it ends.

    The file is made where it is missing, and its folder too. Raises InUse where another holder is alive, OSError where
    the file cannot be written or locked.
    """

    def __init__(self, path: Path):
        import fcntl  # on systems that have none of it the rest of the package still imports

        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._handle, 200, 0).decode(errors="replace").strip() or "unknown"
            self.release()
            raise InUse(path, holder) from error
        except OSError:  # a file system without locks
            self.release()
            raise
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    @property
    def held(self) -> bool:
        """Whether ``release`` was not called yet."""
        return self._handle is not None

    def release(self) -> None:
        """Let others in. The file stays: to delete it would let two processes lock two files of one name."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FileLock":
        return self  # what closes it is that nobody needs it any more

    def __reduce__(self) -> NoReturn:
        raise TypeError("a lock belongs to its process and is not pickled")

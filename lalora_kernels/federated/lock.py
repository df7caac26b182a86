"""One process at a time on a run folder: two that resume it would both spend what is left of the budget."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lalora_kernels.data import BadInput
from lalora_kernels.lock import FileLock, InUse

FILE = "lock"
PAUSE = 0.5  # seconds between two attempts


def refuse_in_use(folder: Path) -> None:
    """Raise BadInput where another process holds ``folder``: for who writes beside a run without holding it."""
    if (folder / FILE).exists():
        RunLock(folder).release()


class RunLock(FileLock):
    """Holds ``folder``/lock for this process until ``release``, or until the process ends, however it ends.

    Where another holder is alive, it is asked again for up to ``patience`` seconds; then BadInput names its process and
    host. Raises BadInput where the folder cannot be written.
    """

    def __init__(self, folder: Path, patience: float = 0.0):
        until = time.monotonic() + patience
        while True:
            try:
                super().__init__(folder / FILE)
                return
            except InUse as error:
                if time.monotonic() >= until:
                    raise BadInput(
                        f"{folder} is in use by process {error.holder}; two processes on one run would spend its "
                        f"budget twice. Wait for that one or stop it"
                    ) from error
            except OSError as error:
                raise BadInput(f"{folder} cannot be written ({error.strerror}); a run keeps its state there") from error
            time.sleep(PAUSE)

    @contextmanager
    def released_on_error(self) -> Iterator["RunLock"]:
        """Within the block an exception gives the lock back; otherwise it stays."""
        try:
            yield self
        except BaseException:
            self.release()
            raise

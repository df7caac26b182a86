"""The replies of the round in progress, on the server's disk."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lalora_kernels.federated.wire import pack
from lalora_kernels.files import write_atomic


class Spool(Mapping):
    """Valid updates of a round's ``clients``, by client; a tensor is read when it is asked for, and not kept.

    Files of ``folder`` that are no update of one of these clients do not count. A damaged update is deleted: its client
    has it still, and sends it again at no cost.
    """

    def __init__(self, folder: Path, clients: Iterable[int]):
        self.folder, self.clients = folder, frozenset(clients)
        for stray in folder.glob(".*"):  # of a server that was killed while writing
            stray.unlink()
        for client in self:
            try:
                self[client]
            except (SafetensorError, OSError):
                (folder / str(client)).unlink()

    def add(self, client: int, update: Mapping[str, Tensor]) -> None:
        """Store an update; on disk before this returns."""
        write_atomic(self.folder / str(client), pack(update, {}))

    def remove(self) -> None:
        """Delete the round's files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __getitem__(self, client: int) -> "_Stored":
        if client not in self:
            raise KeyError(client)
        return _Stored(self.folder / str(client))

    def __contains__(self, client: object) -> bool:
        return client in self.clients and (self.folder / str(client)).is_file()

    def __iter__(self) -> Iterator[int]:
        return iter([client for client in sorted(self.clients) if client in self])

    def __len__(self) -> int:
        return len(list(iter(self)))


class _Stored(Mapping):
    """One update of the spool; only the tensor asked for is in memory."""

    def __init__(self, path: Path):
        self.file = safe_open(path, framework="pt")
        self.names = sorted(self.file.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.names:
            raise KeyError(key)
        return self.file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

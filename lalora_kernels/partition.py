"""How records are dealt to clients."""

import math
from collections.abc import Sequence

import numpy as np

from lalora_kernels.data import BadInput


def partition_iid(
    labels: Sequence[int] | np.ndarray, clients: int, rng: np.random.Generator, min_records: int = 1
) -> list[np.ndarray]:
    """Deal the records evenly in random order. Returns and raises as ``partition_dirichlet`` does."""
    parts = [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), _check_clients(labels, clients))]
    if min(map(len, parts)) < min_records:
        raise BadInput(_too_few(len(labels), clients, min_records))
    return parts


def partition_dirichlet(
    labels: Sequence[int] | np.ndarray,
    clients: int,
    alpha: float,
    rng: np.random.Generator,
    min_records: int = 1,
    attempts: int = 1000,
) -> list[np.ndarray]:
    """Split each class among the clients by a Dirichlet(alpha) draw (Yurochkin et al. 2019, 1905.12022).

    Small ``alpha`` gives each client few classes. Drawn again, at most ``attempts`` times, until every client holds
    ``min_records`` (NIID-Bench, 2102.02079). Returns a sorted index array per client; together they hold every record
    once. Raises BadInput for alpha <= 0, more clients than records, or a minimum that no draw reached.
    """
    if not 0.0 < alpha < math.inf:
        raise BadInput(f"the Dirichlet parameter is a finite number > 0, got {alpha}")
    labels = np.asarray(labels)
    _check_clients(labels, clients)
    if clients * min_records > len(labels):
        raise BadInput(_too_few(len(labels), clients, min_records))
    for _ in range(attempts):
        pieces: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for c in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == c))
            cuts = (np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members)).astype(int)
            for client, piece in enumerate(np.split(members, cuts)):
                pieces[client].append(piece)
        parts = [np.sort(np.concatenate(p)) for p in pieces]
        if min(map(len, parts)) >= min_records:
            return parts
    raise BadInput(
        f"no Dirichlet({alpha:g}) split in {attempts} draws gave each of {clients} clients {min_records} records of "
        f"{len(labels)}; fewer --clients, a larger --dirichlet-alpha, or a smaller --batch-size or --min-records"
    )


def _check_clients(labels: Sequence[int] | np.ndarray, clients: int) -> int:
    if clients < 1:
        raise BadInput(f"at least one client is needed, got {clients}")
    if clients > len(labels):
        raise BadInput(f"{clients} clients but only {len(labels)} records: a client would have no data")
    return clients


def _too_few(records: int, clients: int, min_records: int) -> str:
    return (
        f"{records} records cannot give each of {clients} clients {min_records}; take fewer --clients, or a smaller "
        f"--batch-size or --min-records"
    )

"""What is decided before the first step: who takes part when, and each client's noise for its own number of steps."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lalora_kernels.data import BadInput
from lalora_kernels.federated.config import Config
from lalora_kernels.partition import partition_dirichlet, partition_iid
from lalora_kernels.privacy.accountant import check_noise_multiplier, get_noise_multiplier, refuse_delta

PARTITION, PARTICIPATION = 0, 1  # streams of the public seed


@dataclass(frozen=True)
class ClientPlan:
    """One client: its public size, q = b / |D_i|, its private steps over the whole run, its σ in units of C."""

    client: int
    records: int
    sample_rate: float
    steps: int
    noise_multiplier: float


@dataclass(frozen=True)
class Plan:
    """Participation (client numbers of each round) and every client's part."""

    participation: list[list[int]]
    clients: list[ClientPlan]

    def steps_before(self, client: int, round: int, local_steps: int) -> int:
        """Private steps that ``client`` makes in the rounds before ``round``."""
        return local_steps * sum(client in chosen for chosen in self.participation[: round - 1])

    def as_dict(self) -> dict:
        return asdict(self)


def deal(config: Config, labels: np.ndarray) -> list[np.ndarray]:
    """Each client's record numbers, from the public seed. Raises BadInput where a client would have too few."""
    rng = np.random.default_rng([config.seed, PARTITION])
    if config.partition == "iid":
        return partition_iid(labels, config.clients, rng, config.records_needed)
    return partition_dirichlet(labels, config.clients, config.dirichlet_alpha, rng, config.records_needed)


def partition_digest(parts: Sequence[np.ndarray]) -> str:
    """Equal for equal partitions, in any process."""
    return hashlib.sha256(b"|".join(np.asarray(p, dtype="<i8").tobytes() for p in parts)).hexdigest()[:32]


def participation(config: Config) -> list[list[int]]:
    """Who takes part in each round, from the public seed: in shuffled turns, so that counts differ by one at most.

    Equal turns keep the most exposed client's number of steps, and so every client's noise, as low as can be. No
    amplification by client sampling is claimed, so the order need not be random.
    """
    rng = np.random.default_rng([config.seed, PARTICIPATION])
    chosen = max(1, round(config.fraction * config.clients))
    turn: list[int] = []
    rounds = []
    for _ in range(config.rounds):
        if len(turn) < chosen:
            order = [int(c) for c in rng.permutation(config.clients)]
            turn += [c for c in order if c not in turn] + [c for c in order if c in turn]
        rounds.append(sorted(turn[:chosen]))
        turn = turn[chosen:]
    return rounds


def make_plan(config: Config, sizes: Sequence[int]) -> Plan:
    """Participation, and σ_i calibrated for (ε, δ, q_i = b/|D_i|, the client's total steps).

    Raises BadInput naming the client that has no data or fewer records than the batch, ValueError for an ε that no σ
    reaches.
    """
    for client, records in enumerate(sizes):
        if records == 0:
            raise BadInput(f"client {client} has no data; take fewer clients or a larger --dirichlet-alpha")
        if records < config.batch_size:
            raise BadInput(
                f"client {client} has {records} records, fewer than the batch of {config.batch_size}; make "
                f"--batch-size smaller, or raise --min-records"
            )
        if config.private:
            try:
                refuse_delta(config.delta, records)
            except ValueError as error:
                raise BadInput(f"client {client}: {error}") from None
    rounds = participation(config)
    clients = []
    for client, records in enumerate(sizes):
        q = config.batch_size / records
        steps = config.local_steps * sum(client in chosen for chosen in rounds)
        sigma = 0.0
        if config.private and steps:
            sigma = get_noise_multiplier(
                target_epsilon=config.epsilon, target_delta=config.delta, sample_rate=q, steps=steps
            )
        clients.append(ClientPlan(client, int(records), q, steps, sigma))
    return Plan(rounds, clients)


def read_plan(stored: dict, config: Config, sizes: Sequence[int]) -> Plan:
    """The plan that a run stored, with its σ. Raises BadInput where it is not the one that ``config`` makes."""
    plan = Plan(stored["participation"], [ClientPlan(**client) for client in stored["clients"]])
    told = [(c.client, c.records, c.sample_rate, c.steps) for c in plan.clients]
    turns = [plan.steps_before(i, config.rounds + 1, config.local_steps) for i in range(len(sizes))]
    if plan.participation != participation(config) or told != [
        (i, records, config.batch_size / records, turns[i]) for i, records in enumerate(sizes)
    ]:
        raise BadInput("the stored plan is not the one that the stored settings make; restore config.json from a copy")
    for client in plan.clients:
        try:
            check_noise_multiplier(client.noise_multiplier)
        except ValueError as error:
            raise BadInput(f"config.json, client {client.client}: {error}") from error
    return plan

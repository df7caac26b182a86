"""The federated methods, as data: which factor trains, what travels, how the server averages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lalora_kernels.nn import factor_of
from lalora_kernels.schedule import Schedule, get_schedule

Update = Mapping[str, Tensor]
Aggregate = Callable[[Iterable[Update], Sequence[float]], dict[str, Tensor]]


def weighted_mean(updates: Iterable[Update], weights: Sequence[float]) -> dict[str, Tensor]:
    """Sum_i w_i update_i / Sum_i w_i of each tensor, in float64, in the order given; keys come out sorted.

    ``updates`` hold the same keys and shapes and are looked at one after the other, none being kept; results have the
    first update's dtypes. The mean of one update, or of equal ones with equal weights, is that update to its last bit.

    Raises ValueError for no update, keys or shapes that differ (naming the tensor), NaN or Inf, weights that are
    negative, not finite or all zero.
    """
    total = float(sum(weights))
    if len(weights) and not (all(0 <= w < float("inf") for w in weights) and total > 0):
        raise ValueError(f"weights are finite, not negative and not all zero; got {list(weights)}")
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    count = 0
    for i, update in enumerate(updates):
        count = i + 1
        if count > len(weights):
            break
        if not i:
            dtypes = {key: update[key].dtype for key in sorted(update)}
            sums = {
                key: torch.zeros(update[key].shape, dtype=torch.float64, device=update[key].device) for key in dtypes
            }
        if strange := sorted(set(sums) ^ set(update)):
            raise ValueError(f"update {i}: tensors {strange} are missing or too many")
        for key, acc in sums.items():
            value = update[key]
            if value.shape != acc.shape:
                raise ValueError(f"update {i}: {key} has shape {tuple(value.shape)}, not {tuple(acc.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"update {i}: {key} holds NaN or Inf")
            acc += weights[i] * value.double()
    if not count:
        raise ValueError("nothing to average: no client sent an update")
    if count != len(weights):
        raise ValueError(f"there are as many weights as updates, one an update; got {list(weights)}")
    return {key: (acc / total).to(dtypes[key]) for key, acc in sums.items()}


@dataclass(frozen=True)
class Method:
    """One federated method. ``sends`` names the factors that a round moves; trained heads and norms always travel."""

    name: str
    schedule: Schedule
    sends: str  # "A", "B", "AB", or "active": the one factor of this round
    aggregate: Aggregate
    source: str

    def factors(self, round: int) -> str:
        """The factors that travel in round ``round`` (from 1), both ways: "A", "B" or "AB"."""
        return self.schedule.active(round, 1) if self.sends == "active" else self.sends

    def travels(self, key: str, round: int) -> bool:
        """Whether the tensor named ``key`` travels in this round: one of its factors, or no factor (a head, a norm)."""
        factor = factor_of(key)
        return True if factor is None else factor in self.factors(round)


# FFA-LoRA: A is drawn once, from the public seed, so every client starts from the same A and never moves it.
METHODS = {
    m.name: m
    for m in (
        Method("dp-lora", get_schedule("dp-lora"), "AB", weighted_mean, "arXiv 2312.17493"),
        Method("ffa-lora", get_schedule("ffa-lora"), "B", weighted_mean, "arXiv 2403.12313"),
        Method("rolora", get_schedule("rolora"), "active", weighted_mean, "arXiv 2409.02346"),
        Method("la-lora", get_schedule("la-lora"), "AB", weighted_mean, "arXiv 2602.19926"),
    )
}


def get_method(name: str) -> Method:
    """A method of the table by name. Raises ValueError if unknown."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]

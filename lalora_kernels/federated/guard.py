"""What the server believes: an update is checked before it counts, and the rule that combines updates is data.

Nothing that a client claims about itself has weight: sizes are public and declared beforehand, and an update that does
not fit is left out, counted and named, whoever sent it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lalora_kernels.federated.methods import Aggregate, Update

if TYPE_CHECKING:
    from lalora_kernels.federated.config import Config

MOST_LOST = 3  # rounds in a row that the state stayed as it was


@dataclass(frozen=True)
class Rules:
    """How a round's updates become one state.

    aggregator: "mean", "median" (of each coordinate; Yin et al. 2018, 1803.01498) or "trimmed_mean" (without the share
        ``trim`` of the highest and of the lowest values of each coordinate; same source).
    max_update_norm: an update farther from the reference than this many times the reference's own L2 norm (at least
        1) is left out.
    clip_update_norm: L2 norm to which what an update changes is scaled down first (Sun et al. 2019, 1911.07963).
    quorum: share of the chosen clients that must have sent a valid update, or the state stays as it is.
    """

    aggregator: str = "mean"
    trim: float = 0.2
    max_update_norm: float = 1000.0
    clip_update_norm: float | None = None
    quorum: float = 0.5

    @classmethod
    def of(cls, config: "Config") -> "Rules":
        """The rules that a run's settings name."""
        return cls(config.aggregator, config.trim, config.max_update_norm, config.clip_update_norm, config.quorum)

    def needed(self, chosen: int) -> int:
        """Valid updates that a round of ``chosen`` clients needs; at least one."""
        return max(1, math.ceil(self.quorum * chosen - 1e-9))


@dataclass(frozen=True)
class Outcome:
    """What became of a round's updates: who counted, who was left out and why, whether the state moved."""

    accepted: list[int]
    dropped: dict[int, str] = field(default_factory=dict)
    moved: bool = True


def schema(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> dtype and shape of each tensor, as text; equal in any process."""
    return {name: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in tensors.items()}


def why_other(here: Mapping[str, str], there: object) -> str | None:
    """What the other side's ``schema`` has otherwise than ours, the first three names of it; None where it is ours."""
    if not isinstance(there, dict):
        return f"the server's message has no schema, but {there!r:.70}"
    other = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
    told = [f"{n:.100} is {here.get(n, 'missing')} here, {there.get(n, 'missing')!s:.70} there" for n in other[:3]]
    return f"{len(other)} tensors are not the server's: {'; '.join(told)}" if other else None


def distance(update: Update, reference: Update) -> float:
    """L2 norm of what the update changes, over all of its tensors, in float64."""
    return math.sqrt(sum(float((update[k].double() - reference[k].double()).square().sum()) for k in sorted(reference)))


def norm(tensors: Update) -> float:
    """L2 norm over all tensors, in float64."""
    return math.sqrt(sum(float(tensors[k].double().square().sum()) for k in sorted(tensors)))


def why_refused(update: Update, reference: Update, rules: Rules) -> str | None:
    """The reason to leave ``update`` out, or None. ``reference``: the tensors of this round as the server sent them.

    Checked in this order: names, shapes, dtypes, NaN and Inf, distance from the reference.
    """
    if strange := sorted(set(update) ^ set(reference)):
        return f"other tensors than the method sends: {', '.join(strange[:3])[:200]}"
    for key in sorted(reference):
        value, wanted = update[key], reference[key]
        if value.shape != wanted.shape:
            return f"{key} has shape {tuple(value.shape)}, not {tuple(wanted.shape)}"
        if value.dtype != wanted.dtype:
            return f"{key} is {value.dtype}, not {wanted.dtype}"
        if not value.isfinite().all():
            return f"{key} is NaN or Inf"
    far, bound = distance(update, reference), rules.max_update_norm * max(1.0, norm(reference))
    return f"it is {far:.3g} away from the reference, more than {bound:.3g}" if far > bound else None


def combine(
    updates: Mapping[int, Update],
    weights: Mapping[int, float],
    reference: Update,
    rules: Rules,
    mean: Aggregate,
    chosen: int,
) -> tuple[dict[str, Tensor], Outcome]:
    """Check every update, then combine the valid ones in order of client number: (the new tensors, what became of all).

    An update is looked up when its turn comes and not kept, so a mapping that reads from disk holds one at a time;
    "median" and "trimmed_mean" need every client's value of a coordinate at once, and look up tensor by tensor instead.
    Below the quorum the tensors are none, and the state is to stay.
    """
    accepted: list[int] = []
    dropped: dict[int, str] = {}
    scale: dict[int, float] = {}
    for client in sorted(updates):
        reason, factor = _look_at(updates[client], reference, rules)
        if reason is not None:
            dropped[client] = reason
        else:
            accepted.append(client)
            scale[client] = factor
    if len(accepted) < rules.needed(chosen):
        return {}, Outcome(accepted, dropped, moved=False)
    valid = _Valid(updates, accepted, reference, scale)
    if rules.aggregator == "mean":
        return mean(valid, [weights[client] for client in accepted]), Outcome(accepted, dropped)
    return _by_coordinate(valid, reference, rules), Outcome(accepted, dropped)


def _look_at(update: Update, reference: Update, rules: Rules) -> tuple[str | None, float]:
    """(why it is refused or None, the factor that clips what it changes)"""
    reason = why_refused(update, reference, rules)
    if reason is not None or rules.clip_update_norm is None:
        return reason, 1.0
    far = distance(update, reference)
    return None, min(1.0, rules.clip_update_norm / far) if far else 1.0


class _Valid(Iterable[Update]):
    """The valid updates in order, looked up anew at each pass, clipped where the rules ask for it."""

    def __init__(self, updates: Mapping[int, Update], clients: list[int], reference: Update, scale: dict[int, float]):
        self.updates, self.clients, self.reference, self.scale = updates, clients, reference, scale

    def __iter__(self) -> Iterator[Update]:
        for client in self.clients:
            update, scale = self.updates[client], self.scale.get(client, 1.0)
            yield update if scale == 1.0 else _Clipped(update, self.reference, scale)


class _Clipped(Mapping[str, Tensor]):
    """reference + scale (update - reference), tensor by tensor, in float64 until the last rounding."""

    def __init__(self, update: Update, reference: Update, scale: float):
        self.update, self.reference, self.scale = update, reference, scale

    def __getitem__(self, key: str) -> Tensor:
        start = self.reference[key].double()
        return (start + self.scale * (self.update[key].double() - start)).to(self.reference[key].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.update)

    def __len__(self) -> int:
        return len(self.update)


def _by_coordinate(updates: Iterable[Update], reference: Update, rules: Rules) -> dict[str, Tensor]:
    middle: Callable[[Tensor], Tensor] = median if rules.aggregator == "median" else partial(trimmed, share=rules.trim)
    return {
        key: middle(torch.stack([update[key] for update in updates]).double()).to(reference[key].dtype)
        for key in sorted(reference)
    }


def median(values: Tensor) -> Tensor:
    """(clients, …) -> (…): each coordinate's middle value; of an even number, the mean of the two in the middle."""
    ordered = values.sort(dim=0).values
    low, high = (len(values) - 1) // 2, len(values) // 2
    return ordered[low] if low == high else (ordered[low] + ordered[high]) / 2


def trimmed(values: Tensor, share: float) -> Tensor:
    """(clients, …) -> (…): the mean of each coordinate without its ⌊share · clients⌋ highest and lowest values."""
    cut = math.floor(share * len(values) + 1e-9)
    return values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0)


class QuorumLost(RuntimeError):
    """Round after round, too few clients sent a valid update; training on would spend budgets for nothing."""


def refuse_lost_rounds(history: list[dict[str, Any]]) -> None:
    """Raise QuorumLost, naming whose updates were dropped, where no round of the last ``MOST_LOST`` moved the state."""
    last = history[-MOST_LOST:]
    if len(last) == MOST_LOST and not any(record.get("moved", True) for record in last):
        dropped = last[-1]["dropped"] or {"": "no update came"}
        why = "; ".join(f"client {client}: {reason}" if client else reason for client, reason in dropped.items())
        raise QuorumLost(
            f"no round of the last {MOST_LOST} had a quorum ({why}); where updates are NaN, Inf or far away, the "
            f"training diverged: lower --lr or --momentum"
        )

"""The federated methods, as data: which factor trains, what travels, how the server averages."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lalora_kernels.nn import factor_of
from lalora_kernels.schedule import Schedule, get_schedule

Update = Mapping[str, Tensor]
Aggregate = Callable[[Iterable[Update], Sequence[float]], dict[str, Tensor]]
# (state after the mean, valid updates, their weights, scaling s, round) -> the tensors that the server changes besides
Finish = Callable[[Update, Sequence[Update], Sequence[float], float, int], dict[str, Tensor]]


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


def products(state: Update) -> dict[str, tuple[str, str]]:
    """Layer -> the names of its A (r, n) and its B (m, r) in ``state``. Raises ValueError for other adapters."""
    found = {}
    for a in sorted(key for key in state if factor_of(key) == "A"):
        layer, _, name = a.rpartition(".")
        b = f"{layer}.lora_B" if layer else "lora_B"
        if name != "lora_A" or b not in state or state[a].dim() != 2:
            raise ValueError(f"{a}: the product B A is defined for adapted linear layers only; --targets names layers")
        found[layer] = (a, b)
    return found


def base_name(layer: str) -> str:
    """Name of a layer's frozen weight in the state of a method that folds into it."""
    return f"{layer}.weight" if layer else "weight"


def _mean_product(updates: Sequence[Update], weights: Sequence[float], a: str, b: str) -> Tensor:
    """Sum_i w_i B_i A_i / Sum_i w_i, (m, n) in float64."""
    return torch.stack([w * (u[b].double() @ u[a].double()) for w, u in zip(weights, updates)]).sum(0) / sum(weights)


def merged_weights(state: Update, scaling: float) -> dict[str, Tensor]:
    """The weights of the base model that a method which folds has changed, s B A included, and the trained heads."""
    merged = {key: value for key, value in state.items() if factor_of(key) is None}
    for layer, (a, b) in products(state).items():
        base = state[base_name(layer)]
        merged[base_name(layer)] = (base.double() + scaling * state[b].double() @ state[a].double()).to(base.dtype)
    return merged


def refactor(
    state: Update, updates: Sequence[Update], weights: Sequence[float], s: float, round: int
) -> dict[str, Tensor]:
    """FedSVD: B A = U Σ Vᵀ; A becomes Vᵀ, with orthonormal rows, and B becomes U Σ. The product stays as it is.

    By the QR factors of B and Aᵀ, so that nothing of m by n is made; A has at most as many rows as columns.
    """
    moved: dict[str, Tensor] = {}
    for a, b in products(state).values():
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(state[b].double()), torch.linalg.qr(state[a].double().T)
        u, sigma, vt = torch.linalg.svd(r_b @ r_a.T)
        if len(vt) != len(state[a]):
            most = state[a].shape[1]
            raise ValueError(f"{a}: FedSVD needs a rank of at most the layer's {most} input features; --rank {most}")
        scaled = torch.zeros(len(q_b), len(vt), dtype=torch.float64)
        scaled[:, : len(sigma)] = (q_b @ u)[:, : len(sigma)] * sigma
        moved |= {a: (vt @ q_a.T).to(state[a].dtype), b: scaled.to(state[b].dtype)}
    return moved


def fold_residual(
    state: Update, updates: Sequence[Update], weights: Sequence[float], s: float, round: int
) -> dict[str, Tensor]:
    """FedEx-LoRA: W0 += s (mean(B A) − mean(B) mean(A)), so that the averaged model is the mean of the models."""
    moved: dict[str, Tensor] = {}
    for layer, (a, b) in products(state).items():
        residual = _mean_product(updates, weights, a, b) - state[b].double() @ state[a].double()
        base = state[base_name(layer)]
        moved[base_name(layer)] = (base.double() + s * residual).to(base.dtype)
    return moved


def fold_stack(
    state: Update, updates: Sequence[Update], weights: Sequence[float], s: float, round: int
) -> dict[str, Tensor]:
    """FLoRA: the stacked factors, whose product is mean(B A), are folded into W0; the next round starts adapters anew.

    B is 0 again and A uniform within ±1/√n, as at the start, drawn from the round's number: public, alike for all.
    """
    moved: dict[str, Tensor] = {}
    for i, (layer, (a, b)) in enumerate(products(state).items()):
        base = state[base_name(layer)]
        moved[base_name(layer)] = (base.double() + s * _mean_product(updates, weights, a, b)).to(base.dtype)
        bound = 1 / math.sqrt(state[a].shape[1])
        drawn = torch.rand(state[a].shape, generator=torch.Generator().manual_seed(round * 100_003 + i))
        moved |= {a: ((2 * drawn - 1) * bound).to(state[a].dtype), b: torch.zeros_like(state[b])}
    return moved


@dataclass(frozen=True)
class Method:
    """One federated method. ``sends`` names the factors that a round moves; trained heads and norms always travel.

    Further methods only: ``finish`` is the server's work after the mean, post-processing of what the clients released;
    ``folds``: it changes the frozen weights too, which then are part of the server's state; ``keeps``: the factor that
    stays with each client and is never averaged; ``down``: numbers that the server sends a client for one layer, by
    (m, n, r, clients of the last round).
    """

    name: str
    schedule: Schedule
    sends: str  # "A", "B", "AB", or "active": the one factor of this round
    aggregate: Aggregate
    source: str
    finish: Finish | None = None
    folds: bool = False
    keeps: str = ""
    down: Callable[[int, int, int, int], int] | None = None

    @property
    def in_process_only(self) -> bool:
        """Whether only ``Run`` can drive it: a Flower client holds neither changed weights nor a factor of its own."""
        return self.finish is not None or bool(self.keeps)

    def factors(self, round: int) -> str:
        """The factors that travel in round ``round`` (from 1), up: "A", "B" or "AB"."""
        return self.schedule.active(round, 1) if self.sends == "active" else self.sends

    def travels(self, key: str, round: int) -> bool:
        """Whether the tensor named ``key`` travels up in this round: one of its factors, or a head or a norm."""
        factor = factor_of(key)
        return True if factor is None else factor in self.factors(round)

    def stays(self, key: str) -> bool:
        """Whether the tensor named ``key`` is each client's own."""
        return bool(self.keeps) and factor_of(key) == self.keeps


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
_both = partial(Method, schedule=get_schedule("dp-lora"), aggregate=weighted_mean)
FURTHER = {
    m.name: m
    for m in (
        Method("la-lora-unfiltered", get_schedule("la-lora-unfiltered"), "AB", weighted_mean, "LA-LoRA, no filter"),
        # trains B on a fixed A, as FFA-LoRA does; the server turns A by the SVD of the aggregated product
        Method("fedsvd", get_schedule("ffa-lora"), "B", weighted_mean, "arXiv 2505.12805", refactor,
               down=lambda m, n, r, k: r * (m + n)),
        # both trained as in DP-LoRA; the residual has rank (k + 1) r, and goes down as factors of k clients
        _both("fedex-lora", sends="AB", source="arXiv 2410.09432", finish=fold_residual, folds=True,
              down=lambda m, n, r, k: (k + 1) * r * (m + n)),
        _both("flora", sends="AB", source="arXiv 2409.05976", finish=fold_stack, folds=True,
              down=lambda m, n, r, k: k * r * (m + n)),
        # both trained as in DP-LoRA; what all have in common is A
        _both("fedsa-lora", sends="A", source="arXiv 2410.01463", keeps="B"),
        *(Method(name, get_schedule(name), "AB", weighted_mean, "LA-LoRA, other periods")
          for name in ("la-lora-2-1", "la-lora-4-1", "la-lora-1-2", "la-lora-5-5", "la-lora-10-10", "la-lora-25-25",
                       "la-lora-a-first")),
    )
}  # fmt: skip


def get_method(name: str) -> Method:
    """A method of the tables by name. Raises ValueError if unknown."""
    known = METHODS | FURTHER
    if name not in known:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}")
    return known[name]

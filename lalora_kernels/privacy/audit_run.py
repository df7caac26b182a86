"""The one-run auditor: many canaries, each in the data or not by a fair coin; one training; an attacker who guesses.

Under (ε, δ)-DP the number of right guesses is hardly larger than that of a biased coin's, e^ε to 1, so many right
guesses refute every small ε. Source: Steinke, Nasr & Jagielski 2023 (2305.08846), Theorem 5.2 and appendix D.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lalora_kernels.data import Records
from lalora_kernels.models import Classifier
from lalora_kernels.nn import LoRALinear, lora_layers
from lalora_kernels.privacy.accountant import compute_epsilon, get_noise_multiplier
from lalora_kernels.privacy.audit import binomial_filter_matrix
from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.privacy.optimizer import PrivateOptimizer

KINDS = ("dirac", "mislabelled")
RIDGE = 1e-4  # of the filter's inverse: in float32, frequencies that the filter leaves less than 1% of are lost


def p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Largest probability of ``correct`` or more right of ``guesses``, the rest of ``canaries`` abstained from, under
    (ε, δ)-DP: P[Bin(r, p) >= v] + 2 m δ max_i P[v > Bin(r, p) >= v - i] / i, p = e^ε / (1 + e^ε)."""
    from scipy.stats import binom

    if not 0 <= correct <= guesses <= canaries or epsilon < 0 or not 0 <= delta < 1:
        raise ValueError(f"no audit has {correct} right of {guesses} guesses of {canaries} canaries")
    p = 1.0 / (1.0 + float(np.exp(-epsilon)))
    below = binom.pmf(np.arange(correct - 1, -1, -1), guesses, p).cumsum()
    worst = float((below / np.arange(1, correct + 1)).max()) if correct else 0.0
    return min(1.0, float(binom.sf(correct - 1, guesses, p)) + 2 * canaries * delta * worst)


def epsilon_lower_bound(correct: int, guesses: int, canaries: int, delta: float, false_alarm: float) -> float:
    """The largest ε that so many right guesses refute at ``false_alarm``; 0 where they refute none."""
    low, high = 0.0, 64.0
    if p_value(correct, guesses, canaries, low, delta) >= false_alarm:
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        refuted = p_value(correct, guesses, canaries, middle, delta) < false_alarm
        low, high = (middle, high) if refuted else (low, middle)
    return low


@dataclass(frozen=True)
class RunAudit:
    """What the attack on one run showed. ``epsilon`` is a lower bound that holds with ``confidence``;
    ``epsilon_theory`` is the ledger's."""

    kind: str
    canaries: int
    guesses: int
    correct: int
    steps: int
    sample_rate: float
    noise_multiplier: float
    smoothing: str | None
    delta: float
    confidence: float
    epsilon: float
    epsilon_theory: float

    @property
    def broken(self) -> bool:
        """Whether the claim is refuted."""
        return self.epsilon > self.epsilon_theory

    @property
    def epsilon_most(self) -> float:
        """The largest lower bound of ε that so many guesses can show: that of an attack whose guesses are all right."""
        return epsilon_lower_bound(self.guesses, self.guesses, self.canaries, self.delta, 1.0 - self.confidence)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "broken": self.broken, "epsilon_most": self.epsilon_most}


@dataclass(frozen=True)
class Place:
    """A Dirac canary's coordinates in one layer: B[row_b, rank] at B's steps, A[rank, column_a] at A's."""

    layer: int
    rank: int
    row_b: int
    column_a: int


class _WithCanaries(Dataset):
    """(record, number of the canary, or -1)."""

    def __init__(self, records: Records, numbers: list[int], blank: Tensor):
        self.records, self.numbers, self.blank = records, numbers, blank

    def __len__(self) -> int:
        return len(self.records) + len(self.numbers)

    def __getitem__(self, i: int) -> tuple[tuple[Any, int], int]:
        if i < len(self.records):
            return self.records[i], -1
        return (self.blank, 0), self.numbers[i - len(self.records)]


def audit_run(
    classifier: Classifier,
    records: Records,
    *,
    kind: str = "dirac",
    canaries: int = 1000,
    guesses: int | None = None,
    steps: int = 100,
    sample_rate: float = 0.25,
    target_epsilon: float | None = 3.0,
    noise_multiplier: float | None = None,
    delta: float = 1e-7,
    max_grad_norm: float = 1.0,
    smoothing: str | None = "binomial5",
    method: str = "la-lora",
    lr: float = 0.5,
    false_alarm: float = 1e-4,
    noise: NoiseSource | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RunAudit:
    """Train ``classifier``, adapted, once through ``make_private``, on ``records`` and about half of the canaries.

    kind: "dirac": a canary's gradient is C in one coordinate of one adapter and 0 elsewhere; the attacker sees every
    release and undoes the filter. "mislabelled": a canary is one of ``records`` with a wrong label (the others train
    with theirs); the attacker compares its loss before and after. Either way the highest scores are guessed to be in,
    the lowest out, ``guesses`` in all (default: a fifth). ``seed`` draws the attacker's coins. With a ``delta`` that is
    not well below ``false_alarm`` over the number of canaries, no number of right guesses refutes anything.

    The model is trained in place. Raises ValueError for an unknown kind or more canaries than there is room for.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is one of {KINDS}, got {kind!r}")
    guesses = max(2, canaries // 5) if guesses is None else guesses
    if not 2 <= guesses <= canaries:
        raise ValueError(f"guesses lies between 2 and the number of canaries, got {guesses} of {canaries}")
    if noise_multiplier is None:
        if target_epsilon is None:
            raise ValueError("give target_epsilon or noise_multiplier")
        noise_multiplier = get_noise_multiplier(
            target_epsilon=target_epsilon, target_delta=delta, sample_rate=sample_rate, steps=steps
        )
    rng = np.random.default_rng(seed)
    inside = rng.random(canaries) < 0.5
    attack = _Dirac if kind == "dirac" else _Mislabelled
    attacker = attack(classifier, records, inside, rng, max_grad_norm, smoothing)
    model = classifier.model.train()
    optimizer, loader = make_private(
        model,
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr),
        DataLoader(attacker.data, batch_size=1, collate_fn=attacker.collate),
        method=method, smoothing=smoothing, max_grad_norm=max_grad_norm, noise_multiplier=noise_multiplier,
        sample_rate=sample_rate, noise=noise, loss_reduction="sum",
        check=kind != "dirac",  # whose canaries call layers beside their model
    )  # fmt: skip
    try:
        for step, batch in enumerate(loader.steps(steps), 1):
            attacker.loss(batch).backward()
            optimizer.step()
            attacker.observe(optimizer)
            optimizer.zero_grad()
            if progress is not None:
                progress(step, steps)
    finally:
        optimizer.detach()
    order = np.argsort(attacker.scores(), kind="stable")
    out, into = order[: guesses // 2], order[canaries - (guesses - guesses // 2) :]
    correct = int((~inside[out]).sum() + inside[into].sum())
    return RunAudit(
        kind=kind, canaries=canaries, guesses=guesses, correct=correct, steps=steps, sample_rate=sample_rate,
        noise_multiplier=noise_multiplier, smoothing=smoothing, delta=delta, confidence=1.0 - false_alarm,
        epsilon=epsilon_lower_bound(correct, guesses, canaries, delta, false_alarm),
        epsilon_theory=compute_epsilon(optimizer.ledger.releases, delta),
    )  # fmt: skip


class _Dirac:
    """Canaries are rows of the batch for which every adapted layer is called once more, on an input and with a
    gradient that make the layer's per-sample gradient one coordinate; the image of such a row is blank and free."""

    def __init__(
        self,
        classifier: Classifier,
        records: Records,
        inside: np.ndarray,
        rng: np.random.Generator,
        max_grad_norm: float,
        smoothing: str | None,
    ):
        self.classifier, self.size = classifier, 10.0 * max_grad_norm
        self.layers = [layer for _, layer in lora_layers(classifier.model) if isinstance(layer, LoRALinear)]
        free = [(i, k) for i, l in enumerate(self.layers) for k in range(l.r * min(l.in_features, l.out_features))]
        if len(inside) > len(free):
            raise ValueError(f"{len(inside)} canaries need as many coordinates; the adapters have {len(free)}")
        self.places = []
        for j in rng.permutation(len(free))[: len(inside)]:
            layer, k = free[j]
            feature, rank = divmod(k, self.layers[layer].r)
            self.places.append(Place(layer, rank, feature, feature))
        image, _ = records[0]
        assert isinstance(image, Tensor)
        self.data = _WithCanaries(records, np.flatnonzero(inside).tolist(), torch.zeros_like(image))
        self.totals = np.zeros(len(inside))
        self.inverses: dict[int, Tensor] = {}
        self.smoothing = smoothing

    def collate(self, items: list) -> tuple[Tensor, Tensor, Tensor]:
        inputs, labels = self.classifier.collate([record for record, _ in items])
        return inputs, labels, torch.tensor([number for _, number in items])

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        inputs, labels, numbers = batch
        real = (numbers < 0).to(torch.float32)
        loss = (F.cross_entropy(self.classifier.logits(inputs), labels, reduction="none") * real).sum()
        here = [(row, self.places[c]) for row, c in enumerate(numbers.tolist()) if c >= 0]
        for i, layer in enumerate(self.layers):
            x, dy = torch.zeros(len(numbers), layer.in_features), torch.zeros(len(numbers), layer.out_features)
            b_trains = layer.lora_B.requires_grad
            with torch.no_grad():
                inverse = torch.linalg.pinv(layer.lora_A if b_trains else layer.lora_B)
            for row, place in here:
                if place.layer == i and b_trains:  # s dy (x A^T)^T
                    x[row], dy[row, place.row_b] = inverse[:, place.rank], self.size / layer.scaling
                elif place.layer == i:  # s (dy B)^T x
                    x[row, place.column_a], dy[row] = 1.0, self.size / layer.scaling * inverse[place.rank]
            loss = loss + (layer(x) * dy).sum()
        return loss

    def observe(self, optimizer: PrivateOptimizer) -> None:
        """Add up what each canary's coordinate received, the filter undone."""
        undone = {}
        for i, layer in enumerate(self.layers):
            b = layer.lora_B.grad is not None
            grad = layer.lora_B.grad if b else layer.lora_A.grad.t()
            undone[i] = (self._inverse(len(grad)) @ grad.double()).numpy() * optimizer.expected_batch_size
        for c, place in enumerate(self.places):
            self.totals[c] += undone[place.layer][place.row_b, place.rank]

    def _inverse(self, length: int) -> Tensor:
        if length not in self.inverses:
            M = np.eye(length) if self.smoothing is None else binomial_filter_matrix(length)
            inverse = np.linalg.solve(M.T @ M + (RIDGE if self.smoothing else 0.0) * np.eye(length), M.T)
            self.inverses[length] = torch.from_numpy(inverse)
        return self.inverses[length]

    def scores(self) -> np.ndarray:
        return self.totals


class _Mislabelled:
    """Canaries are the first records with wrong labels."""

    def __init__(
        self,
        classifier: Classifier,
        records: Records,
        inside: np.ndarray,
        rng: np.random.Generator,
        max_grad_norm: float,
        smoothing: str | None,
    ):
        if len(inside) > len(records):
            raise ValueError(f"{len(inside)} mislabelled canaries need as many records; there are {len(records)}")
        self.classifier, self.collate, self.loss = classifier, classifier.collate, classifier.loss
        classes = int(records.labels.max()) + 1
        if classes < 2:
            raise ValueError("records of one class cannot be mislabelled")
        labels = records.labels.clone()
        labels[: len(inside)] += torch.from_numpy(rng.integers(1, classes, len(inside)))
        labels %= classes
        kept = np.concatenate([np.flatnonzero(inside), np.arange(len(inside), len(records))])
        index = torch.from_numpy(kept)
        images = records.inputs
        assert isinstance(images, Tensor)
        self.data = Records(images[index], labels[index])
        self.canaries = [(images[i], int(labels[i])) for i in range(len(inside))]
        self.before = self._losses(copy.deepcopy(classifier.model))

    @torch.no_grad()
    def _losses(self, model: nn.Module) -> np.ndarray:
        inputs, labels = self.classifier.collate(self.canaries)
        return F.cross_entropy(self.classifier.logits(inputs, model.eval()), labels, reduction="none").numpy()

    def observe(self, optimizer: PrivateOptimizer) -> None:
        pass

    def scores(self) -> np.ndarray:
        return self.before - self._losses(self.classifier.model)

"""Attacks on our own private step: what an adversary can show about ε, beside what the accountant claims.

``audit_privatize`` is a white-box test of one release: two neighbouring inputs, many draws, the best statistic there
is, and Clopper-Pearson bounds on its errors. A sound mechanism gives a lower bound close below the theoretical
trade-off curve; a lower bound above it proves a fault. Source: Nasr et al. 2023 (2302.07956), whose conversion by
Gaussian differential privacy (Dong et al. 2019, 1905.02383) is used for μ.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lalora_kernels import functional
from lalora_kernels.privacy.clipping import clip_weights
from lalora_kernels.privacy.noise import NoiseSource

# The record's tensors: a LoRA factor of each kind, filtered along its feature axis, and a bias, which is not.
SHAPES: tuple[tuple[tuple[int, ...], int], ...] = (((2, 7), 1), ((9, 2), 0), ((5,), -1))
# Thresholds in units of the statistic's deviation, centred between the two hypotheses; fixed before any draw.
THRESHOLDS = tuple(k / 4 for k in range(-10, 11))
STATISTICS = ("projection", "inverted")


def clopper_pearson(successes: int, trials: int, alpha: float) -> tuple[float, float]:
    """One-sided lower and upper bounds of a binomial probability, each wrong with probability at most ``alpha``.

    Source: Clopper & Pearson 1934. Raises ValueError for counts or ``alpha`` out of range.
    """
    from scipy.special import betaincinv

    if not 0 <= successes <= trials or trials < 1 or not 0.0 < alpha < 1.0:
        raise ValueError(f"not a binomial count with its risk: {successes} of {trials}, alpha {alpha}")
    low = 0.0 if successes == 0 else float(betaincinv(successes, trials - successes + 1, alpha))
    high = 1.0 if successes == trials else float(betaincinv(successes + 1, trials - successes, 1 - alpha))
    return low, high


def gaussian_tradeoff(fpr: float, mu: float) -> float:
    """Smallest false negative rate at ``fpr`` against a μ-GDP mechanism: Φ(Φ⁻¹(1 - fpr) - μ) (1905.02383)."""
    from scipy.special import ndtr, ndtri

    return float(ndtr(-ndtri(fpr) - mu)) if 0.0 < fpr < 1.0 else float(fpr <= 0.0)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest ε of a μ-GDP mechanism at ``delta`` (Balle & Wang 2018): δ = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ)."""
    from scipy.special import log_ndtr, ndtr

    if mu <= 0.0:
        return 0.0
    low, high = 0.0, mu * (mu + 16.0)
    for _ in range(100):
        epsilon = (low + high) / 2
        excess = ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)) - delta
        low, high = (epsilon, high) if excess > 0 else (low, epsilon)
    return high


@dataclass(frozen=True)
class Point:
    """One threshold's errors: measured, bounded from above, and the least that theory allows at ``fpr_bound``."""

    threshold: float
    fpr: float
    fnr: float
    fpr_bound: float
    fnr_bound: float
    fnr_theory: float


@dataclass(frozen=True)
class StepAudit:
    """What the attack on one release showed. ``confidence`` is that of all bounds together.

    mu, epsilon: lower bounds; mu_theory, epsilon_theory: what the mechanism claims (μ = 1/σ, and its ε at ``delta``).
    mu_attack: what this statistic would reach with draws without end; mu_theory but for a projection after smoothing.
    epsilon_direct: a lower bound from the error rates alone, which does not assume a Gaussian.
    """

    noise_multiplier: float
    max_grad_norm: float
    smoothing: str | None
    statistic: str
    draws: int
    delta: float
    confidence: float
    mu: float
    mu_attack: float
    mu_theory: float
    epsilon: float
    epsilon_direct: float
    epsilon_theory: float
    curve: tuple[Point, ...]

    @property
    def broken(self) -> bool:
        """Whether the claim is refuted: the lower bound lies above theory."""
        return self.mu > self.mu_theory or self.epsilon_direct > self.epsilon_theory

    @property
    def epsilon_most(self) -> float:
        """The largest lower bound of ε that so many draws can show: that of an attack without an error."""
        error = clopper_pearson(0, self.draws, _risk(1.0 - self.confidence))[1]
        mu, direct = _shown(error, error, self.delta)
        return max(gaussian_epsilon(mu, self.delta), direct)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "broken": self.broken, "epsilon_most": self.epsilon_most}


def audit_privatize(
    *,
    noise_multiplier: float = 1.0,
    max_grad_norm: float = 0.7,
    smoothing: str | None = "binomial5",
    statistic: str = "inverted",
    draws: int = 100_000,
    delta: float = 1e-5,
    false_alarm: float = 1e-4,
    noise: NoiseSource | None = None,
    seed: int = 0,
    backend: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StepAudit:
    """Try to tell releases with one record from releases without it.

    The record's gradient has ten times the norm C and is clipped by the product's own rule. ``draws`` releases of each
    hypothesis go through ``functional.privatize``, each with its own release number. The adversary knows everything but
    the noise and whether the record was there, and thresholds

    - "inverted": the release with the filter undone, projected on the record: the likelihood ratio, the best there is;
    - "projection": the release projected on the difference of the two means: weaker after smoothing.

    ``false_alarm`` bounds the probability that ``broken`` is true of a correct mechanism. Raises ValueError for
    arguments out of range.
    """
    if smoothing not in ("binomial5", None) or statistic not in STATISTICS:
        raise ValueError(
            f"smoothing is 'binomial5' or None, statistic one of {STATISTICS}; got {smoothing!r}, {statistic!r}"
        )
    if not noise_multiplier > 0 or not max_grad_norm > 0 or draws < 1:
        raise ValueError("noise_multiplier, max_grad_norm and draws are > 0")
    noise = NoiseSource() if noise is None else noise
    generator = torch.Generator().manual_seed(seed)
    dims = [dim if smoothing and dim >= 0 else None for _, dim in SHAPES]
    others = [3.0 * torch.randn(3, *shape, generator=generator) for shape, _ in SHAPES]
    record = [torch.randn(1, *shape, generator=generator) for shape, _ in SHAPES]
    scale = 10.0 * max_grad_norm / float(_flat(record).norm())
    record = [scale * g for g in record]
    direction, filtered = _statistic(record, dims, statistic, max_grad_norm)

    def release(G: list[Tensor], weights: Tensor, std: float) -> np.ndarray:
        out = [torch.empty(g.shape[1:]) for g in G]
        functional.privatize(
            G, [None] * len(G), weights, out, noise_std=std, key=noise.key if std else None,
            release=noise.take_release() if std else 0, tensor_index=range(len(G)), smooth_dim=dims, divisor=1.0,
            backend=backend,
        )  # fmt: skip
        return _flat(out).numpy()

    std = noise_multiplier * max_grad_norm
    scores: list[np.ndarray] = []
    plain = []
    for G in (others, [torch.cat([o, g]) for o, g in zip(others, record)]):
        weights = _weights(G, max_grad_norm)
        plain.append(float(release(G, weights, 0.0) @ direction))
        drawn = np.empty(draws)
        for i in range(draws):
            drawn[i] = release(G, weights, std) @ direction
            if progress is not None and i % 1000 == 999:
                progress(len(scores) * draws + i + 1, 2 * draws)
        scores.append(drawn)
    spread = std * float(np.linalg.norm(filtered))
    middle = sum(plain) / 2
    curve, mu, direct = _bounds(scores, middle, spread, false_alarm, delta, 1.0 / noise_multiplier)
    return StepAudit(
        noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, smoothing=smoothing, statistic=statistic,
        draws=draws, delta=delta, confidence=1.0 - false_alarm, mu=mu, mu_attack=(plain[1] - plain[0]) / spread,
        mu_theory=1.0 / noise_multiplier, epsilon=gaussian_epsilon(mu, delta), epsilon_direct=direct,
        epsilon_theory=gaussian_epsilon(1.0 / noise_multiplier, delta), curve=curve,
    )  # fmt: skip


def _bounds(
    scores: list[np.ndarray], middle: float, spread: float, false_alarm: float, delta: float, mu_theory: float
) -> tuple[tuple[Point, ...], float, float]:
    """(curve, lower bound of μ, lower bound of ε); all bounds hold at once but with probability ``false_alarm``."""
    alpha = _risk(false_alarm)
    points, mu, epsilon = [], 0.0, 0.0
    for t in THRESHOLDS:
        false_positives = int((scores[0] > middle + t * spread).sum())
        false_negatives = int((scores[1] <= middle + t * spread).sum())
        fpr = clopper_pearson(false_positives, len(scores[0]), alpha)[1]
        fnr = clopper_pearson(false_negatives, len(scores[1]), alpha)[1]
        shown = _shown(fpr, fnr, delta)
        mu, epsilon = max(mu, shown[0]), max(epsilon, shown[1])
        measured = false_positives / len(scores[0]), false_negatives / len(scores[1])
        points.append(Point(t, *measured, fpr, fnr, gaussian_tradeoff(fpr, mu_theory)))
    return tuple(points), mu, epsilon


def _risk(false_alarm: float) -> float:
    """That of each bound, two a threshold, which together are wrong with probability ``false_alarm`` at most."""
    return false_alarm / (2 * len(THRESHOLDS))


def _shown(fpr: float, fnr: float, delta: float) -> tuple[float, float]:
    """Lower bounds of μ and, of any mechanism, of ε, by upper bounds of both errors."""
    from scipy.special import ndtri

    mu = max(0.0, float(-ndtri(fpr) - ndtri(fnr))) if fpr < 1.0 and fnr < 1.0 else 0.0
    odds = max((1.0 - delta - b) / a for a, b in ((fpr, fnr), (fnr, fpr)))
    return mu, math.log(odds) if odds > 1.0 else 0.0


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]).double()


def _weights(G: list[Tensor], max_grad_norm: float) -> Tensor:
    """The product's flat clip factors of these per-sample gradients, (L,N)."""
    sq = torch.stack([g.double().square().flatten(1).sum(1) for g in G])
    weights, _ = clip_weights(
        sq, clipping="flat", max_grad_norm=max_grad_norm, grad_scale=1.0, valid=sq.shape[1], dtype=G[0].dtype
    )
    return weights


def _statistic(
    record: list[Tensor], dims: list[int | None], statistic: str, max_grad_norm: float
) -> tuple[np.ndarray, np.ndarray]:
    """w, which releases are projected on, and Mᵀw, which the noise is then projected on; M is the filter's matrix.

    With u the record's clipped gradient, the release moves by Mu and its noise is Mξ: w = Mu projects on the
    difference, w = M⁻ᵀu gives back <u, S + ξ>.
    """
    M = _filter_matrix([g.shape[1:] for g in record], dims)
    u = _flat(record).numpy()
    u *= max_grad_norm / np.linalg.norm(u)
    w = M @ u if statistic == "projection" else np.linalg.solve(M.T, u)
    return w, M.T @ w


def _filter_matrix(shapes: list[torch.Size], dims: list[int | None]) -> np.ndarray:
    """The filter of all tensors, flattened side by side, as one dense matrix."""
    size = sum(math.prod(shape) for shape in shapes)
    M, at = np.zeros((size, size)), 0
    for shape, dim in zip(shapes, dims):
        factors = [binomial_filter_matrix(n) if axis == dim else np.eye(n) for axis, n in enumerate(shape)]
        block = np.eye(1)
        for factor in factors:
            block = np.kron(block, factor)
        M[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return M


def binomial_filter_matrix(length: int) -> np.ndarray:
    """[1,4,6,4,1]/16 with symmetric padding as a matrix (length, length), by NumPy's convolution and not by ours."""
    pad = [np.pad(line, 2, mode="symmetric") for line in np.eye(length)]
    return np.stack([np.convolve(line, np.array([1, 4, 6, 4, 1]) / 16, "valid") for line in pad], 1)

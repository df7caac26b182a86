"""What the releases of a run cost: ε from (σ, q, count), σ from ε, and how many steps a budget still allows.

Every release is one Poisson-subsampled Gaussian. The default accountant composes privacy loss distributions (PLD) with
Google's ``dp_accounting``, in its pessimistic discretisation ("Connect the Dots", Doroshenko et al. 2022, 2207.04380):
a coarse grid can only make the reported ε larger. The grid's spacing is a power of two, at most 2^-11 and at most 1/16
of the standard deviation of the smallest release's loss, which keeps the excess below about 0.1% of ε; it is coarser
only where more than 2^18 points a release, or 2^22 in all, would be needed (ε in the thousands, or q under 1e-4). The
convolutions round in float64, and raising to the n-th power multiplies their error by n: δ is lowered by 1e-12 and
2^-51 a release (measured: up to 2^-54) to stay above it, and a δ under 1e-10 is refused.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

from lalora_kernels.privacy.sampling import check_sample_rate

Release = tuple[float, float, int]  # (noise_multiplier, sample_rate, count), as in Opacus' accountant.history

ACCOUNTANTS = ("pld", "rdp")
NEIGHBORING_RELATIONS = ("add_or_remove_one", "replace_one")
MIN_DELTA = 1e-10
ROUNDING_DELTA, ROUNDING_OF_ONE = 1e-12, 2.0**-51  # of all, and of each release
MAX_STEPS = 10_000_000
LARGEST = sys.float_info.max  # a whole number may be larger, and still below inf
MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER = 0.01, 1e5

_COARSEST, _FINEST = -11, -30  # log2 of the grid's spacing
_POINTS_OF_ONE, _POINTS_OF_ALL = 2.0**18, 2.0**22


def compute_epsilon(
    releases: Iterable[Release],
    delta: float,
    *,
    accountant: str = "pld",
    neighboring_relation: str = "add_or_remove_one",
) -> float:
    """Smallest ε that the accountant can show for the composition of ``releases`` at ``delta``; an upper bound.

    Args:
        releases: (noise_multiplier, sample_rate, count) triples, in any order; none at all costs 0.
        delta: δ in [1e-10, 1).
        accountant: "pld", or "rdp" (Mironov 2017): looser, for comparison.
        neighboring_relation: "add_or_remove_one" record, or "replace_one" (PLD only).

    Returns ε >= 0; ``inf`` where a release had a noise_multiplier under 0.01, where ε would be in the millions, and
    where δ is within the rounding of so many releases (1e-10: 200,000; 1e-9: 2 million).
    Raises ValueError for arguments out of range.
    """
    _one_of("accountant", accountant, ACCOUNTANTS)
    _one_of("neighboring_relation", neighboring_relation, NEIGHBORING_RELATIONS)
    if accountant == "rdp" and neighboring_relation != "add_or_remove_one":
        raise ValueError("the RDP accountant knows add_or_remove_one only; use accountant='pld' for replace_one")
    return _epsilon(merge_releases(releases), check_delta(delta), accountant, neighboring_relation)


def get_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    epsilon_tolerance: float = 1e-3,
    history: Iterable[Release] = (),
) -> float:
    """σ with which ``steps`` releases at ``sample_rate``, after those of ``history``, cost ε in (target - tolerance,
    target] by PLD, add or remove one record. Opacus' function of this name, with an accountant that is tight.

    Raises ValueError for arguments out of range, and where no σ in [0.01, 1e5] reaches the target.
    """
    target, delta = check_epsilon(target_epsilon, "target_epsilon"), check_delta(target_delta, "target_delta")
    check_sample_rate(sample_rate)
    steps = check_steps(steps)
    spent = merge_releases(history)
    # Below a tolerance that small targets can bear, the interval would have no lower end.
    tolerance = min(_positive("epsilon_tolerance", epsilon_tolerance), target / 20)
    before = _epsilon(spent, delta)
    if before >= target:
        raise ValueError(
            f"target_epsilon {target:g} is not above the {before:.4g} that the releases so far have spent at delta "
            f"{delta:g}; no noise multiplier reaches it: raise target_epsilon or stop"
        )

    def cost(sigma: float, coarser: int = 1) -> float:
        return _epsilon(merge_releases([*spent, (sigma, sample_rate, steps)]), delta, coarser=coarser)

    per_step = (_gdp_mu(target, delta) ** 2 - sum(n * _variance(s, q) for s, q, n in spent)) / steps
    guess = _sigma_of_variance(per_step, sample_rate) if per_step > 0 else 10.0
    # A grid four times coarser finds the place in a quarter of the time; the last word is the fine one's.
    guess = _search(lambda sigma: cost(sigma, 4), guess, target, tolerance) or guess
    sigma = _search(cost, guess, target, tolerance)
    if sigma is None:
        raise ValueError(
            f"no noise_multiplier in [{MIN_NOISE_MULTIPLIER:g}, {MAX_NOISE_MULTIPLIER:g}] gives target_epsilon "
            f"{target:g} at delta {delta:g} for {steps} steps with sample_rate {sample_rate:g}; "
            f"choose another target_epsilon, or fewer steps or a smaller sample_rate"
        )
    return sigma


def max_steps(
    *,
    target_epsilon: float,
    target_delta: float,
    noise_multiplier: float,
    sample_rate: float,
    history: Iterable[Release] = (),
    limit: int = MAX_STEPS,
    neighboring_relation: str = "add_or_remove_one",
) -> int:
    """Largest k <= ``limit`` such that ``history`` and k further releases cost at most ``target_epsilon`` by PLD; 0
    where not even one is left. ``compute_epsilon`` agrees exactly: k is within the target, k + 1 is not.

    Raises ValueError for arguments out of range.
    """
    target, delta = check_epsilon(target_epsilon, "target_epsilon"), check_delta(target_delta, "target_delta")
    sigma, q = check_noise_multiplier(noise_multiplier), check_sample_rate(sample_rate)
    limit = check_steps(limit, "limit")
    _one_of("neighboring_relation", neighboring_relation, NEIGHBORING_RELATIONS)
    spent = merge_releases(history)
    limit = min(limit, int((delta - ROUNDING_DELTA) / ROUNDING_OF_ONE) - sum(n for *_, n in spent))
    if sigma < MIN_NOISE_MULTIPLIER or limit < 1:
        return 0

    def cost(k: int) -> float:
        return _epsilon(merge_releases([*spent, (sigma, q, k)]), delta, "pld", neighboring_relation)

    # μ² of the Gaussian mechanism that matches ε is nearly linear in k, whatever the history.
    goal, slope = _gdp_mu(target, delta) ** 2, _variance(sigma, q)
    last, y_last = 0, _gdp_mu(cost(0), delta) ** 2
    low, high = 0, limit + 1  # low is within the target (0 steps release nothing), high is not allowed
    k = int(min(max((goal - y_last) / slope, 1), limit))
    for turn in range(200):
        epsilon = cost(k)
        low, high = (k, high) if epsilon <= target else (low, k)
        if high - low == 1:
            return low
        y = _gdp_mu(epsilon, delta) ** 2
        if (y - y_last) * (k - last) > 0:
            slope = (y - y_last) / (k - last)
        last, y_last = k, y
        guess = k + (goal - y) / slope
        if turn % 4 == 3:  # should the secant creep along one side
            guess = math.sqrt(max(low, 1) * high)
        k = int(min(max(guess, low + 1), high - 1))
    raise RuntimeError(f"max_steps did not close in on epsilon {target} between {low} and {high} steps")


# ---------------------------------------------------------------- ranges


def check_noise_multiplier(value: float, name: str = "noise_multiplier") -> float:
    """σ >= 0 and finite, as a float, or ValueError."""
    if not _is_real(value) or not 0.0 <= value <= LARGEST:
        raise ValueError(f"{name} is a finite number >= 0, in units of max_grad_norm; got {value!r}")
    return float(value)


def check_delta(value: float, name: str = "delta") -> float:
    """δ in [1e-10, 1), as a float, or ValueError."""
    if not _is_real(value) or not MIN_DELTA <= value < 1.0:
        raise ValueError(
            f"{name} is a number in [{MIN_DELTA:g}, 1), well below 1 over the number of records; got {value!r}"
        )
    return float(value)


def refuse_delta(delta: float, records: int) -> None:
    """Raise ValueError where δ says nothing: to publish one of the ``records``, drawn at random, has δ = 1/records."""
    if delta * records >= 1.0:
        raise ValueError(
            f"delta {delta:g} promises nothing to {records} records: to publish one of them, whole, has a delta of "
            f"{1 / records:.2g}; take it well below that"
        )


def show_bound(epsilon: float) -> str:
    """ε with four digits after the point, rounded up, so that it stays a bound."""
    return "inf" if epsilon == math.inf else f"{math.ceil(1e4 * epsilon - 1e-9) / 1e4:.4f}"


def check_epsilon(value: float, name: str = "epsilon") -> float:
    """ε > 0 and finite, as a float, or ValueError."""
    return _positive(name, value)


def check_steps(value: int, name: str = "steps") -> int:
    """A whole number from 1 to ``MAX_STEPS``, or ValueError."""
    if not _is_integral(value) or not 1 <= value <= MAX_STEPS:
        raise ValueError(f"{name} is a whole number from 1 to {MAX_STEPS:,}; got {value!r}")
    return int(value)


def merge_releases(releases: Iterable[Release]) -> tuple[Release, ...]:
    """The same composition with one sorted triple for each (σ, q). Raises ValueError for a triple out of range."""
    counts: Counter[tuple[float, float]] = Counter()
    for release in releases:
        try:
            sigma, q, count = release
        except (TypeError, ValueError):
            raise ValueError(f"a release is (noise_multiplier, sample_rate, count), got {release!r}") from None
        if not _is_integral(count) or not 0 <= count <= MAX_STEPS:
            raise ValueError(f"the count of a release is a whole number from 0 to {MAX_STEPS:,}, got {count!r}")
        counts[check_noise_multiplier(sigma), check_sample_rate(q)] += int(count)
    return tuple((sigma, q, n) for (sigma, q), n in sorted(counts.items()) if n)


def _positive(name: str, value: float) -> float:
    if not _is_real(value) or not 0.0 < value <= LARGEST:
        raise ValueError(f"{name} is a finite number > 0; got {value!r}")
    return float(value)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_integral(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}; got {value!r}")


# ---------------------------------------------------------------- composition


@lru_cache(maxsize=4096)
def _epsilon(
    releases: tuple[Release, ...],
    delta: float,
    accountant: str = "pld",
    neighboring_relation: str = "add_or_remove_one",
    coarser: int = 1,
) -> float:
    if not releases:
        return 0.0
    if min(sigma for sigma, _, _ in releases) < MIN_NOISE_MULTIPLIER:
        return math.inf
    if accountant == "rdp":
        return _rdp_epsilon(releases, delta)
    interval = coarser * _interval(releases)
    if interval > 1.0:
        return math.inf
    exact = delta - ROUNDING_DELTA - ROUNDING_OF_ONE * sum(count for *_, count in releases)
    if exact <= 0.0:  # rounding alone could be as large
        return math.inf
    composed: Any = None
    for sigma, q, count in releases:
        part = _one_release(sigma, q, interval, neighboring_relation).self_compose(count)
        composed = part if composed is None else composed.compose(part)
    return max(0.0, float(composed.get_epsilon_for_delta(exact)))


@lru_cache(maxsize=16)
def _one_release(sigma: float, q: float, interval: float, neighboring_relation: str) -> Any:
    # dp_accounting takes a second to import, which a command's --help should not wait for.
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=sigma,
        sampling_prob=q,
        pessimistic_estimate=True,
        value_discretization_interval=interval,
        neighboring_relation=NeighboringRelation[neighboring_relation.upper()],
    )


def _rdp_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    # Whole orders: the series for fractional ones often fails to converge, and says so on the log each time.
    accountant = RdpAccountant([*range(2, 64), 80, 96, 128, 192, 256, 512, 1024])
    for sigma, q, count in releases:
        accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), count)
    return float(accountant.get_epsilon(delta))


def _variance(sigma: float, q: float) -> float:
    """About the variance of one release's privacy loss: its limit for small q, or that of the unsampled release."""
    return min(q * q * math.expm1(min(sigma**-2, 700.0)), sigma**-2)


def _interval(releases: tuple[Release, ...]) -> float:
    """The grid's spacing. It depends on the counts only past the limits on memory, so that ε grows with them."""
    wanted = min(math.sqrt(_variance(sigma, q)) for sigma, q, _ in releases) / 16
    widest = max(_largest_loss(sigma, q) for sigma, q, _ in releases)
    mean = sum(n * _variance(sigma, q) for sigma, q, n in releases)
    spread = widest + mean + 16 * math.sqrt(mean)
    floor = max(widest / _POINTS_OF_ONE, spread / _POINTS_OF_ALL)
    exponent = min(max(math.floor(math.log2(wanted)), _FINEST), _COARSEST)
    return 2.0 ** max(exponent, math.ceil(math.log2(floor)))


def _largest_loss(sigma: float, q: float) -> float:
    """The privacy loss 10σ out in the tail, about where ``dp_accounting`` truncates (mass e^-50)."""
    unsampled = 10 / sigma + 0.5 * sigma**-2
    return unsampled + math.log(q + (1 - q) * math.exp(-min(unsampled, 700.0)))


# ---------------------------------------------------------------- search


def _gdp_mu(epsilon: float, delta: float) -> float:
    """μ of the Gaussian mechanism that is exactly (ε, δ)-DP: δ = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ) (Balle & Wang 2018).
    A composition of many small releases is close to it (Dong et al. 2019), so it makes the first guess."""
    from scipy.special import log_ndtr, ndtr

    low, high = -20.0, 20.0  # of log2 μ
    if epsilon == math.inf:
        return 2.0**high
    for _ in range(60):
        mu = 2.0 ** ((low + high) / 2)
        over = ndtr(mu / 2 - epsilon / mu) - math.exp(min(epsilon + log_ndtr(-mu / 2 - epsilon / mu), 0.0)) > delta
        low, high = (low, (low + high) / 2) if over else ((low + high) / 2, high)
    return 2.0**low


def _sigma_of_variance(variance: float, q: float) -> float:
    """The inverse of ``_variance`` in σ."""
    return min(math.log1p(variance / (q * q)) ** -0.5, variance**-0.5)


def _log(value: float) -> float:
    return math.log(min(max(value, 1e-300), 1e300))


def _search(cost: Callable[[float], float], guess: float, target: float, tolerance: float) -> float | None:
    """σ with cost in (target - tolerance, target], cost falling in σ; None where the ends of the range leave none."""
    ends = math.log(MIN_NOISE_MULTIPLIER), math.log(MAX_NOISE_MULTIPLIER)
    aim = math.log(target - tolerance / 2)
    low, high = -math.inf, math.inf  # log σ known to cost too much, and too little
    x, last, slope = min(max(math.log(guess), ends[0]), ends[1]), None, -1.3
    for turn in range(200):
        epsilon = cost(math.exp(x))
        if target - tolerance < epsilon <= target:
            return math.exp(x)
        low, high = (low, x) if epsilon <= target else (x, high)
        if low == ends[1] or high == ends[0]:
            return None
        if high - low < 1e-9:  # ε jumps over the interval where the grid's spacing changes: stay on the safe side
            return math.exp(high)
        y = _log(epsilon)
        if last is not None and (y - last[1]) * (x - last[0]) < 0:
            slope = min((y - last[1]) / (x - last[0]), -1e-3)  # flat where cost is hardly more than 0
        last = x, y
        x = min(max(x + min(max((aim - y) / slope, -1.5), 1.5), ends[0]), ends[1])
        if not low < x < high or turn % 4 == 3 and high - low < math.inf:
            x = (low + high) / 2
    return None

"""ε against Opacus' PRV accountant and closed formulas; calibration and step counts against ε itself."""

import math

import pytest
from opacus.accountants.prv import PRVAccountant
from opacus.accountants.rdp import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier as opacus_noise_multiplier
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from tolerances import EPSILON_GRID, EPSILON_PRV

from lalora_kernels.privacy.accountant import MAX_STEPS, _search, compute_epsilon, get_noise_multiplier, max_steps

DELTA = 1e-5


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε of the Gaussian mechanism with sensitivity over noise mu (Balle & Wang 2018, theorem 8)."""

    def excess(epsilon):
        return ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)) - delta

    return 0.0 if excess(0.0) <= 0 else brentq(excess, 0.0, mu * mu + 40 * mu + 1, xtol=1e-13)


# ---------------------------------------------------------------- epsilon


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("q", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("sigma", [0.8, 3.0])
@pytest.mark.parametrize("steps", [20, 1000])
def test_epsilon_equals_opacus_prv_accountant(q, sigma, steps):
    ours = compute_epsilon([(sigma, q, steps)], DELTA)
    theirs = PRVAccountant()
    theirs.history = [(sigma, q, steps)]
    assert ours > 0.02
    assert ours == pytest.approx(theirs.get_epsilon(DELTA, eps_error=0.002 * ours), rel=EPSILON_PRV)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_a_mixed_history_equals_opacus_prv_accountant():
    history = [(1.1, 0.05, 200), (2.0, 0.2, 30), (0.9, 0.01, 500)]
    theirs = PRVAccountant()
    theirs.history = history
    ours = compute_epsilon(history, DELTA)
    assert ours == pytest.approx(theirs.get_epsilon(DELTA, eps_error=0.002 * ours), rel=EPSILON_PRV)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8, 1e-10])
@pytest.mark.parametrize("sigma, steps", [(0.7, 1), (3.0, 10), (20.0, 400), (100.0, 400), (1000.0, 100_000)])
def test_epsilon_without_sampling_is_the_gaussian_mechanisms_and_never_below(sigma, steps, delta):
    mu, allowance = math.sqrt(steps) / sigma, 1e-12 + steps * 2.0**-51  # for rounding: part of what δ bears
    ours = compute_epsilon([(sigma, 1.0, steps)], delta)
    assert gaussian_epsilon(mu, delta) - 1e-9 <= ours
    assert ours <= gaussian_epsilon(mu, delta - allowance) * (1 + EPSILON_GRID) + 1e-9


@pytest.mark.parametrize(
    "mu, steps, delta", [(8.0, 200_000, 1e-10), (1.0, 3_000_000, 1e-10), (1.0, 3_000_000, 1e-9), (1.0, 1_000_000, 1e-9)]
)
def test_epsilon_of_many_releases_at_a_small_delta_is_never_below(mu, steps, delta):
    """Rounding grows with the steps: without an allowance for it ε was 0.03 to 0.4 below here."""
    ours = compute_epsilon([(math.sqrt(steps) / mu, 1.0, steps)], delta)
    assert gaussian_epsilon(mu, delta) <= ours
    assert math.isinf(ours) == (steps * 2.0**-51 > delta)


def test_what_rounding_hides_is_refused_and_planned_around():
    with pytest.raises(ValueError, match="no noise_multiplier in .*fewer steps"):
        get_noise_multiplier(target_epsilon=3.0, target_delta=1e-10, sample_rate=1.0, steps=1_000_000)
    plan = {"target_epsilon": 3.0, "target_delta": 1e-10, "noise_multiplier": 9e4, "sample_rate": 1.0}
    left = max_steps(**plan, history=[(9e4, 1.0, 222_900)])
    assert 0 < left and compute_epsilon([(9e4, 1.0, 222_901 + left)], 1e-10) > 3.0
    assert max_steps(**plan, history=[(9e4, 1.0, 222_940)]) == 0


def test_the_allowance_for_rounding_moves_no_ordinary_figure(monkeypatch):
    from lalora_kernels.privacy import accountant

    ours = compute_epsilon([(300.0, 1.0, 100_000)], DELTA)
    monkeypatch.setattr(accountant, "ROUNDING_OF_ONE", 0.0)
    accountant._epsilon.cache_clear()
    assert 0 < ours - compute_epsilon([(300.0, 1.0, 100_000)], DELTA) < 1e-5
    accountant._epsilon.cache_clear()


@pytest.mark.parametrize("q, sigma", [(0.5, 1.0), (0.1, 0.8), (0.02, 0.6), (0.001, 0.5)])
def test_epsilon_of_one_release_is_the_closed_formula_and_never_below(q, sigma):
    """δ(ε) of a subsampled release is q δ_G(log(1 + (e^ε - 1)/q)) (Balle, Barthe & Gaboardi 2018)."""
    exact = math.log1p(q * math.expm1(gaussian_epsilon(1 / sigma, DELTA / q)))
    ours = compute_epsilon([(sigma, q, 1)], DELTA)
    assert exact > 0.01 and exact - 1e-9 <= ours <= exact + EPSILON_GRID * max(exact, 0.1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_many_releases_at_a_small_rate_keep_their_accuracy():
    """1e5 releases at q = 1e-3 would be 5% off on a grid of 2^-10 and 1.3% on one of 2^-11."""
    theirs = PRVAccountant()
    theirs.history = [(1.0, 1e-3, 100_000)]
    ours = compute_epsilon(theirs.history, DELTA)
    estimate = theirs.get_epsilon(DELTA, eps_error=0.005) - 0.005  # an upper bound by eps_error
    assert ours == pytest.approx(estimate, abs=0.005)


def test_epsilon_composes_in_any_order_and_any_division():
    whole = compute_epsilon([(1.5, 0.1, 30), (2.0, 0.2, 7)], DELTA)
    assert compute_epsilon([(2.0, 0.2, 3), (1.5, 0.1, 30), (2.0, 0.2, 4), (9.0, 0.5, 0)], DELTA) == whole


def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise_and_delta():
    def grows(values):
        return all(a < b for a, b in zip(values, values[1:]))

    assert grows([compute_epsilon([(1.3, 0.1, n)], DELTA) for n in (1, 2, 3, 50, 51, 400, 5000)])
    assert grows([compute_epsilon([(1.3, q, 50)], DELTA) for q in (0.01, 0.05, 0.051, 0.3, 0.99, 1.0)])
    assert grows([compute_epsilon([(s, 0.1, 50)], DELTA) for s in (40.0, 5.0, 4.99, 1.0, 0.3)])
    assert grows([compute_epsilon([(1.3, 0.1, 50)], d) for d in (0.1, 1e-3, 1e-5, 1e-10)])


def test_no_release_costs_nothing_and_no_noise_everything():
    assert compute_epsilon([], DELTA) == 0.0 == compute_epsilon([(0.0, 0.5, 0)], DELTA)
    assert compute_epsilon([(2.0, 0.1, 5), (0.0, 0.1, 1)], DELTA) == math.inf
    assert compute_epsilon([(0.009, 0.1, 1)], DELTA) == math.inf
    assert compute_epsilon([(0.011, 1.0, 10**6)], DELTA) == math.inf  # in the millions: as good as none


def test_rdp_is_an_upper_bound_near_opacus_own():
    for sigma, q, steps in ((3.0, 0.1, 400), (1.0, 0.01, 2000)):
        theirs = RDPAccountant()
        theirs.history = [(sigma, q, steps)]
        rdp = compute_epsilon([(sigma, q, steps)], DELTA, accountant="rdp")
        assert compute_epsilon([(sigma, q, steps)], DELTA) < rdp
        assert rdp == pytest.approx(theirs.get_epsilon(DELTA), rel=0.01)  # whole orders only
    assert compute_epsilon([(0.0, 0.1, 1)], DELTA, accountant="rdp") == math.inf


def test_replacing_a_record_costs_what_twice_the_sensitivity_costs():
    replace = compute_epsilon([(4.0, 1.0, 10)], DELTA, neighboring_relation="replace_one")
    assert replace == pytest.approx(gaussian_epsilon(2 * math.sqrt(10) / 4.0, DELTA), rel=EPSILON_GRID)
    sampled = [
        compute_epsilon([(2.0, 0.1, 100)], DELTA, neighboring_relation=n) for n in ("add_or_remove_one", "replace_one")
    ]
    assert 1.2 * sampled[0] < sampled[1] < 3 * sampled[0]


# ---------------------------------------------------------------- calibration

PLANS = [
    (3.0, 1e-5, 0.1, 400),
    (1.0, 1e-5, 0.04, 300),
    (3.0, 1e-5, 0.016, 625),
    (8.0, 1e-6, 0.3, 100),
    (0.1, 1e-5, 0.01, 50),
    (3.0, 1e-5, 0.2, 1),
    (2.0, 1e-9, 1.0, 20),
]


@pytest.mark.parametrize("epsilon, delta, q, steps", PLANS)
def test_calibration_hits_the_target_from_below(epsilon, delta, q, steps):
    sigma = get_noise_multiplier(target_epsilon=epsilon, target_delta=delta, sample_rate=q, steps=steps)
    assert epsilon - 1e-3 < compute_epsilon([(sigma, q, steps)], delta) <= epsilon
    assert compute_epsilon([(sigma * 0.99, q, steps)], delta) > epsilon


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("epsilon, delta, q, steps", PLANS[:2])
def test_calibration_agrees_with_opacus(epsilon, delta, q, steps):
    plan = {"target_epsilon": epsilon, "target_delta": delta, "sample_rate": q, "steps": steps}
    theirs = opacus_noise_multiplier(**plan, accountant="prv", eps_error=0.002, epsilon_tolerance=0.005)
    assert get_noise_multiplier(**plan) == pytest.approx(theirs, rel=EPSILON_PRV)


def test_calibration_beside_what_was_spent_before():
    history = [(2.0, 0.1, 100)]
    plan = {"target_epsilon": 3.0, "target_delta": DELTA, "sample_rate": 0.05, "steps": 200}
    sigma = get_noise_multiplier(**plan, history=history)
    assert 3.0 - 1e-3 < compute_epsilon([*history, (sigma, 0.05, 200)], DELTA) <= 3.0
    assert sigma > get_noise_multiplier(**plan)


@pytest.mark.parametrize("epsilon", [1e-300, 1e-30, 1e-9])
def test_an_epsilon_as_small_as_can_be_has_a_noise_that_keeps_it(epsilon):
    sigma = get_noise_multiplier(target_epsilon=epsilon, target_delta=1e-5, sample_rate=0.1, steps=1)
    assert compute_epsilon([(sigma, 0.1, 1)], 1e-5) <= epsilon and math.isfinite(sigma)


def test_calibration_keeps_a_coarser_tolerance_too():
    sigma = get_noise_multiplier(
        target_epsilon=3.0, target_delta=DELTA, sample_rate=0.1, steps=100, epsilon_tolerance=0.1
    )
    assert 2.9 < compute_epsilon([(sigma, 0.1, 100)], DELTA) <= 3.0


GOOD = {"target_epsilon": 3.0, "target_delta": 1e-5, "sample_rate": 0.1, "steps": 100}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target_epsilon": 0.0}, "target_epsilon is a finite number > 0; got 0.0"),
        ({"target_epsilon": -1}, "target_epsilon.*got -1"),
        ({"target_epsilon": math.inf}, "target_epsilon.*got inf"),
        ({"target_epsilon": 10**400}, "target_epsilon.*got 1000"),
        ({"target_epsilon": "3"}, "target_epsilon.*got '3'"),
        ({"target_delta": 0.0}, r"target_delta is a number in \[1e-10, 1\).*got 0.0"),
        ({"target_delta": 1.0}, "target_delta.*got 1.0"),
        ({"target_delta": 1e-11}, "target_delta.*got 1e-11"),
        ({"sample_rate": 0.0}, r"sample_rate is a number in \(0, 1\].*got 0.0"),
        ({"sample_rate": 1.5}, "sample_rate.*got 1.5"),
        ({"sample_rate": math.nan}, "sample_rate.*got nan"),
        ({"steps": 0}, "steps is a whole number from 1.*got 0"),
        ({"steps": 2.5}, "steps.*got 2.5"),
        ({"steps": True}, "steps.*got True"),
        ({"steps": MAX_STEPS + 1}, f"steps.*got {MAX_STEPS + 1}"),
        ({"epsilon_tolerance": 0}, "epsilon_tolerance.*got 0"),
        ({"history": [(1.0, 0.5)]}, "a release is"),
        ({"history": [(-1.0, 0.5, 1)]}, "noise_multiplier is a finite number >= 0.*got -1.0"),
        ({"history": [(1.0, 0.5, -1)]}, "count of a release.*got -1"),
        ({"target_epsilon": 1e-7, "sample_rate": 1.0, "steps": 10_000}, "no noise_multiplier in.*choose another"),
        ({"target_epsilon": 1e6, "sample_rate": 1.0, "steps": 1}, "no noise_multiplier in.*choose another"),
        ({"history": [(0.5, 0.5, 100)]}, "no noise multiplier reaches it: raise target_epsilon or stop"),
        ({"history": [(0.0, 0.5, 1)]}, "not above the inf"),
    ],
)
def test_calibration_refuses_and_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        get_noise_multiplier(**{**GOOD, **change})


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        (([(math.inf, 0.1, 1)], DELTA), {}, "noise_multiplier.*got inf"),
        (([(10**400, 0.1, 1)], DELTA), {}, "noise_multiplier.*got 1000"),
        (([(True, 0.1, 1)], DELTA), {}, "noise_multiplier.*got True"),
        (([(1.0, 0.0, 1)], DELTA), {}, "sample_rate.*got 0.0"),
        (([(1.0, 0.1, 1.5)], DELTA), {}, "count of a release.*got 1.5"),
        (([3], DELTA), {}, "a release is .*got 3"),
        (([], 2.0), {}, "delta is a number.*got 2.0"),
        (([], DELTA), {"accountant": "prv"}, "accountant is one of 'pld', 'rdp'; got 'prv'"),
        (([], DELTA), {"neighboring_relation": "none"}, "neighboring_relation is one of"),
        (([], DELTA), {"accountant": "rdp", "neighboring_relation": "replace_one"}, "use accountant='pld'"),
    ],
)
def test_epsilon_refuses_arguments_out_of_range(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        compute_epsilon(*args, **kwargs)


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(
    "epsilon, sigma, q, history",
    [
        (3.0, 3.0, 0.1, ()),
        (1.0, 1.2, 0.02, ()),
        (0.5, 1.0, 0.001, ()),
        (2.0, 6.0, 1.0, ()),
        (3.0, 3.0, 0.1, [(2.0, 0.05, 100), (1.0, 0.01, 10)]),
        (3.0, 3.0, 0.1, [(3.0, 0.1, 150)]),
    ],
)
def test_max_steps_is_the_last_that_fits(epsilon, sigma, q, history):
    k = max_steps(target_epsilon=epsilon, target_delta=DELTA, noise_multiplier=sigma, sample_rate=q, history=history)
    assert k > 1
    assert compute_epsilon([*history, (sigma, q, k)], DELTA) <= epsilon
    assert compute_epsilon([*history, (sigma, q, k + 1)], DELTA) > epsilon


def test_max_steps_contains_the_plan_that_was_calibrated():
    sigma = get_noise_multiplier(**GOOD)
    budget = {"target_epsilon": 3.0, "target_delta": DELTA, "sample_rate": 0.1}
    assert max_steps(**budget, noise_multiplier=sigma) >= 100
    spent = [(sigma, 0.1, 60)]
    assert (
        max_steps(**budget, noise_multiplier=sigma, history=spent) == max_steps(**budget, noise_multiplier=sigma) - 60
    )


def test_max_steps_at_its_ends():
    budget = {"target_epsilon": 1.0, "target_delta": DELTA, "sample_rate": 0.5}
    assert max_steps(**budget, noise_multiplier=0.5) == 0
    assert max_steps(**budget, noise_multiplier=0.0) == 0
    assert max_steps(**budget, noise_multiplier=9.0, history=[(0.5, 0.5, 1)]) == 0
    assert max_steps(**budget, noise_multiplier=9.0, limit=3) == 3
    replaced = max_steps(**budget, noise_multiplier=9.0, neighboring_relation="replace_one")
    assert 0 < replaced < max_steps(**budget, noise_multiplier=9.0) / 2


def test_where_epsilon_jumps_over_the_target_the_larger_sigma_is_found():
    found = _search(lambda sigma: 2.0 if sigma < 1.7 else 0.5, guess=1.0, target=1.0, tolerance=0.01)
    assert 1.7 <= found < 1.7 * (1 + 1e-8)

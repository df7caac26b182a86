"""The ledger refuses the step too many, claims only what it can, and shows when its file was changed."""

import copy
import json
import math
import os

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EPSILON_GRID

from lalora_kernels.privacy import ledger as module
from lalora_kernels.privacy.accountant import compute_epsilon, get_noise_multiplier
from lalora_kernels.privacy.entries import chain
from lalora_kernels.privacy.ledger import BudgetExceeded, Ledger, LedgerEntry, LedgerError

DELTA = 1e-5


def google_epsilon(releases, delta=DELTA):
    """Google's own accountant at its own discretisation."""
    accountant = PLDAccountant()
    for sigma, q, count in releases:
        accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), count)
    return accountant.get_epsilon(delta)


def charged():
    """Three entries under a budget that they do not use up."""
    ledger = Ledger(target_epsilon=8.0, target_delta=DELTA)
    for _ in range(3):
        ledger.charge(2.0, 0.1, clipping="per_layer", max_grad_norm=0.5, expected_batch_size=16)
    ledger.charge(2.0, 0.1, clipping="per_layer", max_grad_norm=0.7, expected_batch_size=16)
    for i in range(2):
        ledger.charge(3.0, 0.2, release=(1 << 40) + i)
    return ledger


# ---------------------------------------------------------------- the budget


def test_the_step_that_would_exceed_the_budget_is_refused_and_no_other():
    sigma, q, budget = 3.0, 0.5, 2.5
    ledger, last = Ledger(target_epsilon=budget, target_delta=DELTA), 0
    with pytest.raises(BudgetExceeded):
        for last in range(10_000):  # noqa: B007
            ledger.charge(sigma, q)
    assert last > 5 and google_epsilon([(sigma, q, last)]) <= budget < google_epsilon([(sigma, q, last + 1)])
    before = ledger.state_dict()
    for _ in range(2):
        with pytest.raises(
            BudgetExceeded, match=rf"step {last + 1}, .*epsilon 2.5, .*{last} steps have spent 2\.4.*stop here"
        ):
            ledger.charge(sigma, q)
    assert ledger.state_dict() == before and ledger.epsilon() <= budget
    ledger.charge(12.0, 0.5)  # a smaller release may still fit
    with pytest.raises(BudgetExceeded):
        ledger.charge(sigma, q)


def test_a_calibrated_run_fits_its_budget_with_few_looks_at_the_accountant(monkeypatch):
    sigma = get_noise_multiplier(target_epsilon=1.0, target_delta=DELTA, sample_rate=0.05, steps=300)
    looks = []
    original = module.max_steps
    monkeypatch.setattr(module, "max_steps", lambda **k: looks.append(k) or original(**k))
    ledger = Ledger(target_epsilon=1.0, target_delta=DELTA)
    for _ in range(300):
        ledger.charge(sigma, 0.05)
    assert len(looks) == 1 and ledger.steps == 300 and len(ledger.entries) == 1
    assert 1.0 - 1e-3 < ledger.epsilon() <= 1.0


def test_releases_of_several_kinds_share_the_budget():
    ledger = Ledger(target_epsilon=2.0, target_delta=DELTA)
    kinds = [(3.0, 0.1), (2.0, 0.2)]
    taken = []
    with pytest.raises(BudgetExceeded):
        for i in range(10_000):
            ledger.charge(*kinds[i // 20 % 2])
            taken.append(kinds[i // 20 % 2])
    counts = [(*kind, taken.count(kind)) for kind in kinds]
    nextone = (*kinds[len(taken) // 20 % 2], 1)
    assert min(n for *_, n in counts) > 10
    assert ledger.epsilon() == pytest.approx(google_epsilon(counts), rel=EPSILON_GRID)
    assert compute_epsilon(counts, DELTA) <= 2.0 < compute_epsilon([*counts, nextone], DELTA)


def test_a_release_without_noise():
    ledger = Ledger(target_delta=DELTA)
    ledger.charge(0.0, 0.1)
    assert ledger.epsilon() == math.inf
    budget = Ledger(target_epsilon=8.0, target_delta=DELTA)
    with pytest.raises(BudgetExceeded, match="step 1, with noise_multiplier 0"):
        budget.charge(0.0, 0.1)
    assert budget.steps == 0 and budget.epsilon() == 0.0


def test_remaining_steps():
    ledger = charged()
    left = ledger.remaining_steps(2.0, 0.1)
    assert compute_epsilon([*ledger.releases, (2.0, 0.1, left)], DELTA) <= 8.0
    assert compute_epsilon([*ledger.releases, (2.0, 0.1, left + 1)], DELTA) > 8.0
    assert Ledger().remaining_steps(2.0, 0.1) is None


def test_a_budget_changed_by_hand_holds_at_once():
    ledger = charged()
    ledger.target_epsilon = 1e-3
    with pytest.raises(BudgetExceeded):
        ledger.charge(3.0, 0.2)


# ---------------------------------------------------------------- entries and claims


def test_equal_releases_in_a_row_are_one_entry():
    ledger = charged()
    common = {"clipping": "per_layer", "expected_batch_size": 16}
    assert ledger.entries == (
        LedgerEntry(2.0, 0.1, 0, 3, max_grad_norm=0.5, **common),
        LedgerEntry(2.0, 0.1, 3, 1, max_grad_norm=0.7, **common),
        LedgerEntry(3.0, 0.2, 1 << 40, 2),
    )
    assert ledger.steps == 6 and ledger.releases == ((2.0, 0.1, 4), (3.0, 0.2, 2))


def test_epsilon_is_googles():
    ledger = charged()
    assert ledger.epsilon() == pytest.approx(google_epsilon([(2.0, 0.1, 4), (3.0, 0.2, 2)]), rel=EPSILON_GRID)
    assert ledger.epsilon(1e-7) == pytest.approx(google_epsilon(ledger.releases, 1e-7), rel=EPSILON_GRID)
    assert ledger.epsilon(accountant="rdp") > ledger.epsilon()
    assert ledger.epsilon(neighboring_relation="replace_one") > ledger.epsilon()
    with pytest.raises(ValueError, match="needs a delta"):
        Ledger().epsilon()


def test_a_fixed_key_forbids_epsilon_for_good(tmp_path):
    ledger = charged()
    ledger.refuse_epsilon("the noise key is fixed")
    ledger.save(tmp_path / "ledger.json")
    for one in (ledger, Ledger.load(tmp_path / "ledger.json")):
        with pytest.raises(LedgerError, match="no epsilon can be reported: the noise key is fixed"):
            one.epsilon()
    ledger.target_epsilon = 1e-3
    with pytest.raises(BudgetExceeded) as caught:
        ledger.charge(3.0, 0.2)
    assert "spent" not in str(caught.value)


def test_batches_that_are_not_poisson_samples_forbid_epsilon_and_budgets():
    ledger = Ledger(target_delta=DELTA)
    ledger.charge(2.0, 0.1, sampling="shuffle")
    assert ledger.steps == 1
    with pytest.raises(LedgerError, match="no epsilon.*'shuffle' sampling"):
        ledger.epsilon()
    budget = Ledger(target_epsilon=3.0, target_delta=DELTA)
    with pytest.raises(LedgerError, match="'shuffle' sampling.*use PrivateLoader"):
        budget.charge(2.0, 0.1, sampling="shuffle")
    assert budget.steps == 0


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"target_epsilon": 0.0, "target_delta": DELTA}, "target_epsilon is a finite number > 0; got 0.0"),
        ({"target_epsilon": 3.0}, "needs a target_delta"),
        ({"target_delta": 1.5}, "target_delta is a number in.*got 1.5"),
        ({"neighboring_relation": "swap"}, "neighboring_relation is one of.*got 'swap'"),
    ],
)
def test_ledgers_refuse_budgets_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Ledger(**kwargs)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((-1.0, 0.1), {}, "noise_multiplier.*got -1.0"),
        ((math.nan, 0.1), {}, "noise_multiplier.*got nan"),
        ((1.0, 0.0), {}, "sample_rate.*got 0.0"),
        ((1.0, 0.1), {"release": -1}, "first_release.*got -1"),
        ((1.0, 0.1), {"release": 1 << 64}, "first_release"),
        ((1.0, 0.1), {"max_grad_norm": 0.0}, "max_grad_norm is a finite number > 0.*got 0.0"),
        ((1.0, 0.1), {"expected_batch_size": math.inf}, "expected_batch_size.*got inf"),
        ((1.0, 0.1), {"clipping": None}, "clipping is a string, got None"),
    ],
)
def test_charges_out_of_range_are_refused_and_not_recorded(args, kwargs, message):
    ledger = Ledger()
    with pytest.raises(ValueError, match=message):
        ledger.charge(*args, **kwargs)
    assert ledger.steps == 0


# ---------------------------------------------------------------- files


def test_round_trip(tmp_path):
    ledger = charged()
    path = tmp_path / "run" / "ledger.json"
    ledger.save(path)
    loaded = Ledger.load(path)
    assert loaded.state_dict() == ledger.state_dict() and loaded.entries == ledger.entries
    assert (loaded.target_epsilon, loaded.target_delta, loaded.epsilon()) == (8.0, DELTA, ledger.epsilon())
    loaded.charge(3.0, 0.2)
    loaded.save(path)
    assert Ledger.load(path).steps == 7 and os.listdir(path.parent) == ["ledger.json"]


EDITS = {
    "fewer releases": lambda s: s["entries"][0].update(count=1),
    "more noise": lambda s: s["entries"][1].update(noise_multiplier=9.0),
    "smaller rate": lambda s: s["entries"][2].update(sample_rate=0.01),
    "another number": lambda s: s["entries"][0].update(first_release=7),
    "last entry gone": lambda s: s["entries"].pop(),
    "first entry gone": lambda s: s["entries"].pop(0),
    "all entries gone": lambda s: s["entries"].clear(),
    "swapped": lambda s: s["entries"].reverse(),
    "doubled": lambda s: s["entries"].append(s["entries"][-1]),
    "larger budget": lambda s: s.update(target_epsilon=80.0),
    "larger delta": lambda s: s.update(target_delta=0.1),
    "other run": lambda s: s.update(id="0" * 16),
    "refusal gone": lambda s: s["refusals"].clear(),
    "a field more": lambda s: s.update(note="trust me"),
    "an entry's hash": lambda s: s["entries"][1].update(hash="0" * 64),
    "the head": lambda s: s.update(head="0" * 64),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_ledger_is_refused(tmp_path, edit):
    ledger = charged()
    ledger.refuse_epsilon("a test")
    state = ledger.state_dict()
    EDITS[edit](state)
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps(state))
    with pytest.raises(LedgerError, match="ledger.json: the ledger was changed after it was written.*restore"):
        Ledger.load(path)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "ledger.json"
    charged().save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(LedgerError, match="truncated or corrupt.*restore"):
            Ledger.load(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xff\xfe\x00", "truncated or corrupt"),
        (b"[" * 200_000, "truncated or corrupt"),
        (b"[]", "not a ledger"),
        (b"null", "not a ledger"),
        (b'{"format": "lalora-ledger", "version": 2}', "format version 2 and this library reads 1"),
        (b'{"format": "lalora-ledger", "version": true}', "format version True and this library reads 1"),
        (b'{"format": "lalora-ledger", "version": 1.0}', "format version 1.0 and this library reads 1"),
        (b'{"format": "lalora-ledger", "version": 1}', "incomplete"),
    ],
)
def test_a_file_that_is_no_ledger_is_refused(tmp_path, content, message):
    path = tmp_path / "ledger.json"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=message):
        Ledger.load(path)


def test_a_missing_ledger_is_refused(tmp_path):
    with pytest.raises(LedgerError, match="there is no ledger.*restore it"):
        Ledger.load(tmp_path / "ledger.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    value=VALUES, where=st.sampled_from([None, *charged().state_dict()]), field=st.sampled_from(["count", "hash", "x"])
)
def test_any_other_state_is_refused_with_a_ledger_error_only(value, where, field):
    state = charged().state_dict()
    original = copy.deepcopy(state)
    if where is None:
        state["entries"][0][field] = value
    else:
        state[where] = value
    if state == original:
        return
    with pytest.raises(LedgerError):
        Ledger().load_state_dict(state)
    with pytest.raises(LedgerError):
        Ledger().load_state_dict(value)


def test_a_consistent_forgery_out_of_range_is_refused():
    for change in ({"count": 0}, {"noise_multiplier": -1.0}, {"sample_rate": 2.0}, {"count": 1.5}, {"extra": 1}):
        state = charged().state_dict()
        state["entries"][0].update(change)
        hashes = chain(state)
        for raw, digest in zip(state["entries"], hashes[1:]):
            raw["hash"] = digest
        state["head"] = hashes[-1]
        with pytest.raises(LedgerError, match="values out of range"):
            Ledger().load_state_dict(state)


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("entries", [{}, ""])
def test_entries_that_are_empty_but_no_list_are_refused(entries):
    """Found by make fuzz: their hash chain holds, since there is nothing in it."""
    state = Ledger(target_epsilon=1.0, target_delta=1e-5).state_dict()
    assert state["entries"] == []
    with pytest.raises(LedgerError, match="entries are a list"):
        Ledger().load_state_dict({**state, "entries": entries, "head": state["head"]})


def test_a_new_ledger_adopts_what_was_spent():
    old = charged()
    new = Ledger(target_epsilon=8.0, target_delta=DELTA)
    new.load_state_dict(json.loads(json.dumps(old.state_dict())))
    assert new.state_dict() == old.state_dict() and new.epsilon() == old.epsilon()
    unlimited = Ledger()
    unlimited.refuse_epsilon("the noise key is fixed")
    unlimited.load_state_dict(old.state_dict())
    assert unlimited.target_epsilon == 8.0 and unlimited.refusals == ("the noise key is fixed",)
    kept = Ledger(target_epsilon=1e-3, target_delta=DELTA)
    free = Ledger()
    free.charge(2.0, 0.1)
    kept.load_state_dict(free.state_dict())
    with pytest.raises(BudgetExceeded):
        kept.charge(2.0, 0.1)


def test_going_back_to_an_earlier_checkpoint_forgets_nothing():
    ledger = charged()
    early = ledger.state_dict()
    ledger.charge(3.0, 0.2)
    ledger.charge(3.0, 0.25)
    late = ledger.state_dict()
    ledger.load_state_dict(early)
    assert ledger.state_dict() == late
    behind = Ledger()
    behind.load_state_dict(early)
    behind.load_state_dict(late)
    assert behind.state_dict() == late


def test_histories_that_cannot_be_one_are_refused():
    ledger, other = charged(), charged()
    with pytest.raises(LedgerError, match="6 releases of its own.*load the state into a new Ledger"):
        ledger.load_state_dict(other.state_dict())
    twin = Ledger()
    twin.load_state_dict(ledger.state_dict())
    twin.charge(5.0, 0.1)
    ledger.charge(6.0, 0.1)
    with pytest.raises(LedgerError, match="disagree"):
        ledger.load_state_dict(twin.state_dict())
    with pytest.raises(LedgerError, match=r"budget \(epsilon 8, .* and this run \(epsilon 9, "):
        Ledger(target_epsilon=9.0, target_delta=DELTA).load_state_dict(ledger.state_dict())


def test_what_was_adopted_counts_against_the_budget_at_once():
    ledger = Ledger(target_epsilon=2.0, target_delta=DELTA)
    ledger.charge(2.0, 0.2)  # looks up how many more it may
    ahead = Ledger()
    ahead.load_state_dict(ledger.state_dict())
    for _ in range(ahead.remaining_steps(2.0, 0.2)):
        ahead.charge(2.0, 0.2)
    ledger.load_state_dict(ahead.state_dict())
    with pytest.raises(BudgetExceeded):
        ledger.charge(2.0, 0.2)

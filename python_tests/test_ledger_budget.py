"""What a ledger's budget and ε are of: the rate, its own neighbouring relation, what a loaded state says."""

import json

import pytest

from lalora_kernels.data import BadInput
from lalora_kernels.federated.books import show_ledger
from lalora_kernels.privacy.accountant import compute_epsilon, max_steps, show_bound
from lalora_kernels.privacy.ledger import BudgetExceeded, Ledger, LedgerError


def test_what_a_budget_bears_of_one_rate_is_not_drawn_on_at_another():
    ledger = Ledger(target_epsilon=3.0, target_delta=1e-5)
    ledger.charge(1.0, 0.001)
    with pytest.raises(BudgetExceeded):
        for _ in range(20):
            ledger.charge(1.0, 0.9)
    assert compute_epsilon(ledger.releases, 1e-5) <= 3.0


def test_a_budget_and_an_epsilon_are_of_the_ledgers_own_relation():
    ledger = Ledger(target_epsilon=3.0, target_delta=1e-5, neighboring_relation="replace_one")
    ledger.charge(4.0, 0.1)
    replaced = {"neighboring_relation": "replace_one"}
    assert ledger.epsilon() == compute_epsilon(ledger.releases, 1e-5, **replaced)
    assert ledger.epsilon() > compute_epsilon(ledger.releases, 1e-5)
    budget = {"target_epsilon": 3.0, "target_delta": 1e-5, "noise_multiplier": 4.0, "sample_rate": 0.1}
    assert ledger.remaining_steps(4.0, 0.1) == max_steps(**budget, history=ledger.releases, **replaced)


def test_a_state_that_forbids_epsilon_forbids_it_where_it_is_loaded():
    shown, ledger = Ledger(target_delta=1e-5), Ledger(target_delta=1e-5)
    shown.charge(2.0, 0.1)
    shown.refuse_epsilon("its key was shown")
    ledger.load_state_dict(shown.state_dict())
    with pytest.raises(LedgerError, match="its key was shown"):
        ledger.epsilon()


def test_a_spent_epsilon_is_shown_rounded_up():
    ledger = Ledger(target_epsilon=3.0, target_delta=1e-5)
    for sigma in (1.0, 2.0, 3.0, 4.0):
        ledger.charge(sigma, 0.1)
    ledger.target_epsilon = 1e-3
    with pytest.raises(BudgetExceeded) as caught:
        ledger.charge(1.0, 0.1)
    shown = float(str(caught.value).partition("have spent ")[2].partition(")")[0])
    assert ledger.epsilon() <= shown < ledger.epsilon() + 1e-4
    assert (show_bound(0.12341), show_bound(0.1234), show_bound(float("inf"))) == ("0.1235", "0.1234", "inf")


def test_a_file_of_no_clients_or_a_claim_beyond_all_numbers_is_not_sound(tmp_path):
    (path := tmp_path / "ledger.json").write_text('{"clients": {}}')
    with pytest.raises(BadInput, match="holds no client's ledger"):
        show_ledger(path)
    ledger = Ledger(target_epsilon=3.0, target_delta=1e-5)
    ledger.charge(2.0, 0.1)
    book = {"ledger": ledger.state_dict(), "epsilon": 10**400}
    path.write_text(json.dumps({"clients": {"0": book}, "delta": 1e-5}))
    with pytest.raises(BadInput, match="ledger.json: "):
        show_ledger(path)
    path.write_text(json.dumps({"clients": {"0": book | {"epsilon": ledger.epsilon()}}, "delta": 1e-5}))
    shown = float(show_ledger(path).partition("  epsilon ")[2].split()[0])
    assert ledger.epsilon() <= shown < ledger.epsilon() + 1e-4


def test_what_each_release_was_is_listed_and_the_budget_beside_its_own_epsilon_alone(tmp_path):
    ledger = Ledger(target_epsilon=8.0, target_delta=1e-5)
    for _ in range(3):
        ledger.charge(2.0, 0.1, max_grad_norm=0.5, expected_batch_size=16)
    ledger.charge(3.0, 0.2, clipping="automatic", release=40)
    ledger.save(path := tmp_path / "ledger.json")
    listed = [line.split(None, 1) for line in show_ledger(path).splitlines()[3:5]]
    assert listed == [
        ["0-2", "3 x sigma 2, q 0.1, flat, C 0.5, b 16, poisson"],
        ["40", "1 x sigma 3, q 0.2, automatic, poisson"],
    ]
    own, other = [line for line in show_ledger(path).splitlines() if "at delta 1e-05" in line]
    assert " of 8 " in own and "add or remove one" in own and " of " not in other and "replace one" in other
    assert " of " not in show_ledger(path, delta=1e-6).partition("epsilon ")[2]

"""What the server believes: checks of an update, quorum, robust rules against NumPy and SciPy, memory of the mean."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.guard import (
    QuorumLost,
    Rules,
    combine,
    refuse_lost_rounds,
    schema,
    why_other,
    why_refused,
)
from lalora_kernels.federated.methods import get_method, weighted_mean
from lalora_kernels.federated.server import Server
from lalora_kernels.federated.wire import group, lacking

REFERENCE = {"l.lora_A": torch.tensor([[3.0, 4.0]]), "head.bias": torch.zeros(2)}


def update(a=(3.0, 4.0), bias=(0.0, 0.0)):
    return {"l.lora_A": torch.tensor([a]), "head.bias": torch.tensor(bias)}


BAD = {
    "NaN": (update(a=(math.nan, 0.0)), "l.lora_A is NaN or Inf"),
    "Inf": (update(bias=(0.0, -math.inf)), "head.bias is NaN or Inf"),
    "shape": (update() | {"head.bias": torch.zeros(3)}, r"head.bias has shape \(3,\), not \(2,\)"),
    "one that broadcasts": (update() | {"head.bias": torch.zeros(1)}, r"has shape \(1,\)"),
    "dtype": (update() | {"head.bias": torch.zeros(2, dtype=torch.int64)}, "is torch.int64, not torch.float32"),
    "a key too many": (update() | {"l.lora_B": torch.zeros(1)}, "other tensors than the method sends: l.lora_B"),
    "a key too few": ({"head.bias": torch.zeros(2)}, "other tensors than the method sends: l.lora_A"),
    "far away": (update(a=(3.0, 5004.1)), "5e\\+03 away from the reference, more than 5e\\+03"),
}


@pytest.mark.parametrize("what", BAD)
def test_an_invalid_update_is_left_out_named_and_changes_nothing(what):
    bad, why = BAD[what]
    assert why_refused(update(), REFERENCE, Rules()) is None
    good = {0: update(a=(1.0, 2.0)), 2: update(a=(5.0, 0.0))}
    alone, _ = combine(good, {0: 1.0, 2: 1.0}, REFERENCE, Rules(), weighted_mean, 2)
    state, outcome = combine(good | {1: bad}, dict.fromkeys(range(3), 1.0), REFERENCE, Rules(), weighted_mean, 3)
    assert outcome.accepted == [0, 2] and list(outcome.dropped) == [1] and outcome.moved
    assert re.search(why, outcome.dropped[1])
    assert all(torch.equal(state[key], alone[key]) for key in REFERENCE)
    assert alone["l.lora_A"].tolist() == [[3.0, 1.0]]


def test_the_norm_bound_is_relative_to_the_reference_and_has_a_floor_of_one():
    rules = Rules(max_update_norm=2.0)
    assert why_refused(update(a=(3.0, 13.9)), REFERENCE, rules) is None  # 9.9 < 2 * 5
    assert why_refused(update(a=(3.0, 14.1)), REFERENCE, rules)
    zero = {key: torch.zeros_like(value) for key, value in REFERENCE.items()}
    assert why_refused(update(a=(1.9, 0.0)), zero, rules) is None and why_refused(update(a=(2.1, 0.0)), zero, rules)


@pytest.mark.parametrize("quorum, chosen, needed", [(0.5, 4, 2), (0.5, 5, 3), (1.0, 3, 3), (0.1, 3, 1), (0.6, 5, 3)])
def test_below_the_quorum_the_state_stays(quorum, chosen, needed):
    rules = Rules(quorum=quorum)
    assert rules.needed(chosen) == needed
    server = Server(get_method("la-lora"), REFERENCE, rules)
    sent = {i: update(a=(1.0, 1.0)) for i in range(needed)}
    if needed > 1:
        short = dict(list(sent.items())[1:])
        assert not server.aggregate(1, short, dict.fromkeys(range(chosen), 1.0), chosen).moved
        assert torch.equal(server.state["l.lora_A"], REFERENCE["l.lora_A"])
    assert server.aggregate(1, sent, dict.fromkeys(range(chosen), 1.0), chosen).moved
    assert server.state["l.lora_A"].tolist() == [[1.0, 1.0]]


def test_three_rounds_without_a_quorum_end_the_run_and_say_why():
    lost = {"moved": False, "dropped": {"1": "l.lora_A is NaN or Inf"}}
    refuse_lost_rounds([lost, lost])
    refuse_lost_rounds([lost, {"moved": True, "dropped": {}}, lost])
    with pytest.raises(QuorumLost, match="client 1: l.lora_A is NaN or Inf.*lower --lr"):
        refuse_lost_rounds([lost, lost, lost])


numbers = st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4)


@given(st.lists(numbers, min_size=1, max_size=9), st.sampled_from([0.0, 0.1, 0.25, 0.4]))
def test_robust_rules_are_numpys_and_scipys(rows, trim):
    sent = {i: {"b": torch.tensor(row), "a": torch.ones(1)} for i, row in enumerate(rows)}
    reference = {"a": torch.ones(1), "b": torch.zeros(4)}
    table = np.array(rows, dtype=np.float32).astype(np.float64)
    wide = Rules(aggregator="median", max_update_norm=1e9)
    found, _ = combine(sent, {}, reference, wide, weighted_mean, len(rows))
    assert list(found) == ["a", "b"] and found["b"].dtype == torch.float32
    np.testing.assert_array_equal(found["b"].numpy(), np.median(table, axis=0).astype(np.float32))
    cut = Rules(aggregator="trimmed_mean", trim=trim, max_update_norm=1e9)
    found, _ = combine(sent, {}, reference, cut, weighted_mean, len(rows))
    expected = stats.trim_mean(table, trim, axis=0)
    np.testing.assert_allclose(found["b"].numpy(), expected, rtol=1e-6, atol=1e-7 * np.abs(table).max())


@pytest.mark.parametrize("aggregator, moves", [("mean", True), ("median", False), ("trimmed_mean", False)])
def test_one_client_of_five_cannot_move_a_robust_rule(aggregator, moves):
    sent = {i: update(a=(3.0, 4.0 + 0.1 * i)) for i in range(4)} | {4: update(a=(3.0, 3000.0))}
    state, outcome = combine(sent, dict.fromkeys(sent, 1.0), REFERENCE, Rules(aggregator=aggregator), weighted_mean, 5)
    assert outcome.accepted == [0, 1, 2, 3, 4]
    assert (float(state["l.lora_A"][0, 1]) > 5) is moves


def test_norm_clipping_scales_what_an_update_changes():
    rules = Rules(clip_update_norm=1.0)
    sent = {0: update(a=(3.0, 14.0)), 1: update(a=(3.5, 4.0))}  # 10 away, and 0.5
    state, _ = combine(sent, {0: 1.0, 1: 1.0}, REFERENCE, rules, weighted_mean, 2)
    assert state["l.lora_A"].tolist() == [[3.25, 4.5]]


def test_the_mean_is_the_same_in_whatever_order_updates_came_and_holds_one_at_a_time():
    generator = torch.Generator().manual_seed(0)
    sent = {i: {"a": torch.randn(1000, generator=generator) * 10.0**i} for i in range(7)}
    held, most = [0], [0]

    class Counted(dict):
        def __del__(self):
            held[0] -= 1

    class FromDisk(dict):
        def __getitem__(self, client):
            held[0] += 1
            most[0] = max(most[0], held[0])
            return Counted(super().__getitem__(client))

    reference, rules = {"a": torch.zeros(1000)}, Rules(max_update_norm=1e9)
    first, _ = combine(FromDisk(sent), dict.fromkeys(sent, 1.0), reference, rules, weighted_mean, 7)
    backwards = dict(sorted(sent.items(), reverse=True))
    second, _ = combine(backwards, dict.fromkeys(sent, 1.0), reference, rules, weighted_mean, 7)
    assert torch.equal(first["a"], second["a"]) and most[0] <= 2  # one, while the next is fetched
    cancels = {0: {"a": torch.tensor([1e20])}, 2: {"a": torch.tensor([-1e20])}, 1: {"a": torch.ones(1)}}
    third, outcome = combine(
        cancels, dict.fromkeys(cancels, 1.0), {"a": torch.zeros(1)}, Rules(max_update_norm=1e30), weighted_mean, 3
    )
    assert outcome.accepted == [0, 1, 2] and third["a"].item() == 0.0  # 1e20 + 1 - 1e20; as they came it would be 1/3
    exact = np.mean([sent[i]["a"].double().numpy() for i in range(7)], axis=0)
    np.testing.assert_allclose(first["a"].numpy(), exact, rtol=1e-6)


def test_the_schema_knows_names_dtypes_and_shapes_in_any_order():
    a, bias, here = "l.lora_A is float32 (1, 2) here", "head.bias is float32 (2,) here", schema(REFERENCE)
    for there, wanted in (
        ({"head.bias": torch.zeros(2)}, f"1 tensors are not the server's: {a}, missing there"),
        (REFERENCE | {"head.bias": torch.zeros(3)}, f"{bias}, float32 (3,) there"),
        (REFERENCE | {"head.bias": torch.zeros(2).double()}, f"{bias}, float64 (2,) there"),
        (REFERENCE | {"x": torch.zeros(1)}, "x is missing here, float32 (1,) there"),
        ({str(i): torch.zeros(1) for i in range(9)}, "11 tensors are not the server's: 0 is .*; 1 is .*; 2 is [^;]*"),
    ):
        assert re.fullmatch(f".*{wanted.replace('(', '[(]').replace(')', '[)]')}", why_other(here, schema(there)))
    for there in (dict(reversed(REFERENCE.items())), update(a=(0.0, 9.0))):
        assert why_other(here, schema(there)) is None
    for garbage in (None, "0" * 16, [], {"l.lora_A": None, "head.bias": here}):
        assert why_other(here, garbage)


def test_robust_rules_do_not_take_weights():
    with pytest.raises(ValueError, match="does not go with --average size"):
        make_config({"aggregator": "median", "average": "size"})


def test_an_embedding_s_factors_travel_as_factors_do():
    names = ("e.lora_embedding_A", "e.lora_embedding_B", "l.lora_A", "l.lora_B", "head.weight")
    assert [group(name) for name in names] == ["A", "B", "A", "B", "rest"]
    state = {name: torch.zeros(1) for name in names}
    assert set(lacking(state, {"A": 1, "B": 2}, 1)) == {"e.lora_embedding_B", "l.lora_B"}

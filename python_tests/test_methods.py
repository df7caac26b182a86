"""The four methods: aggregation against two-client examples written out, and a whole run against plain autograd."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounds import ACTIVE, K, settings, train_by_hand, two_clients  # noqa: F401

from lalora_kernels.federated.client import learning_rate
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.guard import Rules
from lalora_kernels.federated.methods import METHODS, get_method, merged_weights, weighted_mean
from lalora_kernels.federated.server import Server

# One layer with r = 1, m = n = 2, and a head; before the round, and after client 0 and client 1 trained everything.
START = {"l.lora_A": [[1.0, 2.0]], "l.lora_B": [[0.0], [0.0]], "head.bias": [0.0, 0.0]}
FIRST = {"l.lora_A": [[2.0, 4.0]], "l.lora_B": [[1.0], [3.0]], "head.bias": [1.0, -1.0]}
SECOND = {"l.lora_A": [[4.0, 0.0]], "l.lora_B": [[5.0], [-1.0]], "head.bias": [3.0, 5.0]}
MEAN = {"l.lora_A": [[3.0, 2.0]], "l.lora_B": [[3.0], [1.0]], "head.bias": [2.0, 2.0]}
BY_SIZE = {"l.lora_A": [[2.5, 3.0]], "l.lora_B": [[2.0], [2.0]], "head.bias": [1.5, 0.5]}  # 30 and 10 records
# (method, round) -> what of MEAN the global state takes; the rest stays as in START.
TAKES = {
    ("dp-lora", 1): {"l.lora_A", "l.lora_B", "head.bias"},
    ("dp-lora", 2): {"l.lora_A", "l.lora_B", "head.bias"},
    ("ffa-lora", 1): {"l.lora_B", "head.bias"},
    ("ffa-lora", 2): {"l.lora_B", "head.bias"},
    ("rolora", 1): {"l.lora_B", "head.bias"},
    ("rolora", 2): {"l.lora_A", "head.bias"},
    ("la-lora", 1): {"l.lora_A", "l.lora_B", "head.bias"},
    ("la-lora", 2): {"l.lora_A", "l.lora_B", "head.bias"},
}


def tensors(values):
    return {key: torch.tensor(value) for key, value in values.items()}


@pytest.mark.parametrize("weights, mean", [((1.0, 1.0), MEAN), ((30.0, 10.0), BY_SIZE)])
@pytest.mark.parametrize("method, number", TAKES)
def test_aggregated_state_of_two_clients(method, number, weights, mean):
    method = get_method(method)
    server = Server(method, tensors(START))
    sent = [{k: v for k, v in tensors(u).items() if method.travels(k, number)} for u in (FIRST, SECOND)]
    assert all(set(u) == TAKES[method.name, number] for u in sent)
    server.aggregate(number, {1: sent[1], 0: sent[0]}, {0: weights[0], 1: weights[1]})
    for key in START:
        expected = mean[key] if key in TAKES[method.name, number] else START[key]
        assert torch.equal(server.state[key], torch.tensor(expected)), key


def test_every_method_of_the_table_has_its_example():
    assert {name for name, _ in TAKES} == set(METHODS)


EXACT = {"dp-lora": False, "ffa-lora": True, "rolora": True, "la-lora": False}


@pytest.mark.parametrize("method, exact", EXACT.items())
def test_mean_of_the_products_is_the_product_of_the_means_where_one_factor_is_shared(method, exact):
    method = get_method(method)
    server = Server(method, tensors(START))
    trained = [tensors(START) | {k: v for k, v in tensors(u).items() if method.travels(k, 1)} for u in (FIRST, SECOND)]
    sent = [{k: v for k, v in u.items() if method.travels(k, 1)} for u in trained]
    server.aggregate(1, dict(enumerate(sent)), {0: 1.0, 1: 1.0})
    products = sum(u["l.lora_B"] @ u["l.lora_A"] for u in trained) / 2
    assert torch.equal(server.state["l.lora_B"] @ server.state["l.lora_A"], products) is exact


# ---------------------------------------------------------------- further methods, two clients written out

BASE = {"l.weight": [[10.0, 20.0], [30.0, 40.0]]}
# FIRST: B A = [[2, 4], [6, 12]]; SECOND: [[20, 0], [-4, 0]]; their mean, and mean(B) mean(A) = (3, 1)ᵀ (3, 2)
MEAN_PRODUCT, PRODUCT_OF_MEANS = [[11.0, 2.0], [1.0, 6.0]], [[9.0, 6.0], [3.0, 2.0]]
SIZES = [[6.5, 3.0], [3.5, 9.0]]  # (30 FIRST + 10 SECOND) / 40
S = 2.0  # the adapters' scaling


def further(name, weights=(1.0, 1.0), number=1):
    method = get_method(name)
    server = Server(method, tensors(START | (BASE if method.folds else {})), scaling=S)
    sent = [{k: v for k, v in tensors(u).items() if method.travels(k, number)} for u in (FIRST, SECOND)]
    outcome = server.aggregate(number, {0: sent[0], 1: sent[1]}, {0: weights[0], 1: weights[1]})
    assert outcome.accepted == [0, 1] and outcome.moved
    assert torch.equal(server.state["head.bias"], torch.tensor(MEAN["head.bias"])) or weights != (1.0, 1.0)
    return server, sent


@pytest.mark.parametrize("weights, exact", [((1.0, 1.0), MEAN_PRODUCT), ((30.0, 10.0), SIZES)])
def test_fedex_lora_folds_the_residual(weights, exact):
    server, sent = further("fedex-lora", weights)
    assert all(set(update) == {"l.lora_A", "l.lora_B", "head.bias"} for update in sent)  # no weight goes up
    mean = MEAN if weights == (1.0, 1.0) else BY_SIZE
    state = server.state
    assert torch.equal(state["l.lora_A"], torch.tensor(mean["l.lora_A"]))
    assert torch.equal(state["l.lora_B"], torch.tensor(mean["l.lora_B"]))
    if weights == (1.0, 1.0):  # W0 + 2 (MEAN_PRODUCT - PRODUCT_OF_MEANS)
        assert torch.equal(state["l.weight"], torch.tensor([[14.0, 12.0], [26.0, 48.0]]))
    whole = torch.tensor(BASE["l.weight"]) + S * torch.tensor(exact)
    assert torch.equal(state["l.weight"] + S * state["l.lora_B"] @ state["l.lora_A"], whole)
    assert torch.equal(merged_weights(state, S)["l.weight"], whole)


def test_flora_folds_the_stacked_product_and_starts_adapters_anew():
    server, _ = further("flora")
    # stacked: B = [B1 B2] (2, 2), A = [A1; A2] / 2 (2, 2)
    stacked = torch.tensor([[1.0, 5.0], [3.0, -1.0]]) @ torch.tensor([[2.0, 4.0], [4.0, 0.0]]) / 2
    assert torch.equal(stacked, torch.tensor(MEAN_PRODUCT))
    assert torch.equal(server.state["l.weight"], torch.tensor(BASE["l.weight"]) + S * stacked)
    assert torch.equal(server.state["l.lora_B"], torch.zeros(2, 1))
    A = server.state["l.lora_A"]
    assert A.shape == (1, 2) and 0 < A.abs().max() <= 1 / math.sqrt(2)
    assert torch.equal(further("flora")[0].state["l.lora_A"], A)  # public: any client can draw it
    assert not torch.equal(further("flora", number=2)[0].state["l.lora_A"], A)


def test_flora_draws_a_as_a_new_adapter_has_it_and_folds_a_model_that_is_one_layer():
    """PEFT's start: kaiming_uniform_(a=√5), which is uniform within ±1/√n."""
    A, B = torch.ones(8, 625), torch.ones(3, 8)
    moved = get_method("flora").finish({"lora_A": A, "lora_B": B, "weight": torch.zeros(3, 625)},
                                       [{"lora_A": A, "lora_B": B}], [1.0], 1.0, 1)  # fmt: skip
    assert torch.equal(moved["weight"], torch.full((3, 625), 8.0))
    drawn = moved["lora_A"].double() * math.sqrt(625)
    assert -1 <= drawn.min() < -0.99 and 0.99 < drawn.max() <= 1
    assert abs(drawn.mean()) < 5 / math.sqrt(3 * drawn.numel())  # five standard errors
    assert abs(drawn.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / drawn.numel())


def test_fedsvd_keeps_the_product_and_makes_the_rows_of_a_orthonormal():
    server, sent = further("fedsvd")
    assert all(set(update) == {"l.lora_B", "head.bias"} for update in sent)
    A, B = server.state["l.lora_A"], server.state["l.lora_B"]
    # mean(B) A = (3, 1)ᵀ (1, 2): Σ = sqrt(10) sqrt(5), V = (1, 2) / sqrt(5)
    torch.testing.assert_close(B @ A, torch.tensor([[3.0, 6.0], [1.0, 2.0]]))
    torch.testing.assert_close(A.abs(), torch.tensor([[1.0, 2.0]]) / math.sqrt(5))
    torch.testing.assert_close(B.abs(), torch.tensor([[3.0], [1.0]]) * math.sqrt(5))


@pytest.mark.parametrize("m, n, r, rank", [(7, 9, 3, 3), (7, 9, 3, 1), (2, 9, 4, 2), (7, 9, 3, 0)])
def test_fedsvd_is_numpys_svd_of_the_product(m, n, r, rank):
    g = torch.Generator().manual_seed(m + rank)
    A, B = torch.randn(r, n, generator=g), torch.randn(m, r, generator=g)
    B[:, rank:] = 0.0
    moved = get_method("fedsvd").finish({"l.lora_A": A, "l.lora_B": B}, [], [], 1.0, 1)
    torch.testing.assert_close(moved["l.lora_B"] @ moved["l.lora_A"], B @ A)
    torch.testing.assert_close(moved["l.lora_A"] @ moved["l.lora_A"].T, torch.eye(r))
    sigma = np.linalg.svd((B @ A).double().numpy(), compute_uv=False)
    expected = np.zeros(r)
    expected[: min(r, len(sigma))] = sigma[:r]
    np.testing.assert_allclose(moved["l.lora_B"].norm(dim=0).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("weights, mean", [((1.0, 1.0), MEAN), ((30.0, 10.0), BY_SIZE)])
def test_fedsa_lora_averages_a_and_leaves_b_with_the_clients(weights, mean):
    server, sent = further("fedsa-lora", weights)
    assert all(set(update) == {"l.lora_A", "head.bias"} for update in sent)
    for key, value in (mean | {"l.lora_B": START["l.lora_B"]}).items():
        assert torch.equal(server.state[key], torch.tensor(value)), key


@pytest.mark.parametrize("rules", [Rules(aggregator="median"), Rules(clip_update_norm=1.0)])
@pytest.mark.parametrize("method", ["fedex-lora", "flora"])
def test_a_method_that_folds_the_exact_mean_refuses_other_rules(method, rules):
    with pytest.raises(ValueError, match=f"{method} folds the exact mean"):
        Server(get_method(method), tensors(START | BASE), rules, S)
    with pytest.raises(ValueError, match="needs the adapters' scaling"):
        Server(get_method(method), tensors(START | BASE))


@pytest.mark.parametrize("method, order", [
    ("la-lora-2-1", "BBABBA"), ("la-lora-4-1", "BBBBAB"), ("la-lora-1-2", "BAABAA"), ("la-lora-a-first", "ABABAB"),
    ("la-lora-5-5", "BBBBBAAAAAB"), ("la-lora-10-10", "BBBBBBBBBBAAAAAAAAAAB"),
    ("la-lora-25-25", "B" * 25 + "A" * 25 + "B"),
])  # fmt: skip
def test_periods_of_la_lora(method, order):
    schedule = get_method(method).schedule
    for number in (1, 2):
        assert "".join(schedule.active(number, step + 1) for step in range(len(order))) == order
    assert schedule.least_steps == 1 + max(order.index("A"), order.index("B"))
    assert [m.schedule.least_steps for m in METHODS.values()] == [1, 1, 1, 2]  # rolora turns by rounds


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ({"smoothing": "none"}, 0.5), ({"smoothing": "binomial5"}, 1.0), ({"optimizer": "adamw"}, 0.01),
        ({"lr": 0.3, "smoothing": "binomial5"}, 0.3),
    ],
)  # fmt: skip
def test_the_learning_rate_of_the_readme(given, rate):
    """Twice the rate behind the filter; half a cosine leads from it to zero."""
    config = make_config(given | {"rounds": 4, "lr_schedule": "constant"})
    assert learning_rate(config, 1) == learning_rate(config, 4) == rate
    falling = [learning_rate(make_config(given | {"rounds": 4, "lr_schedule": "cosine"}), t) for t in (1, 3)]
    assert falling == pytest.approx([rate, rate / 2])


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=6),
    st.lists(st.integers(1, 10**6), min_size=6, max_size=6),
)
def test_weighted_mean_is_numpys_in_float64(rows, weights):
    weights = [float(w) for w in weights[: len(rows)]]
    mean = weighted_mean([{"b": torch.tensor(r), "a": torch.ones(1)} for r in rows], weights)
    assert list(mean) == ["a", "b"] and mean["b"].dtype == torch.float32
    expected = np.average(np.array(rows, dtype=np.float32).astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(mean["b"].numpy(), expected, rtol=1e-6, atol=1e-6 * np.abs(rows).max() * 1e-3 + 1e-30)


def test_a_mean_of_equal_updates_is_that_update():
    update = {"a": torch.randn(50, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(weighted_mean([update] * 7, [1.0] * 7)["a"], update["a"])


@pytest.mark.parametrize(
    "updates, weights, message",
    [
        ([], [], "no client sent"),
        ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], [1, 1], r"'a', 'b'"),
        ([{"a": torch.ones(1)}, {"a": torch.ones(2)}], [1, 1], r"update 1: a has shape \(2,\)"),
        ([{"a": torch.ones(1)}, {"a": torch.tensor([math.nan])}], [1, 1], "update 1: a holds NaN"),
        ([{"a": torch.ones(1)}], [0.0], "not all zero"),
        ([{"a": torch.ones(1)}], [math.inf], "finite"),
        ([{"a": torch.ones(1)}], [-1.0], "not negative"),
        ([{"a": torch.ones(1)}], [1.0, 1.0], "one an update"),
    ],
)
def test_weighted_mean_refuses(updates, weights, message):
    with pytest.raises(ValueError, match=message):
        weighted_mean(updates, weights)

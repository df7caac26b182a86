"""The four methods: aggregation against two-client examples written out, and a whole run against plain autograd."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small import digits_npz, vit_folder
from tolerances import ROUNDS_F32

from lalora_kernels.federated.client import Client, get_state, learning_rate
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.methods import METHODS, get_method, weighted_mean
from lalora_kernels.federated.run import Run, prepare
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


# ---------------------------------------------------------------- a whole run, written out

LR, K, C = 0.5, 3, 3.86  # C cuts some records and not others


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a small ViT and 24 digits; two clients of 12 records, drawn whole at every step (q = 1)."""
    folder = tmp_path_factory.mktemp("world")
    return vit_folder(folder / "vit"), digits_npz(folder / "d.npz", 24, 20)


def settings(world, **changes):
    model, data = world
    values = {
        "model": model, "dataset": data, "clients": 2, "fraction": 1.0, "rounds": 2, "local_steps": K, "rank": 2,
        "batch_size": 12, "min_records": 12, "partition": "iid", "epsilon": math.inf, "lr": LR, "max_grad_norm": C,
        "train_head": "yes", "lr_schedule": "cosine", "device": "cpu",
    }  # fmt: skip
    return make_config(values | changes)


def smooth(t: torch.Tensor, key: str, on: bool) -> torch.Tensor:
    """[1,4,6,4,1]/16 along the feature axis with NumPy's symmetric padding, by NumPy."""
    if not on or "lora_" not in key:
        return t
    axis = 1 if key.endswith("lora_A") else 0
    along = lambda v: np.convolve(np.pad(v, 2, mode="symmetric"), np.array([1, 4, 6, 4, 1]) / 16, "valid")  # noqa: E731
    return torch.from_numpy(np.apply_along_axis(along, axis, t.double().numpy())).to(t.dtype)


def train_by_hand(task, active, smoothing) -> dict[str, torch.Tensor]:
    """Clip each record's gradient to C, sum, filter, divide by b, SGD; average the two clients; all in plain torch."""
    model, collate = task.classifier.model.eval(), task.classifier.collate
    tensors = {n: p for n, p in model.named_parameters() if "lora_" in n or n.startswith("classifier.")}
    state, clipped = get_state(model), []
    for number in (1, 2):
        results = []
        for part in task.parts:
            for name, p in tensors.items():
                p.data.copy_(state[name])
            for step in range(1, K + 1):
                trains = [n for n in tensors if "lora_" not in n or n[-1] in active(number, step)]
                for name, p in tensors.items():
                    p.requires_grad_(name in trains)
                total = {n: torch.zeros_like(tensors[n]) for n in trains}
                for i in part:
                    x, y = collate([task.data.train[int(i)]])
                    grads = torch.autograd.grad(F.cross_entropy(model(x).logits, y), [tensors[n] for n in trains])
                    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
                    clipped.append(norm > C)
                    for n, g in zip(trains, grads):
                        total[n] += min(1.0, C / norm) * g
                for n in trains:
                    tensors[n].data -= learning_rate(task.config, number) * smooth(total[n], n, smoothing) / len(part)
            results.append(get_state(model))
        sent = {n for n in state if any("lora_" not in n or n[-1] in active(number, s) for s in range(1, K + 1))}
        for n in sent:
            state[n] = sum(r[n] for r in results) / 2
    assert 0.1 < np.mean(clipped) < 0.9
    return state


ACTIVE = {
    "dp-lora": lambda round, step: "AB",
    "ffa-lora": lambda round, step: "B",
    "rolora": lambda round, step: {1: "B", 2: "A"}[round],
    "la-lora": lambda round, step: {1: "B", 2: "A", 3: "B"}[step],
}


@pytest.mark.parametrize("smoothing", ["binomial5", "none"])
@pytest.mark.parametrize("method", ACTIVE)
def test_two_rounds_of_two_clients_equal_plain_autograd(world, tmp_path, method, smoothing):
    config = settings(world, method=method, smoothing=smoothing)
    task = prepare(config)
    start = get_state(task.classifier.model)
    expected = train_by_hand(task, ACTIVE[method], smoothing == "binomial5")
    run = Run.start(prepare(config), tmp_path / "run")
    run.train()
    for key, value in run.at.state.items():
        torch.testing.assert_close(value, expected[key], **ROUNDS_F32, msg=lambda m, key=key: f"{key}: {m}")
    moved = {key: float((value - start[key]).abs().max()) for key, value in run.at.state.items()}
    assert max(v for k, v in moved.items() if "lora_" in k) > 0.005 < moved["classifier.weight"]
    assert {k[-1] for k, v in moved.items() if v and "lora_" in k} == ({"B"} if method == "ffa-lora" else {"A", "B"})
    # bytes: what the method sends, float32, from two clients
    sizes = {f: 4 * sum(v.numel() for k, v in start.items() if k.endswith(f)) for f in ("lora_A", "lora_B")}
    head = 4 * sum(v.numel() for k, v in start.items() if "lora_" not in k)
    sends = {"dp-lora": ("AB", "AB"), "ffa-lora": ("B", "B"), "rolora": ("B", "A"), "la-lora": ("AB", "AB")}[method]
    wire = [2 * (head + sum(sizes["lora_" + f] for f in factors)) for factors in sends]
    assert [r["bytes_sent"] for r in run.at.history] == [0, *wire]


def test_average_by_size_weighs_by_records(world, tmp_path, monkeypatch):
    task = prepare(settings(world, average="size", partition="dirichlet", batch_size=3, min_records=3, rounds=1))
    run = Run.start(task, tmp_path / "run")
    updates, weights = {}, [len(part) for part in task.parts]
    assert weights[0] != weights[1]
    train_round = Client.train_round

    def keep(self, *args):
        updates[self.name] = train_round(self, *args)
        return updates[self.name]

    monkeypatch.setattr(Client, "train_round", keep)
    run.train()
    for key, value in run.at.state.items():
        both = [updates[name][key].double() for name in ("0", "1")]
        expected = (weights[0] * both[0] + weights[1] * both[1]) / sum(weights)
        assert torch.equal(value, expected.float()), key

"""Whole runs of every method against plain autograd and products written out."""

import math

import numpy as np
import pytest
import safetensors.torch
import torch
from rounds import ACTIVE, K, settings, train_by_hand, two_clients  # noqa: F401
from tolerances import ROUNDS_F32

from lalora_kernels.adapt import unadapt
from lalora_kernels.data import BadInput
from lalora_kernels.federated.client import Client, get_state, set_state
from lalora_kernels.federated.coordinator import Coordinator
from lalora_kernels.federated.methods import FURTHER, get_method
from lalora_kernels.federated.run import MERGED, Run, prepare
from lalora_kernels.federated.server import evaluate
from lalora_kernels.federated.task import Watch
from lalora_kernels.peft_io import load_adapter
from lalora_kernels.reproduce.measures import Recorder


@pytest.mark.parametrize("smoothing", ["binomial5", "none"])
@pytest.mark.parametrize("method", ACTIVE)
def test_two_rounds_of_two_clients_equal_plain_autograd(world, tmp_path, method, smoothing):
    config = settings(world, method=method, smoothing=smoothing)
    task = prepare(config)
    start = get_state(task.classifier.model)
    expected, _ = train_by_hand(task, ACTIVE[method], smoothing == "binomial5")
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


class Stop(Exception):
    pass


def mean_of(run, states):
    """(accuracy, loss) on the test records, means over models that hold these states."""
    found = []
    for state in states:
        set_state(run.task.classifier.model, state)
        found.append(evaluate(run.task.classifier, run.task.data.test))
    return tuple(np.mean(found, axis=0))


def test_fedsa_lora_over_two_rounds_equals_plain_autograd(world, tmp_path):
    """Killed after the first client of round 2: what is stored then goes on as if nothing had happened."""
    config = settings(world, method="fedsa-lora", smoothing="none")
    task, steps = prepare(config), []
    start = get_state(task.classifier.model)
    expected, own = train_by_hand(task, ACTIVE["dp-lora"], False, keeps="B")

    def step():
        steps.append(1)
        if len(steps) > 3 * K:
            raise Stop

    with pytest.raises(Stop):
        Run.start(prepare(config), tmp_path / "run").train(Watch(on_step=step))
    run = Run.resume(tmp_path / "run")
    assert run.at.round == 1 and set(run.at.updates) == {0} and set(run.at.kept) == {0, 1}
    with pytest.raises(BadInput, match="fedsa-lora has no one model"):
        Recorder(run, tmp_path / "measures.jsonl")
    run.train()
    for key, value in run.at.state.items():
        torch.testing.assert_close(value, expected[key], **ROUNDS_F32, msg=lambda m, key=key: f"{key}: {m}")
    for i, b in enumerate(own):
        assert set(run.at.kept[i]) == set(b) == {key for key in start if key.endswith("lora_B")}
        for key, value in b.items():
            torch.testing.assert_close(run.at.kept[i][key], value, **ROUNDS_F32, msg=lambda m, key=key: f"{key}: {m}")
    assert max(float((own[0][key] - own[1][key]).abs().max()) for key in own[0]) > 0.005
    sent = sum(4 * value.numel() for key, value in start.items() if not key.endswith("lora_B"))
    assert [record["bytes_sent"] for record in run.at.history] == [0, 2 * sent, 2 * sent]
    found = []
    for name in ("0", "1"):
        load_adapter(task.classifier.model, run.weights / name)
        found.append(evaluate(task.classifier, task.data.test))
    assert sorted(path.name for path in run.weights.iterdir()) == ["0", "1"] and run.weights.name == "adapters"
    last = run.at.history[-1]
    assert tuple(np.mean(found, axis=0)) == pytest.approx((last["accuracy"], last["loss"]), rel=1e-5)


@pytest.mark.parametrize("broken", ["A", "B"])
def test_a_client_whose_update_does_not_count_keeps_the_b_it_had(world, tmp_path, monkeypatch, broken):
    """Client 1's A is NaN, which the server leaves out; or its B, which nobody but itself sees."""
    train_round = Client.train_round

    def poisoned(self, classifier, *args):
        update = train_round(self, classifier, *args)
        state = dict(classifier.model.named_parameters()) if broken == "B" else update
        for key in state:
            if self.name == "1" and key.endswith(f"lora_{broken}"):
                state[key].data.fill_(math.nan)
        return update

    monkeypatch.setattr(Client, "train_round", poisoned)
    run = Run.start(prepare(settings(world, method="fedsa-lora", rounds=1)), tmp_path / "run")
    run.train()
    last = run.at.history[-1]
    assert set(run.at.kept) == {0} and set(last["dropped"]) == ({"1"} if broken == "A" else set())
    found = mean_of(run, [run.at.state | run.at.kept[0], run.at.state])
    assert found == pytest.approx((last["accuracy"], last["loss"]), rel=1e-6)


@pytest.mark.parametrize("method", [name for name in FURTHER if not name.startswith("la-lora-")])
def test_a_further_method_over_two_rounds_is_a_ledgered_run_that_resumes(world, tmp_path, method):
    """Every step is in the ledgers; what the folder holds at the end is the model that was measured."""
    config = settings(world, method=method, epsilon=8.0, lora_alpha=4.0)
    one = Run.start(prepare(config), tmp_path / "one")
    start, base = dict(one.at.state), one.task.fingerprints
    stop = []

    def after_first(record):
        stop.append(record["round"])

    def step():
        if stop:
            raise Stop

    with pytest.raises(Stop):
        one.train(Watch(on_step=step, on_round=after_first))
    two = Run.resume(tmp_path / "one")
    assert two.at.round == 1 and two.task.fingerprints == base
    assert all(torch.equal(two.at.state[key], value) for key, value in one.at.state.items())
    two.train()
    assert [client.ledger.steps for client in two.clients] == [2 * K, 2 * K]
    assert max(two.epsilons()) <= 8.0
    changed = {key for key, value in two.at.state.items() if not torch.equal(value, start[key])}
    folds = get_method(method).folds
    assert any(key.endswith("q_proj.weight") for key in changed) is folds
    if folds:
        merged = safetensors.torch.load_file(tmp_path / "one" / MERGED)
        assert not (tmp_path / "one" / "adapter").exists()
        assert {key for key in merged if key not in start} == set() and any("q_proj.weight" in key for key in merged)
        plain = prepare(config).classifier
        unadapt(plain.model).load_state_dict(merged, strict=False)
        found = evaluate(plain, two.task.data.test)
    elif get_method(method).keeps:
        assert not (tmp_path / "one" / "adapter").exists()
        found = mean_of(two, [two.at.state | two.at.kept[i] for i in (0, 1)])
    else:
        assert (tmp_path / "one" / "adapter").exists()
        found = evaluate(two.task.classifier, two.task.data.test)
    assert found == pytest.approx((two.at.history[-1]["accuracy"], two.at.history[-1]["loss"]), rel=1e-4)


def test_a_run_that_could_not_fold_is_refused_before_it_starts(world, tmp_path):
    with pytest.raises(ValueError, match="flora folds the exact mean"):
        Run.start(prepare(settings(world, method="flora", aggregator="median")), tmp_path / "run")
    with pytest.raises(BadInput, match="--method fedsvd: .*lora_A: FedSVD needs a rank of at most.*--rank 16$"):
        Run.start(prepare(settings(world, method="fedsvd", rank=17)), tmp_path / "run")
    with pytest.raises(BadInput, match="--method fedsvd: .*lora_A: the product B A is defined for adapted linear"):
        Run.start(prepare(settings(world, method="fedsvd", targets=r".*\.projection")), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("method", ["fedsvd", "fedex-lora", "flora", "fedsa-lora"])
def test_flower_refuses_what_changes_more_than_travels(world, tmp_path, method):
    with pytest.raises(BadInput, match=f"{method} changes more than travels"):
        Coordinator.start(prepare(settings(world, method=method)), tmp_path / "run")

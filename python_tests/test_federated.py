"""The in-process federation: the plan, what a run leaves on disk, interruptions at every kind of moment, noise."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from opacus.accountants.prv import PRVAccountant
from small import bert_folder, digits_npz, text_tsv, vit_folder
from tolerances import EPSILON_PRV

from lalora_kernels.federated import run as run_module
from lalora_kernels.federated.client import get_state, learning_rate, set_state
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.methods import get_method
from lalora_kernels.federated.plan import make_plan, participation
from lalora_kernels.federated.run import Run, Watch, prepare
from lalora_kernels.federated.server import evaluate
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.report import write_report

CLIENTS, ROUNDS, K = 4, 3, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return vit_folder(folder / "vit"), digits_npz(folder / "d.npz", 160, 40)


def settings(world, **changes):
    values = {
        "model": world[0], "dataset": world[1], "clients": CLIENTS, "fraction": 0.5, "rounds": ROUNDS, "local_steps": K,
        "rank": 2, "batch_size": 8, "partition": "iid", "epsilon": 8.0, "delta": 1e-4, "lr": 1.0, "device": "cpu",
    }  # fmt: skip
    return make_config(values | changes)


def everything_drawn(world):
    """No noise and q = 1: a run whose result does not depend on keys."""
    return settings(world, epsilon=math.inf, batch_size=40, min_records=40)


def fixed(client: int) -> NoiseSource:
    return NoiseSource.fixed(bytes([client + 1]) * 32)


def steady(record):
    """A round's record, or a part of it, without times and memory."""
    if not isinstance(record, dict):
        return record
    return {k: steady(v) for k, v in record.items() if k not in ("seconds", "peak_memory")}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("fraction, chosen", [(0.5, 4), (1.0, 8), (0.01, 1), (0.3, 2), (0.6, 5)])
def test_participation_is_balanced_public_and_drawn_without_replacement(fraction, chosen):
    config = make_config({"fraction": fraction, "rounds": 21})
    rounds = participation(config)
    assert all(len(set(r)) == len(r) == chosen and r == sorted(r) for r in rounds)
    counts = [sum(client in r for r in rounds) for client in range(8)]
    assert max(counts) - min(counts) <= 1 and sum(counts) == 21 * chosen
    assert rounds == participation(config)
    if chosen < 8:
        assert rounds != participation(make_config({"fraction": fraction, "rounds": 21, "seed": 1}))


def test_sigma_is_each_clients_own_and_spends_its_budget_by_opacus_accountant():
    config = make_config({"clients": 3, "rounds": 4, "local_steps": 10, "fraction": 0.7, "epsilon": 2.0})
    plan = make_plan(config, [200, 400, 3200])
    sigmas = [c.noise_multiplier for c in plan.clients]
    assert sigmas == sorted(sigmas, reverse=True) and len(set(sigmas)) == 3
    for client, records in zip(plan.clients, (200, 400, 3200)):
        assert client.sample_rate == 64 / records
        assert client.steps == 10 * sum(client.client in r for r in plan.participation)
        theirs = PRVAccountant()
        theirs.history = [(client.noise_multiplier, client.sample_rate, client.steps)]
        assert theirs.get_epsilon(1e-5, eps_error=0.004) == pytest.approx(2.0, rel=EPSILON_PRV)


def test_cosine_learning_rate_starts_at_lr_and_ends_near_zero():
    config = make_config({"rounds": 10, "lr": 0.4})
    rates = [learning_rate(config, t) for t in range(1, 11)]
    assert rates[0] == 0.4 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.02
    assert learning_rate(make_config({"lr_schedule": "constant", "lr": 0.4}), 7) == 0.4


# ---------------------------------------------------------------- a run


def test_a_run_spends_no_more_than_its_budget_and_leaves_what_it_promises(world, tmp_path):
    seen = []
    run = Run.start(prepare(settings(world)), tmp_path / "run", watch=Watch(on_round=seen.append))
    run.train(Watch(on_round=seen.append))
    assert run.done and [r["round"] for r in seen] == [0, 1, 2, 3]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines == seen and lines[0]["epsilon"] == 0.0
    assert [r["clients"] for r in lines[1:]] == run.plan.participation
    for client, plan in zip(run.clients, run.plan.clients):
        assert client.ledger.steps == plan.steps == client.noise.next_release
        assert plan.steps == 0 or 7.99 < client.ledger.epsilon(1e-4) <= 8.0
    assert lines[-1]["epsilon"] == max(c.ledger.epsilon(1e-4) for c in run.clients)
    books = json.loads((tmp_path / "run/ledger.json").read_text())["clients"]
    assert [books[str(i)]["epsilon"] for i in range(CLIENTS)] == lines[-1]["epsilons"]
    about = json.loads((tmp_path / "run/config.json").read_text())
    assert make_config(about["settings"]) == run.task.config and about["plan"] == run.plan.as_dict()
    assert f"{100 * lines[-1]['accuracy']:.1f} %" in write_report(tmp_path / "run").read_text()


def test_the_saved_adapter_gives_peft_the_same_logits(world, tmp_path):
    from peft import PeftModel
    from transformers import ViTForImageClassification

    run = Run.start(prepare(settings(world, train_head="yes", epsilon=math.inf)), tmp_path / "run")
    run.train()
    batch, _ = run.task.classifier.collate([run.task.data.test[i] for i in range(4)])
    theirs = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(world[0]), tmp_path / "run/adapter")
    with torch.no_grad():
        plain = ViTForImageClassification.from_pretrained(world[0]).eval()(batch).logits
        ours, loaded = run.task.classifier.logits(batch), theirs.eval()(batch).logits
    torch.testing.assert_close(loaded, ours)
    assert (ours - plain).abs().max() > 1e-2


def test_training_learns(world, tmp_path):
    """A random model with a trained head, no noise: far above chance on test digits after a few rounds."""
    config = settings(
        world, epsilon=math.inf, train_head="yes", rounds=8, local_steps=20, batch_size=20, optimizer="adamw", lr=0.03,
        max_grad_norm=4.0,
    )  # fmt: skip
    run = Run.start(prepare(config), tmp_path / "run", noise=fixed)
    run.train()
    assert run.at.history[-1]["accuracy"] > 0.4 and run.at.history[-1]["loss"] < run.at.history[0]["loss"]
    set_state(run.task.classifier.model, run.at.state)
    x, y = run.task.classifier.collate([run.task.data.test[i] for i in range(40)])
    with torch.no_grad():
        right = (run.task.classifier.logits(x).argmax(1) == y).float().mean()
    assert float(right) == pytest.approx(run.at.history[-1]["accuracy"])
    assert evaluate(run.task.classifier, run.task.data.test, batch_size=7)[0] == pytest.approx(float(right))


@pytest.mark.parametrize("pairs", [False, True])
def test_text_models_train_too(tmp_path, pairs):
    data = text_tsv(tmp_path / "t.tsv")
    if pairs:
        lines = [f"{line}\tthe end" for line in (tmp_path / "t.tsv").read_text().splitlines()[1:]]
        (tmp_path / "t.tsv").write_text("\n".join(["label\tsentence\tquestion", *lines]) + "\n")
    config = make_config({
        "model": bert_folder(tmp_path / "bert"), "dataset": data, "clients": 2, "rounds": 4,
        "fraction": 1.0, "local_steps": 10, "batch_size": 16, "epsilon": math.inf, "lr": 0.03, "optimizer": "adamw",
        "train_head": "yes", "partition": "iid", "max_grad_norm": 2.0, "device": "cpu",
    })  # fmt: skip
    run = Run.start(prepare(config), tmp_path / "run", noise=fixed)
    assert (run.task.data.test.inputs[0][0] == "the end") is pairs
    optimizer, loader = run.clients[0].private_step(
        run.task.classifier, get_method(config.method), dataclasses.replace(config, physical_batch_size=4), 1
    )
    widths = [inputs["input_ids"].shape[1] for inputs, _ in loader.steps(1)]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]  # padded with others of its length
    optimizer.detach()
    run.train()
    assert run.at.history[-1]["accuracy"] > 0.95 > run.at.history[0]["accuracy"]


def test_adamw_and_small_physical_batches_equal_whole_ones(world, tmp_path):
    states = []
    for physical in (None, 3):
        config = settings(world, optimizer="adamw", lr=0.01, physical_batch_size=physical)
        run = Run.start(prepare(config), tmp_path / f"run{physical}", noise=fixed)
        run.train()
        states.append(run.at.state)
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- noise


def test_noise_comes_from_keys_and_never_from_the_seed(world, tmp_path):
    states = []
    for name, noise in (("a", fixed), ("b", fixed), ("c", None), ("d", None)):
        torch.manual_seed(11)
        run = Run.start(prepare(settings(world)), tmp_path / name, noise=noise)
        run.train()
        states.append(run.at.state)
        if noise is fixed:
            assert run.at.history[-1]["epsilon"] is None  # a known key is worth no ε
    assert same(states[0], states[1])
    assert not same(states[0], states[2]) and not same(states[2], states[3])


def test_no_two_clients_share_a_key(world, tmp_path):
    run = Run.start(prepare(settings(world)), tmp_path / "run")
    assert len({bytes(c.noise.key) for c in run.clients}) == CLIENTS


# ---------------------------------------------------------------- interruptions


class Stop(KeyboardInterrupt):
    pass


def stop_after(steps: int) -> Watch:
    """Ctrl-C after so many private steps."""
    count = [0]

    def on_step():
        count[0] += 1
        if count[0] == steps:
            raise Stop

    return Watch(on_step=on_step)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    run = Run.start(prepare(everything_drawn(world)), tmp_path_factory.mktemp("whole") / "run")
    run.train()
    return run


@pytest.mark.parametrize("steps", range(1, ROUNDS * 2 * K + 1))
def test_interrupted_anywhere_and_resumed_equals_the_undisturbed_run(world, undisturbed, tmp_path, steps):
    """Within a client's steps, between clients, between rounds: same weights, same spending, nothing lost."""
    run = Run.start(prepare(everything_drawn(world)), tmp_path / "run")
    with pytest.raises(Stop):
        run.train(stop_after(steps))
    stored = json.loads((tmp_path / "run/ledger.json").read_text())["clients"]
    resumed = Run.resume(tmp_path / "run")
    assert resumed.at.round == (steps - 1) // (2 * K)
    for client in resumed.clients:
        assert client.noise.next_release >= sum(e["count"] for e in stored[client.name]["ledger"]["entries"])
        assert bytes(client.noise.key) not in {bytes(c.noise.key) for c in run.clients}
    resumed.train()
    assert same(resumed.at.state, undisturbed.at.state)
    assert [c.ledger.steps for c in resumed.clients] == [p.steps for p in resumed.plan.clients]
    for ours, theirs in zip(resumed.at.history, undisturbed.at.history, strict=True):
        assert steady(ours) == steady(theirs)


def test_a_crash_between_ledger_and_weights_costs_the_update_but_never_the_budget(world, tmp_path, monkeypatch):
    """The ledger is written first; the client that paid is left out of that round's mean and is not trained twice."""
    run = Run.start(prepare(settings(world)), tmp_path / "run")
    saves = []
    save = run_module.save_checkpoint

    def crash_at_second(folder, checkpoint):
        saves.append(len(checkpoint.updates))
        if len(saves) == 2:
            raise OSError("disk full")
        save(folder, checkpoint)

    monkeypatch.setattr(run_module, "save_checkpoint", crash_at_second)
    with pytest.raises(OSError, match="disk full"):
        run.train()
    monkeypatch.undo()
    first, second = run.plan.participation[0]
    resumed = Run.resume(tmp_path / "run")
    assert set(resumed.at.updates) == {first} and resumed.clients[second].ledger.steps == K
    resumed.train()
    assert resumed.at.history[1]["clients"] == [first]
    assert [r["clients"] for r in resumed.at.history[2:]] == resumed.plan.participation[1:]
    for client, plan in zip(resumed.clients, resumed.plan.clients):
        assert client.ledger.steps == plan.steps and client.ledger.epsilon(1e-4) <= 8.0


def test_the_ledger_on_disk_is_never_behind_the_weights_on_disk(world, tmp_path, monkeypatch):
    """At every write of a checkpoint, the stored ledgers hold what each stored tensor cost."""
    run = Run.start(prepare(settings(world)), tmp_path / "run")
    checked = []
    save = run_module.save_checkpoint

    def check(folder, checkpoint):
        books = json.loads((folder / "ledger.json").read_text())["clients"]
        for i in range(CLIENTS):
            spent = sum(e["count"] for e in books[str(i)]["ledger"]["entries"])
            owed = run.plan.steps_before(i, checkpoint.round + 1, K) + K * (i in checkpoint.updates)
            assert spent >= owed
            checked.append(owed)
        save(folder, checkpoint)

    monkeypatch.setattr(run_module, "save_checkpoint", check)
    run.train()
    assert sum(checked) > 0 and len(checked) == CLIENTS * ROUNDS * 3


def test_a_crash_while_writing_leaves_the_checkpoint_before(world, tmp_path, monkeypatch):
    run = Run.start(prepare(settings(world)), tmp_path / "run")
    before = (tmp_path / "run/checkpoint.safetensors").read_bytes()
    import os

    replace = os.replace

    def fail(source, target):
        if str(target).endswith("checkpoint.safetensors"):
            raise OSError("power cut")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        run.train()
    assert (tmp_path / "run/checkpoint.safetensors").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))  # no half-written file stays


def test_resuming_a_finished_run_changes_nothing(undisturbed, tmp_path):
    shutil.copytree(undisturbed.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/adapter")
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    (tmp_path / "run/metrics.jsonl").write_text(metrics[: metrics[:-1].rindex("\n") + 1])  # killed before the last line
    run = Run.resume(tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_text() == metrics
    run.train()
    assert same(run.at.state, undisturbed.at.state)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "run/adapter" / name).read_bytes() == (undisturbed.folder / "adapter" / name).read_bytes()


def test_state_round_trips_and_inactive_factors_are_part_of_it(world):
    task = prepare(settings(world, train_head="yes"))
    state = get_state(task.classifier.model)
    assert {k.rpartition(".")[2] for k in state} == {"lora_A", "lora_B", "weight", "bias"}
    other = {k: v + 1 for k, v in state.items()}
    set_state(task.classifier.model, other)
    assert same(get_state(task.classifier.model), other)
    with pytest.raises(ValueError, match="does not fit"):
        set_state(task.classifier.model, {k: v for k, v in list(state.items())[1:]})

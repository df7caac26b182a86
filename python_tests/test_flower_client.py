"""The client owns its privacy: what it refuses, its budget over runs and restarts, its ledger."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch
from flower_nodes import (  # noqa: F401
    ROUNDS,
    Calls,
    K,
    close_logs,
    ledger_of,
    make_nodes,
    settings,
    small_world,
)
from small import digits_npz

from lalora_kernels.data import BadInput, load_data
from lalora_kernels.federated import node as node_module
from lalora_kernels.federated.coordinator import BudgetSpent, Coordinator
from lalora_kernels.federated.guard import QuorumLost
from lalora_kernels.federated.lifetime import LEDGER, RECORDS, claim, find, record_hashes, source_hash
from lalora_kernels.federated.node import Node
from lalora_kernels.federated.policy import Policy, Refused
from lalora_kernels.federated.run import prepare
from lalora_kernels.federated.wire import STATUS, pack, unpack
from lalora_kernels.privacy.ledger import LedgerError

REFUSALS = {
    "a larger epsilon": ({"max_epsilon": "7.9"}, "policy", "epsilon 8 is asked for"),
    "a larger delta": ({"delta": "1e-5"}, "policy", "delta 0.0001 is asked for"),
    "a delta that is no promise": ({"delta": "0.03"}, "policy", "delta 0.03 promises nothing to 40 records"),
    "too little noise": ({"min_noise_multiplier": "50.0"}, "policy", "sigma would be"),
    "a larger C": ({"max_grad_norm": "0.5"}, "policy", "max_grad_norm 1 is asked for"),
    "a larger K": ({"max_local_steps": "1"}, "policy", "local_steps 2 is asked for"),
    "a larger rank": ({"max_rank": "1"}, "policy", "rank 2 is asked for"),
    "other targets": ({"targets": "['qv']"}, "policy", "targets 'all-linear' is asked for"),
    "another clipping": ({"clipping": "['automatic']"}, "policy", "clipping 'flat' is asked for, automatic allowed"),
    "a name that means nothing": ({"max_epsilom": "1"}, "policy", "unknown name 'max_epsilom'"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_client_refuses_what_its_policy_does_not_allow_and_pays_nothing(world, tmp_path, what):
    policy, status, why = REFUSALS[what]
    config = settings(world)
    nodes = make_nodes(tmp_path, config, **policy)
    run, calls = Coordinator.start(prepare(config), tmp_path / "run"), Calls(nodes)
    with pytest.raises(QuorumLost, match=STATUS[status]):
        run.train(calls)
    assert all(unpack(blob)[1]["status"] == status and not unpack(blob)[0] for _, blob in calls.up)
    assert why in (nodes[0].home / "client.log").read_text()
    assert not list(tmp_path.glob("client*/ledgers/*/ledger.json"))


def test_without_a_policy_nothing_is_allowed(world, tmp_path):
    config = settings(world)
    nodes = make_nodes(tmp_path, config)
    for node in nodes:
        (node.home / "policy.toml").unlink()
    with pytest.raises(QuorumLost, match=STATUS["policy"]):
        Coordinator.start(prepare(config), tmp_path / "run").train(Calls(nodes))


def test_the_budget_holds_over_runs_and_restarts_and_its_end_stops_the_run(world, tmp_path):
    """A second run on the same records finds the budget spent by the first; Node objects are new each time."""
    config = settings(world)
    for turn in range(2):
        run = Coordinator.start(prepare(config), tmp_path / f"run{turn}")
        nodes = make_nodes(tmp_path, config, key=False)
        if turn:
            with pytest.raises(BudgetSpent, match="4 of 4 clients refused"):
                run.train(Calls(nodes))
            assert run.at.round == 1 and run.at.history[1]["moved"] is False
            assert json.loads((tmp_path / "run1/result.json").read_text())["outcome"] == "stopped"
        else:
            run.train(Calls(nodes))
        for node in nodes:
            assert ledger_of(node).steps == ROUNDS * K and 7.9 < ledger_of(node).epsilon(1e-4) <= 8.0
    nodes = make_nodes(tmp_path, config, key=False, max_epsilon="16.0")  # each client's own decision
    run = Coordinator.start(prepare(config), tmp_path / "run2")
    run.train(Calls(nodes))
    assert all(ledger_of(node).steps == 2 * ROUNDS * K for node in nodes)
    assert all(8.0 < ledger_of(node).epsilon(1e-4) <= 16.0 for node in nodes)


def test_a_round_that_is_asked_for_again_is_answered_again_and_costs_nothing(world, tmp_path):
    config = settings(world)
    nodes = make_nodes(tmp_path, config, key=False)
    seen = []

    def twice(node, blob):
        first = node.answer(blob)
        seen.append((blob, ledger_of(node).steps))
        second = Node(node.home, node.client).answer(blob)  # a new process
        assert second == first and ledger_of(node).steps == seen[-1][1]
        return second

    Coordinator.start(prepare(config), tmp_path / "run").train(Calls(nodes, {1: twice}))
    assert [steps for _, steps in seen] == [K, 2 * K, 3 * K]
    stale = unpack(nodes[1].answer(seen[0][0]))
    assert stale[1]["status"] == "stale" and not stale[0] and ledger_of(nodes[1]).steps == 3 * K


def test_a_crash_between_the_ledger_and_the_update_costs_the_update_and_never_the_budget(world, tmp_path, monkeypatch):
    config = settings(world)
    nodes = make_nodes(tmp_path, config)
    write, crashes = node_module.write_atomic, []

    def crash(path, data):
        if path.name == "state.safetensors" and "client1" in str(path) and not crashes:
            crashes.append(path)
            raise OSError("power cut")
        write(path, data)

    monkeypatch.setattr(node_module, "write_atomic", crash)

    def asks_again(node, blob):
        first = unpack(node.answer(blob))[1]["status"]
        if unpack(blob)[1]["round"] > 1:
            return node.answer(blob)
        reply = node.answer(blob)
        assert (first, unpack(reply)[1]["status"]) == ("failed", "lost") and ledger_of(node).steps == K
        return reply

    run = Coordinator.start(prepare(config), tmp_path / "run")
    run.train(Calls(nodes, {1: asks_again}))
    assert [r["clients"] for r in run.at.history[1:]] == [[0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert ledger_of(nodes[1]).steps == ROUNDS * K


def test_more_rounds_than_planned_and_changed_settings_are_refused(world, tmp_path):
    config = settings(world, fraction=0.5)
    nodes = make_nodes(tmp_path, config)
    calls = Calls(nodes)
    run = Coordinator.start(prepare(config), tmp_path / "run")
    run.train(calls)
    client, blob = calls.down[0]
    tensors, about = unpack(blob)
    idle = next(n for n in range(ROUNDS) if client not in run.at.history[n + 1]["clients"]) + 1
    steps = ledger_of(nodes[client]).steps
    for change, status in (
        ({"round": ROUNDS + 1}, "settings"),
        ({"settings": about["settings"] | {"epsilon": 7.0}}, "settings"),
        ({"settings": about["settings"] | {"epsilon": "much"}}, "settings"),
        ({"settings": []}, "settings"),
        ({"run": "../../etc"}, "settings"),
        ({"run": "f" * 16, "round": idle}, "budget"),  # not one of its turns
        ({"run": "f" * 16, "schema": "0" * 16}, "schema"),
        ({"run": "f" * 16, "base": "0" * 64}, "schema"),
        ({"run": "f" * 16, "state": "0" * 32}, "resync"),
    ):
        _, reply = unpack(nodes[client].answer(pack(tensors, about | change)))
        assert reply["status"] == status, change
    assert unpack(nodes[client].answer(b"garbage"))[1]["status"] == "failed"
    assert ledger_of(nodes[client]).steps == steps


def test_a_client_with_a_file_of_its_own_trains_on_all_of_it_at_its_own_rate(world, tmp_path):
    config = settings(world, clients=2)
    nodes = make_nodes(tmp_path, config)
    own = digits_npz(tmp_path / "own.npz", 120, 40)
    (nodes[1].home / "client.toml").write_text(f"dataset = '{own}'\n")
    run = Coordinator.start(prepare(config), tmp_path / "run", sizes=[80, 120])
    run.train(Calls(nodes))
    entries = [ledger_of(node).entries[0] for node in nodes]
    assert [e.sample_rate for e in entries] == [8 / 80, 8 / 120]
    assert entries[0].noise_multiplier > entries[1].noise_multiplier
    with pytest.raises(BadInput, match="--sizes are 2 whole numbers"):
        Coordinator.start(prepare(config), tmp_path / "other", sizes=[80])


def charged(ledgers, hashes):
    """The folder of the ledger that a release from these records was charged to."""
    folder = find(ledgers, hashes)
    claim(folder, hashes)
    (folder / LEDGER).touch()
    return folder


def test_a_record_has_one_ledger_whatever_its_data_set_becomes(world, tmp_path):
    train = prepare(settings(world)).data.train

    def where(*indices):
        return charged(tmp_path, record_hashes(train, indices)).name

    first, other = where(1, 2, 3), where(7, 8)
    assert first == where(3, 1, 2) == where(2, 3, 4) == where(4, 5, 6) == where(6) != other
    with pytest.raises(Refused, match=f"({first} and {other}|{other} and {first}) hold records") as refusal:
        where(5, 8)
    assert refusal.value.status == "budget" and where(9) not in (first, other)
    (tmp_path / first / RECORDS).write_bytes(b"short")
    with pytest.raises(LedgerError, match="is missing or damaged"):
        where(10)


def test_another_column_of_the_same_file_is_no_new_budget(tmp_path):
    lines = [f"{i % 2}\t{i}\tfirst {i}\tsecond {i}" for i in range(20)]
    table, other = tmp_path / "t.tsv", tmp_path / "other.tsv"
    table.write_text("label\tnumber\tone\ttwo\n" + "\n".join(lines) + "\n")
    other.write_text("label\ttwo\n" + "\n".join(f"{i % 2}\tthird {i}" for i in range(20)) + "\n")

    def where(file, column):
        data = load_data(str(file), text_column=column)
        hashes = record_hashes(data.train, range(len(data.train)))
        return hashes, charged(tmp_path / "ledgers", hashes | {source_hash(str(file))})

    (one, first), (two, second), (_, third) = where(table, "one"), where(table, "two"), where(other, "two")
    assert not one & two and first == second != third
    assert source_hash("mnist") == source_hash("mnist") != source_hash("digits")


def test_the_node_counts_the_file_among_its_records(world, tmp_path):
    config = settings(world, clients=1)
    (node,) = make_nodes(tmp_path, config, key=False)
    Coordinator.start(prepare(config), tmp_path / "run").train(Calls([node]))
    (records,) = (node.home / "ledgers").glob(f"*/{RECORDS}")
    assert source_hash(config.dataset) in records.read_bytes()


def test_a_data_set_that_lost_a_record_and_won_one_goes_on_with_its_ledger(world, tmp_path):
    config = settings(world, clients=1)
    images = np.load(world[1])
    for turn in range(2):
        (node,) = make_nodes(tmp_path, config, key=False)
        own = tmp_path / f"own{turn}.npz"
        train = {f"{part}_train": images[f"{part}_train"][turn : 100 + turn] for part in "xy"}
        np.savez(own, **{**images, **train})
        (node.home / "client.toml").write_text(f"dataset = '{own}'\n")
        run = Coordinator.start(prepare(config), tmp_path / f"run{turn}")
        if turn:
            with pytest.raises(BudgetSpent):
                run.train(Calls([node]))
        else:
            run.train(Calls([node]))
        assert ledger_of(node).steps == ROUNDS * K


def test_a_message_that_is_sent_again_waits_for_the_first_ones_answer(world, tmp_path):
    """Flower does so when a client reconnects that is still training: one round is paid for, both answers are it."""
    config = settings(world, clients=1, rounds=1)
    (node,) = make_nodes(tmp_path, config, key=False)
    training, go, answers = threading.Event(), threading.Event(), []

    class Reconnect(Calls):
        def exchange(self, messages, timeout):
            def step():
                training.set()
                go.wait()

            def ask(*more):
                answers.append(Node(node.home, 0).answer(messages[0], *more))

            first = threading.Thread(target=ask, args=(step,), daemon=True)
            first.start()
            training.wait()
            second = threading.Thread(target=ask, daemon=True)
            second.start()
            second.join(1.0)  # seconds that it would need to refuse
            waited = second.is_alive() and not answers
            go.set()
            first.join(), second.join()
            assert waited
            yield from ((0, answer) for answer in answers)

    Coordinator.start(prepare(config), tmp_path / "run").train(Reconnect([node]))
    assert [unpack(answer)[1]["status"] for answer in answers] == ["ok", "ok"]
    one, other = (unpack(answer)[0] for answer in answers)
    assert all(torch.equal(one[key], other[key]) for key in one) and ledger_of(node).steps == K


@pytest.mark.parametrize("lost", ["the folder", "the file"])
def test_a_deleted_ledger_is_no_new_budget(world, tmp_path, lost):
    config = settings(world, clients=1)
    (node,) = make_nodes(tmp_path, config, key=False)
    Coordinator.start(prepare(config), tmp_path / "run0").train(Calls([node]))
    (path,) = (node.home / "ledgers").glob("*/ledger.json")
    path.unlink() if lost == "the file" else shutil.rmtree(node.home / "ledgers")
    with pytest.raises(QuorumLost, match=STATUS["failed"]):
        Coordinator.start(prepare(config), tmp_path / "run1").train(Calls(make_nodes(tmp_path, config, key=False)))
    assert not list((node.home / "ledgers").glob("*/ledger.json"))
    assert "put the ledger back from a copy" in (node.home / "client.log").read_text()


def test_a_policy_that_cannot_be_meant_is_refused(tmp_path):
    for text in ("max_epsilon = 3\n", "max_epsilon = -1\ndelta = 1e-5\n", "max_epsilon = 3\ndelta = 2.0\n",
                 "max_epsilon = 3\ndelta = 1e-5\nmax_rank = 'many'\n", "max_epsilon = 3\ndelta = true\n"):  # fmt: skip
        (tmp_path / "policy.toml").write_text(text)
        with pytest.raises(BadInput):
            Policy.read(tmp_path)

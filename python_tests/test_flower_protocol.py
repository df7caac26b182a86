"""Server and clients over a transport of function calls: the in-process run to the last bit, what travels, what a
client refuses, what becomes of every kind of fault. Over Flower itself: test_flower_processes.py."""

import json
import logging
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from small import digits_npz, vit_folder

from lalora_kernels.data import BadInput
from lalora_kernels.federated import node as node_module
from lalora_kernels.federated.client import Client
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.coordinator import BudgetSpent, Coordinator
from lalora_kernels.federated.guard import QuorumLost
from lalora_kernels.federated.lifetime import RECORDS, claim, record_hashes
from lalora_kernels.federated.node import Node
from lalora_kernels.federated.policy import Policy, Refused, policy_for
from lalora_kernels.federated.run import Run, prepare
from lalora_kernels.federated.wire import STATUS, WireError, pack, unpack
from lalora_kernels.privacy.ledger import Ledger, LedgerError
from lalora_kernels.privacy.noise import NoiseSource

CLIENTS, ROUNDS, K = 4, 3, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return vit_folder(folder / "vit"), digits_npz(folder / "d.npz", 160, 40)


def settings(world, **changes):
    values = {
        "model": world[0], "dataset": world[1], "clients": CLIENTS, "fraction": 1.0, "rounds": ROUNDS, "local_steps": K,
        "rank": 2, "batch_size": 8, "partition": "iid", "epsilon": 8.0, "delta": 1e-4, "lr": 1.0, "device": "cpu",
    }  # fmt: skip
    return make_config(values | changes)


def fixed(client: int) -> NoiseSource:
    return NoiseSource.fixed(bytes([client + 1]) * 32)


def make_nodes(folder, config, key=True, **policy):
    nodes = []
    for i in range(config.clients):
        home = folder / f"client{i}"
        home.mkdir(parents=True, exist_ok=True)
        lines = dict(line.split(" = ") for line in policy_for(config).splitlines()) | policy
        (home / "policy.toml").write_text("".join(f"{name} = {value}\n" for name, value in lines.items()))
        if key:
            (home / "test_key").write_text((bytes([i + 1]) * 32).hex())
        nodes.append(Node(home, i))
    return nodes


class Calls:
    """A transport to nodes of this process. ``faults`` (client -> function) changes or replaces what a client sends."""

    def __init__(self, nodes, faults=None):
        self.nodes, self.faults, self.down, self.up = nodes, faults or {}, [], []

    def exchange(self, messages, timeout):
        for client in sorted(messages, reverse=True):  # not in the order in which they are averaged
            self.down.append((client, messages[client]))
            fault = self.faults.get(client)
            reply = (
                fault(self.nodes[client], messages[client]) if fault else self.nodes[client].answer(messages[client])
            )
            if reply == "silence":
                continue
            self.up.append((client, reply))
            yield client, reply


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def ledger_of(node) -> Ledger:
    (path,) = (node.home / "ledgers").glob("*/ledger.json")
    ledger = Ledger()
    ledger.load_state_dict(json.loads(path.read_text())["ledger"])
    return ledger


# ---------------------------------------------------------------- one client step, whatever carries the messages


@pytest.mark.parametrize("method", ["dp-lora", "ffa-lora", "rolora", "la-lora"])
def test_equals_the_in_process_run_bit_for_bit_and_sends_what_the_method_says(world, tmp_path, method):
    config = settings(world, method=method, train_head="yes")
    here = Run.start(prepare(config), tmp_path / "here", noise=fixed)
    here.train()
    calls = Calls(make_nodes(tmp_path, config))
    there = Coordinator.start(prepare(config), tmp_path / "there")
    there.train(calls)
    assert same(here.at.state, there.at.state)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "here/adapter" / name).read_bytes() == (tmp_path / "there/adapter" / name).read_bytes()
    for ours, theirs in zip(here.clients, calls.nodes):
        assert ours.ledger.entries == ledger_of(theirs).entries

    # bytes: one factor for RoLoRA and FFA, both for the others; before the first change nothing goes down at all
    sizes = {f: 4 * sum(v.numel() for k, v in here.at.state.items() if k.endswith(f)) for f in ("lora_A", "lora_B")}
    head = 4 * sum(v.numel() for k, v in here.at.state.items() if "lora_" not in k)
    sends = {"ffa-lora": ("B", "B", "B"), "rolora": ("B", "A", "B")}.get(method, ("AB",) * 3)
    up = [head + sum(sizes["lora_" + f] for f in factors) for factors in sends]
    down = [0, *up[:-1]]
    for n in range(ROUNDS):
        for blobs, expected in ((calls.up, up[n]), (calls.down, down[n])):
            for _, blob in blobs[n * CLIENTS : (n + 1) * CLIENTS]:
                assert sum(t.numel() * t.element_size() for t in unpack(blob)[0].values()) == expected
                assert len(blob) - expected < 6000
    assert [r["bytes_sent"] for r in there.at.history[1:]] == [
        sum(len(b) for _, b in calls.up[n * CLIENTS : (n + 1) * CLIENTS]) for n in range(ROUNDS)
    ]
    assert [r["bytes_down"] for r in there.at.history[1:]] == [
        sum(len(b) for _, b in calls.down[n * CLIENTS : (n + 1) * CLIENTS]) for n in range(ROUNDS)
    ]


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_partial_participation_by_size_is_bit_equal_too(world, tmp_path, clipping):
    changes = {"fraction": 0.5, "rounds": 4, "partition": "dirichlet", "average": "size", "clipping": clipping}
    config = settings(world, method="rolora", **changes)
    here = Run.start(prepare(config), tmp_path / "here", noise=fixed)
    here.train()
    there = Coordinator.start(prepare(config), tmp_path / "there")
    there.train(Calls(make_nodes(tmp_path, config)))
    assert same(here.at.state, there.at.state)
    assert [r["clients"] for r in here.at.history] == [r["clients"] for r in there.at.history]


def test_bfloat16_on_the_wire_halves_the_bytes_and_still_trains(world, tmp_path):
    sent, states = {}, {}
    for wire in ("float32", "bfloat16"):
        config = settings(world, wire=wire)
        calls = Calls(make_nodes(tmp_path / wire, config))
        run = Coordinator.start(prepare(config), tmp_path / wire / "run")
        run.train(calls)
        assert all(r["statuses"] == dict.fromkeys("0123", "ok") for r in run.at.history[1:])
        sent[wire] = [
            sum(t.numel() * t.element_size() for t in unpack(b)[0].values()) for _, b in calls.up + calls.down
        ]
        states[wire] = run.at.state
    assert sent["bfloat16"] == [n // 2 for n in sent["float32"]]
    assert not same(*states.values())
    for key, value in states["float32"].items():
        assert (states["bfloat16"][key] - value).norm() < 0.05 * max(float(value.norm()), 0.1)


def test_a_message_up_holds_tensors_and_a_status_and_nothing_else(world, tmp_path):
    config = settings(world)
    calls = Calls(make_nodes(tmp_path, config))
    Coordinator.start(prepare(config), tmp_path / "run").train(calls)
    for client, blob in calls.up:
        tensors, about = unpack(blob)
        assert set(about) == {"run", "round", "client", "status"} and about["client"] == client
        assert about["status"] == "ok" and all("lora_" in key for key in tensors)
        assert list(tensors) == sorted(tensors)


def test_equal_messages_are_equal_bytes_whatever_the_order_of_the_keys():
    tensors = {f"k{i}": torch.full((i + 1,), float(i)) for i in range(40)}
    blob = pack(tensors, {"a": 1, "b": 2})
    assert blob == pack(dict(reversed(tensors.items())), {"b": 2, "a": 1})
    assert list(unpack(blob)[0]) == sorted(tensors)


# ---------------------------------------------------------------- faults

GOOD = [0, 1, 3]


def resent(change):
    """Client 2 trains as it should, then something happens to its reply."""

    def fault(node, blob):
        tensors, about = unpack(node.answer(blob))
        return change(tensors, about)

    return fault


def with_tensors(change):
    return resent(lambda tensors, about: pack({k: change(k, t) for k, t in tensors.items()}, about))


def dies(node, blob):
    """Killed between its private steps: nothing leaves, nothing is charged."""

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    with pytest.raises(Killed):
        node.answer(blob, kill)
    return "silence"


def throws(node, blob):
    train, secret = Client.train_round, "record 7 has label 3"

    def broken(*_):
        raise ValueError(secret)

    Client.train_round = broken
    try:
        reply = node.answer(blob)
    finally:
        Client.train_round = train
    assert secret.encode() not in reply and secret in (node.home / "client.log").read_text()
    return reply


OTHER = "another run, round or client"


def odd(key):
    return key.endswith("lora_A")


FAULTS = {
    "NaN": (with_tensors(lambda k, t: t.fill_(math.nan) if odd(k) else t), "is NaN or Inf"),
    "Inf": (with_tensors(lambda k, t: t.fill_(math.inf) if odd(k) else t), "is NaN or Inf"),
    "wrong shapes": (with_tensors(lambda k, t: t.T.contiguous()), "has shape"),
    "another dtype": (with_tensors(lambda k, t: t.double()), "float64"),
    "wrong keys": (resent(lambda t, about: pack({"x" + k: v for k, v in t.items()}, about)), "other tensors"),
    "missing keys": (resent(lambda t, about: pack(dict(list(t.items())[1:]), about)), "other tensors"),
    "garbage": (lambda node, blob: bytes(range(256)) * 40, "cannot be read"),
    "half a message": (lambda node, blob: node.answer(blob)[:-100], "cannot be read"),
    "nothing": (lambda node, blob: b"", "cannot be read"),
    "metadata that is no object": (lambda node, blob: save({}, metadata={"lalora": "[1]"}), "cannot be read"),
    "an oversized message": (
        resent(lambda t, about: pack(t | {"z": torch.zeros(10**6)}, about)),
        "larger than any valid",
    ),
    "a huge update": (with_tensors(lambda k, t: t + 1e6), "away from the reference"),
    "another round": (resent(lambda t, about: pack(t, about | {"round": 99})), OTHER),
    "another run": (resent(lambda t, about: pack(t, about | {"run": "0" * 16})), OTHER),
    "another client's name": (resent(lambda t, about: pack(t, about | {"client": 1})), OTHER),
    "a status of its own": (
        resent(lambda t, about: pack(t, about | {"status": "<b>all is well"})),
        "status is unknown",
    ),
    "an exception": (throws, STATUS["failed"]),
    "an error of the carrier": (lambda node, blob: None, STATUS["failed"]),
    "killed mid-round": (dies, "no answer in time"),
}


@pytest.fixture(scope="module")
def without_two(world, tmp_path_factory):
    """The run in which client 2 never answers."""
    folder, config = tmp_path_factory.mktemp("without"), settings(world)
    run = Coordinator.start(prepare(config), folder / "run")
    run.train(Calls(make_nodes(folder, config), {2: lambda node, blob: "silence"}))
    return run


@pytest.mark.parametrize("what", FAULTS)
def test_a_faulty_client_is_named_and_the_rest_is_the_run_without_it(world, without_two, tmp_path, what):
    fault, why = FAULTS[what]
    config = settings(world)
    nodes = make_nodes(tmp_path, config)
    run = Coordinator.start(prepare(config), tmp_path / "run")
    run.train(Calls(nodes, {2: fault}))
    assert same(run.at.state, without_two.at.state)
    for record in run.at.history[1:]:
        assert record["clients"] == GOOD and list(record["dropped"]) == ["2"] and why in record["dropped"]["2"]
    if what in ("killed mid-round", "garbage", "nothing", "an error of the carrier", "an exception"):
        assert not (nodes[2].home / "ledgers").exists() or not list(nodes[2].home.glob("ledgers/*/ledger.json"))
    elif "metadata" not in what:  # it trained, so it paid: a ledger is never behind what left
        assert ledger_of(nodes[2]).steps == ROUNDS * K


def test_a_client_that_comes_back_counts_again(world, tmp_path):
    config = settings(world)
    rounds = []

    def away_at_first(node, blob):
        rounds.append(unpack(blob)[1]["round"])
        return "silence" if rounds[-1] == 1 else node.answer(blob)

    run = Coordinator.start(prepare(config), tmp_path / "run")
    nodes = make_nodes(tmp_path, config)
    run.train(Calls(nodes, {2: away_at_first}))
    assert [r["clients"] for r in run.at.history[1:]] == [GOOD, [0, 1, 2, 3], [0, 1, 2, 3]]
    assert rounds == [1, 2, 3] and ledger_of(nodes[2]).steps == 2 * K


def test_a_client_that_lost_what_it_was_sent_gets_all_of_it_in_the_same_round(world, tmp_path):
    config = settings(world, method="rolora")

    def forgets(node, blob):
        for path in node.home.glob("runs/*/state.safetensors"):
            path.unlink()
        return node.answer(blob)

    states = []
    for name, faults in (("whole", {}), ("forgetful", {2: forgets})):
        calls = Calls(make_nodes(tmp_path / name, config), faults)
        run = Coordinator.start(prepare(config), tmp_path / name / "run")
        run.train(calls)
        states.append(run.at.state)
        asked = [client for client, _ in calls.down].count(2)
        assert asked == (4 if faults else 3)  # in round 3 it lacks the A of round 2; in round 2 nothing but B
    assert same(*states)


def test_too_many_faulty_clients_end_the_run_after_three_rounds_with_the_state_as_it_was(world, tmp_path):
    config = settings(world, rounds=5)
    run = Coordinator.start(prepare(config), tmp_path / "run")
    before = dict(run.at.state)
    nan = FAULTS["NaN"][0]
    with pytest.raises(QuorumLost, match="client 1: .* is NaN or Inf"):
        run.train(Calls(make_nodes(tmp_path, config), dict.fromkeys(range(3), nan)))
    assert same(run.at.state, before) and run.at.round == 3
    assert json.loads((tmp_path / "run/result.json").read_text())["outcome"] == "stopped"


# ---------------------------------------------------------------- the client owns its privacy

REFUSALS = {
    "a larger epsilon": ({"max_epsilon": "7.9"}, "policy", "epsilon 8 is asked for"),
    "a larger delta": ({"delta": "1e-5"}, "policy", "delta 0.0001 is asked for"),
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


def test_a_record_has_one_ledger_whatever_its_data_set_becomes(world, tmp_path):
    train = prepare(settings(world)).data.train

    def where(*indices):
        return claim(tmp_path, record_hashes(train, indices)).name

    first, other = where(1, 2, 3), where(7, 8)
    assert first == where(3, 1, 2) == where(2, 3, 4) == where(4, 5, 6) == where(6) != other
    with pytest.raises(Refused, match=f"({first} and {other}|{other} and {first}) hold records") as refusal:
        where(5, 8)
    assert refusal.value.status == "budget" and where(9) not in (first, other)
    (tmp_path / first / RECORDS).write_bytes(b"short")
    with pytest.raises(LedgerError, match="is missing or damaged"):
        where(10)


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


# ---------------------------------------------------------------- the server is killed


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 2, 5, 6, 7, 11])
def test_a_killed_server_resumes_to_the_same_state_and_nobody_pays_twice(world, tmp_path, after):
    """Killed after so many replies, with test keys: what was stored counts, what was lost is sent again."""
    config = settings(world)
    calls = Calls(make_nodes(tmp_path / "a", config))
    whole = Coordinator.start(prepare(config), tmp_path / "whole")
    whole.train(calls)

    class Cut(Calls):
        def exchange(self, messages, timeout):
            for client, reply in super().exchange(messages, timeout):
                if len(self.up) == after:
                    raise Killed
                yield client, reply

    nodes = make_nodes(tmp_path / "b", config)
    run = Coordinator.start(prepare(config), tmp_path / "run")
    with pytest.raises(Killed):
        run.train(Cut(nodes))
    assert json.loads((tmp_path / "run/result.json").read_text())["outcome"] == "failed"
    resumed = Coordinator.resume(tmp_path / "run")
    assert resumed.at.round == (after - 1) // CLIENTS
    resumed.train(Calls(nodes))
    assert same(resumed.at.state, whole.at.state) and not list((tmp_path / "run/updates").glob("*"))
    assert all(ledger_of(node).steps == ROUNDS * K for node in nodes)
    assert json.loads((tmp_path / "run/result.json").read_text()) == {"outcome": "finished", "why": "", "round": ROUNDS}
    again = Coordinator.resume(tmp_path / "run")
    again.train(Calls([]))  # nothing is left to do
    with pytest.raises(BadInput, match="holds a run already"):
        Coordinator.start(prepare(config), tmp_path / "run")


def test_unpack_refuses_before_it_parses():
    with pytest.raises(WireError, match="larger"):
        unpack(b"\xff" * 100, limit=99)
    for blob in (b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", (1 << 62).to_bytes(8, "little") + b"{" * 50):
        with pytest.raises(WireError, match="cannot be read"):
            unpack(blob)


@pytest.fixture(autouse=True)
def close_logs():
    yield
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("lalora.client") and isinstance(logger, logging.Logger):
            for handler in list(logger.handlers):
                handler.close()
                logger.removeHandler(handler)


def test_the_run_folder_holds_what_the_in_process_one_does(without_two):
    files = {path.name for path in without_two.folder.iterdir()}
    assert files >= {"config.json", "metrics.jsonl", "checkpoint.safetensors", "adapter", "result.json"}
    lines = [json.loads(line) for line in (without_two.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == without_two.at.history and lines[-1]["round"] == ROUNDS
    adapter = load_file(without_two.folder / "adapter/adapter_model.safetensors")
    with safe_open(without_two.folder / "checkpoint.safetensors", framework="pt") as file:
        assert len(adapter) == len([key for key in file.keys() if key.startswith("state/")])

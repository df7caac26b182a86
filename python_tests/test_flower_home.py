"""Files of a client's own folder that were damaged, or left by a crash, and two of its processes at one time."""

import math
import re

import numpy as np
import pytest
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
from test_hostile_state import message, said

from lalora_kernels.federated import node as node_module
from lalora_kernels.federated.coordinator import Coordinator
from lalora_kernels.federated.lifetime import RECORDS
from lalora_kernels.federated.lock import RunLock
from lalora_kernels.federated.run import prepare
from lalora_kernels.federated.wire import pack, unpack


@pytest.fixture
def config(world):
    return settings(world, clients=1)


@pytest.fixture
def node(config, tmp_path):
    return make_nodes(tmp_path, config, key=False)[0]


def only(node, pattern):
    (path,) = node.home.glob(pattern)
    return path


@pytest.mark.parametrize("damage", ["cut", "another run's"])
def test_a_damaged_state_is_asked_for_again_in_the_same_round(world, node, tmp_path, damage):
    """In round 3, where RoLoRA sends A and the client has B."""
    config, answers = settings(world, clients=1, method="rolora"), []

    def with_damage(node, blob):
        tensors, about = unpack(blob)
        if about["round"] == ROUNDS and not answers[ROUNDS - 1 :]:
            path = only(node, "runs/*/state.safetensors")
            other = pack({"x": next(iter(tensors.values()))}, {})
            path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else other)
        answers.append(node.answer(blob))
        return answers[-1]

    run = Coordinator.start(prepare(config), tmp_path / "run")
    run.train(Calls([node], {0: with_damage}))
    assert [unpack(answer)[1]["status"] for answer in answers] == ["ok", "ok", "resync", "ok"]
    assert run.at.history[ROUNDS]["clients"] == [0] and ledger_of(node).steps == ROUNDS * K


@pytest.mark.parametrize(
    "file, status, why",
    [
        ("runs/*/reply-1.safetensors", "lost", "[1] are done"),
        ("runs/*/run.json", "failed", "run.json is damaged"),
        ("ledgers/*/ledger.json", "failed", "ledger.json is damaged"),
        ("ledgers/*/inputs", "failed", "is missing or damaged"),
    ],
)
def test_what_is_damaged_is_named_in_the_log_and_costs_nothing(config, node, file, status, why):
    blob = message(config)
    assert said(node, blob)[0] == "ok"
    path = only(node, file)
    whole = path.read_bytes()
    for damage in (b"", whole[:-40], b"[1]"):
        path.write_bytes(damage)
        found, log = said(node, blob)
        assert found == status and why in re.split("ERROR|WARNING", log)[-1]
    path.write_bytes(whole)
    assert said(node, blob)[0] == "ok" and ledger_of(node).steps == K


def test_other_layers_than_the_server_s_are_named_in_the_log_alone(world, config, node):
    tensors, about = unpack(message(config))
    name = next(iter(about["schema"]))
    about["schema"][name] = "float32 (3, 99)"
    reply = unpack(node.answer(pack(tensors, about)))[1]
    assert set(reply) == {"run", "round", "client", "status"} and reply["status"] == "schema"
    assert f"{name} is float32 (2, " in (log := (node.home / "client.log").read_text())
    assert "here, float32 (3, 99) there; this client needs the server's model" in log


def test_two_processes_of_one_client_take_turns_at_its_ledgers(config, node, monkeypatch):
    """Of which each would else begin one; how long the second waits is test_flower_client.py's."""
    monkeypatch.setattr(node_module, "PATIENCE", 0.0)
    lock = RunLock(node.home / "ledgers")
    status, log = said(node, message(config))
    assert status == "failed" and "ledgers is in use by process" in log and not list(node.home.glob("ledgers/*/*"))
    lock.release()
    assert said(node, message(config))[0] == "ok"


def test_records_are_a_ledger_s_once_they_are_charged_to_it(world, node, tmp_path, monkeypatch):
    """Of two data sets one cost nothing, since its state was not complete and then a crash came before the charge; both
    together are charged to the other's ledger."""
    config, images = settings(world, clients=1, epsilon=math.inf), np.load(world[1])
    make_nodes(tmp_path, config, key=False)  # a policy for it
    tensors, about = unpack(message(config))

    def asked(first, last, run, **more):
        own = tmp_path / f"{first}-{last}.npz"
        np.savez(own, **{**images, **{f"{part}_train": images[f"{part}_train"][first:last] for part in "xy"}})
        (node.home / "client.toml").write_text(f"dataset = '{own}'\n")
        status, log = said(node, pack(tensors, about | {"run": run * 16} | more))
        return status, len(list(node.home.glob(f"ledgers/*/{RECORDS}"))), log

    assert asked(0, 60, "1")[:2] == ("ok", 1)
    assert asked(60, 120, "2", state="0" * 32)[:2] == ("resync", 1)
    with monkeypatch.context() as patch:
        patch.setattr(node_module._Book, "save", lambda *_: 1 / 0)
        assert asked(60, 120, "3")[:2] == ("failed", 2)
    assert asked(0, 120, "4")[0] == "ok" and ledger_of(node).steps == 2 * K
    assert (only(node, "ledgers/*/ledger.json").parent / RECORDS).stat().st_size == 32 * (120 + 2)

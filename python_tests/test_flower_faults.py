"""What becomes of every kind of fault that a client can have, over a transport of function calls."""

import json
import math
import types

import pytest
import torch
from flower_nodes import (  # noqa: F401
    ROUNDS,
    Calls,
    K,
    close_logs,
    ledger_of,
    make_nodes,
    same,
    settings,
    small_world,
)
from safetensors import safe_open
from safetensors.torch import load_file, save

from lalora_kernels import cli, flower_command
from lalora_kernels.cli import main
from lalora_kernels.data import BadInput
from lalora_kernels.federated.client import Client
from lalora_kernels.federated.coordinator import Coordinator, serve
from lalora_kernels.federated.flower import Control
from lalora_kernels.federated.guard import QuorumLost
from lalora_kernels.federated.run import prepare
from lalora_kernels.federated.wire import STATUS, pack, unpack

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
    "a status that is no word": (resent(lambda t, about: pack(t, about | {"status": ["ok"]})), "status is unknown"),
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


def test_a_second_server_on_a_run_leaves_the_first_one_s_word(world, tmp_path, monkeypatch):
    """Over each way in: the server itself, the order to start one, both commands."""
    monkeypatch.setattr(Control, "_flwr", lambda *_: pytest.fail("Flower was asked"))
    monkeypatch.setattr(flower_command, "_need_flower", lambda *_: None)
    monkeypatch.setattr(flower_command, "signal", types.SimpleNamespace(signal=lambda *_: None, SIGTERM=None))
    folder = tmp_path / "run"
    run = Coordinator.start(prepare(settings(world)), folder)
    run._result("running")  # as train does first
    word = (folder / "result.json").read_text()
    control = Control(tmp_path / "home", "127.0.0.1:1")
    for act in (lambda: serve(folder, "", "", 1.0, None), lambda: control.submit(folder, None)):
        with pytest.raises(BadInput, match="in use by process"):
            act()
    with pytest.raises(BadInput, match="--rank"):  # fails before it would look at the folder
        serve(folder, '{"rank": 0}', "", 1.0, None)
    for words in (["flower", "run"], ["train", "--engine", "flower-sim"]):
        assert main([*words, "--resume", str(folder)]) == 2
    assert (folder / "result.json").read_text() == word and not (folder / ".flower").exists()
    run.lock.release()
    with pytest.raises(BadInput, match="--rank"):
        serve(folder, '{"rank": 0}', "", 1.0, None)
    assert json.loads((folder / "result.json").read_text())["outcome"] == "failed"
    Coordinator.resume(folder)  # and nobody holds it


def test_a_server_s_settings_that_were_edited_are_refused_by_name(world, tmp_path):
    Coordinator.start(prepare(settings(world)), tmp_path / "run").lock.release()
    about = json.loads((tmp_path / "run/config.json").read_text())
    about["settings"]["local_steps"] = 3
    (tmp_path / "run/config.json").write_text(json.dumps(about))
    with pytest.raises(BadInput, match=f"local_steps is 3, not {K}: these are not the settings"):
        Coordinator.resume(tmp_path / "run")


def test_the_run_folder_holds_what_the_in_process_one_does(without_two):
    files = {path.name for path in without_two.folder.iterdir()}
    assert files >= {"config.json", "metrics.jsonl", "checkpoint.safetensors", "adapter", "result.json"}
    lines = [json.loads(line) for line in (without_two.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == without_two.at.history and lines[-1]["round"] == ROUNDS
    adapter = load_file(without_two.folder / "adapter/adapter_model.safetensors")
    with safe_open(without_two.folder / "checkpoint.safetensors", framework="pt") as file:
        assert len(adapter) == len([key for key in file.keys() if key.startswith("state/")])


@pytest.mark.parametrize("seconds", ["inf", "nan", "0", "-5"])
def test_a_timeout_that_is_none_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, seconds):
    monkeypatch.setattr(flower_command, "_need_flower", lambda *_: None)
    assert cli.main(["flower", "run", f"--round-timeout={seconds}", "--out", str(tmp_path / "run")]) == 2
    assert "--round-timeout is a number of seconds, 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

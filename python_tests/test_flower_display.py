"""What a run over Flower shows and leaves: rows, JSON Lines, TensorBoard, Weights & Biases, a page.

Flower is not needed: the command's server runs in this process, its clients are calls.
"""

import json
import sys
import types
from contextlib import nullcontext

import numpy as np
import pytest
from flower_nodes import CLIENTS, Calls, K, close_logs, ledger_of, settings, small_world  # noqa: F401
from test_loggers import events
from test_report import SECTIONS, Page

from lalora_kernels import flower_command
from lalora_kernels.cli import main
from lalora_kernels.federated import flower
from lalora_kernels.federated.coordinator import Coordinator
from lalora_kernels.federated.flower import FlowerFailed
from lalora_kernels.federated.node import Node
from lalora_kernels.federated.run import prepare
from lalora_kernels.privacy.accountant import show_bound
from lalora_kernels.report import MARK, read_run, show_epsilon
from lalora_kernels.report_flower import spent_at_most

ROUNDS = 2


@pytest.fixture
def commanded(monkeypatch):
    """The control that the command gave its orders to, and the faults of clients that a test wants."""
    told = types.SimpleNamespace(stopped=[], faults={})

    class Control:
        def __init__(self, home, address, ca=None):
            pass

        def submit(self, folder, config, **options):
            nodes = [Node(folder / "clients" / str(client), client) for client in range(CLIENTS)]
            run = Coordinator.start(prepare(config), folder) if config else Coordinator.resume(folder)
            run.train(Calls(nodes, told.faults))
            return "7"

        def stop(self, run):
            told.stopped.append(run)

    for name, stand_in in (
        ("Control", Control), ("Process", lambda *_: nullcontext(types.SimpleNamespace(require=lambda: None))),
        ("wait_for", lambda *_: None), ("_need_flower", lambda *_: None),
    ):  # fmt: skip
        monkeypatch.setattr(flower_command, name, stand_in)
    monkeypatch.setattr(flower_command, "signal", types.SimpleNamespace(signal=lambda *_: None, SIGTERM=None))
    return told


def simulated(world, folder, *flags, **changes) -> int:
    values = vars(settings(world, rounds=ROUNDS, **changes))
    given = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    return main(["train", "--engine", "flower-sim", "--out", str(folder), *given, *flags])


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def page(path) -> Page:
    return Page(path.read_text())


def test_json_lines_and_tensorboard_are_the_metrics_and_a_resumed_run_is_whole(world, tmp_path, capsys, commanded):
    run = tmp_path / "run"
    for words in (0, ["train", "--engine", "flower-sim", "--resume", str(run), "--json", "--tensorboard"]):
        assert (main(words) if words else simulated(world, run, "--json", "--tensorboard")) == 0
        start, *rounds, end = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        history, about = metrics(run), json.loads((run / "config.json").read_text())
        assert start["event"] == "start" and start["flower_run"] == "7"
        assert (start["settings"], start["sizes"]) == (about["settings"], about["sizes"])
        assert rounds == [{"event": "round"} | record for record in history] and len(rounds) == ROUNDS + 1
        assert end["event"] == "end" and end["outcome"] == "finished" and end["rounds"] == ROUNDS
        assert (end["accuracy"], end["before"]) == (history[-1]["accuracy"], history[0]["accuracy"])
        assert end["bytes_down"] == sum(record["bytes_down"] for record in history) > 0
        assert (run / "report.html").samefile(end["report"]) and (run / "adapter").samefile(end["adapter"])
        found = events(run)
        assert set(found) == {"accuracy", "loss", "bytes_sent", "bytes_down"}
        for name, values in found.items():
            assert values == [(record["round"], pytest.approx(record[name])) for record in history]


def test_people_get_rows_and_quiet_is_the_last_line(world, tmp_path, capsys, commanded):
    commanded.faults = {2: lambda node, blob: b""}
    assert simulated(world, tmp_path / "run") == 0
    out = capsys.readouterr().out
    last = f"finished after {ROUNDS} rounds; adapter in {tmp_path / 'run/adapter'}\n"
    assert out.startswith(f"run 7 in {tmp_path / 'run'}") and out.endswith(last)
    assert out.count("left out: client 2: the message cannot be read") == ROUNDS
    assert f"report in {tmp_path / 'run/report.html'}" in out
    assert main(["train", "--engine", "flower-sim", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert capsys.readouterr().out == last


def test_wandb_gets_the_rounds_and_one_that_fails_ends_the_run(world, tmp_path, capsys, monkeypatch, commanded):
    logged, given = [], []
    writer = types.SimpleNamespace(step=0, log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    wandb = types.ModuleType("wandb")
    wandb.Settings, wandb.init = dict, lambda **options: given.append(options) or writer
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert simulated(world, tmp_path / "run", "--wandb", "--quiet") == 0
    assert [(step, values["accuracy"]) for step, values in logged] == [
        (record["round"], record["accuracy"]) for record in metrics(tmp_path / "run")
    ]
    assert given[0]["config"]["epsilon"] == 8.0 and given[0]["name"] == "run"
    assert main(["train", "--engine", "flower-sim", "--resume", str(tmp_path / "run"), "--wandb", "--quiet"]) == 0
    assert given[0]["id"] == given[1]["id"] and not commanded.stopped

    def fails(**options):
        raise RuntimeError("api_key not configured")

    wandb.init = fails
    assert simulated(world, tmp_path / "other", "--wandb", "--quiet") == 2
    assert "--wandb: api_key not configured" in capsys.readouterr().err and commanded.stopped == ["7"]


@pytest.mark.parametrize("where", ["before it began", "in a round", "elsewhere"])
def test_ctrl_c_is_told_with_the_way_on_and_has_its_own_exit_code(
    world, tmp_path, capsys, monkeypatch, commanded, where
):
    run = tmp_path / "a run"

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def unreachable(control, run):
        commanded.stopped.append(run)
        raise FlowerFailed("no answer")

    changes = {
        "before it began": [(flower_command.Control, "submit", interrupt)],
        "in a round": [
            (flower_command, "follow", interrupt), (flower_command.Control, "stop", unreachable),
        ],
        "elsewhere": [(flower_command, "follow", lambda *_: {"outcome": "interrupted", "why": "", "round": None})],
    }
    for change in changes[where]:
        monkeypatch.setattr(*change)
    assert simulated(world, run, "--quiet") == 130
    began = where != "before it began"
    out, err = capsys.readouterr()
    assert out == "interrupted" + f"; --resume '{run}' continues it" * began + "\n"
    assert ("run 7 may go on: no answer" in err) == (where == "in a round") == (commanded.stopped == ["7"])


def test_a_server_that_is_interrupted_says_so(world, tmp_path, monkeypatch):
    class Stopped(Calls):
        def exchange(self, messages, timeout):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Coordinator.start(prepare(settings(world)), tmp_path).train(Stopped([]))
    assert json.loads((tmp_path / "result.json").read_text())["outcome"] == "interrupted"
    (tmp_path / "result.json").unlink()
    monkeypatch.setattr(flower, "ASK_AGAIN", 0.0)
    for status, outcome in (("finished:stopped", "interrupted"), ("finished:failed", "failed")):
        control = types.SimpleNamespace(ended=lambda run, status=status: status)
        assert flower.follow(control, "7", tmp_path)["outcome"] == outcome


def test_the_page_shows_what_the_settings_imply_and_says_what_the_server_does_not_know(
    world, tmp_path, capsys, commanded
):
    """Client 2 is never heard, so the page counts more for it than it has spent."""
    run = tmp_path / "run"
    commanded.faults = {2: lambda node, blob: "silence"}
    assert simulated(world, run) == 0
    implied, history = spent_at_most(read_run(run)), metrics(run)
    for client, values in implied.items():
        home = run / "clients" / str(client)
        assert values[0] == 0.0 and values == sorted(values) and 7.9 < values[-1] <= 8.0
        if client == 2:
            assert not list(home.glob("ledgers/*/ledger.json"))
        else:
            assert ledger_of(home).steps == ROUNDS * K and values[-1] == ledger_of(home).epsilon(1e-4)
    assert sorted(implied) == [0, 1, 2, 3]
    found = page(run / "report.html")
    assert found.text["h2"] == SECTIONS and "ε ≤ 8.00" in found.text["dd"] and MARK not in found.words
    assert "ε = 8" in found.words and "Not known here" in found.words
    shown = [text for text in found.text["title"] if text.startswith("largest of them")]
    most = [show_epsilon(max(values)).replace("=", "≤") for values in zip(*implied.values())]
    assert shown == [f"largest of them: round {n}, {epsilon}" for n, epsilon in enumerate(most)]
    rows = found.tables["Each client"][1:]
    assert [row[2:] for row in rows] == [["2 of 2", "2", "0"], ["2 of 2", "2", "0"], ["2 of 2", "0", "2"],
                                         ["2 of 2", "2", "0"]]  # fmt: skip
    down = sum(record["bytes_down"] for record in history)
    assert dict(found.tables["Time and traffic"][1:])["bytes sent down, all rounds"] == f"{down:,}"
    before = (run / "report.html").read_text()
    assert main(["report", str(run)]) == 0 and (run / "report.html").read_text() == before
    about = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(about | {"sizes": [40, 40, "many", 40]}))
    capsys.readouterr()
    assert main(["report", str(run)]) == 2
    assert "is not a complete run: its sizes are not whole numbers" in capsys.readouterr().err


def test_a_run_without_noise_has_no_epsilon_on_its_page(world, tmp_path, commanded):
    assert simulated(world, tmp_path / "run", epsilon=float("inf")) == 0
    found = page(tmp_path / "run/report.html")
    assert "guarantees nothing" in found.words and "≤" not in found.words


def test_the_ledgers_of_a_run_are_its_clients_own(world, tmp_path, capsys, commanded):
    """All simulated here: each is printed with what it was charged for. Elsewhere: the message says where they are."""
    run = tmp_path / "run"
    commanded.faults = {2: lambda node, blob: "silence"}
    assert simulated(world, run, "--quiet") == 0
    capsys.readouterr()
    assert main(["ledger", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{run}: 3 ledgers, {3 * ROUNDS * K} releases; every hash chain holds")
    assert out.count(f"for run {json.loads((run / 'config.json').read_text())['run']}, rounds 1, 2") == 3
    for client in (0, 1, 3):
        spent = ledger_of(run / "clients" / str(client)).epsilon(1e-4)
        block = out[out.index(f"client {client}, run") :].split("client", 2)[1]
        assert f"epsilon {show_bound(spent)} of 8 at delta 0.0001, add or remove one record" in block
    assert f"client 2: no ledger in {run}/clients/2" in out

    home = run / "clients" / "0"
    assert main(["ledger", str(home)]) == 0
    assert capsys.readouterr().out.startswith(f"{home}: 1 ledger, {ROUNDS * K} releases")
    (path,) = home.glob("ledgers/*/ledger.json")
    whole = path.read_text()
    path.write_text(whole.replace('"count": ', '"count": 1', 1))
    for folder in (run, home):
        assert main(["ledger", str(folder)]) == 2
        assert str(path) in capsys.readouterr().err
    path.unlink()
    assert main(["ledger", str(run)]) == 2
    assert "put the ledger back from a copy" in capsys.readouterr().err
    (run / "clients").rename(tmp_path / "elsewhere")
    assert main(["ledger", str(run)]) == 2
    assert "every client keeps its own, in its HOME folder" in capsys.readouterr().err


def test_accuracy_of_records_set_aside_from_the_clients_is_not_published(world, tmp_path, commanded, capsys):
    arrays = dict(np.load(world[1]))
    np.savez(tmp_path / "d.npz", x_train=arrays["x_train"], y_train=arrays["y_train"])
    alone, folder = (world[0], str(tmp_path / "d.npz")), tmp_path / "run"
    assert simulated(alone, folder, "--tensorboard", "--json") == 0
    _, *rounds, end = map(json.loads, capsys.readouterr().out.splitlines())
    for event in (*rounds, end):
        assert event["test_is_private"] and not {"accuracy", "before", "loss", "seconds"} & set(event)
    assert all(record["test_is_private"] for record in metrics(folder))
    assert not any("accuracy" in name for name in events(folder))
    assert main(["report", str(folder), "--public"]) == 2
    assert "set aside from the private ones" in capsys.readouterr().err
    resumed = Coordinator.resume(folder)
    assert resumed.private_test
    resumed.lock.release()
    told = Coordinator.start(prepare(settings(alone)), tmp_path / "told", sizes=[40] * CLIENTS)
    told.lock.release()
    assert not any("test_is_private" in record for record in told.at.history)
    assert simulated(alone, tmp_path / "all", "--tensorboard", "--log-private") == 0
    assert "accuracy and loss are of private records set aside" in capsys.readouterr().out
    assert "not_private/accuracy" in events(tmp_path / "all")

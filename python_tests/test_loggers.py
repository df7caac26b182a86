"""What leaves a run while it goes on: TensorBoard (read by its own reader), Weights & Biases, JSON Lines, bars."""

import io
import json
import math
import sys
import types

import numpy as np
import pytest
from rich.console import Console
from small import digits_npz, vit_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lalora_kernels.cli import main
from lalora_kernels.data import BadInput
from lalora_kernels.display import Display, JsonDisplay
from lalora_kernels.federated.client import Client
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.run import Run, prepare
from lalora_kernels.report import write_report

SMALL = {"clients": 2, "rounds": 2, "local_steps": 2, "rank": 2, "batch_size": 8, "partition": "iid", "device": "cpu"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return {"model": vit_folder(folder / "vit"), "dataset": digits_npz(folder / "d.npz", 160, 40)}


def flags(world, *more: str) -> list[str]:
    given = [word for name, value in (SMALL | world).items() for word in ("--" + name.replace("_", "-"), str(value))]
    return ["train", *given, *more]


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def interrupt_at(monkeypatch, call: int) -> None:
    train_round, calls = Client.train_round, []

    def interrupted(self, *args):
        calls.append(self.name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return train_round(self, *args)

    monkeypatch.setattr(Client, "train_round", interrupted)


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_shows_the_metrics_and_nothing_private(world, tmp_path):
    assert main(flags(world, "--out", str(tmp_path / "run"), "--quiet", "--tensorboard")) == 0
    found, history = events(tmp_path / "run"), metrics(tmp_path / "run")
    for name in ("accuracy", "loss", "bytes_sent"):
        assert found[name] == [(r["round"], pytest.approx(r[name])) for r in history]
    assert found["epsilon/largest"] == [(r["round"], pytest.approx(r["epsilon"])) for r in history]
    for client in range(2):
        spent = [(r["round"], pytest.approx(r["epsilons"][client])) for r in history]
        assert found[f"epsilon/client_{client}"] == spent
    released = {tag for tag in found if tag.startswith("released")}
    assert len(released) == 6 and not any("not_private" in tag for tag in found)
    public = {"accuracy", "loss", "bytes_sent", "epsilon/largest", "epsilon/client_0", "epsilon/client_1"}
    assert set(found) == public | released
    reader = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert len({event.wall_time for tag in found for event in reader.Scalars(tag)}) == 1  # not when a round ended


def test_tensorboard_shows_private_figures_only_when_asked(world, tmp_path):
    assert main(flags(world, "--out", str(tmp_path / "run"), "--quiet", "--tensorboard", "--log-private")) == 0
    found, history = events(tmp_path / "run"), metrics(tmp_path / "run")
    for client in ("0", "1"):
        expected = [
            (r["round"], pytest.approx(r["not_private"]["clients"][client]["drawn"]))
            for r in history
            if client in r["not_private"]["clients"]
        ]
        assert found[f"not_private/drawn/client_{client}"] == expected != []
    assert found["not_private/seconds"] == [(r["round"], pytest.approx(r["seconds"])) for r in history]


@pytest.mark.parametrize("asked", [False, True])
def test_accuracy_on_private_records_is_logged_only_when_asked(world, tmp_path, asked):
    """A file without test records: a fifth of the private ones are measured on, without noise."""
    with np.load(world["dataset"]) as arrays:
        np.savez(tmp_path / "d.npz", **{name: arrays[name] for name in ("x_train", "y_train")})
    more = ["--log-private"] if asked else []
    given = flags(world | {"dataset": str(tmp_path / "d.npz")}, "--out", str(tmp_path / "run"), "--tensorboard", *more)
    assert main([*given, "--quiet"]) == 0
    found, history = events(tmp_path / "run"), metrics(tmp_path / "run")
    assert all(record["test_is_private"] for record in history)
    assert {tag for tag in found if "accuracy" in tag or "loss" in tag} == (
        {"not_private/accuracy", "not_private/loss"} if asked else set()
    )
    if asked:
        assert found["not_private/accuracy"] == [(r["round"], pytest.approx(r["accuracy"])) for r in history]
    with pytest.raises(BadInput, match="set aside from the private ones, so its accuracy and loss are not to be pub"):
        write_report(tmp_path / "run", public=True)
    page = write_report(tmp_path / "run").read_text()
    assert "test accuracy, of private records set aside" in page


def test_a_resumed_run_is_whole_in_tensorboard(world, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2)
    assert main(flags(world, "--out", str(tmp_path / "run"), "--quiet", "--tensorboard")) == 130
    assert [step for step, _ in events(tmp_path / "run")["accuracy"]] == [0, 1]
    assert main(["train", "--resume", str(tmp_path / "run"), "--quiet", "--tensorboard"]) == 0
    expected = [(r["round"], pytest.approx(r["accuracy"])) for r in metrics(tmp_path / "run")]
    assert events(tmp_path / "run")["accuracy"] == expected


# ---------------------------------------------------------------- Weights & Biases


class Recorder(types.ModuleType):
    """wandb's names as its documentation has them: Settings, init(...) -> run with step, log, finish."""

    def __init__(self, fail: str = ""):
        super().__init__("wandb")
        self.fail, self.rounds, self.given, self.finished = fail, [], {}, 0
        self.Settings = lambda **settings: settings
        self.step = 0

    def init(self, **given):
        if self.fail:
            raise RuntimeError(self.fail)
        self.given = given
        return self

    def log(self, values, step):
        self.rounds.append((step, values))
        self.step = step + 1

    def finish(self):
        self.finished += 1


def test_wandb_gets_public_numbers_and_its_own_spying_is_off(world, tmp_path, monkeypatch):
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    interrupt_at(monkeypatch, 2)
    assert main(flags(world, "--out", str(tmp_path / "run"), "--quiet", "--wandb")) == 130
    first = wandb.given
    assert main(["train", "--resume", str(tmp_path / "run"), "--quiet", "--wandb"]) == 0
    history = metrics(tmp_path / "run")
    assert [step for step, _ in wandb.rounds] == [0, 1, 2] and wandb.finished == 2
    for (_, values), record in zip(wandb.rounds, history):
        assert values["accuracy"] == record["accuracy"] and values["epsilon/largest"] == record["epsilon"]
        assert not any("not_private" in name or "seconds" in name for name in values)
    assert first["id"] == wandb.given["id"] and first["resume"] == "allow" and "mode" not in first
    quiet = first["settings"]
    assert quiet["x_disable_stats"] and quiet["x_disable_meta"] and quiet["x_disable_machine_info"]
    assert quiet["console"] == "off" and quiet["disable_git"] and quiet["disable_code"]
    assert first["config"]["epsilon"] == 3.0 and first["name"] == "run"
    ledgers = json.loads((tmp_path / "run/ledger.json").read_text())["clients"]
    assert first["id"] not in str(ledgers)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_writer_that_is_not_installed_is_said_before_anything_starts(world, tmp_path, capsys, monkeypatch, kind):
    for name in [name for name in sys.modules if name.split(".")[0] == kind] + ["torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, kind, None)
    assert main(flags(world, "--out", str(tmp_path / "run"), f"--{kind}")) == 2
    says = f"lalora: {kind} is not installed; pip install 'lalora_kernels[{kind}]'\n"
    assert capsys.readouterr().err == says and not (tmp_path / "run").exists()


def test_a_writer_that_does_not_start_is_said_before_the_first_round(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Recorder(fail="api_key not configured"))
    monkeypatch.setattr(Client, "train_round", lambda *_: pytest.fail("it trained"))
    assert main(flags(world, "--out", str(tmp_path / "run"), "--wandb")) == 2
    assert "lalora: --wandb: api_key not configured" in capsys.readouterr().err


# ---------------------------------------------------------------- JSON Lines, bars


@pytest.mark.parametrize("epsilon", [3.0, math.inf])
def test_json_lines_are_the_metrics_without_what_is_private(world, tmp_path, capsys, epsilon):
    run = tmp_path / "run"
    assert main(flags(world, "--out", str(run), "--json", "--epsilon", str(epsilon))) == 0
    out, err = capsys.readouterr()
    start, *rounds, end = [json.loads(line) for line in out.splitlines()]
    assert err == "" and "not_private" not in out and "Infinity" not in out
    history = metrics(run)
    assert rounds == [{"event": "round"} | {k: v for k, v in r.items() if k != "not_private"} for r in history]
    about = json.loads((run / "config.json").read_text())
    assert start["event"] == "start" and start["settings"] == about["settings"] and start["plan"] == about["plan"]
    assert end["event"] == "end"
    assert (end["accuracy"], end["epsilon"]) == (history[-1]["accuracy"], history[-1]["epsilon"])
    assert end["bytes_sent"] == sum(r["bytes_sent"] for r in history) and (run / "report.html").samefile(end["report"])
    assert (run / "adapter").samefile(end["adapter"])


def test_json_and_quiet_are_one_line_and_ctrl_c_is_one_too(world, tmp_path, capsys, monkeypatch):
    assert main(flags(world, "--out", str(tmp_path / "run"), "--json", "--quiet")) == 0
    assert json.loads(capsys.readouterr().out)["event"] == "end"
    interrupt_at(monkeypatch, 1)
    assert main(flags(world, "--out", str(tmp_path / "other"), "--json", "--quiet")) == 130
    told = json.loads(capsys.readouterr().out)
    assert told == {"event": "interrupted", "folder": str(tmp_path / "other"), "resumable": True}


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("kind", [Display, JsonDisplay])
def test_bars_are_drawn_in_a_terminal_and_nowhere_else(world, tmp_path, kind, terminal):
    file = io.StringIO()
    with kind(console=Console(file=file, force_terminal=terminal, width=200)) as display:
        run = Run.start(prepare(make_config(SMALL | world)), tmp_path / "run")
        display.begin(run)
        run.train(display.watch())
        display.finish(run)
    bars = terminal and kind is Display
    assert ("private steps" in file.getvalue().replace("private steps;", "")) == bars
    assert ("\x1b" in file.getvalue() or "\r" in file.getvalue()) == bars

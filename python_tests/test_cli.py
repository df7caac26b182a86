"""The command as a user meets it: flags, TOML, exit codes, Ctrl-C in a real process, the table over seeds."""

import dataclasses
import functools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import digits_npz, vit_folder

from lalora_kernels.cli import EXTRAS, build_parser, main
from lalora_kernels.data import BadInput
from lalora_kernels.federated.config import NAMES, Config, make_config, read_toml, tomllib
from lalora_kernels.privacy.ledger import Ledger
from lalora_kernels.settings_flags import FLAGS, settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return vit_folder(folder / "vit"), digits_npz(folder / "d.npz", 160, 40)


def flags(world, *more: str) -> list[str]:
    small = "--clients 4 --rounds 2 --local-steps 2 --rank 2 --batch-size 8 --partition iid --device cpu".split()
    return ["train", "--model", world[0], "--dataset", world[1], *small, *more]


def read_pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_setting_is_a_flag_with_help_and_nothing_else_is():
    named = [name for _, group in FLAGS for name, _ in group]
    assert sorted(named) == sorted(NAMES) and len(set(named)) == len(named)
    assert all(text for _, group in FLAGS for _, text in group)


def test_help_names_what_a_newcomer_looks_for(capsys):
    for command in ([], ["train"], ["table"], ["report"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in ("--epsilon", "budget of each client", "(default: 3.0)", "--resume", "adapter/ in PEFT's format"):
        assert words in out


def test_flags_override_the_toml_file_which_overrides_the_defaults(tmp_path):
    (tmp_path / "c.toml").write_text(
        'rank = 3\nepsilon = inf\n[federation]\nlocal-steps = 7\nclients = 5\n[data]\ndataset = "digits"\n'
    )
    args = build_parser().parse_args(["train", "--config", str(tmp_path / "c.toml"), "--clients", "6"])
    config = make_config(settings(args))
    assert (config.rank, config.local_steps, config.clients, config.dataset) == (3, 7, 6, "digits")
    assert config.epsilon == math.inf and config.method == Config().method
    assert make_config(json.loads(config.to_json())) == config
    assert read_toml(tmp_path / "c.toml")["local_steps"] == 7


def test_another_runs_settings_are_taken_from_its_folder(tmp_path):
    done = make_config({"clients": 5, "epsilon": math.inf, "lr": 0.25, "image_size": 32})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"settings": json.loads(done.to_json()), "plan": {}}))
    args = build_parser().parse_args(["train", "--config", str(path), "--clients", "6"])
    assert make_config(settings(args)) == dataclasses.replace(done, clients=6)
    for content, why in (
        ("{}", "no JSON object with settings); give a TOML file, or the config.json of a run"),
        ('{"settings": 3}', "its settings are a int; give a TOML"), (None, "no such file"),
    ):  # fmt: skip
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(BadInput, match=re.escape(why)):
            settings(args)


def test_train_ends_with_the_line_that_says_it_all(world, tmp_path, capsys):
    assert main(flags(world, "--out", str(tmp_path / "run"))) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    pattern = (
        r"accuracy \d\.\d\d \(before \d\.\d\d\) · ε = (\d\.\d\d), δ = \S+ for the most exposed client · "
        rf"adapter in {re.escape(str(tmp_path / 'run' / 'adapter'))}"
    )
    assert 2.9 <= float(re.fullmatch(pattern, lines[-1])[1]) <= 3.0
    assert [line.split()[0] for line in lines if re.match(r" +\d", line)] == ["0", "1", "2"]
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files >= {"config.json", "metrics.jsonl", "ledger.json", "report.html", "adapter", "checkpoint.safetensors"}


def test_quiet_says_one_line_and_no_noise_says_infinity(world, tmp_path, capsys):
    assert main(flags(world, "--out", str(tmp_path / "run"), "--quiet", "--epsilon", "inf")) == 0
    out = capsys.readouterr().out.strip()
    assert len(out.splitlines()) == 1 and "· ε = ∞ ·" in out


def test_report_is_written_anew(world, tmp_path, capsys):
    assert main(flags(world, "--out", str(tmp_path / "run"), "--quiet")) == 0
    (tmp_path / "run/report.html").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "What is guaranteed" in (tmp_path / "run/report.html").read_text()


def test_ctrl_c_in_a_real_process_exits_130_and_resume_goes_on(world, tmp_path, monkeypatch):
    from lalora_kernels.federated.client import Client

    command = [sys.executable, "-m", "lalora_kernels.cli"]
    run = tmp_path / "run"
    long = flags(world, "--out", str(run), "--rounds", "2000")
    # what a shell starts in the background ignores Ctrl-C, and so would its children
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": listen}
    process = subprocess.Popen([*command, *long], **pipes)
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)  # of a busy machine
    assert process.returncode == 130, err
    assert "Traceback" not in err and f"lalora train --resume {run}" in out
    before = len(metrics.read_text().splitlines())
    train_round, calls = Client.train_round, []

    def interrupted(self, *args):  # the rest would take minutes
        calls.append(self.name)
        if len(metrics.read_text().splitlines()) == before + 2:
            raise KeyboardInterrupt
        return train_round(self, *args)

    monkeypatch.setattr(Client, "train_round", interrupted)
    assert main(["train", "--resume", str(run)]) == 130
    assert len(calls) in (3, 4, 5)  # of the round that was interrupted none, one or both clients had not trained yet
    rounds = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [(record["round"], len(record["clients"])) for record in rounds] == [
        (number, 2 if number else 0) for number in range(before + 2)
    ]


def test_resume_finishes_an_interrupted_run(world, tmp_path, capsys, monkeypatch):
    from lalora_kernels.federated.client import Client

    train_round, calls = Client.train_round, []

    def interrupted(self, *args):
        calls.append(self.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_round(self, *args)

    monkeypatch.setattr(Client, "train_round", interrupted)
    assert main(flags(world, "--out", str(tmp_path / "run"))) == 130
    assert f"continue with: lalora train --resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "for the most exposed client" in capsys.readouterr().out
    assert len(calls) == 5  # 2 rounds of 2 clients, one of them twice


def test_a_folder_with_blanks_and_brackets_is_named_as_it_is(world, tmp_path, capsys, monkeypatch):
    from lalora_kernels.federated.client import Client

    monkeypatch.setattr(Client, "train_round", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    folder = str(tmp_path / "run [a] :dog: b")
    assert main(flags(world, "--out", folder)) == 130
    out = capsys.readouterr().out
    assert f"run folder {folder}\n" in out
    assert shlex.split(out.partition("continue with: ")[2]) == ["lalora", "train", "--resume", folder]


def full(*_args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("command", ["train", "table"])
def test_a_full_disk_while_training_says_how_to_go_on(world, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("lalora_kernels.federated.client.Client.train_round", full)
    grid = "--methods la-lora --smoothings none --epsilons 3 --seeds 0".split() if command == "table" else []
    folder = str(tmp_path / "a b")
    assert main([command, *flags(world)[1:], *grid, "--out", folder]) == 1
    how = f"--resume '{folder}' continues it" if command == "train" else "the same command continues"
    said = f"lalora: [Errno 28] No space left on device; what was saved before is whole, and {how}\n"
    assert capsys.readouterr().err == said


def test_what_does_not_fit_in_memory_is_one_line_with_a_cure(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lalora_kernels.federated.task.adapt_classifier", lambda *_: torch.empty(10**15))
    assert main([*flags(world), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("lalora: out of memory (") and "--physical-batch-size" in said and "Traceback" not in said
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        main([*flags(world), "--out", str(tmp_path / "run"), "--debug"])


def test_a_full_disk_elsewhere_promises_nothing(world, tmp_path, capsys, monkeypatch):
    assert main(flags(world, "--out", str(tmp_path / "run"), "--quiet")) == 0
    monkeypatch.setattr("lalora_kernels.report.write_atomic", full)
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "lalora: [Errno 28] No space left on device\n"


# ---------------------------------------------------------------- what is not installed, and Ctrl-C before all


@pytest.mark.parametrize("name, install", [
    ("timm.layers", "'lalora_kernels[vision]'"), ("flwr", "'lalora_kernels[flower]'"), ("nosuch.part", "nosuch"),
])  # fmt: skip
def test_a_missing_module_is_installed_by_the_extra_that_holds_it(monkeypatch, capsys, name, install):
    def report(args):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("lalora_kernels.cli.report", report)
    assert main(["report", "run"]) == 2
    module = name.partition(".")[0]
    assert capsys.readouterr().err == f"lalora: {module} is not installed; pip install {install}\n"


def called(command: str, **env: str) -> subprocess.CompletedProcess:
    """A shell's command, with ``lalora`` for this one."""
    lalora = f"{shlex.quote(sys.executable)} -m lalora_kernels.cli"
    command = "set -o pipefail; " + command.replace("lalora", lalora)
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | env, capture_output=True, timeout=120)


def test_a_locale_without_greek_letters_shows_question_marks(world, tmp_path):
    folder = shlex.quote(str(tmp_path / "run"))
    train = called(f"{shlex.join(['lalora', *flags(world)])} --rounds 1 --out {folder}", PYTHONIOENCODING="ascii")
    assert train.returncode == 0 and b"noise ?/C" in train.stdout and not train.stderr
    assert b"budget of each client" in called("lalora train --help", PYTHONIOENCODING="latin-1").stdout


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path):
    ledger = Ledger(target_delta=1e-5)
    ledger.charge(2.0, 0.1)
    ledger.save(tmp_path / "one.json")
    done = called(f"(sleep 1; lalora ledger {shlex.quote(str(tmp_path / 'one.json'))}) | true")
    assert (done.returncode, done.stderr) == (1, b"")
    done = called(f"lalora ledger {shlex.quote(str(tmp_path / 'one.json'))} > /dev/full")
    assert done.returncode == 1 and done.stderr == b"lalora: [Errno 28] No space left on device\n"


def test_the_extras_hold_the_modules():
    extras = read_pyproject()["project"]["optional-dependencies"]
    # flwr[simulation] brings both
    told = {"sklearn": "scikit-learn", "PIL": "pillow", "ray": "flwr", "cryptography": "flwr"}

    def holds(extra: str) -> set[str]:
        found = {re.split(r"[\[<>=;]", one)[0] for one in extras[extra]}
        inner = [name for one in extras[extra] if one.startswith("lalora_kernels[") for name in one[15:-1].split(",")]
        return found.union(*map(holds, inner))

    for module, extra in EXTRAS.items():
        assert told.get(module, module) in holds(extra), module


def test_records_with_a_gradient_that_is_not_finite_are_counted_and_said(world, tmp_path, capsys):
    import numpy as np

    with np.load(world[1]) as arrays:
        x = arrays["x_train"].astype(np.float32) / 255
    x[5, 2, 3], x[77] = np.nan, np.inf
    data = digits_npz(tmp_path / "nan.npz", 160, 40, x_train=x)
    with np.load(data) as arrays:
        kept = dict(arrays) | {"x_test": arrays["x_test"].astype(np.float32) / 255}
    np.savez(data, **kept)
    args = flags((world[0], data), "--out", str(tmp_path / "run"), "--batch-size", "40", "--min-records", "40")
    with pytest.warns(UserWarning, match="they are left out of the step"):
        assert main([*args, "--fraction", "1.0"]) == 0
    # q = 1: both records are drawn in each of 2 rounds x 2 steps
    books = json.loads((tmp_path / "run/ledger.json").read_text())["clients"].values()
    assert sum(book["nonfinite_samples"] for book in books) == 8
    assert "left out because their gradient was not finite" in capsys.readouterr().out
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(loss is not None for loss in losses)


def test_table_is_mean_and_deviation_of_runs_that_are_kept(world, tmp_path, capsys):
    args = ["table", *flags(world)[1:], "--methods", "la-lora", "ffa-lora", "--smoothings", "none", "--epsilons", "3",
            "inf", "--seeds", "0", "1", "--rounds", "1", "--out", str(tmp_path)]  # fmt: skip
    assert main(args) == 0
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    assert rows[0] == ["method", "smoothing", "ε = 3", "ε = ∞ (no noise)"]
    assert [row[0] for row in rows[2:4]] == ["la-lora", "ffa-lora"]
    assert re.fullmatch(r"Before fine-tuning: \d+\.\d( ± \d\.\d)?. Seeds 0, 1.", table.splitlines()[-1])
    for row in rows[2:4]:
        for cell, epsilon in zip(row[2:], ("3", "inf")):
            found = []
            for seed in (0, 1):
                lines = (tmp_path / f"{row[0]}-none-eps{epsilon}-seed{seed}/metrics.jsonl").read_text().splitlines()
                found.append(100 * json.loads(lines[-1])["accuracy"])
            spread = statistics.stdev(found)
            assert cell == f"{statistics.mean(found):.1f}" + (f" ± {spread:.1f}" if spread else "")
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/checkpoint.safetensors")}
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- accuracy:begin -->\nold\n<!-- accuracy:end -->\nbelow\n")
    assert len(stamps) == 8 and main([*args, "--into", str(page)]) == 0
    assert page.read_text() == f"above\n<!-- accuracy:begin -->\n\n{table}\n<!-- accuracy:end -->\nbelow\n"
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps} and (tmp_path / "table.md").read_text() == table


def test_table_in_two_processes(world, tmp_path, capsys):
    grid = "--methods ffa-lora --smoothings none --epsilons inf --seeds 0 1 --rounds 1 --jobs 2 --out".split()
    assert main(["table", *flags(world)[1:], *grid, str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*/adapter"))) == 2 and "| ffa-lora | none |" in capsys.readouterr().out


def test_the_command_is_installed(tmp_path):
    script = os.path.join(os.path.dirname(sys.executable), "lalora")
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("lalora_kernels ")

"""config.json of a run that was edited: a setting that changes what is trained or claimed is refused by its name."""

import json
import re
import shutil
from pathlib import Path

import pytest
from test_robustness import copy_of_it, finishes, fresh_task, small_config, stopped_folder  # noqa: F401

from lalora_kernels.cli import main
from lalora_kernels.data import BadInput
from lalora_kernels.federated.checkpoint import load_checkpoint, save_checkpoint
from lalora_kernels.federated.run import Run


def change_config(folder: Path, part: str, **changes) -> None:
    about = json.loads((folder / "config.json").read_text())
    (about[part]["clients"][0] if part == "plan" else about[part]).update(changes)
    (folder / "config.json").write_text(json.dumps(about))


EDITED = {"local_steps": 7, "max_grad_norm": 5.0, "clipping": "automatic", "delta": 1e-3, "rounds": 4, "lr": 0.5}


@pytest.mark.parametrize("name", EDITED)
def test_settings_that_were_edited_are_refused_by_name(run_folder, name):
    was = json.loads((run_folder / "config.json").read_text())["settings"][name]
    change_config(run_folder, "settings", **{name: EDITED[name]})
    says = f"config.json: {name} is {EDITED[name]!r}, not {was!r}: these are not the settings"
    with pytest.raises(BadInput, match=re.escape(says)):
        Run.resume(run_folder)


@pytest.mark.parametrize("name, value", [("rounds", "many"), ("lr", -1), ("local_steps", 1), ("epsilon", None)])
def test_a_setting_that_does_not_even_fit_is_refused_by_file_and_name_too(run_folder, capsys, name, value):
    change_config(run_folder, "settings", **{name: value})
    at = load_checkpoint(run_folder)
    assert main(["train", "--resume", str(run_folder)]) == 2
    said = capsys.readouterr().err
    assert f"config.json: {name} is {value!r}, not {at.settings[name]!r}: these are" in said and "--" not in said


@pytest.mark.parametrize("name, value", [("physical_batch_size", 0), ("device", 3), ("rounds", "many")])
def test_by_file_and_name_also_what_may_be_edited_and_where_the_checkpoint_knows_no_settings(run_folder, name, value):
    change_config(run_folder, "settings", **{name: value})
    at = load_checkpoint(run_folder)
    at.settings.clear()
    save_checkpoint(run_folder, at)
    with pytest.raises(BadInput, match=rf"{run_folder}/config.json: {name} is (text|a whole number).*, got {value!r}"):
        Run.resume(run_folder)


def test_where_a_run_s_data_lie_may_be_edited_and_an_older_checkpoint_knows_no_settings(task, run_folder, tmp_path):
    moved = shutil.copy(task.config.dataset, tmp_path / "moved.npz")
    change_config(run_folder, "settings", dataset=str(moved), physical_batch_size=3)
    finishes(run_folder, task)
    at = load_checkpoint(run_folder)
    assert at.settings.pop("lr") == 1.0
    save_checkpoint(run_folder, at)  # as a version without that setting wrote it
    change_config(run_folder, "settings", lr=0.5)
    Run.resume(run_folder)
    at.settings.clear()
    save_checkpoint(run_folder, at)
    change_config(run_folder, "settings", max_grad_norm=5.0)  # which is in the ledgers, too
    with pytest.raises(BadInput, match="releases that are not this client's"):
        Run.resume(run_folder)


def test_steps_of_the_plan_that_were_edited_are_refused(run_folder):
    steps = json.loads((run_folder / "config.json").read_text())["plan"]["clients"][0]["steps"]
    change_config(run_folder, "plan", steps=steps + 1)
    with pytest.raises(BadInput, match="the stored plan is not the one that the stored settings make"):
        Run.resume(run_folder)


def change_metrics(folder: Path, change) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    change(lines)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


DAMAGED = {
    "no ε of each client": lambda lines: [line.pop("epsilons") for line in lines],
    "ε of fewer clients": lambda lines: lines[0].update(epsilons=[1.0]),
    "no accuracy": lambda lines: [line.pop("accuracy") for line in lines],
    "an accuracy that is none": lambda lines: [line.update(accuracy=float("nan")) for line in lines],
    "text for ε": lambda lines: [line.update(epsilon="3") for line in lines],
    "a list for a round": lambda lines: lines.insert(0, [1]),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_report_on_damaged_metrics_is_refused_and_resuming_mends_them(task, run_folder, capsys, how):
    change_metrics(run_folder, DAMAGED[how])
    for more in ([], [str(run_folder), "--out", str(run_folder / "both.html")]):
        assert main(["report", str(run_folder), *more]) == 2
        said = capsys.readouterr().err
        assert "is not a complete run" in said and "--resume writes metrics.jsonl anew" in said
    assert not list(run_folder.glob("*.html"))
    finishes(run_folder, task)
    assert main(["report", str(run_folder)]) == 0


@pytest.mark.parametrize("line", ['{"round": 1, "accu', "", "[1]", "\xff", "[" * 100_000], ids=lambda line: line[:5])
def test_a_report_names_the_line_that_is_no_round(run_folder, capsys, line):
    path = run_folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line.encode("latin-1"), *lines[1:]]))
    assert main(["report", str(run_folder)]) == 2
    said = capsys.readouterr().err
    assert f"{path}, line 2 is corrupt or truncated (" in said and "--resume writes metrics.jsonl anew" in said


@pytest.mark.parametrize("name", ["config.json", "ledger.json"])
def test_a_report_names_the_file_that_is_not_json(run_folder, capsys, name):
    (run_folder / name).write_text("{")
    assert main(["report", str(run_folder)]) == 2
    assert f"{run_folder / name} is corrupt or truncated (" in capsys.readouterr().err


def test_a_report_on_a_plan_that_was_edited_is_refused(run_folder, capsys):
    change_config(run_folder, "plan", client=99)
    assert main(["report", str(run_folder)]) == 2
    assert "is not a complete run (KeyError: '99')" in capsys.readouterr().err


def test_a_report_s_place_is_no_folder_not_even_this_one(run_folder, capsys, monkeypatch):
    monkeypatch.chdir(run_folder)
    assert main(["report", str(run_folder), "--out", "."]) == 2
    assert ". is a folder; --out names a file" in capsys.readouterr().err


def test_a_report_s_place_is_looked_at_before_the_runs_are_read(run_folder, capsys, monkeypatch):
    monkeypatch.setattr("lalora_kernels.report.read_run", lambda _: pytest.fail("read"))
    file = run_folder / "metrics.jsonl"
    for place in ("x.html", "new/x.html"):
        assert main(["report", str(run_folder), "--out", str(file / place)]) == 2
        assert f"{file / place} cannot be made: {file} is a file, not a folder; --out" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    assert main(["report", str(run_folder)]) == 2
    said = f"report.html cannot be made: {run_folder} cannot be written to; --out names a file elsewhere"
    assert said in capsys.readouterr().err


def test_a_report_into_a_folder_that_is_still_to_be_made(run_folder, tmp_path):
    assert main(["report", str(run_folder), "--out", str(tmp_path / "a/b/x.html")]) == 0
    assert (tmp_path / "a/b/x.html").is_file()


def test_the_ledger_command_misses_a_client_whose_ledger_was_cut_out(run_folder, capsys):
    books = json.loads((run_folder / "ledger.json").read_text())
    del books["clients"]["2"]
    (run_folder / "ledger.json").write_text(json.dumps(books))
    assert main(["ledger", str(run_folder)]) == 2
    assert "holds no ledger of client 2, which config.json names" in capsys.readouterr().err
    (run_folder / "config.json").write_text("{")  # what is there can still be read
    assert main(["ledger", str(run_folder)]) == 0

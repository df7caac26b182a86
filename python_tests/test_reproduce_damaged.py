"""``lalora reproduce`` over files that are damaged, and its exit code."""

import re

import pytest

from lalora_kernels.cli import main
from lalora_kernels.data import BadInput
from lalora_kernels.reproduce import command, cost, measures, runs, start
from lalora_kernels.reproduce.presets import PRESETS, Preset

READ = {  # file: what reads it, what its cure says
    "start.json": (lambda path: start.prepare_start({}, path.parent), "remove it, and it is made again"),
    "tuned.json": (runs.read_tuned, "restore it from a copy, or remove it and --tune again"),
    "x-question-1.jsonl": (lambda path: runs.read_known(path.parent, "x"), "restore it from a copy"),
    "published.jsonl": (lambda path: runs.merged_lines(path.with_name("new"), path), "restore it from a copy"),
    "costs.jsonl": (cost.read_costs, "remove that line to measure it again"),
    "measures.jsonl": (measures.read_measures, "remove .* to train it again"),
}


@pytest.mark.parametrize("file", READ)
@pytest.mark.parametrize("damage, why", [("{", "line 1 column 2"), ("[1]", "it is no JSON object"), ("\0", "column 1")])
def test_a_damaged_file_is_named_with_its_cure(tmp_path, file, damage, why):
    (read, cure), path = READ[file], tmp_path / file
    (tmp_path / "new").write_text("{}\n")
    first = '{"round": 1, "pass": 1, "rank": 1, "contender": "x", "settings": {}}\n' * file.endswith("l")
    path.write_text(first + damage)
    where = re.escape(f"{path}") + ", line 2" * bool(first)
    with pytest.raises(BadInput, match=f"^{where} is damaged [(].*{why}.*; {cure}$"):
        read(path)


def test_metrics_without_what_is_read_are_of_no_complete_run(tmp_path):
    (tmp_path / runs.METRICS).write_text("{}\n")
    assert runs._read_result(None, tmp_path) is None


@pytest.mark.parametrize("done, flags, code", [(True, [], 0), (False, [], 1), (False, ["--minutes", "1e-9"], 0)])
def test_what_is_missing_though_there_was_time_has_an_exit_code(tmp_path, monkeypatch, done, flags, code):
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", {}, {"digits": {}}, seeds=(0,), tuning_seed=7, tuning={}))
    monkeypatch.setattr(command, "answer", lambda *_, **__: done)
    assert main(["reproduce", "tiny", "--out", str(tmp_path), *flags]) == code

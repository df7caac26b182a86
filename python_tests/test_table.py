"""``lalora table`` reads what is complete, and nothing else."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import digits_npz, vit_folder

from lalora_kernels.cli import main
from lalora_kernels.data import BadInput
from lalora_kernels.reproduce.presets import PRESETS
from lalora_kernels.reproduce.tables import markdown
from lalora_kernels.table import make_table, put_into

GRID = {"method": ["ffa-lora"], "smoothing": ["none"], "epsilon": [math.inf], "seed": [0]}


@pytest.mark.parametrize("method", ["ffa-lora", "flora", "fedsa-lora"])
def test_a_complete_run_is_not_loaded_again(tmp_path, monkeypatch, method):
    """One that leaves an adapter, one that leaves merged weights, one that leaves an adapter for each client."""
    shared = {
        "model": vit_folder(tmp_path / "vit"), "dataset": digits_npz(tmp_path / "d.npz", 60, 20), "clients": 2,
        "rounds": 1, "local_steps": 2, "rank": 2, "batch_size": 6, "partition": "iid", "device": "cpu",
    }  # fmt: skip
    whole = make_table(shared, GRID | {"method": [method]}, tmp_path / "out")
    monkeypatch.setattr("lalora_kernels.federated.run.prepare", None)
    assert make_table(shared, GRID | {"method": [method]}, tmp_path / "out") == whole


def test_metrics_that_a_crash_left_behind_are_not_a_result(tmp_path):
    """Of a run whose last line is missing the table takes no earlier round's accuracy; a damaged folder is named."""
    shared = {
        "model": vit_folder(tmp_path / "vit"), "dataset": digits_npz(tmp_path / "d.npz", 80, 40), "clients": 2,
        "fraction": 1.0, "rounds": 2, "local_steps": 8, "rank": 2, "batch_size": 20, "lr": 4.0, "partition": "iid",
        "train_head": "yes", "device": "cpu",
    }  # fmt: skip
    whole = make_table(shared, GRID, tmp_path / "out")
    folder = tmp_path / "out/ffa-lora-none-epsinf-seed0"
    metrics = (folder / "metrics.jsonl").read_text()
    *earlier, line, _ = metrics.splitlines(keepends=True)
    behind = json.dumps(json.loads(line) | {"accuracy": 0.123}) + "\n"  # what the table must not take
    for broken in ("".join([*earlier, behind]), "{", ""):
        (folder / "metrics.jsonl").write_text(broken)
        assert make_table(shared, GRID, tmp_path / "out") == whole
        assert (folder / "metrics.jsonl").read_text() == metrics
    for broken, says in (("{", "is corrupt or truncated"), ("[]", "holds no settings")):
        (folder / "config.json").write_text(broken)
        with pytest.raises(BadInput, match=says):
            make_table(shared, GRID, tmp_path / "out")


def test_a_seed_that_is_named_twice_counts_once(tmp_path):
    shared = {
        "model": vit_folder(tmp_path / "vit"), "dataset": digits_npz(tmp_path / "d.npz", 80, 40), "clients": 2,
        "rounds": 1, "local_steps": 2, "rank": 2, "batch_size": 6, "partition": "iid", "device": "cpu",
    }  # fmt: skip
    once = make_table(shared, GRID | {"seed": [0, 1]}, tmp_path / "out")
    twice = GRID | {"seed": [0, 0, 1, 0], "method": ["ffa-lora", "ffa-lora"]}
    assert make_table(shared, twice, tmp_path / "out") == once


def test_the_accuracy_of_private_records_set_aside_is_marked_and_kept_off_pages(tmp_path):
    shared = {
        "model": vit_folder(tmp_path / "vit"), "dataset": digits_npz(tmp_path / "d.npz", 80, 40), "clients": 2,
        "rounds": 1, "local_steps": 2, "rank": 2, "batch_size": 6, "partition": "iid", "device": "cpu",
    }  # fmt: skip
    public = make_table(shared, GRID, tmp_path / "public")
    with np.load(shared["dataset"]) as whole:
        np.savez(tmp_path / "own.npz", x_train=whole["x_train"], y_train=whole["y_train"])
    own = shared | {"dataset": str(tmp_path / "own.npz")}
    (page := tmp_path / "page.md").write_text("<!-- accuracy:begin --><!-- accuracy:end -->")
    for _ in range(2):  # the second reads what the first has trained
        private = make_table(own, GRID, tmp_path / "private")
        assert "not covered by epsilon, do not publish" in private
        with pytest.raises(BadInput, match="do not publish; leave out --into"):
            put_into(page, private)
        assert "|" not in page.read_text()
    put_into(page, public)
    assert page.read_text().count("Runs on the same records add up.") == 1 and "do not publish" not in page.read_text()


def test_a_page_is_kept_from_private_records_before_a_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lalora_kernels.table._one", lambda *_: pytest.fail("trained"))
    with np.load(digits_npz(tmp_path / "d.npz", 80, 40)) as whole:
        np.savez(tmp_path / "own.npz", x_train=whole["x_train"], y_train=whole["y_train"])
    (page := tmp_path / "page.md").write_text("<!-- accuracy:begin --><!-- accuracy:end -->")
    flags = ["--dataset", str(tmp_path / "own.npz"), "--methods", "ffa-lora", "--local-steps", "1"]
    assert main(["table", *flags, "--out", str(tmp_path / "out"), "--into", str(page)]) == 2
    assert "page.md would show accuracy of private records set aside" in capsys.readouterr().err


def test_a_page_in_another_encoding_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_bytes("<!-- accuracy:begin --> é <!-- accuracy:end -->".encode("latin-1"))
    with pytest.raises(BadInput, match="page.md: not a page in UTF-8"):
        put_into(page, "| table |")


def test_a_published_table_reaches_its_page_whatever_the_locale(tmp_path):
    (tmp_path / "question-1.md").write_text("## Title\n\n| ε = ∞ | 1.0 ± 2.0 |\n", encoding="utf-8")
    (tmp_path / "page.md").write_text("<!-- evidence-p-1:begin --><!-- evidence-p-1:end -->", encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from lalora_kernels.reproduce.command import _publish; "
        "out = Path(sys.argv[1]); _publish(out, 'question-1', 'p', None, out / 'page.md')"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ | ascii_only, check=True, cwd=root)
    assert "| ε = ∞ | 1.0 ± 2.0 |" in (tmp_path / "page.md").read_text(encoding="utf-8")


def test_a_cell_of_fewer_seeds_than_the_table_s_is_named():
    def lines(arm: str, *seeds: int) -> list[dict]:
        return [{"arm": arm, "epsilon": 3.0, "seed": s, "accuracy": s / 10, "accuracy_before": 0.1} for s in seeds]

    whole = markdown("T", lines("a", 0, 1, 2) + lines("b", 0, 1, 2), ["a", "b", "none"], "a", "")
    part = markdown("T", lines("a", 0, 1, 2) + lines("b", 0, 2), ["a", "b", "none"], "a", "")
    assert "Of fewer seeds" not in whole
    assert "over seeds 0, 1, 2;" in part and "Of fewer seeds: b at ε = 3 0, 2." in part


def test_a_page_without_a_place_is_refused_before_a_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lalora_kernels.table.make_table", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr("lalora_kernels.reproduce.command.answer", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["small-vision"], public_head=False))
    monkeypatch.setattr("lalora_kernels.reproduce.command.base_settings", lambda *_: {})
    (tmp_path / "page.md").write_text("no marks")
    for command in (["table"], ["reproduce", "tiny"]):
        for page, why in (("page.md", "has no lines <!-- "), ("none.md", "no such file"), (".", "not a page")):
            assert main([*command, "--out", str(tmp_path / "out"), "--into", str(tmp_path / page)]) == 2
            assert why in capsys.readouterr().err


@pytest.mark.parametrize("flags, epsilons", [([], [0.5]), (["--epsilons", "2"], [2.0])])
def test_a_file_s_budget_is_the_table_s_unless_a_flag_says_another(tmp_path, monkeypatch, flags, epsilons):
    (tmp_path / "a.toml").write_text('method = "rolora"\nepsilon = 0.5\nseed = 7\nrounds = 1\n')
    asked = []
    monkeypatch.setattr("lalora_kernels.table.make_table", lambda *args: asked.append(args[:2]) or "")
    assert main(["table", "--config", str(tmp_path / "a.toml"), *flags]) == 0
    ((given, grid),) = asked
    assert grid == {"method": ["rolora"], "smoothing": ["none", "binomial5"], "epsilon": epsilons, "seed": [7]}
    assert given["rounds"] == 1

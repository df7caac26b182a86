"""``lalora table`` reads what is complete, and nothing else."""

import json
import math

import pytest
from small import digits_npz, vit_folder

from lalora_kernels.data import BadInput
from lalora_kernels.table import make_table

GRID = {"method": ["ffa-lora"], "smoothing": ["none"], "epsilon": [math.inf], "seed": [0]}


@pytest.mark.parametrize("method", ["ffa-lora", "flora", "fedsa-lora"])
def test_a_complete_run_is_not_loaded_again(tmp_path, monkeypatch, method):
    """One that leaves an adapter, one that leaves merged weights, one that leaves an adapter for each client."""
    shared = {
        "model": vit_folder(tmp_path / "vit"), "dataset": digits_npz(tmp_path / "d.npz", 60, 20), "clients": 2,
        "rounds": 1, "local_steps": 1, "rank": 2, "batch_size": 6, "partition": "iid", "device": "cpu",
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

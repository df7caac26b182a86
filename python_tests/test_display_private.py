"""``lalora train`` on data without test records: what it shows of those set aside says so, and --json leaves it out."""

import io
import json

import numpy as np
from rich.console import Console
from small import digits_npz, vit_folder

from lalora_kernels.display import Display, JsonDisplay
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.run import Run, prepare


def shown(tmp_path, display):
    """The lines that a run of one round has."""
    with np.load(digits_npz(tmp_path / "d.npz", 80, 40)) as whole:
        np.savez(tmp_path / "own.npz", x_train=whole["x_train"], y_train=whole["y_train"])
    config = make_config({
        "model": vit_folder(tmp_path / "vit"), "dataset": str(tmp_path / "own.npz"), "clients": 2, "rounds": 1,
        "local_steps": 2, "rank": 2, "batch_size": 6, "partition": "iid", "device": "cpu", "delta": 1e-3,
    })  # fmt: skip
    file = io.StringIO()
    with display(console=Console(file=file, width=2000)) as display:
        run = Run.start(prepare(config), tmp_path / "run")
        display.begin(run)
        run.train(display.watch())
        display.finish(run)
    return file.getvalue().splitlines()


def test_figures_of_private_records_are_left_out_and_the_events_say_so(tmp_path):
    _, *rounds, end = map(json.loads, shown(tmp_path, JsonDisplay))
    assert len(rounds) == 2 and end["event"] == "end" and end["epsilon"] > 0
    for event in (*rounds, end):
        assert event["test_is_private"] and not {"accuracy", "before", "loss", "seconds", "not_private"} & set(event)


def test_people_are_told_before_the_first_figure_and_beside_the_last(tmp_path):
    *lines, last = shown(tmp_path, Display)
    told = lines.index("accuracy and loss are of private records set aside: ε does not cover them, do not publish them")
    assert told < next(i for i, line in enumerate(lines) if line.split()[:2] == ["round", "accuracy"])
    assert "; of private records, not to be published) · ε = " in last

"""``lalora train --json`` on a data set without test records: nothing of the records set aside is on the stream."""

import io
import json

import numpy as np
from rich.console import Console
from small import digits_npz, vit_folder

from lalora_kernels.display import JsonDisplay
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.run import Run, prepare


def test_figures_of_private_records_are_left_out_and_the_events_say_so(tmp_path):
    with np.load(digits_npz(tmp_path / "d.npz", 80, 40)) as whole:
        np.savez(tmp_path / "own.npz", x_train=whole["x_train"], y_train=whole["y_train"])
    config = make_config({
        "model": vit_folder(tmp_path / "vit"), "dataset": str(tmp_path / "own.npz"), "clients": 2, "rounds": 1,
        "local_steps": 2, "rank": 2, "batch_size": 6, "partition": "iid", "device": "cpu", "delta": 1e-3,
    })  # fmt: skip
    file = io.StringIO()
    with JsonDisplay(console=Console(file=file, width=200)) as display:
        run = Run.start(prepare(config), tmp_path / "run")
        display.begin(run)
        run.train(display.watch())
        display.finish(run)
    _, *rounds, end = [json.loads(line) for line in file.getvalue().splitlines()]
    assert len(rounds) == 2 and end["event"] == "end" and end["epsilon"] > 0
    for event in (*rounds, end):
        assert event["test_is_private"] and not {"accuracy", "before", "loss", "seconds", "not_private"} & set(event)

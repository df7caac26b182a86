"""What ``lalora train`` shows: a table that grows by a row each round; progress bars, where there is a terminal.

With --json: one JSON object a line, each with an "event": "start", "round" (metrics.jsonl's record without what is
computed on private data), and "end" or "interrupted". Where the test records were set aside from private ones, so are
accuracy and loss, and "test_is_private" says why they and the seconds are missing.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lalora_kernels.adapt import trainable_summary
from lalora_kernels.federated.client import trainable_tensors
from lalora_kernels.federated.diagnostics import PRIVATE_TEST, SET_ASIDE, left_out
from lalora_kernels.federated.run import ADAPTER, ADAPTERS, Run, Watch
from lalora_kernels.report import show_epsilon, write_report

ROW = "{:>5}  {:>9}  {:>7}  {:>9}  {:>11}  {:>7}  {}"


class Display:
    """Context manager around one run. ``quiet`` leaves only the last line."""

    def __init__(self, quiet: bool = False, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.quiet, self.private = quiet, True
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        hidden = quiet or not self.console.is_terminal
        self.progress = Progress(*columns, console=self.console, transient=True, disable=hidden)
        self.pretraining = self.steps = None

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def watch(self) -> Watch:
        """The callbacks for ``Run``."""
        return Watch(self._pretraining, self._step, self._round)

    def note(self, text: str) -> None:
        """A line that a quiet run leaves out."""
        if not self.quiet:
            self._print(text)

    def last(self, text: str) -> None:
        """The line that is always printed, below the bars."""
        self.progress.stop()
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, emoji=False)  # a path may hold [brackets] or :colons:

    def interrupted(self, folder: Path, resumable: bool) -> None:
        """Ctrl-C: how to go on."""
        command = f"lalora train --resume {shlex.quote(str(folder))}"
        self.last(f"interrupted; continue with: {command}" if resumable else "interrupted")

    def begin(self, run: Run) -> None:
        """What will be trained on what, then the table's head and the rounds that are there already."""
        task, config, plan = run.task, run.task.config, run.plan
        self.private = config.private
        tensors = trainable_tensors(task.classifier.model)
        self.note(
            f"{config.dataset}: {len(task.data.train):,} {task.data.kind}s held by {config.clients} clients, "
            f"{len(task.data.test):,} to test on; {len(task.data.classes)} classes"
        )
        self.note(
            f"{config.model}: {trainable_summary(task.classifier.model).layers} layers adapted, r = {config.rank}; "
            f"{sum(t.numel() for t in tensors.values()):,} parameters to train, in {len(tensors)} tensors"
        )
        sizes, sigmas = [c.records for c in plan.clients], [c.noise_multiplier for c in plan.clients if c.steps]
        steps = [c.steps for c in plan.clients]
        self.note(
            f"clients hold {min(sizes)} to {max(sizes)} records and make {min(steps)} to {max(steps)} private steps; "
            + (f"noise σ/C {min(sigmas):.2f} to {max(sigmas):.2f}" if config.private else "no noise")
        )
        self.note(f"{config.method}, smoothing {config.filter or 'none'}, clipping {config.clipping}")
        if run.weights.name == ADAPTERS:
            self.note("each client ends with a model of its own; accuracy and loss are means over all clients' models")
        if PRIVATE_TEST in run.at.history[0]:
            self.note(SET_ASIDE)
        self.note(ROW.format("round", "accuracy", "loss", "largest ε", "bytes sent", "time", "clients"))
        for record in run.at.history:
            self._round(record)
        left = sum(map(len, plan.participation[run.at.round :])) * config.local_steps
        self.steps = self.progress.add_task("private steps", total=left)

    def _pretraining(self, done: int, steps: int) -> None:
        if self.pretraining is None:
            self.note("pre-training the embedded model on scikit-learn's digits, once; it is kept in the cache folder")
            self.pretraining = self.progress.add_task("public pre-training", total=steps)
        self.progress.update(self.pretraining, completed=done)

    def _step(self) -> None:
        if self.steps is not None:
            self.progress.advance(self.steps)

    def _round(self, record: dict[str, Any]) -> None:
        epsilon = "∞" if not self.private else show_epsilon(record["epsilon"]).removeprefix("ε = ")
        loss = "–" if record["loss"] is None else f"{record['loss']:.3f}"
        clients = " ".join(map(str, record["clients"])) or "before"
        self.note(
            ROW.format(
                record["round"], f"{100 * record['accuracy']:.1f} %", loss, epsilon, f"{record['bytes_sent']:,}",
                f"{record['seconds']:.1f} s", clients,
            )  # fmt: skip
        )
        for client, why in record.get("dropped", {}).items():
            self.note(f"       left out: client {client}: {why}")
        if not record.get("moved", True):
            self.note("       below the quorum: the state stays as it was")

    def finish(self, run: Run) -> None:
        """Write the report; say what was reached, what it cost, where it lies."""
        write_report(run.folder)
        first, last = run.at.history[0], run.at.history[-1]
        left_out = {c.name: c.nonfinite_samples for c in run.clients if c.nonfinite_samples}
        if left_out:
            counts = ", ".join(f"{count} at client {name}" for name, count in left_out.items())
            self.last(f"left out because their gradient was not finite: {counts} (counted once a draw; not privatized)")
        epsilon = show_epsilon(last["epsilon"], self.private)
        who = f", δ = {run.task.config.delta:g} for the most exposed client" if last["epsilon"] is not None else ""
        self.note(f"report in {run.folder}/report.html")
        what = {ADAPTER: "adapter", ADAPTERS: "each client's adapter"}.get(run.weights.name, "weights")
        aside = "; of private records, not to be published" if PRIVATE_TEST in last else ""
        mean = "mean over the clients' own models: " if run.weights.name == ADAPTERS else ""
        self.last(
            f"{mean}accuracy {last['accuracy']:.2f} (before {first['accuracy']:.2f}{aside}) · {epsilon}{who} · {what} "
            f"in {run.weights}"
        )


class JsonDisplay(Display):
    """The same for programs: JSON Lines on standard output, and no bars. ``quiet`` leaves the last one."""

    def __init__(self, quiet: bool = False, console: Console | None = None):
        super().__init__(quiet, console)
        self.progress.disable = True

    def _event(self, event: str, values: dict[str, Any], last: bool = False) -> None:
        if last or not self.quiet:
            print(json.dumps({"event": event} | values), file=self.console.file, flush=True)

    def note(self, text: str) -> None:
        """Prose is for people."""

    def interrupted(self, folder: Path, resumable: bool) -> None:
        self._event("interrupted", {"folder": str(folder), "resumable": resumable}, last=True)

    def begin(self, run: Run) -> None:
        tensors = trainable_tensors(run.task.classifier.model).values()
        self._event("start", {
            "folder": str(run.folder),
            "settings": json.loads(run.task.config.to_json()),
            "plan": run.plan.as_dict(),
            "moved_parameters": sum(tensor.numel() for tensor in tensors),
        })  # fmt: skip
        for record in run.at.history:
            self._round(record)

    def _round(self, record: dict[str, Any]) -> None:
        self._event("round", {name: value for name, value in record.items() if name not in left_out(record)})

    def finish(self, run: Run) -> None:
        first, last = run.at.history[0], run.at.history[-1]
        end = {
            "folder": str(run.folder), "report": str(write_report(run.folder)), "adapter": str(run.weights),
            "accuracy": last["accuracy"], "before": first["accuracy"], "epsilon": last["epsilon"],
            "delta": run.task.config.delta if run.task.config.private else None, "rounds": last["round"],
            "bytes_sent": sum(record["bytes_sent"] for record in run.at.history), "seconds": last["seconds"],
        }  # fmt: skip
        end |= {PRIVATE_TEST: True} if PRIVATE_TEST in last else {}
        self._event("end", {name: value for name, value in end.items() if name not in left_out(end)}, last=True)

"""What a run over Flower shows while its server works elsewhere: a row a round; with JSON one object a line.

JSON events are those of display.py: "start", "round" (metrics.jsonl's record, without what is computed on private
data), and "end" or "interrupted".
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lalora_kernels.federated.diagnostics import PRIVATE_TEST, SET_ASIDE, left_out
from lalora_kernels.report import write_report

ROW = "{:>5}  {:>9}  {:>7}  {:>11}  {:>11}  {:>8}  {}"
TRAINED = ("finished", "stopped")  # outcomes that leave an adapter


class FlowerDisplay:
    """Lines for people by ``note``; ``quiet`` leaves the last one."""

    def __init__(self, quiet: bool = False, note: Callable[[str], None] = print):
        self.quiet, self.note = quiet, (lambda text: None) if quiet else note

    def begin(self, folder: Path, run: str) -> None:
        """It was submitted as Flower's ``run``."""
        self.note(f"run {run} in {folder}; its server log: FLWR_HOME={folder / '.flower'} flwr log {run} lalora")
        self.note(ROW.format("round", "accuracy", "loss", "bytes up", "bytes down", "time", "clients"))

    def round(self, folder: Path, record: dict[str, Any]) -> None:
        """A round is complete, or round 0 was measured."""
        loss = "–" if record["loss"] is None else f"{record['loss']:.3f}"
        clients = " ".join(map(str, record["clients"])) or ("before" if not record["round"] else "none")
        accuracy, seconds = f"{100 * record['accuracy']:.1f} %", f"{record['seconds']:.1f} s"
        up, down = f"{record['bytes_sent']:,}", f"{record['bytes_down']:,}"
        if not record["round"] and PRIVATE_TEST in record:
            self.note(SET_ASIDE)
        self.note(ROW.format(record["round"], accuracy, loss, up, down, seconds, clients))
        for client, why in record["dropped"].items():
            self.note(f"       left out: client {client}: {why}")

    def interrupted(self, folder: Path, resumable: bool) -> None:
        """Ctrl-C: how to go on."""
        print("interrupted" + f"; --resume {shlex.quote(str(folder))} continues it" * resumable)

    def finish(self, folder: Path, result: dict[str, Any]) -> None:
        """How it ended, by result.json; the report, where rounds were completed. Not for one that was interrupted."""
        if result["outcome"] in TRAINED:
            self.note(f"report in {write_report(folder)}")
        if result["outcome"] == "finished":
            print(f"finished after {result['round']} rounds; adapter in {folder / 'adapter'}")
        else:
            print(f"{result['outcome']}: {result['why']}")


class JsonFlowerDisplay(FlowerDisplay):
    """The same for programs, on standard output."""

    def _event(self, event: str, values: dict[str, Any], last: bool = False) -> None:
        if last or not self.quiet:
            print(json.dumps({"event": event} | values), flush=True)

    def begin(self, folder: Path, run: str) -> None:
        self.run = run

    def round(self, folder: Path, record: dict[str, Any]) -> None:
        if not record["round"]:
            about = json.loads((folder / "config.json").read_text())
            told = {"settings": about["settings"], "sizes": about["sizes"], "flower_run": self.run}
            self._event("start", {"folder": str(folder)} | told)
        self._event("round", {name: value for name, value in record.items() if name not in left_out(record)})

    def interrupted(self, folder: Path, resumable: bool) -> None:
        self._event("interrupted", {"folder": str(folder), "resumable": resumable}, last=True)

    def finish(self, folder: Path, result: dict[str, Any]) -> None:
        end = {"folder": str(folder), "outcome": result["outcome"], "why": result["why"], "rounds": result["round"]}
        if result["outcome"] in TRAINED:
            history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            end |= {
                "report": str(write_report(folder)), "adapter": str(folder / "adapter"),
                "accuracy": history[-1]["accuracy"], "before": history[0]["accuracy"],
                "bytes_sent": sum(record["bytes_sent"] for record in history),
                "bytes_down": sum(record["bytes_down"] for record in history), "seconds": history[-1]["seconds"],
            }  # fmt: skip
            end |= {PRIVATE_TEST: True} if PRIVATE_TEST in history[-1] else {}
        self._event("end", {name: value for name, value in end.items() if name not in left_out(end)}, last=True)

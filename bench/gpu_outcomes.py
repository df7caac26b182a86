"""How the tests of ``bench/gpu.sh`` ended: a pytest plugin (``-p gpu_outcomes``) that writes it down, and its reader.

One JSON line to the file LALORA_GPU_OUTCOMES for each test that is to run, with the kernel that it is about, and one as
each ends: a process that is stopped leaves what it had, and what it had not.
"""

import json
import os
from pathlib import Path

STEPS = "steps"  # in a kernel's place: tests of whole steps, which are about no one kernel


def _note(**fields: str) -> None:
    with open(os.environ["LALORA_GPU_OUTCOMES"], "a") as file:
        file.write(json.dumps(fields) + "\n")


class Outcomes:
    def __init__(self, worker: str | None):
        self.worker = worker  # of pytest-xdist; None: the process that hears of all outcomes

    def pytest_collection_finish(self, session) -> None:
        if self.worker in (None, "gw0"):  # every worker collects all tests
            for item in session.items:
                params = item.callspec.params if hasattr(item, "callspec") else {}
                _note(test=item.nodeid, kernel=params.get("of", STEPS))

    def pytest_runtest_logreport(self, report) -> None:
        if self.worker is None and (report.when == "call" or not report.passed):
            _note(test=report.nodeid, outcome=report.outcome)


def pytest_configure(config) -> None:
    config.pluginmanager.register(Outcomes(getattr(config, "workerinput", {}).get("workerid")))


def read(path: Path) -> tuple[dict[str, bool | None], list[str]]:
    """Kernel -> False where one of its tests failed, True where all ended and one passed, else None, which is neither;
    names of the tests that failed."""
    kernels: dict[str, str] = {}
    ended: dict[str, set[str]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            note = json.loads(line)
        except ValueError:  # the last one of a process that was stopped
            continue
        if "kernel" in note:
            kernels[note["test"]] = note["kernel"]
        else:
            ended.setdefault(note["test"], set()).add(note["outcome"])
    found: dict[str, bool | None] = {}
    for kernel in dict.fromkeys(kernels.values()):
        outcomes = set().union(*(ended.get(test, {"cut off"}) for test, of in kernels.items() if of == kernel))
        whole = "passed" in outcomes and "cut off" not in outcomes
        found[kernel] = False if "failed" in outcomes else whole or None
    return found, [test.partition("::")[2] for test, outcomes in ended.items() if "failed" in outcomes]

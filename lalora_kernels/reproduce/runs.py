"""Runs of a grid: what is there is read, what was interrupted is resumed, what is missing is trained."""

import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lalora_kernels import __version__
from lalora_kernels.data import BadInput
from lalora_kernels.federated.config import Config, make_config
from lalora_kernels.federated.run import METRICS, Run, prepare
from lalora_kernels.federated.task import Watch
from lalora_kernels.files import write_atomic
from lalora_kernels.reproduce.measures import Recorder, read_measures
from lalora_kernels.reproduce.presets import Question, Settings, arm_settings, then_key, tuning_key
from lalora_kernels.reproduce.stored import read_lines, read_object

RUNS, TUNED, MEASURES = "runs", "tuned.json", "measures.jsonl"
RESTORE = "restore it from a copy"
THEN, WITH = "then", "with"  # of tuned.json: what was tried on top of a grid's best, and what each line of it sets
Known = Mapping[str, Mapping[str, Any]]  # same(settings) -> a result line of another machine or day
NOTHING: Known = {}


@dataclass(frozen=True)
class Job:
    """One run: ``arm`` of a table at one ε and seed; the folder's name tells its settings apart from all others."""

    arm: str
    config: Config
    measure: bool = False

    @property
    def name(self) -> str:
        """Readable, then a digest of every setting that is not the default: equal runs of two questions are one, on any
        machine."""
        c = self.config
        digest = hashlib.sha256(same(_told(c)).encode()).hexdigest()[:10]
        return f"{c.method}-{c.smoothing}-eps{c.epsilon:g}-seed{c.seed}-{digest}" + "-measured" * self.measure

    def folders(self, out: Path) -> list[Path]:
        """Where this run may be: its own folder, and that of the same run with measures, which serves as well."""
        own = out / RUNS / self.name
        return [own] if self.measure else [own, own.with_name(own.name + "-measured")]


def jobs_of(
    question: Question,
    base: Settings,
    tuned: Mapping[str, Settings],
    epsilons: Iterable[float],
    seeds: Iterable[int],
) -> list[Job]:
    """Every run of a question, the seeds last, so that a piece of it is whole arms."""
    found = []
    for epsilon, (arm, own), seed in itertools.product(epsilons, question.arms.items(), seeds):
        settings = arm_settings(base, own, tuned.get(tuning_key(own, epsilon), {}))
        config = make_config(settings | {"epsilon": epsilon, "seed": seed})
        found.append(Job(arm, config, question.measure))
    return found


def combinations(grid: Mapping[str, tuple]) -> list[Settings]:
    """Every combination of a grid's values."""
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def tuning_jobs(arm: Settings, base: Settings, tries: Iterable[Settings], seed: int) -> list[Job]:
    """Each of ``tries`` for one arm; as many for every arm."""
    return [Job("tuning", make_config(arm_settings(base | arm, one, {}) | {"seed": seed})) for one in tries]


def same(settings: Mapping[str, Any] | None) -> str:
    """Text that is equal for equal settings."""
    return json.dumps(settings, sort_keys=True)


def result_of(job: Job, out: Path, known: Known = NOTHING) -> dict[str, Any] | None:
    """One line of results.jsonl for a run that is complete here or ``known`` from elsewhere; None for any other."""
    for folder in job.folders(out):
        if (found := _read_result(job, folder)) is not None:
            return found
    key = same(_told(job.config))
    line = known.get(MEASURES + key, known.get(key)) if job.measure else known.get(key)
    if line is None or (job.measure and "measures" not in line):
        return None
    return {**line, "arm": job.arm}


def _read_result(job: Job, folder: Path) -> dict[str, Any] | None:
    try:
        lines = read_lines(folder / METRICS, "", "round", "accuracy", "loss", "epsilon", "seconds", "bytes_sent")
        first, last = lines[0], lines[-1]
    except (FileNotFoundError, IndexError, BadInput):  # resuming the run writes it anew
        return None
    measures = read_measures(folder / MEASURES)
    if last["round"] < job.config.rounds or (job.measure and measures is None):
        return None
    return {
        "run": folder.name, "arm": job.arm, "epsilon": "inf" if not job.config.private else job.config.epsilon,
        "seed": job.config.seed, "accuracy_before": first["accuracy"], "accuracy": last["accuracy"],
        "loss": last["loss"], "epsilon_spent": last["epsilon"], "seconds": last["seconds"],
        "bytes_sent": sum(line["bytes_sent"] for line in lines), "settings": _told(job.config),
        **({} if measures is None else {"measures": measures}), "version": __version__,
    }  # fmt: skip


def read_known(folder: Path, preset: str) -> Known:
    """What ``--publish`` left of a preset in ``folder``: result lines of all its questions, by their settings.

    The first of equal settings counts, so a table does not change when a later question trains them again to measure
    something; the first that was measured is also found by its settings behind ``MEASURES``.
    """
    known: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{preset}-question-*.jsonl")):
        for line in read_lines(path, RESTORE):
            if "settings" in line:
                known.setdefault(key := same(line["settings"]), line)
                if "measures" in line:
                    known.setdefault(MEASURES + key, line)
    return known


def _told(config: Config) -> dict[str, Any]:
    """Method, filter, and what else is not the default, without folders of this machine."""
    default = json.loads(Config().to_json())
    told = {key: value for key, value in json.loads(config.to_json()).items() if value != default[key]}
    told |= {"method": config.method, "smoothing": config.filter or "none"}
    return {key: Path(value).name if os.sep in str(value) else value for key, value in told.items()}


def train(
    jobs: Iterable[Job], out: Path, parallel: int = 1, deadline: float | None = None, known: Known = NOTHING
) -> Iterator[Job]:
    """Train what is neither complete nor ``known``; yield each run as it ends. ``deadline``: a ``time.time()``.

    A run stops between two rounds and is resumable, so a piece of any length gets at least one round further.
    """
    todo = list({job.name: job for job in jobs if result_of(job, out, known) is None}.values())
    if parallel == 1:
        for job in todo:
            if _late(deadline):
                return
            if _one(job, out, None, deadline):
                yield job
        return
    threads = max(1, (os.cpu_count() or 1) // parallel)
    # spawned, not forked: a forked process inherits torch's threads in an unusable state
    with ProcessPoolExecutor(parallel, multiprocessing.get_context("spawn"), _follow_parent) as pool:
        started = {pool.submit(_one, job, out, threads, deadline): job for job in todo}
        try:
            for ended in as_completed(started):
                if ended.result():
                    yield started[ended]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _follow_parent() -> None:
    """End this worker when the process that started it has ended, killed or not; its run resumes from its last round.
    The pool's own workers would train on, or wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class TimeUp(Exception):
    """The time of this piece is over; the run can be resumed."""


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.time() >= deadline


def _one(job: Job, out: Path, threads: int | None, deadline: float | None) -> bool:
    """Train one run from where it stands; whether it reached its end."""
    if _late(deadline):
        return False
    if threads is not None:
        torch.set_num_threads(threads)
    folder = out / RUNS / job.name
    there = (folder / "config.json").exists()
    run = Run.resume(folder) if there else Run.start(prepare(job.config), folder)

    def stop(record: dict[str, Any]) -> None:
        if _late(deadline) and record["round"] < job.config.rounds:
            late.append(record["round"])

    late: list[int] = []

    def step() -> None:  # between rounds, where nothing of this piece is lost
        if late:
            raise TimeUp

    watch = Watch(on_step=step, on_round=stop)
    recorder = Recorder(run, folder / MEASURES) if job.measure else None
    if recorder is not None:
        watch = dataclasses.replace(watch, on_updates=recorder)
    try:
        run.train(watch)
    except TimeUp:
        return False
    if recorder is not None:
        recorder.finish()
    return True


def results_of(jobs: Iterable[Job], out: Path, known: Known = NOTHING) -> list[dict[str, Any]]:
    """Results of what is complete or known, in the order of ``jobs``."""
    return [result for job in jobs if (result := result_of(job, out, known)) is not None]


def save_lines(results: Iterable[Mapping[str, Any]], path: Path) -> None:
    """One JSON line a run."""
    write_atomic(path, "".join(json.dumps(result) + "\n" for result in results))


def merged_lines(new: Path, old: Path) -> str:
    """The lines of ``new``, then those of ``old`` whose settings are in none of them."""
    lines = read_lines(new, RESTORE)
    there = {same(line.get("settings")) for line in lines}
    kept = [line for line in read_lines(old, RESTORE) if same(line.get("settings")) not in there]
    return "".join(json.dumps(line) + "\n" for line in [*lines, *kept])


def read_tuned(*paths: Path) -> dict[str, dict[str, Any]]:
    """What ``--tune`` chose, by ``tuning_key``, from all files that are there; of two choices the first file's counts,
    which is the published one: the published results were trained with it. One that goes on where that ended counts."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        if path.exists():
            for key, one in read_object(path, f"{RESTORE}, or remove it and --tune again").items():
                there = found.setdefault(key, one)
                if THEN in one and THEN not in there and one["tried"] == there["tried"]:
                    found[key] = one
    return found


def chosen(tuned: Mapping[str, Any], key: str, base: Settings, then: bool, by: str = "loss") -> Settings:
    """Settings of a ``tuning_key``: the best of its grid and, with ``then``, what was better at ``THEN_EPSILON``."""
    settings = base | best(tuned[key]["tried"], by)
    one = tuned.get(then_key(key), {})
    return arm_settings(settings, further(one, one[THEN]), {}) if then and THEN in one else settings


def further(one: Mapping[str, Any], found: Iterable[Mapping[str, Any]]) -> Settings:
    """What of ``found`` was better than the best of the grid, by loss; nothing where nothing was."""
    nothing = {WITH: {}, "accuracy": 0.0, "loss": min(map(_by_loss, one["tried"]))}
    return best([nothing, *found])[WITH]


def best(tried: Iterable[Mapping[str, Any]], by: str = "loss") -> Settings:
    """The settings of what was tried with the lowest test loss, which tells close settings apart, or the highest
    accuracy, the loss then deciding ties; a loss that is not finite is the worst."""

    def order(one: Mapping[str, Any]) -> tuple[float, float]:
        return (-one["accuracy"] if by == "accuracy" else _by_loss(one), _by_loss(one))

    return {key: value for key, value in min(tried, key=order).items() if key not in ("accuracy", "loss")}


def _by_loss(one: Mapping[str, Any]) -> float:
    return math.inf if one["loss"] is None else one["loss"]


def outcomes(jobs: list[Job], out: Path) -> list[dict[str, Any]] | None:
    """Accuracy and loss of each job, for ``best``.

    None while a run is missing: an arm is tuned with its whole budget or not at all.
    """
    results = [result_of(job, out) for job in jobs]
    if any(result is None for result in results):
        return None
    return [{"accuracy": result["accuracy"], "loss": result["loss"]} for result in results if result is not None]

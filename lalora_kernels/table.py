"""``lalora table``: every method, with and without smoothing, at several ε and seeds; a Markdown table."""

import itertools
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from lalora_kernels.data import BadInput, load_data
from lalora_kernels.federated.config import Config, make_config
from lalora_kernels.federated.diagnostics import PRIVATE_TEST
from lalora_kernels.federated.methods import get_method
from lalora_kernels.files import write_atomic

Accuracy = tuple[float, float, bool]  # before and after, in [0, 1]; whether they are of private records set aside
PRIVATE = "accuracy of private records set aside: not covered by epsilon, do not publish"


def make_table(
    shared: dict[str, Any], grid: dict[str, Sequence], out: Path, jobs: int = 1, page: Path | None = None
) -> str:
    """Train what is missing of ``grid`` (setting -> values) under ``out``; return the table, also as ``out/table.md``.

    A cell is the mean test accuracy over the seeds, in percent, ± the sample standard deviation. Runs that are complete
    are read, runs that were interrupted are resumed. Raises BadInput for settings that do not fit, for a folder there
    whose run has other settings, and, before it trains, for a ``page`` to put the table into where the data set's
    test records are private ones.
    """
    if jobs < 1:
        raise BadInput(f"--jobs is a whole number >= 1, got {jobs}")
    grid = {name: list(dict.fromkeys(values)) for name, values in grid.items()}  # a seed twice is no second sample
    names = list(grid)
    todo = [dict(zip(names, values)) for values in itertools.product(*grid.values())]
    configs = {_name(cell): make_config(shared | cell) for cell in todo}
    results = {}
    for name, config in configs.items():
        _check_same(out / name, config)
        if (done := _finished(out / name, config)) is not None:
            results[name] = done
    missing = {name: config for name, config in configs.items() if name not in results}
    if page is not None and missing and _tests_are_private(next(iter(missing.values()))):
        raise _kept_off(page)
    for name, accuracy in _train(missing, out, jobs):
        results[name] = accuracy
        print(f"[{len(results)}/{len(configs)}] {name}: {100 * accuracy[1]:.1f} %", flush=True)
    text = _markdown(grid, results)
    write_atomic(out / "table.md", text)
    return text


def put_into(page: Path, table: str, mark: str = "accuracy") -> None:
    """Replace what stands between the page's lines <!-- MARK:begin --> and <!-- MARK:end --> by ``table``.

    Raises BadInput for a page without them, and for a table of private records' accuracy.
    """
    if PRIVATE in table:
        raise _kept_off(page)
    head, tail = around_marks(page, mark)
    write_atomic(page, f"{head}\n\n{table.strip()}\n\n{tail}")


def _kept_off(page: Path) -> BadInput:
    return BadInput(
        f"{page} would show {PRIVATE}; leave out --into, or give the data set test records of its own (x_test and "
        f"y_test of an .npz, --test-dataset of a table or a folder) that may be published"
    )


def _tests_are_private(config: Config) -> bool:
    return load_data(
        config.dataset, test=config.test_dataset, text_column=config.text_column, label_column=config.label_column,
        image_size=config.image_size,
    ).set_aside  # fmt: skip


def around_marks(page: Path, mark: str = "accuracy") -> tuple[str, str]:
    """What stands up to the page's line <!-- MARK:begin -->, with it, and from <!-- MARK:end --> on.

    Raises BadInput for a page without them: called before a training too, whose table would have no place.
    """
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    try:
        head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    except FileNotFoundError:
        raise BadInput(f"{page}: no such file; make one with the lines {begin} and {end}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{page}: not a page in UTF-8 ({error})") from error
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise BadInput(f"{page}: has no lines {begin} and {end} to put the table between")
    return head + begin, end + tail


def _name(cell: dict[str, Any]) -> str:
    return f"{cell['method']}-{cell['smoothing']}-eps{cell['epsilon']:g}-seed{cell['seed']}"


def _check_same(folder: Path, config: Config) -> None:
    if not (folder / "config.json").exists():
        return
    from lalora_kernels.federated.run import read_json

    there, here = read_json(folder / "config.json"), json.loads(config.to_json())
    if not isinstance(there, dict) or not isinstance(there := there.get("settings"), dict):
        raise BadInput(f"{folder}/config.json holds no settings; remove the folder or choose another --out")
    if differ := [key for key in here if here[key] != there.get(key)]:
        raise BadInput(f"{folder} holds a run with another {', '.join(differ)}; remove it or choose another --out")


def _finished(folder: Path, config: Config) -> Accuracy | None:
    """The test accuracies of a run that has written its weights, the last thing it does, and metrics of its last round.

    Of others None: resuming them writes metrics anew that a crash left behind or that were damaged.
    """
    from lalora_kernels.federated.run import ADAPTER, ADAPTERS, MERGED

    if not any((folder / name).exists() for name in (ADAPTER, ADAPTERS, MERGED)):
        return None
    try:
        first, *_, last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return _accuracy(first, last) if last["round"] == config.rounds else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _train(configs: dict[str, Config], out: Path, jobs: int) -> Iterator[tuple[str, Accuracy]]:
    """(name, accuracies) of each run, as they end."""
    if jobs == 1:
        yield from ((name, _one(config, out / name, None)) for name, config in configs.items())
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # spawned, not forked: a forked process inherits torch's threads in an unusable state
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        started = {pool.submit(_one, config, out / name, threads): name for name, config in configs.items()}
        for finished in as_completed(started):
            yield started[finished], finished.result()


def _one(config: Config, folder: Path, threads: int | None) -> Accuracy:
    """Train one run to its end, from where it stands; its test accuracies."""
    import torch

    from lalora_kernels.federated.run import Run, prepare

    if threads is not None:
        torch.set_num_threads(threads)
    there = (folder / "config.json").exists()
    run = Run.resume(folder) if there else Run.start(prepare(config), folder)
    run.train()
    return _accuracy(run.at.history[0], run.at.history[-1])


def _accuracy(first: dict[str, Any], last: dict[str, Any]) -> Accuracy:
    return first["accuracy"], last["accuracy"], PRIVATE_TEST in first or PRIVATE_TEST in last


def _markdown(grid: dict[str, Sequence], results: dict[str, Accuracy]) -> str:
    head = ["method", "smoothing", *("ε = ∞ (no noise)" if e == math.inf else f"ε = {e:g}" for e in grid["epsilon"])]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * len(grid["epsilon"])]
    for method, smoothing in itertools.product(grid["method"], grid["smoothing"]):
        row = [method, smoothing]
        for epsilon in grid["epsilon"]:
            cell = {"method": method, "smoothing": smoothing, "epsilon": epsilon}
            row.append(_spread([results[_name(cell | {"seed": seed})][1] for seed in grid["seed"]]))
        lines.append("| " + " | ".join(row) + " |")
    before = [accuracy for accuracy, *_ in results.values()]
    seeds = ", ".join(map(str, grid["seed"]))
    notes = [f"**{PRIVATE}.**"] if any(private for *_, private in results.values()) else []
    lines += ["", " ".join([*notes, "Runs on the same records add up."])]
    text = "\n".join(lines) + f"\n\nBefore fine-tuning: {_spread(before)}. Seeds {seeds}."
    own = [method for method in grid["method"] if get_method(method).keeps]
    return text + (f" {', '.join(own)}: the mean over the clients' models." if own else "") + "\n"


def _spread(accuracies: Sequence[float]) -> str:
    values = [100 * a for a in accuracies]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f}" + (f" ± {spread:.1f}" if spread else "")

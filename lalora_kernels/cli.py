"""The command ``lalora``: plan, train, flower, table, report, ledger, audit, reproduce.

Exit codes: 0 done; 2 the input or the settings do not fit (one line says what); 130 interrupted; 1 anything else.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lalora_kernels import __version__
from lalora_kernels.data import BadInput
from lalora_kernels.federated.config import Config, make_config
from lalora_kernels.federated.guard import QuorumLost
from lalora_kernels.federated.methods import METHODS
from lalora_kernels.flower_command import FlowerFailed, add_flower, simulate
from lalora_kernels.flower_command import flower as run_flower
from lalora_kernels.flower_display import FlowerDisplay, JsonFlowerDisplay
from lalora_kernels.plan_command import add_plan
from lalora_kernels.plan_command import plan as run_plan
from lalora_kernels.privacy.accountant import ACCOUNTANTS
from lalora_kernels.privacy.ledger import BudgetExceeded, LedgerError
from lalora_kernels.reproduce.command import add_reproduce
from lalora_kernels.reproduce.command import reproduce as reproduce_piece
from lalora_kernels.settings_flags import CONFIG, add_settings, settings

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory")  # torch's, on a card and on the CPU
EXTRAS = {  # module -> the extra of pyproject.toml that brings it
    "sklearn": "data", "mlxtend": "data", "PIL": "data", "rich": "federated", "transformers": "text",
    "timm": "vision", "peft": "peft", "flwr": "flower", "ray": "flower", "cryptography": "flower",
    "matplotlib": "reproduce", "scipy": "reproduce", "tensorboard": "tensorboard", "wandb": "wandb",
    "accelerate": "trainer", "triton": "triton",
}  # fmt: skip

RUN_FOLDER = "give the folder that lalora train made (its --out), or that one's copy"
GRID: dict[str, Sequence] = {  # what a table varies
    "method": list(METHODS), "smoothing": ["none", "binomial5"], "epsilon": [1.0, 3.0], "seed": [0, 1, 2],
}  # fmt: skip

ENGINE = "in-process: one loop; flower-sim: the same clients simulated over Flower (default: in-process)"


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    about = "Federated fine-tuning of LoRA adapters with record-level differential privacy for every client."
    parser = argparse.ArgumentParser(prog="lalora", description=about)
    parser.add_argument("--version", action="version", version=f"lalora_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_plan(commands, add_settings)
    add_flower(commands, add_settings)
    train = commands.add_parser(
        "train",
        usage="lalora train [options]",
        help="train an adapter privately",
        description="Train an adapter on records that clients keep to themselves. Without arguments: a small vision "
        "transformer, pre-trained on scikit-learn's digits, learns 4,000 MNIST images held by 8 clients at ε = 3 and "
        "is tested on 1,000 others.",
        epilog="A run folder holds config.json, metrics.jsonl, ledger.json, report.html, the checkpoint and adapter/ "
        "in PEFT's format. Ctrl-C stops a run so that --resume continues it.",
    )
    run = train.add_argument_group("the run")
    run.add_argument("--config", metavar="FILE", help=CONFIG)
    run.add_argument("--out", metavar="FOLDER", help="run folder (default: runs/DATASET-METHOD-TIME)")
    run.add_argument("--resume", metavar="FOLDER", help="continue this run, with its own settings")
    run.add_argument("--engine", choices=("in-process", "flower-sim"), default="in-process", help=ENGINE)
    run.add_argument("--quiet", action="store_true", help="print only the last line")
    run.add_argument("--json", action="store_true", help="one JSON object a line: start, every round, end")
    run.add_argument("--tensorboard", action="store_true", help="also log to RUN/tensorboard")
    run.add_argument("--wandb", action="store_true", help="also log to Weights & Biases (WANDB_MODE=offline: to disk)")
    run.add_argument("--log-private", action="store_true", help="log private figures too: ε does not cover them")
    run.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_settings(train)

    table = commands.add_parser(
        "table",
        usage="lalora table [options]",
        help="compare methods over seeds",
        description="Train every method with and without smoothing at each ε and seed, and print the mean and standard "
        "deviation of the test accuracy as a Markdown table. Runs that are there already are not repeated.",
    )
    sweep = table.add_argument_group("the table")
    sweep.add_argument("--methods", nargs="+", metavar="METHOD", help=f"(default: {' '.join(METHODS)})")
    sweep.add_argument("--smoothings", nargs="+", metavar="FILTER", help="(default: none binomial5)")
    sweep.add_argument("--epsilons", nargs="+", type=float, metavar="E", help="(default: 1 3)")
    sweep.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="(default: 0 1 2)")
    sweep.add_argument("--jobs", type=int, metavar="N", default=1, help="runs at the same time (default: 1)")
    shared = "settings that all runs share, by the names of train's flags in TOML, or the config.json of a run; its "
    shared += "method, smoothing, epsilon and seed stand where the flag above is left out"
    sweep.add_argument("--config", metavar="FILE", help=shared)
    sweep.add_argument("--out", metavar="FOLDER", default="runs/table", help="(default: runs/table)")
    sweep.add_argument("--into", metavar="PAGE.md", help="put the table between this page's accuracy marks")
    sweep.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_settings(table, leave_out=("method", "smoothing", "epsilon", "seed"))

    add_reproduce(commands)
    report = commands.add_parser(
        "report",
        help="write one page on a run, or on several side by side",
        description="One HTML file that needs no network: accuracy and ε over rounds, clients, gradients, time and "
        "memory, ledger, settings, the guarantee in words. What is computed on private data is marked.",
    )
    report.add_argument("run", metavar="RUN", nargs="+", help="run folders")
    report.add_argument("--out", metavar="FILE", help="(default: report.html in the run, comparison.html of several)")
    report.add_argument("--public", action="store_true", help="leave out what is computed on private data")
    report.add_argument("--debug", action="store_true", help="show the traceback of an error")

    ledger = commands.add_parser(
        "ledger",
        help="print what a run released, verify it, recompute its epsilon",
        description="Print every release of every client, verify the hash chain over them, and compute epsilon from "
        "them anew. Exit code 2 where a ledger is missing, edited or cut.",
    )
    ledger.add_argument("run", metavar="RUN", help="run folder, or a ledger's file")
    ledger.add_argument("--accountant", choices=ACCOUNTANTS, default="pld", help="(default: pld)")
    ledger.add_argument("--delta", type=float, metavar="X", help="(default: the run's)")
    ledger.add_argument("--debug", action="store_true", help="show the traceback of an error")

    audit = commands.add_parser(
        "audit",
        help="attack the private step and show which epsilon that refutes",
        description="Attack one release (two neighbouring inputs, many draws) and whole runs of the embedded default "
        "(planted records, each there or not by a coin). Prints lower bounds of epsilon beside what is claimed. Exit "
        "code 1 where a claim is refuted.",
    )
    audit.add_argument("--draws", type=int, metavar="N", default=100_000, help="of each hypothesis (default: 100000)")
    audit.add_argument("--canaries", type=int, metavar="N", default=4000, help="planted records (default: 4000)")
    audit.add_argument("--steps", type=int, metavar="N", default=100, help="private steps of a run (default: 100)")
    audit.add_argument("--out", metavar="FOLDER", help="also write the results there, as JSON and Markdown")
    audit.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def train(args: argparse.Namespace) -> int:
    """``lalora train``."""
    given = settings(args)
    resumed = args.resume is not None  # "" of an unset variable is no new run, which would spend a second budget
    if resumed and (given or args.config or args.out):
        raise BadInput("--resume continues a run with its own settings; leave the other flags out")
    config = None if resumed else make_config(given, args.config or "the command line")
    folder = Path(args.resume if resumed else args.out or _new_folder(make_config(given)))
    from lalora_kernels.display import Display, JsonDisplay
    from lalora_kernels.federated.run import Run, prepare
    from lalora_kernels.loggers import KINDS, Loggers, Source, both, check

    kinds = [kind for kind in KINDS if getattr(args, kind)]
    check(kinds)
    if args.engine == "flower-sim":
        shown = (JsonFlowerDisplay if args.json else FlowerDisplay)(args.quiet)
        return simulate(config, folder, shown, kinds, args.log_private)
    with (JsonDisplay if args.json else Display)(quiet=args.quiet) as display:
        try:
            with _setup():
                display.note(f"{'resuming' if resumed else 'run folder'} {folder}")
                if config is None:
                    run = Run.resume(folder, display.watch())
                else:
                    run = Run.start(prepare(config, display.watch()), folder)
            display.begin(run)
            with _saved(f"--resume {shlex.quote(str(folder))} continues it"):
                with Loggers(kinds, Source.of(run), args.log_private) as log:
                    watch = display.watch()
                    run.train(dataclasses.replace(watch, on_round=both(watch.on_round, log)))
                display.finish(run)
        except KeyboardInterrupt:
            display.interrupted(folder, resumable=(folder / "config.json").exists())
            return INTERRUPTED
    return OK


def _new_folder(config: Config) -> Path:
    data = Path(config.dataset.removeprefix("hf:")).name.split(".")[0]
    return Path("runs") / f"{data}-{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"


def flower(args: argparse.Namespace) -> int:
    """``lalora flower``."""
    return run_flower(args, settings(args))


@contextlib.contextmanager
def _setup() -> Iterator[None]:
    """Turns errors of arguments, raised anywhere before the first step, into BadInput."""
    try:
        yield
    except BadInput:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(str(error)) from error


class Unwritten(Exception):
    """A file of a run could not be written or read; the message says what and how to go on."""


@contextlib.contextmanager
def _saved(cure: str) -> Iterator[None]:
    """Within the block runs are trained: what they had saved when a disk was full or went read-only is not lost."""
    try:
        yield
    except OSError as error:
        raise Unwritten(f"{error}; what was saved before is whole, and {cure}") from error


def plan(args: argparse.Namespace) -> int:
    """``lalora plan``."""
    with _setup():
        return run_plan(args, settings(args))


def table(args: argparse.Namespace) -> int:
    """``lalora table``."""
    from lalora_kernels.table import around_marks, make_table, put_into

    given = settings(args)
    grid: dict[str, Sequence] = {}
    for name, usual in GRID.items():  # a file's ε is a budget that the table must not exceed unasked
        grid[name] = getattr(args, f"{name}s") or ([given[name]] if name in given else usual)
    page = Path(args.into) if args.into else None
    if page is not None:
        around_marks(page)
    try:
        with _saved("the same command continues"), _setup():
            text = make_table(given, grid, Path(args.out), args.jobs, page)
        print(text)
        if page is not None:
            put_into(page, text)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
    return OK


def reproduce(args: argparse.Namespace) -> int:
    """``lalora reproduce``."""
    with _saved("the same command continues"), _setup():
        return OK if reproduce_piece(args) else FAILED


def report(args: argparse.Namespace) -> int:
    """``lalora report``."""
    from lalora_kernels.report import write_report

    try:
        print(write_report(*args.run, out=args.out, public=args.public))
    except (FileNotFoundError, NotADirectoryError) as error:
        path = Path(error.filename)
        raise BadInput(f"{path.parent} is not a run: {path.name} is missing; {RUN_FOLDER}") from error
    except LedgerError as error:
        raise BadInput(f"the report would not be true: {error}") from error
    return OK


def ledger(args: argparse.Namespace) -> int:
    """``lalora ledger``."""
    from lalora_kernels.federated.books import show_ledger

    print(show_ledger(args.run, accountant=args.accountant, delta=args.delta))
    return OK


def audit(args: argparse.Namespace) -> int:
    """``lalora audit``."""
    from lalora_kernels.privacy import audit_report

    def progress(what: str, done: int, all: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{what}: {done / all:4.0%} ", end="\n" if done == all else "", file=sys.stderr, flush=True)

    if args.out:
        audit_report.make_folder(args.out)
    singles, runs = audit_report.audit_all(
        draws=args.draws, canaries=args.canaries, steps=args.steps, progress=progress
    )
    print(audit_report.table(singles, runs))
    if args.out:
        print("\nwritten:", *audit_report.write(singles, runs, args.out))
    return FAILED if any(a.broken for a in singles) or any(a.broken for a in runs) else OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ε shows a question mark, and the run goes on
    args = build_parser().parse_args(argv)
    commands = {
        "plan": plan, "train": train, "flower": flower, "table": table, "reproduce": reproduce, "report": report,
        "ledger": ledger, "audit": audit,
    }  # fmt: skip
    command = commands[args.command]
    try:
        code = command(args)
        sys.stdout.flush()  # here, where what cannot be written has an exit code
        return code
    except BrokenPipeError:  # | head has read enough; nothing is left to be written when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except BadInput as error:
        if args.debug:
            raise
        print(f"lalora: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except (BudgetExceeded, QuorumLost, FlowerFailed, Unwritten, OSError) as error:
        # OSError: a full disk, a folder that cannot be written
        if args.debug:
            raise
        print(f"lalora: {error}", file=sys.stderr)
        return FAILED
    except (MemoryError, RuntimeError) as error:
        if args.debug or not (isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error))):
            raise
        from lalora_kernels.models import first_line

        cure = "a smaller --physical-batch-size costs no accuracy; so may fewer --jobs or a smaller --rank help"
        print(f"lalora: out of memory ({first_line(error)}); {cure}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if args.debug or (error.name or "lalora_kernels").startswith("lalora_kernels"):  # one of ours, or no module's
            raise
        module = str(error.name).partition(".")[0]
        install = f"'lalora_kernels[{EXTRAS[module]}]'" if module in EXTRAS else module
        print(f"lalora: {module} is not installed; pip install {install}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())

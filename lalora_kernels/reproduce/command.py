"""``lalora reproduce``: tune, train a question's grid in pieces of any length, write its tables and figures."""

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lalora_kernels.data import BadInput
from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.methods import FURTHER
from lalora_kernels.files import write_atomic
from lalora_kernels.reproduce.presets import (
    COST,
    PRESETS,
    QUESTIONS,
    THEN_EPSILON,
    Preset,
    Question,
    Settings,
    base_settings,
    then_key,
    tuned_arms,
    tuning_key,
)

ABOUT = (
    "Answers the paper's questions under true per-sample DP. 1: four methods at each ε; 2: alternation and filter; 3: "
    "other filters; 4: schedules, K, ranks, heterogeneity, clipping; 5: noise and coupling; 6: cost. What is there is "
    "not repeated: the same command goes on where it was stopped. See docs/reproduce.md."
)


def add_reproduce(commands: Any) -> None:
    """The subcommand's flags."""
    parser = commands.add_parser("reproduce", help="answer the paper's questions, in pieces", description=ABOUT)
    parser.add_argument("preset", choices=PRESETS, help="; ".join(f"{k}: {p.about}" for k, p in PRESETS.items()))
    parser.add_argument("--question", type=int, choices=(*QUESTIONS, COST), default=1, help="(default: 1)")
    parser.add_argument("--tune", action="store_true", help="tune the question's arms first, all with one budget")
    parser.add_argument("--by", choices=("loss", "accuracy"), default="loss", help="what the tuning goes by")
    parser.add_argument("--grid-alone", action="store_true", help="question 1 without what is tuned after the grid")
    parser.add_argument("--task", metavar="NAME", help="one of the preset's data sets and models (default: the first)")
    parser.add_argument("--scale", choices=("small", "large"), default="small", help="large: for a machine with a card")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="weights and data in files (default: from the hub)")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after about this long, between two rounds")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="(default: the preset's)")
    parser.add_argument("--epsilons", type=float, nargs="+", metavar="E", help="(default: the question's)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms of the question (default: all)")
    parser.add_argument("--further", action="store_true", help="question 1: also FedSVD, FedEx-LoRA, FLoRA, FedSA-LoRA")
    parser.add_argument("--against", metavar="ARM", help="one more table, of the differences from this arm")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="(default: runs/reproduce/PRESET-TASK-SCALE)")
    parser.add_argument(
        "--publish", type=Path, metavar="FOLDER",
        help="keep table, figure, results and tuning there; runs and tuning that it holds count as done",
    )  # fmt: skip
    parser.add_argument("--into", type=Path, metavar="PAGE.md", help="and the table between this page's evidence marks")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def reproduce(args: argparse.Namespace, say: Callable[[str], None] = print) -> bool:
    """Run the piece that ``args`` ask for and write the tables of what is complete; whether all of it is there that
    there was time for.

    Raises BadInput for a task or an arm that is not the preset's, and for a seed that is kept for tuning.
    """
    if args.jobs < 1 or (args.minutes is not None and not args.minutes > 0):
        raise BadInput("--jobs is a whole number >= 1, --minutes a number > 0")
    preset = PRESETS[args.preset]
    task = args.task or next(iter(preset.tasks))
    if task not in preset.tasks:
        raise BadInput(f"--task is one of {', '.join(preset.tasks)}; got {task!r}")
    if args.grid_alone and (args.by != "loss" or args.question == COST or not QUESTIONS[args.question].then):
        raise BadInput("--grid-alone is what all but question 1 by loss do anyway; leave it out")
    if args.against is not None and args.question == COST:
        raise BadInput(f"--against is for accuracies, and question {COST} has costs; leave it out")
    base = base_settings(args.preset, task, args.scale, args.data)
    out = args.out or Path("runs") / "reproduce" / f"{args.preset}-{task}-{args.scale}"
    name = args.preset + f"-{task}" * (task != next(iter(preset.tasks))) + f"-{args.scale}" * (args.scale != "small")
    title = _name(args.question, args.by, args.grid_alone)
    table = title + _compared(args.against)
    if args.into is not None:
        from lalora_kernels.table import around_marks

        around_marks(args.into, _mark(name, table))
    if preset.public_head:
        from lalora_kernels.reproduce.start import prepare_start

        base = prepare_start(base, out / "start")
    deadline = None if args.minutes is None else time.time() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    if args.question == COST:
        done = _cost(base, out, deadline, say)
    else:
        question = _whole(QUESTIONS[args.question], args.further)
        known = None if args.publish is None else (args.publish, name)
        done = answer(
            args.question, question, preset, base, out, arms=args.arms, seeds=args.seeds, epsilons=args.epsilons,
            tune=args.tune, jobs=args.jobs, deadline=deadline, by=args.by, alone=args.grid_alone,
            against=args.against, known=known, say=say,
        )  # fmt: skip
    _publish(out, title, name, args.publish, args.into, table)
    return done or (deadline is not None and time.time() >= deadline)


def _name(question: int, by: str, alone: bool) -> str:
    return f"question-{question}" + "-grid-alone" * alone + f"-by-{by}" * (by != "loss")


def _compared(against: str | None) -> str:
    return "" if against is None else "-against-" + re.sub(r"[^\w.]+", "-", against).strip("-")


def _mark(name: str, table: str) -> str:
    return f"evidence-{name}-{table.removeprefix('question-')}"


def _publish(out: Path, question: str, name: str, folder: Path | None, page: Path | None, table: str = "") -> None:
    """Copy what ``answer`` wrote to ``folder``, whose results of other arms and seeds stay, as does its tuning; put its
    table (of this name, if it is another), without the heading, into ``page``."""
    from lalora_kernels.reproduce.runs import TUNED, merged_lines, read_tuned
    from lalora_kernels.table import put_into

    table = table or question
    files = dict.fromkeys((f"{question}.md", f"{question}.svg", f"{question}.jsonl", f"{table}.md"))
    made = {f"{name}-{file}": out / file for file in files}
    if folder is not None:
        for target, path in made.items():
            if path.exists():
                lines = target.endswith(".jsonl") and (folder / target).exists()
                made_here = merged_lines(path, folder / target).encode() if lines else path.read_bytes()
                write_atomic(folder / target, made_here)
        if (out / TUNED).exists():
            published = folder / f"{name}-{TUNED}"
            write_atomic(published, json.dumps(read_tuned(published, out / TUNED), indent=2) + "\n")
    if page is not None and (out / f"{table}.md").exists():
        text = (out / f"{table}.md").read_text(encoding="utf-8").partition("\n")[2]
        put_into(page, text, _mark(name, table))


def _whole(question: Question, further: bool) -> Question:
    names = (name for name in FURTHER if further and not name.startswith("la-lora"))
    return replace(question, arms=question.arms | {name: {"method": name, "smoothing": "none"} for name in names})


def answer(
    number: int, question: Question, preset: Preset, base: Mapping[str, Any], out: Path, *,
    arms: list[str] | None = None, seeds: list[int] | None = None, epsilons: list[float] | None = None,
    tune: bool = False, jobs: int = 1, deadline: float | None = None, by: str = "loss", alone: bool = False,
    against: str | None = None, known: tuple[Path, str] | None = None, say: Callable[[str], None] = print,
) -> bool:  # fmt: skip
    """Tune where asked, train what is missing, write question-N.jsonl, .md and .svg into ``out``; whether all that was
    asked for is there. ``arms``, ``seeds`` and ``epsilons`` choose what is trained (default: the whole question, and
    with some arms what they are compared with); the table has all that is there of these and of the preset's own.
    ``alone``: with what is best in the grid. ``against``: beside the question's own table one more, of the same runs'
    differences from this arm. ``known``: a folder, and the name that a preset was published under, whose results and
    tuning count as done.

    Raises BadInput for an arm that is not the question's, and where the tuning seed is among ``seeds``: what was tuned
    on is never reported.
    """
    from lalora_kernels.reproduce import runs, tables

    seeds = list(preset.seeds) if seeds is None else seeds
    if preset.tuning_seed in seeds:
        raise BadInput(f"seed {preset.tuning_seed} is what the settings are tuned on, and is not reported")
    compared = [question.against] if against is None else [question.against, against]
    if strange := [arm for arm in (*(arms or ()), *compared) if arm not in question.arms]:
        raise BadInput(f"no arm {strange[0]!r} in this question; there are {', '.join(question.arms)}")
    # by accuracy, the highest of some draws more would be luck
    question = replace(question, then=question.then and not alone and by == "loss")
    own = list(preset.epsilons if question.epsilons is None else question.epsilons)
    epsilons = own if epsilons is None else epsilons
    have = {a: s for a, s in question.arms.items() if arms is None or a in (*arms, *compared)}
    there = runs.NOTHING if known is None else runs.read_known(*known)
    published = [] if known is None else [known[0] / f"{known[1]}-{runs.TUNED}"]
    asked = replace(question, arms=have)
    if tune and not _tune(asked, epsilons, preset, dict(base), out, published, jobs, deadline, say):
        say("tuning is not complete; the same command continues")
        return False
    tuned = runs.read_tuned(*published, out / runs.TUNED)
    chosen = {key: runs.chosen(tuned, key, dict(base), question.then, by) for key in tuned}
    todo = runs.jobs_of(asked, dict(base), chosen, epsilons, seeds)
    for job in runs.train(todo, out, jobs, deadline, there):
        if (result := runs.result_of(job, out)) is None:  # the other runs go on
            say(f"{job.name} has ended, but its {runs.METRICS} lacks rounds; if the same command does not mend that, "
                f"remove {job.folders(out)[0]} to train it again")  # fmt: skip
            continue
        done = len(runs.results_of(todo, out, there))
        say(f"[{done}/{len(todo)}] {job.name}: {100 * result['accuracy']:.1f} %, {result['seconds']:.0f} s")
    shown_epsilons, shown_seeds = sorted({*own, *epsilons}), sorted({*preset.seeds, *seeds})
    shown = runs.jobs_of(question, dict(base), chosen, shown_epsilons, shown_seeds)
    results = runs.results_of(shown, out, there)
    name = _name(number, by, alone)
    runs.save_lines(results, out / f"{name}.jsonl")
    used = [tuning_key(question.arms[r["arm"]], float(r["epsilon"])) for r in results]
    note = _note(preset, question.then, by, tuned, list(dict.fromkeys(used)))
    more = "\n" + tables.measures(results) if question.measure else ""
    if len(results) < len(shown):
        more += f"\nIncomplete: {len(results)} of {len(shown)} runs.\n"
    for arm, end in zip(compared, ("", _compared(against))):
        text = tables.markdown(question.title, results, list(question.arms), arm, note) + more
        write_atomic(out / f"{name}{end}.md", text)
    if results:
        tables.figure(question.title, results, list(question.arms), out / f"{name}.svg")
    say(text)
    return len(runs.results_of(todo, out, there)) == len(todo)


def _note(preset: Preset, then: bool, by: str, tuned: Mapping[str, Any], used: list[str]) -> str:
    """How the settings of a table's runs came about; names what was tuned with less than the others."""
    from lalora_kernels.reproduce.runs import THEN

    if missing := [key for key in used if key not in tuned]:
        return f"Not tuned, the preset's own settings: {'; '.join(missing)}."
    then = then and bool(preset.then)
    more = f", then batch size and C for each method at ε = {THEN_EPSILON:g}," if then else ""
    note = (
        f"Learning rate and C tuned for each method and ε{more} with the same budget on seed {preset.tuning_seed}, by "
        f"test {by}; that seed is not in the table."
    )
    keys = dict.fromkeys(then_key(key) for key in used)
    if less := [key for key in keys if then and THEN not in tuned.get(key, {})]:
        note += f" Not yet tuned in batch size: {'; '.join(less)}."
    return note


def _tune(
    question: Question, epsilons: list[float], preset: Preset, base: dict[str, Any], out: Path,
    published: list[Path], jobs: int, deadline: float | None, say: Callable[[str], None],
) -> bool:  # fmt: skip
    """Tune every arm of the question that is not: the grid at every ε, then at one what the preset tries on top of its
    best. ``tuned.json`` holds the grid's choice and all that was tried."""
    from lalora_kernels.reproduce import runs

    tuned = runs.read_tuned(*published, out / runs.TUNED)
    further, seed = question.then and bool(preset.then), preset.tuning_seed
    arms = dict(tuned_arms(question, dict.fromkeys([*epsilons, THEN_EPSILON] if further else epsilons)))

    def run(tries: Mapping[str, list[Settings]], on: Mapping[str, Settings]) -> dict[str, list[dict[str, Any]]]:
        plans = {key: runs.tuning_jobs(arms[key], base | on[key], tries[key], seed) for key in tries}
        for job in runs.train([job for plan in plans.values() for job in plan], out, jobs, deadline):
            c = job.config
            say(f"tuning at ε = {c.epsilon:g}: {c.method} lr {c.lr:g} C {c.max_grad_norm:g} batches of {c.batch_size}")
        found = {key: runs.outcomes(plan, out) for key, plan in plans.items()}
        return {key: outcomes for key, outcomes in found.items() if outcomes is not None}

    grid = {key: runs.combinations(preset.tuning) for key in arms if key not in tuned}
    for key, outcomes in run(grid, dict.fromkeys(grid, {})).items():
        tried = [settings | outcome for settings, outcome in zip(grid[key], outcomes)]
        tuned[key] = {"settings": runs.best(tried), "tried": tried, "seed": seed}
    wanted = {key for key in arms if further and key == then_key(key) and runs.THEN not in tuned.get(key, {})}
    then: dict[str, list[Settings]] = {key: [] for key in wanted & set(tuned)}
    for step in preset.then:
        more = {key: [runs.further(tuned[key], found) | one for one in step] for key, found in then.items()}
        made = run(more, {key: runs.best(tuned[key]["tried"]) for key in more})
        then = {
            key: then[key] + [{runs.WITH: one} | outcome for one, outcome in zip(more[key], made[key])] for key in made
        }
    for key, found in then.items():
        tuned[key] = tuned[key] | {runs.THEN: found}
    write_atomic(out / runs.TUNED, json.dumps(tuned, indent=2) + "\n")
    return set(arms) <= set(tuned) and wanted <= set(then)


def _cost(base: dict[str, Any], out: Path, deadline: float | None, say: Callable[[str], None]) -> bool:
    from lalora_kernels.data import load_data
    from lalora_kernels.reproduce import cost

    config = make_config(base)
    data = load_data(config.dataset, test=config.test_dataset, image_size=config.image_size)
    path = out / f"question-{COST}.jsonl"
    for line in cost.measure(config, len(data.classes), data.kind, path, deadline):
        say(f"{line['contender']}, r = {line['rank']}: {line.get('error') or line['factors']}")
    if lines := cost.read_costs(path):
        write_atomic(out / f"question-{COST}.md", text := cost.markdown(lines, config, len(data.classes), data.kind))
        cost.figure(lines, config, out / f"question-{COST}.svg")
        say(text)
    return cost.complete(lines)

"""``lalora plan``: what a run will cost, before it: noise, ε, bytes, parameters, memory and time, methods side by side.

Noise and ε come from the functions that the run itself calls, bytes from the shapes that it sends; memory and time are
measured on this machine in a few steps on placeholders, each method and DP-LoRA with Opacus in a fresh process.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lalora_kernels.data import MOST_CLASSES, BadInput, load_data
from lalora_kernels.federated.config import CHOICES, Config, make_config
from lalora_kernels.federated.methods import METHODS, Method, get_method
from lalora_kernels.federated.plan import Plan, deal, make_plan
from lalora_kernels.federated.server import update_bytes
from lalora_kernels.nn import factor_of
from lalora_kernels.privacy.accountant import compute_epsilon
from lalora_kernels.settings_flags import CONFIG

MOST_RECORDS = 100_000_000  # each is dealt, and takes some bytes
POINTS = 12  # of the ε curve, where there are more rounds
OWN = ("rank", "method")  # settings that this command asks for in the plural


def add_plan(commands: Any, add_settings: Callable[..., None]) -> None:
    """The command's arguments."""
    plan = commands.add_parser(
        "plan",
        usage="lalora plan [options]",
        help="say what a run would cost, before it",
        description="Noise, the expected ε after each round, bytes sent, parameters, and the memory and time of a "
        "private step: measured on this machine with random weights on placeholder records, each method and DP-LoRA "
        "with Opacus in a fresh process. Nothing is trained and no model is downloaded.",
    )
    ask = plan.add_argument_group("the plan")
    ask.add_argument("--records", type=int, metavar="N", help="training records of all clients; no data set is read")
    ask.add_argument("--classes", type=int, metavar="N", help="how many there are, with --records (default: 10)")
    ask.add_argument("--methods", nargs="+", metavar="METHOD", default=list(METHODS), help="(default: %(default)s)")
    ask.add_argument("--ranks", nargs="+", type=int, metavar="R", help=f"(default: {Config().rank})")
    ask.add_argument("--no-dry-run", action="store_true", help="leave out what has to be measured")
    ask.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    ask.add_argument("--config", metavar="FILE", help=CONFIG)
    ask.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_settings(plan, leave_out=OWN)


def plan(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """``lalora plan``. Raises BadInput, or ValueError as ``make_plan`` and ``adapt`` do."""
    ranks = args.ranks or [given.get("rank", Config().rank)]
    if args.records is not None and "dataset" in given:
        raise BadInput("--records and --dataset are two ways to say how much data there is; give one of them")
    if args.classes is not None and args.records is None:
        raise BadInput("--classes goes with --records; a data set has its own")
    for method in args.methods:
        if method not in CHOICES["method"]:
            raise BadInput(f"--methods are of {', '.join(CHOICES['method'])}; got {method!r}")
    configs = [make_config(given | {"rank": rank}, args.config or "the command line") for rank in ranks]
    for method in args.methods:
        dataclasses.replace(configs[0], method=method)  # which refuses too few steps for it
    progress = None if args.json or not sys.stderr.isatty() else _say
    result = make(configs, args.methods, args.records, args.classes, measured=not args.no_dry_run, progress=progress)
    if args.json:
        print(json.dumps(result))
    else:
        from lalora_kernels.plan_tables import show

        show(result)
    return 0


def _say(what: str) -> None:
    print(f"\r\033[Kmeasuring {what} ..." if what else "\r\033[K", end="", file=sys.stderr, flush=True)


def make(
    configs: Sequence[Config],
    methods: Sequence[str],
    records: int | None = None,
    classes: int | None = None,
    *,
    measured: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The plan as one JSON-able mapping; ``configs`` differ in rank only. ``records`` None: the data set is read."""
    from lalora_kernels.dry_run import shapes

    config = configs[0]
    labels, classes, kind = _data(config, records, classes)
    costs = make_plan(config, [len(part) for part in deal(config, labels)])
    ranks = []
    for one in configs:
        state, kind = shapes(one, classes, kind)
        rows = [_method(one, get_method(name), costs, state) for name in methods]
        opacus = _method(one, get_method("dp-lora"), costs, state) | {"method": "Opacus"}
        ranks.append({"rank": one.rank, "methods": rows, "opacus": opacus})
    if measured:
        _measure(configs, ranks, classes, kind, progress or (lambda _: None))
    return {
        "settings": json.loads(config.to_json()),
        "records": len(labels),
        "classes": classes,
        "kind": kind,
        "placeholder_labels": records is not None,
        "delta": config.delta,
        "clients": [dataclasses.asdict(client) for client in costs.clients],
        "epsilon_curve": epsilon_curve(config, costs),
        "ranks": ranks,
    }


def _data(config: Config, records: int | None, classes: int | None) -> tuple[np.ndarray, int, str | None]:
    """(labels, classes, kind): the data set's own, or as many placeholders, equally many of each class."""
    if records is None:
        data = load_data(
            config.dataset,
            test=config.test_dataset,
            text_column=config.text_column,
            label_column=config.label_column,
            image_size=config.image_size,
        )
        return data.train.labels.numpy(), len(data.classes), data.kind
    classes = 10 if classes is None else classes
    if not (1 <= records <= MOST_RECORDS and 2 <= classes <= MOST_CLASSES):
        raise BadInput(
            f"a plan needs --records of at least 1 and --classes of at least 2, and at most {MOST_RECORDS:,} and "
            f"{MOST_CLASSES:,}; got {records} and {classes}"
        )
    return np.arange(records) % classes, classes, None


def epsilon_curve(config: Config, costs: Plan) -> list[dict[str, Any]]:
    """[{round, epsilon, epsilons}] as the run will report them, at ``POINTS`` rounds at most, the last among them."""
    if not config.private:
        return []
    points = min(POINTS, config.rounds)
    curve = []
    for number in [round(i * config.rounds / points) for i in range(points + 1)]:
        spent = []
        for client in costs.clients:
            steps = costs.steps_before(client.client, number + 1, config.local_steps)
            release = (client.noise_multiplier, client.sample_rate, steps)
            spent.append(compute_epsilon([release] if steps else [], config.delta))
        curve.append({"round": number, "epsilon": max(spent), "epsilons": spent})
    return curve


def _method(config: Config, method: Method, costs: Plan, state: Mapping[str, Tensor]) -> dict[str, Any]:
    rounds = range(1, config.rounds + 1)
    steps = Counter(method.schedule.active(t, k) for t in rounds for k in range(1, config.local_steps + 1))
    trained = {None, *(factor for factors in steps for factor in factors)}
    update = [update_bytes({key: v for key, v in state.items() if method.travels(key, t)}) for t in rounds]
    sent = [one * len(chosen) for one, chosen in zip(update, costs.participation)]
    return {
        "method": method.name,
        "trainable_parameters": sum(v.numel() for key, v in state.items() if factor_of(key) in trained),
        "bytes_sent_per_update": update,  # of one client, in each round
        "bytes_sent_per_round": sent,
        "bytes_sent": sum(sent),
        "private_steps": sum(client.steps for client in costs.clients),
        "steps_by_factor": dict(steps),
    }


def _measure(
    configs: Sequence[Config], ranks: list[dict], classes: int, kind: str | None, progress: Callable[[str], None]
) -> None:
    from lalora_kernels.dry_run import OPACUS, dry_run

    missing = [name for name in ("opacus", "peft") if importlib.util.find_spec(name) is None]
    for config, rank in zip(configs, ranks):
        for row in (rank["opacus"], *rank["methods"]):
            progress(f"{row['method']}, r = {config.rank}")
            if row is rank["opacus"] and missing:
                row["error"] = f"{' and '.join(missing)} not installed"
                continue
            found = dry_run(config, classes, kind, OPACUS if row is rank["opacus"] else row["method"])
            row |= found if "error" in found else _times(found, row)
        for row in rank["methods"]:
            row["against_opacus"] = {
                name: row[name] / rank["opacus"][name]
                for name in ("seconds_per_step", "step_memory", "bytes_sent")
                if row.get(name) and rank["opacus"].get(name)
            }
    progress("")


def _times(found: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A step's mean time, with each factor as often as the run will train it, and what all steps take one by one."""
    steps = row["steps_by_factor"]
    mean = sum(count * found["factors"][factors] for factors, count in steps.items()) / sum(steps.values())
    return {
        "seconds_per_step": mean,
        "seconds": mean * row["private_steps"],
        "seconds_by_factor": found["factors"],
        "peak_memory": found["peak"],
        "step_memory": found["step"],
        "device_memory": found["device"],
    }

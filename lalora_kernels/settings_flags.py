"""The settings of a run as flags of the command line, with their help."""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lalora_kernels.data import BadInput, no_such_file
from lalora_kernels.federated.config import CHOICES, Config, check_value, read_toml, type_of
from lalora_kernels.reproduce.stored import read_object

CONFIG = "settings by the names of the flags in TOML, or the config.json of another run; flags override them"

# (group, (setting, help)): every setting is a flag and a name in the TOML file.
FLAGS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("model and data", (
        ("model", "embedded (a small vision transformer), timm:NAME, hf:NAME, or a folder that transformers wrote"),
        ("weights", "weights file for a timm model, instead of timm's download"),
        ("dataset", "mnist, digits, FILE.npz of images, a folder of images with one for each class, FILE.tsv, .csv or "
                    ".jsonl of text (also .gz), or hf:NAME of the hub, hf:FOLDER of Parquet files"),
        ("test_dataset", "test records beside a file of text or a folder; without them a fifth is set aside"),
        ("text_column", "column of the text, where it cannot be guessed; two with a comma are a pair"),
        ("label_column", "column of the label, where it cannot be guessed"),
        ("image_size", "input size in pixels, where it should not be the model's own"),
        ("max_length", "longest text, in tokens"),
    )),
    ("method", (
        ("method", "which LoRA factor trains when, and what travels"),
        ("smoothing", "filter of the noisy gradient; at no privacy; auto: the method's own; others are experimental"),
        ("rank", "r of the adapters"),
        ("lora_alpha", "the adapter's output is scaled by lora_alpha / r (default: r)"),
        ("targets", "layers to adapt: all-linear, qv (a fused qkv whole), names with commas, or a regular expression"),
        ("train_head", "train the classifier in full too; auto: only if it has no trained weights"),
    )),
    ("federation", (
        ("clients", "how many hold the training records"),
        ("fraction", "share of the clients that take part in a round"),
        ("rounds", "rounds of averaging"),
        ("local_steps", "private steps of a client in a round (K)"),
        ("partition", "how records are dealt: by class with Dirichlet draws, or evenly"),
        ("dirichlet_alpha", "small: each client sees few classes; large: all look alike"),
        ("min_records", "least records of a client; the draw is repeated until it holds (default: twice the batch)"),
        ("average", "weights of the mean: the same for all, or by number of records"),
        ("aggregator", "how updates are combined; median and trimmed_mean weigh all clients alike"),
        ("trim", "share of the highest and of the lowest values that trimmed_mean leaves out"),
        ("max_update_norm", "an update this many times farther away than the state's norm is left out"),
        ("clip_update_norm", "largest L2 norm of what an update changes; more is scaled down (default: no limit)"),
        ("quorum", "share of the chosen clients whose valid updates a round needs"),
        ("wire", "number format of what travels (Flower only; in one process nothing does)"),
    )),
    ("privacy", (
        ("epsilon", "budget of each client over the whole run; inf: no noise and no guarantee"),
        ("delta", "the δ that goes with it"),
        ("clipping", "how one record's gradient is bounded"),
        ("max_grad_norm", "that bound, C; adaptive clipping starts from it"),
        ("target_unclipped_quantile", "adaptive clipping: share of the records that C shall leave as they are"),
    )),
    ("optimization", (
        ("batch_size", "expected size of a private batch (b); each record joins with probability b / records"),
        ("physical_batch_size", "most records in memory at once (default: the whole batch)"),
        ("optimizer", "local optimizer, new in each round"),
        ("lr", "learning rate (default: 0.5, behind the filter 1.0; 0.01 for adamw)"),
        ("lr_b_ratio", "learning rate of the B factors, as a multiple of lr"),
        ("lr_schedule", "over the rounds"),
        ("momentum", "of sgd, within a round"),
        ("weight_decay", "of the optimizer"),
        ("seed", "public seed of partition, participation and initialization; noise never comes from it"),
        ("device", "auto, cpu, cuda, cuda:1, ..."),
    )),
)  # fmt: skip


def add_settings(parser: argparse.ArgumentParser, leave_out: Sequence[str] = ()) -> None:
    """A flag for each setting but those of ``leave_out``, which the command asks for in another way."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for title, flags in FLAGS:
        group = parser.add_argument_group(title)
        for name, text in flags:
            if name in leave_out:
                continue
            field = fields[name]
            kind, _ = type_of(field)
            shown = "" if field.default is None else f" (default: {field.default})"
            choices = CHOICES.get(name)
            group.add_argument(
                "--" + name.replace("_", "-"), type=kind, choices=choices, default=None, help=text + shown,
                metavar=None if choices else {str: "NAME", int: "N", float: "X"}[kind],
            )  # fmt: skip


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the user set: the values of the file that --config names, overridden by flags."""
    values = read_settings(Path(args.config)) if getattr(args, "config", None) is not None else {}
    names = [field.name for field in dataclasses.fields(Config)]
    return values | {name: value for name in names if (value := getattr(args, name, None)) is not None}


def read_settings(path: Path) -> dict[str, Any]:
    """Of a TOML file, or of a run's config.json, where null is a setting that was left out.

    Raises BadInput, also for a value that does not fit: by the name of the file, since no flag is wrong.
    """
    values = _read_json(path) if path.suffix == ".json" else read_toml(path)
    if values.get("epsilon") == "inf":
        values["epsilon"] = math.inf
    for field in dataclasses.fields(Config):
        if field.name in values:
            check_value(field, values[field.name], f"{path}: {field.name}")
    return values


def _read_json(path: Path) -> dict[str, Any]:
    cure = "give a TOML file, or the config.json of a run"
    try:
        found = read_object(path, cure, "settings")["settings"]
    except FileNotFoundError:
        raise no_such_file(path) from None
    except OSError as error:
        raise BadInput(f"{path}: not readable ({error}); {cure}") from error
    if not isinstance(found, Mapping):
        raise BadInput(f"{path}: its settings are a {type(found).__name__}; {cure}")
    return {name: value for name, value in found.items() if value is not None}

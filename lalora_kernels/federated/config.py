"""Settings of a federated run: one flat, validated record that TOML, JSON and command-line flags share."""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from lalora_kernels.data import BadInput
from lalora_kernels.federated.methods import FURTHER, METHODS, get_method
from lalora_kernels.privacy.accountant import MAX_STEPS
from lalora_kernels.privacy.clipping import CLIPPING
from lalora_kernels.privacy.postprocess import EXPERIMENTAL
from lalora_kernels.schedule import DEFAULT

CHOICES = {
    "method": (*METHODS, *FURTHER),
    "smoothing": ("auto", "binomial5", "none", *EXPERIMENTAL),
    "clipping": (*CLIPPING, "adaptive"),
    "partition": ("dirichlet", "iid"),
    "average": ("uniform", "size"),
    "aggregator": ("mean", "median", "trimmed_mean"),
    "wire": ("float32", "bfloat16"),
    "optimizer": ("sgd", "adamw"),
    "lr_schedule": ("cosine", "constant"),
    "train_head": ("auto", "yes", "no"),
}
LARGEST = 1e15  # of factors and rates: a product of two still fits float32
# name: (low, high, whether low itself is allowed)
RANGES = {
    "clients": (1, math.inf, True),
    "fraction": (0, 1, False),
    "rounds": (1, MAX_STEPS, True),
    "local_steps": (1, MAX_STEPS, True),
    "quorum": (0, 1, False),
    "trim": (0, 0.5, True),
    "max_update_norm": (0, math.inf, False),
    "clip_update_norm": (0, math.inf, False),
    "batch_size": (1, math.inf, True),
    "physical_batch_size": (1, math.inf, True),
    "epsilon": (0, 1e300, False),
    "delta": (0, 1, False),
    "max_grad_norm": (0, LARGEST, False),
    "target_unclipped_quantile": (0, 1, True),
    "lr": (0, LARGEST, False),
    "lr_b_ratio": (0, LARGEST, False),
    "momentum": (0, 1, True),
    "weight_decay": (0, LARGEST, True),
    "rank": (1, 100_000, True),  # no layer is wider
    "lora_alpha": (0, LARGEST, False),
    "dirichlet_alpha": (0, math.inf, False),
    "min_records": (1, math.inf, True),
    "image_size": (1, math.inf, True),
    "max_length": (1, math.inf, True),
    "seed": (0, 2**63, True),
}
INFINITE = ("epsilon",)  # infinity is a value: no noise, no guarantee
OPEN_ABOVE = ("delta", "momentum", "trim")


@dataclass(frozen=True)
class Config:
    """Settings of one run; the defaults are the embedded default run. Raises BadInput for a value out of range."""

    # what is trained on what
    model: str = "embedded"
    weights: str | None = None
    dataset: str = "mnist"
    test_dataset: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    max_length: int = 128
    # the method
    method: str = DEFAULT
    smoothing: str = "auto"  # as the method's paper has it
    rank: int = 8
    lora_alpha: float | None = None  # None: the rank, so s = 1
    targets: str = "all-linear"
    train_head: str = "auto"  # auto: only a head without trained weights
    # the federation
    clients: int = 8
    fraction: float = 0.5
    rounds: int = 8
    local_steps: int = 20
    partition: str = "dirichlet"
    dirichlet_alpha: float = 0.5
    min_records: int | None = None  # None: twice the batch
    average: str = "uniform"
    aggregator: str = "mean"  # the five below: guard.Rules
    trim: float = 0.2
    max_update_norm: float = 1000.0
    clip_update_norm: float | None = None
    quorum: float = 0.5
    wire: str = "float32"
    # privacy
    epsilon: float = 3.0
    delta: float = 1e-5
    clipping: str = "flat"
    max_grad_norm: float = 1.0
    target_unclipped_quantile: float = 0.5  # of adaptive clipping
    # optimization
    batch_size: int = 64
    physical_batch_size: int | None = None
    optimizer: str = "sgd"
    lr: float | None = None  # None: see client.base_rate
    lr_b_ratio: float = 1.0
    lr_schedule: str = "cosine"
    momentum: float = 0.0
    weight_decay: float = 0.0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name), "--" + field.name.replace("_", "-"))
        if self.local_steps < (least := get_method(self.method).schedule.least_steps):
            raise BadInput(
                f"--local-steps is {self.local_steps}: {self.method} trains A and B in turn, anew in every round, and "
                f"has trained both after {least} steps; --local-steps {least} or more, or another --method"
            )
        few = min(self.clients, 2**53)  # which a float holds
        turns = self.rounds * max(1, round(self.fraction * few)) // self.clients
        if self.private and self.local_steps * turns > MAX_STEPS:
            raise BadInput(
                f"--rounds {self.rounds} of --local-steps {self.local_steps} are {self.local_steps * turns:,} private "
                f"steps of each client, and an ε is computed for {MAX_STEPS:,} at most; make one of them smaller"
            )
        if self.average == "size" and self.aggregator != "mean":
            raise BadInput(f"--aggregator {self.aggregator} weighs all alike; it does not go with --average size")

    @property
    def private(self) -> bool:
        """False where ``epsilon`` is infinite: the run adds no noise and guarantees nothing."""
        return math.isfinite(self.epsilon)

    @property
    def filter(self) -> str | None:
        """The filter behind ``smoothing``: its name, or None; "auto" is that of the method's schedule."""
        if self.smoothing == "auto":
            return get_method(self.method).schedule.smoothing
        return None if self.smoothing == "none" else self.smoothing

    @property
    def records_needed(self) -> int:
        """The least number of records that the partition gives a client."""
        return 2 * self.batch_size if self.min_records is None else self.min_records

    @property
    def scaling(self) -> float:
        """s of the adapters: lora_alpha / r."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.rank

    def to_json(self) -> str:
        """JSON text; an infinite ε is the string "inf", since JSON has no infinity."""
        values = {k: "inf" if v == math.inf else v for k, v in dataclasses.asdict(self).items()}
        return json.dumps(values, indent=2) + "\n"


def type_of(field: dataclasses.Field) -> tuple[type, bool]:
    """(str, int or float; whether None is allowed) of a setting."""
    kinds: Any = getattr(field.type, "__args__", (field.type,))
    return kinds[0], len(kinds) > 1


def check_value(field: dataclasses.Field, value: Any, given: str) -> None:
    """Raise BadInput, which begins with ``given``, where the value is not of the setting's type or out of its range."""
    name, (wanted, optional) = field.name, type_of(field)
    if value is None and optional:
        return
    fits = isinstance(value, (int, float) if wanted is float else wanted) and not isinstance(value, bool)
    if not fits:
        what = {str: "text", int: "a whole number", float: "a number"}[wanted]
        raise BadInput(f"{given} is {what}, got {value!r}")
    if name in CHOICES and value not in CHOICES[name]:
        raise BadInput(f"{given} is one of {', '.join(CHOICES[name])}; got {value!r}")
    if name in RANGES and not _inside(name, value):
        low, high, closed = RANGES[name]
        below = "" if high == math.inf else f" and {'<' if name in OPEN_ABOVE else '<='} {high:g}"
        below += ", or inf" * (name in INFINITE)
        number = f"a {'whole ' if wanted is int else ''}number {'>=' if closed else '>'} {low:g}{below}"
        raise BadInput(f"{given} is {number}, got {value!r}")


def _inside(name: str, value: float) -> bool:
    low, high, closed = RANGES[name]
    if abs(value) == math.inf:  # math.isinf stops at whole numbers that no float holds
        return name in INFINITE and value > 0
    above = value < high if name in OPEN_ABOVE else value <= high
    return above and (value >= low if closed else value > low)


NAMES = tuple(field.name for field in dataclasses.fields(Config))


def make_config(values: dict[str, Any], where: str | Path = "settings") -> Config:
    """A Config from a flat mapping; ε = inf (JSON: "inf") means no noise. Raises BadInput for unknown names, and for
    values that do not fit: by their flags' names, or by file and key, where a Path says which file holds them."""
    if not isinstance(values, Mapping):
        raise BadInput(f"{where}: settings are names with values, got {type(values).__name__}")
    if strange := sorted(set(values) - set(NAMES)):
        import difflib

        close = difflib.get_close_matches(strange[0], NAMES, 1)
        raise BadInput(f"{where}: unknown setting {strange[0]!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    values = dict(values)
    if values.get("epsilon") == "inf":
        values["epsilon"] = math.inf
    if not isinstance(where, Path):
        return Config(**values)
    for field in dataclasses.fields(Config):
        if field.name in values:
            check_value(field, values[field.name], f"{where}: {field.name}")
    try:
        return Config(**values)
    except BadInput as error:  # two that do not go together
        raise BadInput(f"{where}: {error}") from error


def read_toml(path: str | Path) -> dict[str, Any]:
    """Settings of a TOML file: the names of the flags, with - or _; tables only group. Raises BadInput."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{path}: not a readable TOML file ({error})") from error
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        for name, one in (value.items() if isinstance(value, dict) else [(key, value)]):
            name = name.replace("-", "_")
            if name in flat:
                raise BadInput(f"{path}: {name} is given twice")
            flat[name] = one
    return flat

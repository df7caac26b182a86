"""The two files of an adapter in PEFT's format: adapter_model.safetensors beside adapter_config.json."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from lalora_kernels.adapt import check_settings

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Rows = dict[str, list[tuple[int, int]]]  # layer -> [(start, stop), ...] of the outputs that its adapter has
ROWS = "lalora_kernels.rows"  # where the weights' header says them, which PEFT does not read
# Settings that are honoured, or that do not change what a loaded adapter computes. Any other that is switched on does
# (DoRA, aLoRA, and those that PEFT does not have yet): it is refused by name.
KNOWN = set(
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config eva_config exclude_modules fan_in_fan_out "
    "inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout "
    "lora_ga_config megatron_core modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision "
    "runtime_config target_modules task_type use_rslora".split()
)
# Initializations that leave the base as it was, so that the factors make the model. An unknown one is refused.
PLAIN = ("gaussian", "eva", "orthogonal", "mica")
# Those that change the base weights too. PEFT makes the first two again from the base as it loads them (but not
# pissa_niter_4, whose SVD is drawn).
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
SERVED = "patch_peft(PeftModel.from_pretrained(model, folder, is_trainable=True)) serves it"
CONVERTED = "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) makes a plain LoRA adapter of it"


def write_file(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def listed(keys: Iterable[str]) -> str:
    """A line for each, as errors end."""
    return "\n  " + "\n  ".join(sorted(keys))


def refuse_nonfinite(tensors: dict[str, Tensor], outcome: str) -> None:
    """Raise ValueError with the names of tensors that hold NaN or Inf."""
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise ValueError(f"NaN or Inf in the adapter, {outcome}:{listed(bad)}")


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises FileNotFoundError, or ValueError where it is damaged or asks for more than LoRA."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: {CONFIG} is missing")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: a LoRA adapter has peft_type LORA, this one says {kind!r}")
    unsupported = sorted(key for key, value in config.items() if key not in KNOWN and value)
    cures = {SERVED if key == "lora_bias" else "" for key in unsupported}
    if config.get("bias") not in (None, "none"):
        unsupported.append(f"bias={config['bias']!r}")
        cures.add(SERVED if config["bias"] in ("all", "lora_only") else "")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool)) and str(init).lower() not in PLAIN:
        what, kind = f"init_lora_weights={init!r}", str(init).lower()
        changes = kind.startswith(CHANGES_BASE)
        unsupported.append(what + (" (it changes the base weights)" if changes else " (it is not known)"))
        cures.add(SERVED if kind in CHANGES_BASE[:2] else CONVERTED if changes and kind != "loftq" else "")
    if unsupported:
        cure = f"; {cures.pop()}" if len(cures) == 1 and "" not in cures else ""  # that of all of it
        raise ValueError(f"{path} uses what is not supported here: {', '.join(unsupported)}{cure}")
    try:
        _check_values(config)
    except (ValueError, re.error) as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _check_values(config: dict[str, Any]) -> None:
    kinds: dict[str, Any] = {"modules_to_save": list, "rank_pattern": dict, "alpha_pattern": dict}
    kinds |= {"target_modules": (str, list), "exclude_modules": (str, list)}
    for key, kind in kinds.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise ValueError(f"{key} cannot be {config[key]!r}")
        if isinstance(config.get(key), list) and not all(isinstance(name, str) for name in config[key]):
            raise ValueError(f"{key} holds names, got {config[key]!r}")
    if not isinstance(config.get("task_type"), (str, type(None))):
        raise ValueError(f"task_type cannot be {config['task_type']!r}")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for pattern in (config.get("target_modules"), config.get("exclude_modules")):
        re.compile(pattern if isinstance(pattern, str) else "")
    for pattern in (*(config.get("modules_to_save") or ()), *ranks, *alphas):
        re.compile(rf"(^|.*\.)({pattern})($|\..*)")  # inside others, as they are used
    for r in (config.get("r"), *ranks.values()):
        for alpha in (config.get("lora_alpha"), *alphas.values()):
            check_settings(r, alpha, config.get("lora_dropout") or 0.0)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """adapter_model.safetensors. Raises FileNotFoundError, or ValueError where it is damaged."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = "; adapter_model.bin is a pickle, which is not read: save it with PEFT as safetensors"
        raise FileNotFoundError(
            f"{folder}: {WEIGHTS} is missing{pickled if (folder / 'adapter_model.bin').exists() else ''}"
        )
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from None


def tensors_file(tensors: dict[str, Tensor], rows: Rows) -> bytes:
    """The weights' file. Equal arguments give equal bytes."""
    if not rows:
        return save(tensors, metadata={"format": "pt"})
    data = save(tensors, metadata={"format": "pt", ROWS: json.dumps(rows, sort_keys=True)})
    # safetensors writes two entries of the metadata now in one order, now in the other
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def read_rows(folder: Path) -> Rows:
    """What ``tensors_file`` was given; {} in a file of somebody else's. Raises ValueError for what cannot be that."""
    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(ROWS, "{}")
    try:
        rows = {name: [(start, stop) for start, stop in parts] for name, parts in json.loads(text).items()}
        for parts in rows.values():
            edges = [edge for part in parts for edge in part]
            if not all(type(edge) is int and edge >= 0 for edge in edges) or edges != sorted(set(edges)):
                raise ValueError(f"{parts} are no ranges of outputs")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt: {ROWS} in its header: {error}") from None
    return rows

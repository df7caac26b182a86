"""Adapters on disk in PEFT's format: adapter_model.safetensors beside adapter_config.json. Imports nothing of PEFT."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lalora_kernels.adapt import SAVED, Fused, Model, install, lora_factors, saved_modules
from lalora_kernels.nn import LoRAEmbedding, LoRALayer, LoRALinear, lora_layers
from lalora_kernels.peft_files import (
    CONFIG,
    WEIGHTS,
    Rows,
    listed,
    read_config,
    read_rows,
    read_tensors,
    refuse_nonfinite,
    tensors_file,
    write_file,
)
from lalora_kernels.peft_names import (
    common_and_pattern,
    peft_saved,
    peft_targets,
    rank_and_alpha,
    refuse_apart,
    refuse_two_places,
    renamed,
    targets_and_saved,
    with_task_heads,
    with_tied,
)
from lalora_kernels.targets import adapted_rows, head, lora_class, modules_by_name, refusal

PREFIX = "base_model.model."  # PEFT puts it before every key


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write an adapted model's factors and modules_to_save as PEFT does, for PEFT and ``load_adapter``.

    ``folder`` is made if missing. Each file is replaced in one step: a crash leaves the old one or the new one. Equal
    adapters give equal bytes. ``base_model_name_or_path`` is the model's own ``name_or_path`` where it is not given;
    ``task_type`` is PEFT's ("SEQ_CLS", "CAUSAL_LM", ...) or None. Which outputs of a fused projection are adapted
    (``fused="qv"``) stands in the weights' header, where PEFT does not look; B's other rows are written as zeros.

    Raises ValueError for a model without LoRA layers, for NaN or Inf in a tensor (by name), and for what the format
    cannot say: a trainable parameter outside factors and modules_to_save, layers that differ in dropout or rsLoRA, a
    layer under two names, an adapted layer that PEFT would count as one of modules_to_save.
    """
    layers = dict(lora_layers(model))
    if not layers:
        own = "a PEFT model is saved by its own save_pretrained (diffusers' add_adapter: save_lora_adapter)"
        raise ValueError(f"nothing to save: the model has no LoRA layer; call adapt(model, ...) first; {own}")
    _refuse_unsayable(model, layers)
    config = _config(model, layers, base_model_name_or_path, task_type)
    tensors: dict[str, Tensor] = {}
    tensors |= {name if "lora_embedding" in name else f"{name}.weight": factor for name, factor in lora_factors(model)}
    rows = _rows(layers)
    tensors |= {f"{name}.lora_B.weight": layers[name].masked_B() for name in rows}  # as it acts, whatever it holds
    for name in peft_saved(model, config["modules_to_save"] or ()):
        tensors |= {f"{name}.{key}": t for key, t in model.get_submodule(name).state_dict().items()}
    tensors = {PREFIX + key: tensors[key].detach().cpu().clone().contiguous() for key in sorted(tensors)}
    refuse_nonfinite(tensors, "nothing was saved")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / WEIGHTS, tensors_file(tensors, rows))
    write_file(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def load_adapter(model: Model, folder: str | os.PathLike, *, fused: Fused | None = None) -> Model:
    """Read an adapter that ``save_adapter`` or PEFT wrote into ``model``, in place; return the model.

    A plain model is adapted first, as the files say, and trains what ``adapt`` would let train. An adapted one must
    have the same layers, ranks and scalings; which of its parameters train does not change. ``fused`` is ``adapt``'s;
    None: as the adapter was trained, so that one of ``fused="qv"`` goes on without the keys (a file that PEFT wrote
    does not say).

    Raises FileNotFoundError for a missing file; ValueError for a corrupt or truncated one, for a feature of PEFT that
    is not supported (by name), for keys that do not fit the model (all of them), for shapes that do not fit (both), for
    outputs that are left out by ``fused`` and not by the file, and for NaN or Inf. Nothing is changed unless everything
    fits.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder)
    modules = modules_by_name(model)
    saved = peft_saved(model, with_task_heads(config.get("modules_to_save"), config.get("task_type")))
    factors, others, tables = _split(tensors, folder)
    names = list(dict.fromkeys(name for name, _ in factors))
    bases = _take_bases(model, saved, names, others)
    _refuse_keys(model, modules, saved, names, factors, others, config)
    _refuse_kinds(model, modules, names, tables, bases)
    plan = {name: rank_and_alpha(name, config) for name in names}
    adapted = any(True for _ in lora_layers(model))
    if adapted:
        _refuse_other_adapter(model, modules, plan, config)
    refuse_two_places(model, [modules[name] for name in names])
    _refuse_shapes(model, modules, plan, factors, others)
    refuse_nonfinite(tensors, "nothing was loaded")
    refuse_apart(model, others)
    rows = read_rows(folder) if fused is None else adapted_rows(model, names, fused)
    _refuse_rows(modules, factors, rows, fused)

    if adapted:
        for name in saved:
            setattr(modules[name], SAVED, True)
    else:
        install(model, plan, saved, float(config.get("lora_dropout") or 0.0), bool(config.get("use_rslora")), rows)
        modules = modules_by_name(model)
    state = model.state_dict()
    with torch.no_grad():
        for (name, factor), value in factors.items():
            getattr(modules[name], f"lora_{factor}").copy_(value)
        for key, value in others.items():
            state[key].copy_(value)
    return model


def _rows(layers: Mapping[str, LoRALayer]) -> Rows:
    """The outputs that are adapted, of layers of which not all are."""
    found: Rows = {}
    for name, layer in layers.items():
        if layer.trained_rows is not None:
            flags = [0.0, *layer.trained_rows.flatten().tolist(), 0.0]
            edges = [i for i in range(len(flags) - 1) if flags[i] != flags[i + 1]]
            found[name] = list(zip(edges[::2], edges[1::2]))
    return found


def _refuse_unsayable(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    trained = (m for name in saved_modules(model) for m in model.get_submodule(name).modules())
    refuse_two_places(model, [*layers.values(), *(m for m in trained if m._parameters)])
    for what, values in (
        ("lora_dropout", {getattr(layer.lora_dropout, "p", 0.0) for layer in layers.values()}),
        ("use_rslora", {layer.use_rslora for layer in layers.values()}),
    ):
        if len(values) > 1:
            raise ValueError(f"PEFT has one {what} for all layers, this model has {sorted(values)}")
    sayable = {id(factor) for _, factor in lora_factors(model)}
    sayable |= {id(p) for name in saved_modules(model) for p in model.get_submodule(name).parameters()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in sayable]
    if lost:
        raise ValueError(
            "trainable, but neither LoRA factors nor inside modules_to_save, so their training would be lost; freeze "
            f"them, or adapt with modules_to_save naming their modules:{listed(lost)}"
        )


def _config(
    model: nn.Module, layers: dict[str, LoRALayer], base_model_name_or_path: str | None, task_type: str | None
) -> dict[str, Any]:
    first = next(iter(layers.values()))
    targets, saved = targets_and_saved(model, list(layers), with_tied(model, saved_modules(model)), task_type)
    r, rank_pattern = common_and_pattern({name: layer.r for name, layer in layers.items()})
    alpha, alpha_pattern = common_and_pattern({name: layer.lora_alpha for name, layer in layers.items()})
    auto = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": auto if task_type is None else None,
        "base_model_name_or_path": base_model_name_or_path or getattr(model, "name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": getattr(first.lora_dropout, "p", 0.0),
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": targets,
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": first.use_rslora,
    }


def _split(
    tensors: dict[str, Tensor], folder: Path
) -> tuple[dict[tuple[str, str], Tensor], dict[str, Tensor], set[str]]:
    """({(layer, "A" or "B"): factor}, {key in the model's state_dict: tensor of modules_to_save}, embeddings)"""
    factors: dict[tuple[str, str], Tensor] = {}
    others: dict[str, Tensor] = {}
    tables: set[str] = set()
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_(A|B)\.weight", name):
            factors[match[1], match[2]] = value
        elif match := re.fullmatch(r"(.+)\.lora_embedding_(A|B)", name):
            factors[match[1], match[2]] = value
            tables.add(match[1])
        else:
            others[name] = value
    unsupported = [key for key in others if ".lora_" in key]
    if unsupported:
        raise ValueError(f"{folder}: only lora_A and lora_B weights are supported, found:{listed(unsupported)}")
    if not factors:
        raise ValueError(f"{folder} holds no LoRA factor")
    return factors, others, tables


def _file_key(module: nn.Module, name: str, factor: str) -> str:
    return f"{name}.lora_embedding_{factor}" if isinstance(module, nn.Embedding) else f"{name}.lora_{factor}.weight"


def _take_bases(model: nn.Module, saved: list[str], names: list[str], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """{key in the model: tensor}, taken out of ``others``: frozen weights of the model in the file.

    PEFT stores those of the embeddings and of the head where one of them is adapted, or on demand.
    """
    modules, ends, state, found = modules_by_name(model), head(model), model.state_dict(), {}
    for key in [k for k in others if not any(k.startswith(name + ".") for name in saved)]:
        owner, _, leaf = key.rpartition(".")
        name = owner.removesuffix(".base_layer")
        module = modules.get(name)
        if name in names if name != owner else isinstance(module, nn.Embedding) or id(module) in ends:
            if f"{name}.{leaf}" in state:
                found[f"{name}.{leaf}"] = others.pop(key)
    return found


def _refuse_kinds(
    model: nn.Module, modules: dict[str, nn.Module], names: list[str], tables: set[str], bases: dict[str, Tensor]
) -> None:
    """Factors of embeddings belong to embeddings; frozen weights in the file must be the model's."""
    kinds: dict[str, Any] = {n: type(m) if isinstance(m := modules[n], LoRALayer) else lora_class(m) for n in names}
    wrong = [n for n in names if kinds[n] is not None and (n in tables) != issubclass(kinds[n], LoRAEmbedding)]
    if wrong:
        raise ValueError(f"an embedding in the file or in the model, but not in both:{listed(wrong)}")
    state = model.state_dict()
    for name, base in bases.items():
        if not (base.shape == state[name].shape and torch.equal(base.to(state[name]), state[name])):
            raise ValueError(
                f"the adapter also holds a weight for {name.rpartition('.')[0]} that is not the model's (it was "
                "trained or resized); save it with PEFT's save_pretrained(..., save_embedding_layers=False), or load "
                "the model it belongs to"
            )


def _refuse_keys(
    model: nn.Module,
    modules: dict[str, nn.Module],
    saved: list[str],
    names: list[str],
    factors: dict[tuple[str, str], Tensor],
    others: dict[str, Tensor],
    config: dict[str, Any],
) -> None:
    state = model.state_dict()
    inside = {key for key in state if any(key.startswith(name + ".") for name in saved)}
    if any(isinstance(getattr(m, "base_layer", None), nn.Module) for m in modules.values()):
        raise ValueError("the model has layers of PEFT's; load with its own load_adapter, or into the plain model")
    strange = [name for name in names if name not in modules] + [key for key in others if key not in inside]
    if strange:
        raise ValueError(
            f"the adapter does not fit this model, which has no place for:{listed(strange)}{renamed(strange, modules)}"
        )
    missing = [_file_key(modules[name], name, f) for name in names for f in "AB" if (name, f) not in factors]
    missing += [key for key in inside if key not in others]
    missing += [name for name in saved_modules(model) if not any((name + ".").startswith(s + ".") for s in saved)]
    if not config.get("layers_to_transform"):
        held = {id(modules[name]) for name in names}
        excluded = config.get("exclude_modules") or ()
        for name, module in modules.items():
            meant = peft_targets(name, config.get("target_modules"), saved) and not peft_targets(name, excluded, ())
            if meant and id(module) not in held and (lora_class(module) or isinstance(module, LoRALayer)):
                missing.append(_file_key(module, name, "A"))
    if missing:
        raise ValueError(f"the adapter is incomplete, nothing in it for:{listed(missing)}")


def _refuse_other_adapter(
    model: nn.Module, modules: dict[str, nn.Module], plan: dict[str, tuple[int, float]], config: dict[str, Any]
) -> None:
    held = {id(modules[name]) for name in plan}
    wrong = [f"{name}: adapted in the model, not in the file" for name, m in lora_layers(model) if id(m) not in held]
    for name, (r, alpha) in plan.items():
        layer = modules[name]
        if not isinstance(layer, LoRALayer):
            wrong.append(f"{name}: in the file, not adapted in the model")
            continue
        if layer.merged:
            raise RuntimeError(f"{name} is merged; call unmerge(model) before loading an adapter")
        scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        if layer.r != r or not math.isclose(layer.scaling, scaling, rel_tol=1e-9):
            wrong.append(f"{name}: r {r}, scaling {scaling:g} in the file; {layer.r}, {layer.scaling:g} in the model")
    if wrong:
        raise ValueError(f"the model is adapted in another way; call unadapt(model) first:{listed(wrong)}")


def _refuse_rows(
    modules: dict[str, nn.Module], factors: dict[tuple[str, str], Tensor], rows: Rows, fused: str | None
) -> None:
    """``rows``: the outputs to adapt where not all are, by ``fused``, or by the file if that is None."""
    source = "in the file" if fused is None else f"with fused={fused!r}"
    wrong = [name for name in rows if (name, "B") not in factors]
    for (name, factor), value in factors.items():
        if factor == "A":
            continue
        module, wanted = modules[name], rows.get(name)
        kept = wanted
        if isinstance(module, LoRALayer):
            kept = _rows({name: module}).get(name)
            if kept != wanted and (wanted is not None or fused is not None):  # a file of PEFT's does not say
                raise ValueError(
                    f"the model is adapted in another way; call unadapt(model) first, or give the model's own fused=: "
                    f"{name} has outputs {wanted or 'all'} {source}, {kept or 'all'} in the model"
                )
        elif wanted is not None:
            linear = issubclass(lora_class(module) or LoRALayer, LoRALinear)
            wrong += [] if linear and (not wanted or wanted[-1][1] <= len(value)) else [name]
        out = torch.ones(len(value), dtype=torch.bool)
        for start, stop in [(0, len(value))] if kept is None else kept:
            out[start:stop] = False
        if value[out].any():
            raise ValueError(f"{name}: the file adapts outputs that fused='qv' leaves out; take fused='qkv'")
    if wrong:
        raise ValueError(f"the file says which outputs are adapted of what is not such a layer:{listed(wrong)}")


def _refuse_shapes(
    model: nn.Module,
    modules: dict[str, nn.Module],
    plan: dict[str, tuple[int, float]],
    factors: dict[tuple[str, str], Tensor],
    others: dict[str, Tensor],
) -> None:
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = []
    for (name, factor), value in factors.items():
        module, r = modules[name], plan[name][0]
        why = None if isinstance(module, LoRALayer) else refusal(model, name, module)
        if why:
            raise ValueError(f"{name} cannot be adapted: {why}")
        kind: Any = type(module) if isinstance(module, LoRALayer) else lora_class(module)
        expected.append((_file_key(module, name, factor), value, kind.factor_shapes(module, r)["AB".index(factor)]))
    state = model.state_dict()
    expected += [(key, value, tuple(state[key].shape)) for key, value in others.items()]
    wrong = [f"{k}: {tuple(v.shape)} in the file, {s} in the model" for k, v, s in expected if tuple(v.shape) != s]
    if wrong:
        raise ValueError(f"shapes that do not fit:{listed(wrong)}")

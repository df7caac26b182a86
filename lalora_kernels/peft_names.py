"""PEFT's rules for names, both ways: what a configuration means in a model, and how to say what a model has."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lalora_kernels.targets import ends_with, modules_by_name

TASK_HEADS = {  # PEFT adds these to modules_to_save by itself
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def targets_and_saved(
    model: nn.Module, adapted: list[str], marked: list[str], task_type: str | None
) -> tuple[list[str] | str, list[str]]:
    """target_modules and modules_to_save that mean these layers and no others in PEFT; short names where they can."""

    def last(names: list[str]) -> list[str]:
        return sorted({n.rpartition(".")[2] for n in names})

    modules = modules_by_name(model)
    pattern = "|".join(map(re.escape, sorted(adapted)))
    for names in (last(marked), sorted(marked)):
        if set(peft_saved(model, names)) != set(peft_saved(model, marked)):
            continue
        saved = with_task_heads(names, task_type, model)
        wrapped = [f for f in peft_saved(model, saved) if any(a == f or a.startswith(f + ".") for a in adapted)]
        for targets in (last(adapted), sorted(adapted), pattern):
            if not wrapped and {n for n in modules if peft_targets(n, targets, saved)} == set(adapted):
                return targets, saved
    raise ValueError(
        f"PEFT counts every module whose name ends like one of {saved} as one of modules_to_save, also "
        f"{wrapped or adapted}: adapted layers, or modules that hold one. Leave them out of target_modules, or save "
        "without task_type"
    )


def with_task_heads(names: Iterable[str] | None, task_type: str | None, model: nn.Module | None = None) -> list[str]:
    """``names`` and the heads that PEFT adds for this task; with a model, only heads that it has."""
    names = list(names or ())
    extra = [h for h in TASK_HEADS.get(task_type or "", ()) if h not in names]
    return names + [h for h in extra if model is None or any(n.endswith(h) for n in modules_by_name(model))]


def with_tied(model: nn.Module, names: Iterable[str]) -> list[str]:
    """``names`` of modules_to_save and of the modules that hold a tensor of theirs, too (an embedding and the head).

    PEFT gives a copy of its own to every module that it trains: one that is not named would keep the old tensor.
    """
    names, modules = list(names), modules_by_name(model)
    inside = {id(m) for name in names for m in modules[name].modules()}
    held = {id(p) for name in names for p in modules[name].parameters()}
    found = names + [n for n, m in modules.items() if id(m) not in inside and not held.isdisjoint(_own(m))]
    return [n for n in found if not any(n.startswith(other + ".") for other in found)]


def refuse_apart(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a file's ``values`` (by the names of modules_to_save's parameters) are not one tensor for
    what is one tensor in the model: PEFT trained a copy of it, or several."""
    places: dict[int, dict[tuple[int, str, str], str]] = {}
    for name, module in modules_by_name(model).items():
        parent, _, child = name.rpartition(".")
        for key, p in module._parameters.items():
            if p is not None:
                place = (id(model.get_submodule(parent)), child, key)
                places.setdefault(id(p), {}).setdefault(place, f"{name}.{key}")
    tensors = {id(p): p for p in model.parameters()}
    for at, found in places.items():
        names, p = list(found.values()), tensors[at]
        if any(n in values for n in names) and not all(
            torch.equal(values.get(n, p).to(p), values.get(names[0], p).to(p)) for n in names[1:]
        ):
            raise ValueError(
                f"{' and '.join(names)} are one tensor in this model and not in the adapter, since PEFT trains copies; "
                f"untie them before loading: "
                f"module.weight = torch.nn.Parameter(module.weight.detach().clone()) for all but one of them"
            )


def _own(module: nn.Module) -> set[int]:
    return set(map(id, module.parameters(recurse=False)))


def peft_saved(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Modules that PEFT counts as modules_to_save: whose name ends so, with no regard to dots.

    DistilBERT's pre_classifier is one for "classifier": PEFT looks for its weights and saves them.
    """
    found: list[str] = []
    for name in modules_by_name(model):
        if any(name.endswith(n) for n in names) and not any(name.startswith(f + ".") for f in found):
            found.append(name)
    return found


def peft_targets(name: str, targets: Iterable[str] | str | None, saved: Iterable[str]) -> bool:
    """PEFT's check_target_module_exists."""
    if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in saved):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(ends_with(name, t) for t in targets or ())


def common_and_pattern(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and a regular expression for each layer that has another, as PEFT's *_pattern holds them."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {"^" + re.escape(name): value for name, value in values.items() if value != common}


def rank_and_alpha(name: str, config: dict[str, Any]) -> tuple[int, float]:
    """PEFT's get_pattern_key: the first pattern that matches the end of the name."""

    def look_up(which: str, default: Any) -> Any:
        for pattern, value in (config.get(which) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return default

    return look_up("rank_pattern", config["r"]), look_up("alpha_pattern", config["lora_alpha"])


def refuse_two_places(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Raise ValueError for a layer that two modules hold.

    A shared block is one place under two names; a layer in two parents is two places, of which PEFT adapts the first.
    """
    places: dict[int, dict[tuple[int, str], str]] = {id(layer): {} for layer in layers}
    for name, module in modules_by_name(model).items():
        if id(module) in places:
            parent, _, child = name.rpartition(".")
            places[id(module)].setdefault((id(model.get_submodule(parent)), child), name)
    for names in places.values():
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names.values())} are one layer. PEFT adapts it in the first place only, so the adapter "
                "computes something else there; save and load model.state_dict() instead"
            )


def renamed(strange: Iterable[str], modules: dict[str, nn.Module]) -> str:
    """The cure where an adapter has the names that transformers 4 gave to layers of this model; else nothing."""
    old = {"query", "key", "value"} & {part for name in strange for part in name.split(".")}
    if old and any(name.endswith("q_proj") for name in modules):
        return (
            f"\n{', '.join(sorted(old))} are names of transformers 4, which version 5 changed to q_proj, k_proj and so "
            "on: install transformers<5, or rename the keys of adapter_model.safetensors and target_modules in "
            "adapter_config.json to this model's, which `for name, _ in model.named_modules(): print(name)` shows"
        )
    return ""

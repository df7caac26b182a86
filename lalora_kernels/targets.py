"""Which layers a name means, and which of them can hold a LoRA layer: PEFT's rules, with errors that say the cure."""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lalora_kernels.nn import (
    LoRAConv1D,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    conv2d_refusal,
    embedding_refusal,
)
from lalora_kernels.quantized import bits

# Query and value by the names of each family: all that PEFT has targets for but RWKV, which has no query. Both names of
# a pair belong to the same parent; a fused projection holds query, key and value, and is adapted whole, as PEFT does.
QUERY_VALUE = (
    ("query", "value"),  # BERT, RoBERTa, ELECTRA, ViT and Swin before transformers 5
    ("q_proj", "v_proj"),  # Llama and its kin, BART, OPT; ViT, DeiT and Swin from transformers 5 on
    ("q_lin", "v_lin"),  # DistilBERT, XLM
    ("q", "v"),  # T5
    ("query_proj", "value_proj"),  # DeBERTa-v2
    ("q_head", "v_head"),  # Funnel
    ("linear_q", "linear_v"),  # Conformers, such as Wav2Vec2-BERT's
    ("Wq", "Wv"),  # CTRL
    ("projection_query", "projection_value"),  # CvT
    ("c_attn",),  # GPT-2
    ("qkv",),  # timm
    ("query_key_value",),  # Bloom, Falcon, GPT-NeoX
    ("qkv_proj",),  # Phi-3
    ("Wqkv",),  # MPT, ModernBERT
    ("in_proj",),  # DeBERTa; a name of Mamba's, too: see _query_value
)
FUSED = ("qkv", "c_attn")  # outputs are all queries, then all keys, then all values
INTERLEAVED = ("query_key_value", "qkv_proj", "Wqkv", "in_proj")  # by heads, or with fewer keys than queries
HEADS = ("score", "classifier", "lm_head", "head")  # where neither transformers nor timm says what the head is
# Known by name: a class exists in this process only if somebody else imported transformers. Falcon's linear layer says
# x @ W^T + b where nn.Linear calls linear(x, W, b); timm's differs from it in TorchScript only.
THEIRS: dict[tuple[str, str], type[LoRALayer]] = {
    ("transformers.pytorch_utils", "Conv1D"): LoRAConv1D,
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"): LoRALinear,
    ("timm.layers.linear", "Linear"): LoRALinear,
}
# PEFT refuses their out_proj: the kernels of GPUs take its weight and never call it.
MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # by model_type
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every name of every module (a shared module has several), without the root and what LoRA layers hold."""
    modules: dict[str, nn.Module] = {}
    inside = None
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or (inside is not None and name.startswith(inside)):
            continue
        inside = name + "." if isinstance(module, LoRALayer) else None
        modules[name] = module
    return modules


def lora_class(module: nn.Module) -> type[LoRALayer] | None:
    """The LoRA layer for this module's type; None if there is none.

    A subclass of nn.Linear, nn.Conv2d or nn.Embedding counts while it has that class's forward, or is named in THEIRS.
    """
    kind = type(module)
    for plain, adapted in ((nn.Linear, LoRALinear), (nn.Conv2d, LoRAConv2d), (nn.Embedding, LoRAEmbedding)):
        if isinstance(module, plain) and kind.forward is plain.forward:
            return adapted
    return THEIRS.get((kind.__module__, kind.__qualname__))


def refusal(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why this module cannot become a LoRA layer, with the cure; None if it can."""
    kind = type(module)
    above, _, child = name.rpartition(".")
    parent = model.get_submodule(above)
    if isinstance(module, LoRALayer):
        return "it is adapted already; call unadapt(model) or merge_and_unload(model) first"
    if isinstance(parent, nn.MultiheadAttention) or _bypasses(type(parent), child):  # type: ignore[arg-type]  # a class is hashable
        return f"{type(parent).__name__} uses its weight without calling it, so an adapter would do nothing"
    if child == "out_proj" and getattr(getattr(model, "config", None), "model_type", None) in MAMBA:
        return "PEFT adapts no out_proj of a Mamba, whose kernels for GPUs use its weight without calling it"
    if bits(module):
        return "it is quantized; PEFT adapts it, and patch_peft(get_peft_model(model, LoraConfig(...))) makes that ours"
    if lora_class(module) is None:
        return (
            f"its type is {kind.__name__}; nn.Linear, nn.Conv2d, nn.Embedding and transformers' Conv1D can be adapted. "
            "Longer names in target_modules (attn.proj for proj) leave it out"
        )
    weight: Any = module.weight  # a parametrized one is no parameter, and is refused below
    if is_lazy(weight) or weight.dtype not in FLOATS:
        return f"its weight is {'not initialized yet' if is_lazy(weight) else weight.dtype}"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks or a replaced forward, which would be lost; remove them (or load without device_map) first"
    if isinstance(module, nn.Conv2d):
        return conv2d_refusal(module)
    return embedding_refusal(module) if isinstance(module, nn.Embedding) else None


@functools.cache
def _bypasses(parent: type[nn.Module], child: str) -> bool:
    """Whether the forward says linear(..., self.child.weight, ...), as for qkv in timm's Swin-v2, BEiT and EVA; or
    conv2d or embedding."""
    try:
        source = inspect.getsource(parent.forward)
    except (OSError, TypeError):
        return False
    return re.search(rf"\b(?:linear|conv2d|embedding)\([^()]*\bself\.{re.escape(child)}\.weight\b", source) is not None


def ends_with(name: str, target: str) -> bool:
    """PEFT's rule for a name in a list: the whole name, or its end after a dot."""
    return name == target or name.endswith("." + target)


def _as_names(argument: str, value: Iterable[str]) -> list[str]:
    names = list(value)
    if not names or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"{argument} holds names of modules, got {names!r}")
    return names


def resolve_saved(model: nn.Module, modules_to_save: str | Iterable[str] | None) -> list[str]:
    """Names of the modules that ``modules_to_save`` means. Raises ValueError as ``adapt`` says."""
    if modules_to_save is None:
        return []
    wanted = [modules_to_save] if isinstance(modules_to_save, str) else list(modules_to_save)
    if not wanted:
        return []
    modules = modules_by_name(model)
    found: list[str] = []
    for target in _as_names("modules_to_save", wanted):
        names = [n for n in modules if ends_with(n, target)]
        if not names:
            raise ValueError(f"modules_to_save: no module is named {target!r}{_suggest(target, modules)}")
        for name in names:
            if next(modules[name].parameters(), None) is None:
                raise ValueError(f"modules_to_save: {name} ({type(modules[name]).__name__}) has no parameters")
            if any(isinstance(m, LoRALayer) for m in modules[name].modules()):
                raise ValueError(f"modules_to_save: {name} is or holds an adapted layer; call unadapt(model) first")
        found += [n for name in names for n in _in_lists(modules, name) if n not in found]
    return found


def _in_lists(modules: dict[str, nn.Module], name: str) -> list[str]:
    """The module itself, or what trains in a ModuleList or ModuleDict, which PEFT's modules_to_save cannot be."""
    if not isinstance(modules[name], (nn.ModuleList, nn.ModuleDict)):
        return [name]
    inside = [f"{name}.{child}" for child in modules[name]._modules]
    return [n for c in inside if any(True for _ in modules[c].parameters()) for n in _in_lists(modules, c)]


def resolve_targets(
    model: nn.Module,
    target_modules: str | Iterable[str],
    saved: list[str],
    exclude_modules: str | Iterable[str] | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Names to adapt, and what "all-linear" has to leave out (name -> reason)."""
    modules = modules_by_name(model)
    for name, module in modules.items():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(f"{name} is wrapped already, as {kind}; unload that adapter, or adapt the base model")
    kept_whole = {id(m) for name in saved for m in modules[name].modules()}
    candidates = {n: m for n, m in modules.items() if id(m) not in kept_whole}
    left_out: dict[str, str] = {}
    if not isinstance(target_modules, str):
        targets = _as_names("target_modules", target_modules)
        for target in targets:
            if not any(ends_with(n, target) for n in modules):
                hint = f"{_suggest(target, modules)}; {_linear_names(modules)}"
                raise ValueError(f"target_modules: no module is named {target!r}{hint}")
        names = [n for n in candidates if any(ends_with(n, t) for t in targets)]
    elif target_modules.lower() == "all-linear":
        left = head(model)
        linear = {n: m for n, m in candidates.items() if _is_linear(m) and id(m) not in left}
        refused = {n: refusal(model, n, m) for n, m in linear.items() if not isinstance(m, LoRALayer)}
        left_out = {n: why for n, why in refused.items() if why}
        names = [n for n in linear if n not in left_out]
    elif target_modules.lower() == "qv":
        names = _query_value(model, candidates)
    else:
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules: {target_modules!r} is not a regular expression ({error})") from None
        names = [n for n in candidates if pattern.fullmatch(n)]
    excluded = _excluded(modules, exclude_modules)
    kept = [n for n in names if n not in excluded]
    if names and not kept:
        raise ValueError(f"exclude_modules={exclude_modules!r} leaves nothing of target_modules={target_modules!r}")
    if not kept:
        raise ValueError(_no_match(target_modules, modules, left_out))
    return kept, {n: why for n, why in left_out.items() if n not in excluded}


def _excluded(modules: dict[str, nn.Module], exclude_modules: str | Iterable[str] | None) -> set[str]:
    if exclude_modules is None:
        return set()
    if isinstance(exclude_modules, str):
        try:
            pattern = re.compile(exclude_modules)
        except re.error as error:
            raise ValueError(f"exclude_modules: {exclude_modules!r} is not a regular expression ({error})") from None
        return {n for n in modules if pattern.fullmatch(n)}
    targets = _as_names("exclude_modules", exclude_modules)
    for target in targets:
        if not any(ends_with(n, target) for n in modules):
            raise ValueError(f"exclude_modules: no module is named {target!r}{_suggest(target, modules)}")
    return {n for n in modules if any(ends_with(n, t) for t in targets)}


def adapted_rows(model: nn.Module, names: Iterable[str], fused: str) -> dict[str, list[tuple[int, int]]]:
    """Name -> [(start, stop), ...] of the outputs to adapt, for those of ``names`` that ``fused`` adapts in part.

    Raises ValueError for a ``fused`` that is no setting, or "qv" where no layer is a fused projection.
    """
    found = fused_projections(model, names) if fused == "qv" else []
    if fused not in ("qkv", "qv") or (fused == "qv" and not found):
        raise ValueError(f"fused={fused!r}: it is 'qkv', or 'qv' with a target named qkv or c_attn")
    thirds = {name: max(model.get_submodule(name).weight.shape) // 3 for name in found}  # type: ignore[arg-type]
    return {name: [(0, third), (2 * third, 3 * third)] for name, third in thirds.items()}


def fused_projections(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are fused projections of three equal parts. Raises ValueError for other layouts."""
    found = []
    for name in names:
        above, _, last = name.rpartition(".")
        module, parent = model.get_submodule(name), type(model.get_submodule(above)).__name__
        m, n = sorted(getattr(module, "weight", torch.empty(0, 0)).shape[:2], reverse=True)
        by_heads = last in INTERLEAVED or (last == "c_attn" and parent == "GPTBigCodeAttention")  # unlike GPT-2's
        if by_heads or (last in FUSED and m != 3 * n):
            raise ValueError(f"fused='qv': the outputs of {name} are not queries, keys and values in three equal parts")
        if last in FUSED and isinstance(module, nn.Conv2d):
            raise ValueError(f"fused='qv': {name} is a convolution, which is adapted whole; leave it at fused='qkv'")
        if last in FUSED:
            found.append(name)
    return found


def _no_match(target_modules: str | Iterable[str], modules: dict[str, nn.Module], left_out: dict[str, str]) -> str:
    text = f"target_modules={target_modules!r} matches no layer outside modules_to_save; {_linear_names(modules)}"
    if isinstance(target_modules, str) and any(ends_with(n, target_modules) for n in modules):
        text += f". A string is a regular expression for the whole name; write [{target_modules!r}] for this name"
    if isinstance(target_modules, str) and target_modules.lower() == "qv":
        gate = ", and RWKV's receptance is a gate, no query" if any(ends_with(n, "receptance") for n in modules) else ""
        text += f". 'qv' takes query and value by the names of known families{gate}; give a list of this model's names"
    convolutions = _shown(modules, lambda m: isinstance(m, nn.Conv2d) and m.groups == 1)
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear" and convolutions:
        text += f". Convolutions are adapted by their names, such as {convolutions}"
    return text + "".join(f". {name}: {why}" for name, why in left_out.items())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or lora_class(module) is LoRAConv1D


def head(model: nn.Module) -> set[int]:
    """ids of the modules that make up the output head: transformers' and timm's own word, else the usual names."""
    found = [
        getattr(model, getter)() for getter in ("get_output_embeddings", "get_classifier") if hasattr(model, getter)
    ]
    found += [getattr(model, name, None) for name in HEADS]
    for one in found:
        heads = one if isinstance(one, (tuple, list)) else (one,)  # a distilled DeiT has two
        if all(isinstance(h, nn.Module) for h in heads):
            return {id(m) for h in heads for m in h.modules()}
    return set()


def _query_value(model: nn.Module, candidates: dict[str, nn.Module]) -> list[str]:
    linear = {n for n, m in candidates.items() if _is_linear(m)}

    def belongs(name: str) -> bool:
        parent, dot, child = name.rpartition(".")
        if child == "in_proj" and not hasattr(model.get_submodule(parent), "q_bias"):
            return False
        return any(child in family and all(parent + dot + one in linear for one in family) for family in QUERY_VALUE)

    return [n for n in candidates if n in linear and belongs(n)]


def _linear_names(modules: dict[str, nn.Module]) -> str:
    shown = _shown(modules, _is_linear)
    return f"the linear layers here are {shown}" if shown else "the model has no linear layer below its root"


def _shown(modules: dict[str, nn.Module], which: Callable[[nn.Module], bool]) -> str:
    """The last parts of the names of these modules, each once."""
    names: dict[str, None] = {}
    for name, module in modules.items():
        if which(module):
            last = name.rpartition(".")[2]
            names[name if last.isdigit() else last] = None
    return ", ".join(list(names)[:16]) + (", ..." if len(names) > 16 else "")


def _suggest(target: str, modules: dict[str, nn.Module]) -> str:
    known = dict.fromkeys([n.rpartition(".")[2] for n in modules] + list(modules))
    close = difflib.get_close_matches(target, list(known), n=3)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""

"""Which tensors of a model train, and by what their per-sample gradient is known."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lalora_kernels.adapted import Adapted
from lalora_kernels.privacy.rules import rule_of
from lalora_kernels.privacy.sites import Site
from lalora_kernels.privacy.ties import kind_of
from lalora_kernels.privacy.trees import leaves

FACTOR_ROLES = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Use:
    """One module's use of a tensor that trains, or will when its factor's turn comes."""

    name: str  # qualified
    owner: nn.Module  # the module that holds it: a child, where PEFT keeps a factor in a layer of its own
    key: str  # its name there
    role: str  # "lora_A" and "lora_B" of an adapted layer; else its name
    adapted: bool
    kind: str  # see ties.kind_of

    @property
    def param(self) -> nn.Parameter:
        """The tensor."""
        return self.owner.get_parameter(self.key)


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[Use]]]:
    """(name, module, its uses) of every module, a shared one once.

    Raises ValueError, naming it, for a trainable tensor that no rule covers, or of whose memory another tensor of the
    model is a view, and for PEFT's own layers.
    """
    found = list(_uses(model))
    _refuse_views(model, [use for _, _, uses in found for use in uses])
    yield from found


def _uses(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[Use]]]:
    names = {module: name for name, module in model.named_modules()}
    lora = {module: _tensors(name, module) for module, name in names.items() if _is_lora(name, module)}
    held = {place for tensors in lora.values() for place in tensors.values()}
    for module, name in names.items():
        adapted, rule = module in lora, rule_of(module)
        uses = []
        for role, (owner, key) in lora.get(module, {k: (module, k) for k in module._parameters}).items():
            p = owner._parameters[key]
            if p is None or not (p.requires_grad or adapted and role in FACTOR_ROLES):
                continue
            if not adapted and (owner, key) in held:
                continue
            full = f"{names[owner]}.{key}" if names[owner] else key
            if not (role != "weight" if adapted else rule is not None and key in rule.covers):
                raise ValueError(
                    f"{full} is trainable, but no rule gives its gradient per sample ({type(module).__name__}); "
                    f"freeze it with requires_grad_(False), or train it through an adapter"
                )
            table, defers = getattr(module, "is_table", False), rule is not None and rule.defers
            uses.append(Use(full, owner, key, role, adapted, kind_of(role, adapted, table, defers)))
        yield name, module, uses


def refuse_frozen(model: nn.Module) -> None:
    """Raise ValueError, naming it, for an adapted layer both of whose factors are frozen."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            held = _tensors(name, module)
            pair = [held[role][0]._parameters[held[role][1]] for role in FACTOR_ROLES if role in held]
            if pair and not any(p is not None and p.requires_grad for p in pair):  # none: no active adapter is in it
                raise ValueError(
                    f"both factors of {name} are frozen, and the schedule would train them all the same; unfreeze them "
                    f"(PEFT: from_pretrained(..., is_trainable=True)), leave the layer out of target_modules, or merge "
                    f"its adapter"
                )


def refuse_hooks(use: Use) -> None:
    """Raise ValueError where a hook waits for the tensor's gradient: within backward there is none to give to it."""
    if use.param._backward_hooks:
        raise ValueError(
            f"{use.name} has a hook on its gradient (Tensor.register_hook; wandb.watch), which a private step does not "
            f"have within backward; remove it, and read or change p.grad after optimizer.step(), as often as you like"
        )


def refuse_upstream(inputs: Any, sites: Sequence[Site]) -> None:
    """Raise ValueError where a forward's inputs were computed by a parameter that is none of the sites'. Layers that
    computed them by the sites' (``inputs_embeds = model.embed(ids)``) were called for the model, and not beside it."""
    given = [t for t in leaves(inputs) if t.requires_grad]
    if not given:
        return
    known = {id(s.param) for s in sites}
    nodes = [t.grad_fn for t in given if t.grad_fn is not None]
    ends, seen = [t for t in given if t.grad_fn is None], set(nodes)
    for node in nodes:  # which grows meanwhile
        if getattr(node, "beside", False):
            node.beside = False  # type: ignore[attr-defined]  # of ours, see autograd_tools.keep
        if (leaf := getattr(node, "variable", None)) is not None:
            ends.append(leaf)
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                nodes.append(before)
    for leaf in ends:
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            raise ValueError(
                f"the model's input is computed by a trainable parameter of shape {tuple(leaf.shape)} that is not "
                f"among those of make_private, so nothing clips or noises its gradient; make it a part of the model "
                f"that make_private is given, freeze it, or detach() the input"
            )


def _refuse_views(model: nn.Module, uses: Sequence[Use]) -> None:
    """A step on one would move the other: a factor whose turn it is not, or what is frozen; and the sum of the two
    gradients, which is the one memory's, is neither clipped nor noised as one."""
    trained = {use.param: use.name for use in uses}
    placed: dict[Any, list[tuple[str, torch.Tensor]]] = {}
    others = (named for named in chain(model.named_parameters(), model.named_buffers()) if named[1] not in trained)
    for name, tensor in chain(((name, p) for p, name in trained.items()), others):
        if tensor.layout is torch.strided and not is_lazy(tensor) and tensor.numel():
            if at := tensor.untyped_storage().data_ptr():  # 0 on the meta device, and of subclasses that hold others
                placed.setdefault((tensor.device, at), []).append((name, tensor))
    for held in placed.values():
        for i, (name, tensor) in enumerate(held):
            for before, other in held[:i] if len(held) > 1 else ():
                if other in trained and _overlap(other, tensor):
                    raise ValueError(
                        f"{before}, which trains, and {name} are two tensors over one memory, so a step on one moves "
                        f"the other; share one nn.Parameter, or give {name} a clone() of its own (PEFT makes such "
                        f"views of adapters on tied layers: LoraConfig(ensure_weight_tying=False))"
                    )


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage have an element in common. Flattened weights (cuDNN's) have not."""
    spans = []
    for t in (a, b):
        size = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
        spans.append((t.storage_offset(), t.storage_offset() + size, t.element_size(), size == t.numel()))
    (start, end, width, dense), (start_b, end_b, width_b, dense_b) = spans
    if end * width <= start_b * width_b or end_b * width_b <= start * width:
        return False
    if dense and dense_b or width != width_b:
        return True
    first = min(start, start_b)  # columns of one matrix lie between each other
    mask = torch.zeros(max(end, end_b) - first, dtype=torch.bool)
    mask.as_strided(a.shape, a.stride(), start - first).fill_(True)
    return bool(mask.as_strided(b.shape, b.stride(), start_b - first).any())


def _tensors(name: str, layer: Adapted) -> dict[str, tuple[nn.Module, str]]:
    try:
        told = layer.tensors()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    for role in FACTOR_ROLES if told else ():
        owner, key = told.get(role, (layer, role))
        if key not in owner._parameters:
            raise ValueError(
                f"{role} of {name} is no parameter any more but computed (parametrized or pruned), so no rule gives "
                f"its gradient per sample; call torch.nn.utils.parametrize.remove_parametrizations or prune.remove "
                f"first"
            )
    return told


def _is_lora(name: str, module: nn.Module) -> bool:
    """Whether it is an adapted layer. Raises ValueError for one of PEFT's own."""
    if isinstance(module, Adapted):
        return True
    kind = type(module)
    if kind.__module__.startswith("peft.tuners.") and any(p.requires_grad for p in module.parameters()):
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise ValueError(
                f"{name} is PEFT's own {kind.__module__}.{kind.__qualname__}, which knows neither the method nor the "
                f"smoothing; call lalora_kernels.patch_peft(model) first"
            )
    return False

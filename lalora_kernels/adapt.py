"""Put LoRA layers into a model, and take them out again. Names of modules and parameters do not change."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from lalora_kernels.nn import LoRALayer, LoRALinear, lora_layers
from lalora_kernels.targets import (
    adapted_rows,
    lora_class,
    modules_by_name,
    refusal,
    resolve_saved,
    resolve_targets,
)

Model = TypeVar("Model", bound=nn.Module)
Fused = Literal["qkv", "qv"]
SAVED = "_saved_with_adapter"  # set on every module of modules_to_save; saved_modules() reads it
NO_ROWS: Mapping[str, Iterable[tuple[int, int]]] = {}
PEFTS = {"merge": "merge_adapter", "unmerge": "unmerge_adapter", "unadapt": "unload"}  # its words for ours


def adapt(
    model: Model,
    *,
    r: int = 8,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    target_modules: str | Iterable[str] = "qv",
    exclude_modules: str | Iterable[str] | None = None,
    modules_to_save: str | Iterable[str] | None = None,
    fused: Fused = "qkv",
    verbose: bool = True,
) -> Model:
    """Swap layers for LoRA layers in place, freeze everything else, and return the same model.

    ``lora_alpha`` is r where it is not given, so that s = 1. ``target_modules`` means what it means in PEFT: a list of
    names, each the whole name of a module or the end of one after a dot; ``"all-linear"``, every linear layer but the
    output head; any other string a regular expression that matches the whole name. ``"qv"`` is the query and value
    projections by the names of known families (targets.QUERY_VALUE), a fused one whole (see ``fused``).
    ``exclude_modules``, such names or a regular expression, are left out of them.
    ``modules_to_save``, a list of such names, stay trainable as they are and are saved with the adapter; nothing inside
    them is adapted. A layer that is reachable under two names becomes one LoRA layer in both places.
    ``fused`` says what is adapted of a fused projection (timm's qkv, GPT-2's c_attn): all of it, as PEFT does, or with
    "qv" its query and value outputs; B's rows for the keys then stay zero, also in the file, so PEFT loads the same
    function. ``verbose`` prints what was done.

    ``nn.Linear``, ``nn.Conv2d``, ``nn.Embedding`` and transformers' ``Conv1D`` and ``FalconLinear`` can be adapted.
    Raises ValueError, before anything is changed, for names that no module has, for a target that matches nothing, is
    adapted already or cannot be adapted (with the reason), and for r, lora_alpha or lora_dropout out of range.
    """
    lora_alpha = r if lora_alpha is None else lora_alpha
    check_settings(r, lora_alpha, lora_dropout)
    saved = resolve_saved(model, modules_to_save)
    names, left_out = resolve_targets(model, target_modules, saved, exclude_modules)
    rows = adapted_rows(model, names, fused)
    install(model, dict.fromkeys(names, (r, lora_alpha)), saved, lora_dropout, use_rslora, rows)
    if verbose:
        print(trainable_summary(model))
        for name, why in left_out.items():
            print(f"  left out {name}: {why}")
    return model


def check_settings(r: int, lora_alpha: float, lora_dropout: float) -> None:
    """Raise ValueError for values that no LoRA layer can have."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r is a positive integer, got {r!r}")
    for name, value, fits in (
        ("lora_alpha is a positive number", lora_alpha, lambda v: 0 < v < math.inf),
        ("lora_dropout lies in [0, 1)", lora_dropout, lambda v: 0 <= v < 1),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
            raise ValueError(f"{name}, got {value!r}")


def install(
    model: nn.Module,
    plan: dict[str, tuple[int, float]],
    saved: Iterable[str] = (),
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    rows: Mapping[str, Iterable[tuple[int, int]]] = NO_ROWS,
) -> None:
    """Swap the layers named in ``plan`` (name -> r, lora_alpha), mark ``saved`` modules, freeze everything else.

    ``rows``: name -> [(start, stop), ...] of layers of which only these outputs are adapted.
    Raises ValueError for a layer that cannot be adapted, before anything is changed.
    """
    modules = modules_by_name(model)
    for name in plan:
        if why := refusal(model, name, modules[name]):
            raise ValueError(f"{name} cannot be adapted: {why}")
    fresh: dict[int, LoRALayer] = {}
    for name, (r, lora_alpha) in plan.items():
        module = modules[name]
        if id(module) not in fresh:
            kind = lora_class(module)
            assert kind is not None  # refusal() said so
            layer: Any = kind.from_linear(module, r, lora_alpha, lora_dropout, use_rslora)
            layer._plain = (module,)  # in a tuple, so that it is no submodule: unadapt gives this very object back
            fresh[id(module)] = layer
    for name, parts in rows.items():
        fresh[id(modules[name])].only_rows(*(slice(*part) for part in parts))
    for name, module in modules.items():
        if id(module) in fresh:
            _replace(model, name, fresh[id(module)])
    _forbid_fast_path(model)
    for name in saved:
        setattr(modules[name], SAVED, True)
    _freeze_base(model)


def lora_factors(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """(qualified name, factor) of every A and B, a shared layer once."""
    for name, layer in lora_layers(model):
        for factor in layer.names.values():
            yield (f"{name}.{factor}" if name else factor), getattr(layer, factor)


def saved_modules(model: nn.Module) -> list[str]:
    """Names of the modules that were given as ``modules_to_save``."""
    return [name for name, module in model.named_modules() if getattr(module, SAVED, False)]


@dataclass(frozen=True)
class Summary:
    """What trains in a model. Counts are of parameters (elements), each tensor once."""

    layers: int  # adapted layers
    ranks: tuple[int, ...]
    adapter_parameters: int
    trainable_parameters: int  # requires_grad at this moment: with one active factor, only that one
    total_parameters: int
    modules_to_save: tuple[str, ...]
    peft_layers: int = 0  # of PEFT's, of which nothing but trainable_parameters and total_parameters is told here

    @property
    def share(self) -> float:
        """Trainable share of all parameters, in percent."""
        return 100.0 * self.trainable_parameters / max(1, self.total_parameters)

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks)) or "none"
        adapted = f"{self.layers} layers adapted (r = {ranks})"
        if self.peft_layers:
            adapted = (f"{adapted} and " if self.layers else "") + f"{self.peft_layers} layers adapted by PEFT"
        text = (
            f"{adapted}; {self.trainable_parameters:,} of {self.total_parameters:,} "
            f"parameters trainable ({self.share:.2f} %)"
        )
        return text + (f"; trained in full: {', '.join(self.modules_to_save)}" if self.modules_to_save else "")


def trainable_summary(model: nn.Module) -> Summary:
    """Count adapted layers and parameters."""
    layers = [layer for _, layer in lora_layers(model)]
    return Summary(
        layers=len(layers),
        ranks=tuple(sorted({layer.r for layer in layers})),
        adapter_parameters=sum(factor.numel() for _, factor in lora_factors(model)),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=sum(p.numel() for p in model.parameters()),
        modules_to_save=tuple(saved_modules(model)),
        peft_layers=sum(isinstance(getattr(m, "base_layer", None), nn.Module) for m in model.modules()),
    )


def merge(model: Model) -> Model:
    """Fold every layer's s B A into its weight, all of them or none; evaluation then costs what the base model does.

    Raises RuntimeError for a layer that is merged already, ValueError for NaN or Inf in a factor, for a weight that
    another module shares (a tied embedding would change with it) and for a model without layers of ``adapt``'s.
    """
    _refuse_plain(model, "merge")
    for name, layer in lora_layers(model):
        if layer.merged:
            raise RuntimeError(f"{name}: this LoRA layer is already merged")
    _merge_rest(model)
    return model


def unmerge(model: Model) -> Model:
    """Undo ``merge``, bit for bit. Raises, before anything is changed, RuntimeError for a layer that is not merged,
    ValueError for a model without layers of ``adapt``'s."""
    _refuse_plain(model, "unmerge")
    for name, layer in lora_layers(model):
        if not layer.merged:
            raise RuntimeError(f"{name}: this LoRA layer is not merged")
    for _, layer in lora_layers(model):
        layer.unmerge()
    return model


def merge_and_unload(model: Model) -> Model:
    """Give back the plain layers, in place, with s B A folded into their weights. The weights stay frozen.

    Raises ValueError as ``merge`` does, RuntimeError where the model belongs to a private optimizer.
    """
    from lalora_kernels.privacy.accounts import pass_on

    _refuse_plain(model, "merge_and_unload")
    _refuse_private(model)
    _merge_rest(model)
    for _, layer in lora_layers(model):
        pass_on((layer.lora_A, layer.lora_B), layer.weight)
    return _unload(model)


def unadapt(model: Model) -> Model:
    """Give back the plain layers, in place, with the base weights as they were; the factors are dropped.

    Raises RuntimeError where the model belongs to a private optimizer, ValueError where it has no layer of ``adapt``'s.
    """
    _refuse_plain(model, "unadapt")
    _refuse_private(model)
    for _, layer in lora_layers(model):
        if layer.merged:
            layer.unmerge()
    return _unload(model)


def _merge_rest(model: nn.Module) -> None:
    _refuse_shared_weights(model)
    done: list[LoRALayer] = []
    for name, layer in lora_layers(model):
        if layer.merged:
            continue
        try:
            layer.merge()
        except ValueError as error:
            for other in done:
                other.unmerge()
            raise ValueError(f"{name}: {error}") from None
        done.append(layer)


def _refuse_plain(model: nn.Module, call: str) -> None:
    if not any(True for _ in lora_layers(model)):
        raise ValueError(
            f"nothing to {call}: the model has no LoRA layer of adapt's; call adapt(model, ...) first, and on a PEFT "
            f"model its own {PEFTS.get(call, call)}()"
        )


def _refuse_private(model: nn.Module) -> None:
    for name, layer in lora_layers(model):
        if layer.recorder is not None:
            raise RuntimeError(f"{name} belongs to a private optimizer; call its detach() first")


def _unload(model: Model) -> Model:
    if isinstance(model, LoRALayer):
        raise ValueError("the model itself is a LoRA layer, which cannot be replaced in place; use merge()")
    for name, layer in list(modules_by_name(model).items()):
        if isinstance(layer, LoRALayer):
            _replace(model, name, _plain_layer(layer))
    for module in model.modules():
        if getattr(module, SAVED, False):
            delattr(module, SAVED)
    return model


def _plain_layer(layer: Any) -> nn.Module:
    if hasattr(layer, "_plain"):
        (plain,) = layer._plain
    elif type(layer) is not LoRALinear:
        raise ValueError(f"a {type(layer).__name__} that adapt() did not make has no plain layer to go back to")
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = layer.weight
    if hasattr(layer, "bias"):
        plain.bias = layer.bias
    return plain.train(layer.training)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _freeze_base(model: nn.Module) -> None:
    factors = {id(factor) for _, factor in lora_factors(model)}
    trained = {id(p) for m in model.modules() if getattr(m, SAVED, False) for p in m.parameters()}
    for p in model.parameters():
        if id(p) in trained:
            p.requires_grad_(p.is_floating_point())
        elif id(p) not in factors:
            p.requires_grad_(False)


def _forbid_fast_path(model: nn.Module) -> None:
    # torch's encoder layer reads linear1.weight and linear2.weight in evaluation and never calls the layers: the
    # adapter would train and then be ignored. These flags only choose the path.
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            if any(isinstance(m, LoRALayer) for m in (module.linear1, module.linear2)):
                module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and any(isinstance(m, LoRALayer) for m in module.modules()):
            module.use_nested_tensor = False


def _refuse_shared_weights(model: nn.Module) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    for name, layer in lora_layers(model):
        if len(users := owners[id(layer.weight)]) > 1:
            others = ", ".join(n for n in users if n != name)
            raise ValueError(
                f"{name} shares its weight with {others}, which merging would change too; untie them first"
            )

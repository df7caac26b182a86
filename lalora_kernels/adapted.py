"""What the private step needs of an adapted layer, ours or PEFT's."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:  # these classes are mixed into modules
    from torch.nn import Module as _Mixed
else:
    _Mixed = object

FACTORS = ("", "A", "B", "AB")
Tensors = dict[str, tuple[nn.Module, str]]  # what Adapted.tensors() tells
Factors = list[tuple[str, nn.Parameter]]  # ("lora_A" or "lora_B", parameter)
NONE: Mapping[nn.Module, Tensors] = {}


class Adapted(_Mixed):
    """What a private step needs of an adapted layer: a place for its recorder, and where its parameters are."""

    recorder: Any = None  # set by the engine (privacy/recorders.py)
    is_table = False  # whether its inputs are ids, and A has a column for each
    varies = False  # whether ``tensors`` may tell of others while the modules hold the same: PEFT's active adapter

    def tensors(self) -> Tensors:
        """Role -> (module, name in it) of what a forward uses: "lora_A", "lora_B", "weight", "bias", "lora_bias"."""
        raise NotImplementedError

    @property
    def trained_rows(self) -> Tensor | None:
        """(m,1), 1 for the rows of B that the adapter has and 0 for those that stay zero; None: it has all."""
        return self._buffers.get("rows")


def submodules(model: nn.Module) -> list[nn.Module]:
    """``model.modules()`` in no order, at a tenth of its time: a private step walks over them."""
    found, seen = [model], {model}
    for module in found:  # which grows meanwhile
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def factor_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """("lora_A" or "lora_B", parameter) of every adapted layer, ours and PEFT's patched ones."""
    yield from factors_of(submodules(model))


def factors_of(modules: Iterable[nn.Module], known: Mapping[nn.Module, Tensors] = NONE) -> Factors:
    """``factor_parameters`` of a model whose modules these are; ``known``: what some of them tell of their tensors."""
    found: list[Any] = []
    for module in modules:
        if isinstance(module, Adapted):
            tensors = known.get(module)
            for role, (owner, key) in (module.tensors() if tensors is None else tensors).items():
                if role == "lora_A" or role == "lora_B":
                    found.append((role, owner._parameters[key]))
    return found


def activate(found: Iterable[tuple[str, nn.Parameter]], factors: str) -> None:
    """``set_active`` of a model whose ``factor_parameters`` these are."""
    if factors not in FACTORS:
        raise ValueError(f"factors is one of {FACTORS}, got {factors!r}")
    for role, p in found:
        p.requires_grad_(role[-1] in factors)
        if role[-1] not in factors:
            p.grad = None

"""PEFT's LoRA layers with our forward. Imports peft: reached through ``patch_peft`` only.

Each class adds a forward to one of PEFT's and is swapped in as ``module.__class__``; everything else (adapters, saving,
merging) stays PEFT's code on PEFT's parameters.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from lalora_kernels.autograd import lora_conv2d, lora_embedding, lora_linear
from lalora_kernels.nn import Adapted
from lalora_kernels.privacy.accounts import pass_on


class Patched(Adapted):
    """The common part. With one active adapter, unmerged, a forward is ours; in every other state it is PEFT's."""

    # PEFT's own, by adapter; Any: a layer of the kind that is patched
    active_adapters: Sequence[str]
    disable_adapters: bool
    merged: bool
    merged_adapters: list[str]
    base_layer: Any
    lora_A: Mapping[str, Any]
    lora_B: Mapping[str, Any]
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict
    lora_dropout: Mapping[str, nn.Module]
    lora_variant: Mapping[str, object]
    scaling: Mapping[str, float]
    base_is_called = False  # or its weight alone is used
    varies = True

    def _names(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.scaling]

    def tensors(self) -> dict[str, tuple[nn.Module, str]]:
        """As ``Adapted.tensors``; empty where no active adapter is in this layer.

        Raises ValueError where a private step cannot serve what is active: several adapters at once, DoRA and its kin.
        """
        names = self._names()
        if not names:
            return {}
        if len(names) > 1:
            raise ValueError(f"the adapters {', '.join(names)} are active at once; set_adapter one of them")
        (name,) = names
        if name in self.lora_variant:
            raise ValueError(variant_refusal(self, name))
        base = self.base_layer
        found = {**self._factors(name), "weight": (base, "weight")}
        if getattr(base, "bias", None) is not None:
            found["bias"] = (base, "bias")
        return found

    def _factors(self, name: str) -> dict[str, tuple[nn.Module, str]]:
        found = {"lora_A": (self.lora_A[name], "weight"), "lora_B": (self.lora_B[name], "weight")}
        if self.lora_B[name].bias is not None:
            found["lora_bias"] = (self.lora_B[name], "bias")
        return found

    def _forward(self, x: Tensor, name: str) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's. Raises RuntimeError in a private step where only PEFT's forward would do."""
        names = self._names()
        why = None
        private = self.recorder is not None and torch.is_grad_enabled()
        if private and self.merged and not self.disable_adapters:
            why = "it is merged; call unmerge_adapter() first, or evaluate under torch.no_grad()"
            raise RuntimeError(f"{self.recorder.name} cannot train privately: {why}")
        if self.disable_adapters or self.merged or not names:
            return super().forward(x, *args, **kwargs)
        if len(names) > 1 or names[0] in self.lora_variant:
            why = "several adapters, or one that is not plain LoRA, are active"
        elif args or any(value is not None for value in kwargs.values()):
            why = f"it was called with {', '.join(kwargs) or 'further arguments'}"
        elif not self.base_is_called and watched(self.base_layer):
            why = "its base layer has hooks or a replaced forward"
        if why is None:
            return self._forward(x, names[0])
        if private:
            raise RuntimeError(f"{self.recorder.name} cannot train privately: {why}")
        return super().forward(x, *args, **kwargs)

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's; within a private training which factors train is left to the schedule."""
        if self.recorder is None:
            super().enable_adapters(enabled)  # type: ignore[misc]  # of PEFT's class beside this one
        else:
            self._disable_adapters = not enabled

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; the base weight, which goes on without the layer, keeps the account of what trained the factors.
        Unmerging takes the product away but for rounding, so the account stays."""
        before = set(self.merged_adapters)
        super().merge(*args, **kwargs)  # type: ignore[misc]
        for name in set(self.merged_adapters) - before:
            factors = [getattr(m, key) for m, key in self._factors(name).values()]
            pass_on(factors, self.base_layer.weight)
            if getattr(self.base_layer, "bias", None) is not None:
                pass_on(factors, self.base_layer.bias)

    def _bias(self, name: str) -> Tensor | None:
        """b + s b_B, b_B being the bias that PEFT's lora_bias gives B."""
        bias, added = self.base_layer.bias, self.lora_B[name].bias
        if added is None:
            return bias
        return self.scaling[name] * added if bias is None else bias + self.scaling[name] * added

    def _dropped(self, x: Tensor, name: str) -> Tensor | None:
        dropout = self.lora_dropout[name]
        return dropout(x) if isinstance(dropout, nn.Dropout) and dropout.training else None


class Linear(Patched, lora.Linear):
    """PEFT's LoRA layer over nn.Linear, or over transformers' Conv1D, whose weight is stored (n,m)."""

    def _forward(self, x: Tensor, name: str) -> Tensor:
        x = x if self.recorder is None else self.recorder.expand(x)
        weight = self.base_layer.weight
        return lora_linear(
            x,
            weight if isinstance(self.base_layer, nn.Linear) else weight.t(),
            self._bias(name),
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            x_lora=self._dropped(x, name),
            recorder=self.recorder,
        )


class Conv2d(Patched, lora.Conv2d):
    """PEFT's LoRA layer over nn.Conv2d."""

    def _forward(self, x: Tensor, name: str) -> Tensor:
        x = x if self.recorder is None else self.recorder.expand(x)
        base = self.base_layer
        return lora_conv2d(
            x,
            base.weight,
            self._bias(name),
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            base.stride,
            tuple(base._reversed_padding_repeated_twice),
            x_lora=self._dropped(x, name),
            recorder=self.recorder,
        )


class Embedding(Patched, lora.Embedding):
    """PEFT's LoRA layer over nn.Embedding."""

    is_table = True
    num_embeddings = property(lambda self: self.base_layer.num_embeddings)
    padding_idx = property(lambda self: self.base_layer.padding_idx)

    def _factors(self, name: str) -> dict[str, tuple[nn.Module, str]]:
        return {"lora_A": (self.lora_embedding_A, name), "lora_B": (self.lora_embedding_B, name)}

    def _forward(self, ids: Tensor, name: str) -> Tensor:
        ids = ids if self.recorder is None else self.recorder.expand(ids)
        base = self.base_layer
        A, B = self.lora_embedding_A[name], self.lora_embedding_B[name]
        return lora_embedding(ids, base.weight, A, B, self.scaling[name], base.padding_idx, recorder=self.recorder)


CLASSES: dict[type[nn.Module], type[Patched]] = {
    lora.Linear: Linear,
    lora.Conv2d: Conv2d,
    lora.Embedding: Embedding,
}


def classes() -> dict[type[nn.Module], type[Patched]]:
    """PEFT's class -> ours; with those over quantized layers where PEFT has made one."""
    if "peft.tuners.lora.bnb" not in sys.modules:
        return CLASSES
    from lalora_kernels.peft_quantized import CLASSES as quantized

    return {**CLASSES, **quantized}


def watched(base: nn.Module) -> bool:
    """Whether somebody else would notice that the base layer is not called."""
    return bool(
        "forward" in vars(base)
        or base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
    )


def variant_refusal(layer: Any, name: str) -> str:
    """Says which variant of LoRA an adapter is."""
    kind = type(layer.lora_variant[name]).__name__
    return f"its adapter {name!r} is a {kind} (DoRA and its kin), which is not y = W0 x + s B A x; use plain LoRA"

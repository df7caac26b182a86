"""PEFT's LoRA layers over bitsandbytes' with our adapter. Imports both: reached where PEFT has made such a layer."""

import torch
from peft.tuners.lora import bnb
from torch import Tensor, nn

from lalora_kernels.peft_layers import Patched
from lalora_kernels.quantized import lora_update, mixing_refusal, unpack


class Quantized(Patched):
    """The common part. The base layer is called as it is, so hooks on it are heard; its bias stays frozen."""

    base_is_called = True

    def tensors(self) -> dict[str, tuple[nn.Module, str]]:
        """As ``Patched.tensors``, of the adapter alone. Raises ValueError, too, where the base layer mixes records."""
        if why := mixing_refusal(self.base_layer):
            raise ValueError(f"its base layer mixes records: {why}")
        return {role: place for role, place in super().tensors().items() if role not in ("weight", "bias")}

    def _forward(self, x: Tensor, name: str) -> Tensor:
        x = x if self.recorder is None else self.recorder.expand(x)
        if torch.is_grad_enabled():
            unpack(self.base_layer)
        dropped, bias = self._dropped(x, name), self.lora_B[name].bias
        return lora_update(
            self.base_layer(x),
            x if dropped is None else dropped,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            bias=None if bias is None else self.scaling[name] * bias,
            recorder=self.recorder,
        )


class Linear4bit(Quantized, bnb.Linear4bit):
    """Over bitsandbytes' 4-bit layer."""


class Linear8bitLt(Quantized, bnb.Linear8bitLt):
    """Over bitsandbytes' 8-bit layer."""


CLASSES: dict[type[nn.Module], type[Patched]] = {bnb.Linear4bit: Linear4bit, bnb.Linear8bitLt: Linear8bitLt}

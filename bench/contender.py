"""What every contender of the step benchmarks is made of: the model, with our adapters or PEFT's, and a plain SGD."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from zoo import Spec, base_model, loader

from lalora_kernels.adapt import adapt
from lalora_kernels.nn import lora_layers

LR = 1e-3
BACKWARD = "bench::backward"  # marks where the forward's memory is read (memory.py)


def adapted(spec: Spec) -> nn.Module:
    """The model with this library's adapters; B is not zero, so that A has a gradient."""
    model = adapt(base_model(spec), r=spec.r, target_modules=spec.targets, modules_to_save=spec.head, verbose=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.copy_(0.02 * torch.randn(layer.lora_B.shape, generator=generator))
    return model


def peft_model(spec: Spec, float32_factors: bool = True) -> nn.Module:
    """The same in PEFT, with the same weights; beside a half-precision base, factors in float32 or in its dtype."""
    import peft

    ours = adapted(spec)
    layers = dict(lora_layers(ours))
    config = peft.LoraConfig(r=spec.r, lora_alpha=spec.r, target_modules=list(layers), modules_to_save=spec.head)
    model = peft.get_peft_model(base_model(spec), config, autocast_adapter_dtype=float32_factors).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            for factor in ("lora_A", "lora_B"):
                if f".{factor}." in name:
                    layer = name.removeprefix("base_model.model.").removesuffix(f".{factor}.default.weight")
                    p.copy_(getattr(layers[layer], factor))
    return model


def plain_name(name: str) -> str:
    """This library's name of a PEFT (or Opacus-wrapped PEFT) parameter."""
    name = name.removeprefix("_module.").removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    return name.replace(".lora_A.default.weight", ".lora_A").replace(".lora_B.default.weight", ".lora_B")


class Contender:
    """A model, an optimizer and endless batches of all records.

    ``step()``: load the batch, forward, backward, plain SGD on adapters and head. ``grads()``: the gradients of its
    last step under this library's names, before the optimizer's.
    """

    clipping: str | None = "flat"  # "per_layer": each tensor to C / sqrt(tensors) by itself; None: not private

    def __init__(self, spec: Spec, model: nn.Module):
        self.spec, self.model = spec, model
        self.sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)
        self.batches: Iterator = self._endless()
        self.kept: dict[str, Tensor] | None = None

    def _endless(self) -> Iterator:
        batches = loader(self.spec)
        while True:
            yield from batches

    def keep_grads(self) -> None:
        """From now on the inner optimizer's step notes the gradients it is given; ``grads`` returns them."""
        self.sgd.register_step_pre_hook(lambda *_: self._keep())

    def _keep(self) -> None:
        named = self.model.named_parameters()
        self.kept = {plain_name(n): p.grad.clone() for n, p in named if p.grad is not None}

    def grads(self) -> dict[str, Tensor]:
        return self.kept

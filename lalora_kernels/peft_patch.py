"""A PEFT model's LoRA layers, served by our kernels and seen by the private step."""

from typing import Any

from torch import nn

from lalora_kernels.nn import conv2d_refusal, embedding_refusal
from lalora_kernels.quantized import bits, mixing_refusal
from lalora_kernels.targets import FLOATS, lora_class


def patch_peft(model: nn.Module) -> nn.Module:
    """Swap the LoRA layers of a PEFT model for ours, in place, and return the model; then ``make_private`` takes it.

    Names of modules and parameters, ``state_dict``, ``save_pretrained``, merging, ``disable_adapter``, ``set_adapter``,
    ``modules_to_save``, rsLoRA, ``lora_dropout`` and ``lora_bias`` are PEFT's as before. Served are LoRA on nn.Linear,
    transformers' Conv1D, nn.Conv2d and nn.Embedding, in float16, bfloat16, float32 or float64, and on bitsandbytes'
    Linear4bit and Linear8bitLt (QLoRA). Call it again after ``add_adapter`` has wrapped further layers; layers patched
    already are left alone. In half precision without autocast the products are taken in the base's dtype, where PEFT
    takes them in that of the factors.

    Raises ValueError, before anything is changed, for a model without PEFT's LoRA layers and for a layer that is not
    served: DoRA and other variants, quantization other than bitsandbytes', its 8 bits where outliers are sought in the
    whole batch, other tuners, subclasses with a forward of their own.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from lalora_kernels.peft_layers import Patched, classes

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    if not layers:
        raise ValueError("this model has no layer of PEFT's; call peft.get_peft_model first, or lalora_kernels.adapt")
    fresh = [(name, m) for name, m in layers if not isinstance(m, Patched)]
    ours = classes()
    for name, module in fresh:
        if why := _refusal(module, ours):
            raise ValueError(f"{name} cannot be patched: {why}")
    for _, module in fresh:
        module.__class__ = ours[type(module)]
    return model


def unpatch_peft(model: nn.Module) -> nn.Module:
    """Give PEFT's own classes back, in place; return the model. Raises RuntimeError while it is private."""
    from lalora_kernels.peft_layers import Patched, classes

    plain = {ours: theirs for theirs, ours in classes().items()}
    layers: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if isinstance(m, Patched)]
    for name, module in layers:
        if module.recorder is not None:
            raise RuntimeError(f"{name} belongs to a private optimizer; call its detach() first")
    for _, module in layers:
        module.__class__ = plain[type(module)]
    return model


def _refusal(module: Any, classes: dict) -> str | None:
    from lalora_kernels.peft_layers import variant_refusal, watched

    kind, base = type(module), module.base_layer
    weight = getattr(base, "weight", None)
    if kind not in classes:
        known = ", ".join(c.__name__ for c in classes)
        return (
            f"it is {kind.__module__}.{kind.__qualname__}; of PEFT's, only LoRA's own {known} are served, no other "
            f"tuner and no quantization but bitsandbytes'"
        )
    if module.lora_variant:
        return variant_refusal(module, next(iter(module.lora_variant)))
    if bits(base):
        if not kind.__module__.endswith(".bnb"):
            flag = f"is_loaded_in_{bits(base)}bit"
            return f"PEFT took its quantized base for a plain one; set model.{flag} = True before get_peft_model"
        return mixing_refusal(base)
    plain = {"Linear": lora_class(base) is not None, "Conv2d": type(base) is nn.Conv2d}
    if not plain.get(kind.__name__, type(base) is nn.Embedding):
        return f"its base layer is a {type(base).__module__}.{type(base).__qualname__}, whose forward is not known here"
    if weight is None or weight.dtype not in FLOATS:
        return f"its base weight is {getattr(weight, 'dtype', None)}; of quantized bases, bitsandbytes' are served"
    if hasattr(base, "parametrizations"):
        return "its base weight is parametrized"
    if watched(base):
        return "its base layer has hooks or a replaced forward, which would be passed by; load without device_map"
    if isinstance(base, nn.Conv2d):
        return conv2d_refusal(base)
    if isinstance(base, nn.Embedding):
        return embedding_refusal(base) or ("it is sharded" if getattr(module, "tp_layer", None) is not None else None)
    return None

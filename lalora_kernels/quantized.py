"""LoRA over bitsandbytes' 4-bit and 8-bit layers (QLoRA, 2305.14314): the base layer is called, the adapter is ours.

bitsandbytes is never imported here: a model that holds one of its layers has imported it.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_kernels.autograd_tools import (
    apply,
    cast,
    keep,
    low_rank_backward,
    once_differentiable,
    rows_of,
    shaped,
    traced,
)

BITS = {"bitsandbytes.nn.modules.Linear4bit": 4, "bitsandbytes.nn.modules.Linear8bitLt": 8}  # and their subclasses


def bits(module: nn.Module) -> int:
    """4 or 8 for a linear layer of bitsandbytes', 0 for any other module."""
    return next((BITS[name] for k in type(module).__mro__ if (name := f"{k.__module__}.{k.__qualname__}") in BITS), 0)


def mixing_refusal(module: Any) -> str | None:
    """Why a quantized layer is no function of single records; None where it is one.

    LLM.int8 (2208.07339) takes a feature out of the 8-bit product where any row of the batch exceeds the threshold.
    """
    if bits(module) == 8 and module.state.threshold > 0.0:
        return (
            "it looks for outliers in the whole batch (LLM.int8), so that the output for one record depends on the "
            "others; load the model with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), or in 4 bits"
        )
    return None


def unpack(layer: Any) -> None:
    """Undo what bitsandbytes does to 4-bit weights in eval mode on CPUs with AVX-512 BF16.

    It lays them out for products that have no backward, and leaves them so. Saving a state undoes it; what stays is
    that their scales are rounded to bfloat16.
    """
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        layer.state_dict()


def dequantized(layer: Any) -> nn.Linear:
    """The layer as nn.Linear in float64, computing what the quantized weight means; frozen."""
    weight = layer.weight
    if bits(layer) == 4:
        unpack(layer)
        full = sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, weight.quant_state)
    elif layer.state.has_fp16_weights:
        full = weight.data
    else:
        codes, scale = (getattr(weight if weight.CB is not None else layer.state, name) for name in ("CB", "SCB"))
        full = codes.double() * (scale.double() / 127.0).unsqueeze(1)
    m, n = full.shape
    plain = nn.Linear(n, m, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(full.double(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().double(), requires_grad=False)
    return plain.train(layer.training)


def dequantize_(model: nn.Module) -> None:
    """Put ``dequantized`` in the place of every quantized layer below ``model``."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if bits(child):
                setattr(module, name, dequantized(child))


class LoRAUpdateFunction(torch.autograd.Function):
    """y + s (x A^T) B^T + b; y (..., m) is what the base layer made, x (..., n), A (r,n), B (m,r), b (m,) or None.

    The low-rank products are taken in ``dtype``; the result has y's. For backward h = x A^T is kept where B trains, and
    x where A does.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float,
        dtype: torch.dtype, recorder: Any, token: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        _, _, need_A, need_B, need_bias = ctx.needs_input_grad[:5]
        xc, A, B = cast(x, dtype), cast(lora_A, dtype), cast(lora_B, dtype)
        h = F.linear(rows_of(xc), A)
        if dtype == y.dtype:
            out = torch.addmm(rows_of(y), h, B.t(), alpha=scaling)
        else:
            out = rows_of(y) + (scaling * F.linear(h, B)).to(y.dtype)
        if bias is not None:
            out += bias.to(y.dtype)
        ctx.save_for_backward(shaped(h, x) if need_B else None, xc if need_A else None, A, B)
        ctx.scaling, ctx.dtype = scaling, dtype
        keep(ctx, recorder, token)
        ctx.dtypes = (x.dtype, lora_A.dtype, lora_B.dtype)
        if recorder is not None and token is None and (need_bias or need_A or need_B):
            recorder.note_forward()
        return shaped(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        need_y, need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:5]
        h, x, A, B = ctx.saved_tensors
        dz, dA, dB, db = low_rank_backward(
            ctx, cast(dy, ctx.dtype), B, h, x, need_x, need_A, need_B, need_bias, ctx.dtypes[1:]
        )
        dx = None
        if need_x:
            dx = cast((rows_of(dz) @ A).view(*dy.shape[:-1], A.shape[1]), ctx.dtypes[0])
        return (dy if need_y else None), dx, dA, dB, db, None, None, None, None


def lora_update(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, bias: Tensor | None = None,
    recorder: Any = None,
) -> Tensor:  # fmt: skip
    """The adapter's part added to the base layer's output y (..., m), for plain and private training.

    x (..., n), already dropped out; lora_A (r,n), lora_B (m,r), bias (m,) or None -> (..., m) in y's dtype. The
    products are taken in that dtype, or in autocast's.
    """
    kind, dtype = x.device.type, y.dtype
    if not torch.is_autocast_enabled(kind):
        return apply(LoRAUpdateFunction, y, x, lora_A, lora_B, bias, scaling, dtype, *traced(recorder))
    if dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return apply(LoRAUpdateFunction, y, x, lora_A, lora_B, bias, scaling, dtype, *traced(recorder))

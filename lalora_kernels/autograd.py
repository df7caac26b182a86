"""The autograd Functions. What a backward does with the gradient of a parameter is decided by its recorder.

Without a recorder a Function returns ordinary summed gradients. With one (a private step, privacy/engine.py) it hands
over what per-sample gradients are made of and returns None for every parameter, so that any gradient that autograd
does accumulate into a private parameter came from a use outside its module, and is refused there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from lalora_kernels import opaque
from lalora_kernels.autograd_tools import (
    apply,
    cast,
    keep,
    low_rank_backward,
    once_differentiable,
    product,
    recorder_of,
    rows_of,
    shaped,
    traced,
)

USUAL = 128  # positions of a record, where a choice may not go by those that were drawn


def _merging_pays(x: Tensor, weight: Tensor, dtype: torch.dtype, recorder: Any) -> bool:
    """Whether x (W0 + s B A)^T beats x W0^T + s (x A^T) B^T.

    Two passes over W0 (m n) against one over x (rows n) and two over y (rows m), once more in backward; three times
    measured. In half precision W0 + s B A would round small updates away. A private step goes by the public size of
    its batches: by the records drawn, one more would change how those of all others are rounded, and a server may send
    factors of which rounding is all that is left.
    """
    if torch.compiler.is_compiling() or dtype not in (torch.float32, torch.float64) or weight.dtype != dtype:
        return False  # traced: one graph for every batch size
    m, n = weight.shape
    if recorder is None:
        rows = x.numel() / n
    else:
        rows = recorder.engine.usual_rows * (USUAL if x.dim() > 2 else 1)
    return rows * (m + n) >= 3 * m * n


MAKERS: dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = {  # node -> (what it keeps, x from that)
    "GeluBackward0": (("self",), lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate)),
    "SiluBackward0": (("self",), lambda node: F.silu(node._saved_self)),
    "MulBackward0": (("self", "other"), lambda node: node._saved_self * node._saved_other),  # a gated unit
}


def _maker(x: Tensor) -> Any:
    """The autograd node that made x, where it can make x again, bit for bit, from what it keeps anyway; else None.

    Its own backward comes after x's use, so that it still has that then. What hooks keep elsewhere (checkpointing,
    offloading) is not asked for twice.
    """
    node = None if torch.compiler.is_compiling() else x.grad_fn
    # A factor is kept where the other one trains.
    if node is None or (name := node.name()) not in MAKERS or any(f is None for f, _ in node.next_functions):
        return None
    hooks = [getattr(getattr(node, f"_raw_saved_{kept}"), "unpack_hook", "unknown") for kept in MAKERS[name][0]]
    return node if all(hook is None for hook in hooks) else None


def _made_again(node: Any) -> Tensor:
    try:
        return MAKERS[node.name()][1](node)
    except RuntimeError as error:
        if "second time" not in str(error):  # changed in place, say
            raise
        raise RuntimeError(
            f"the input of an adapted layer is made again from what {node.name()} keeps, and an earlier backward "
            f"through that alone has freed it; give that one retain_graph=True"
        ) from error


class LoRAFunction(torch.autograd.Function):
    """y = x W0^T + b + s (x_lora A^T) B^T; x (..., n), W0 (m,n), A (r,n), B (m,r).

    ``x_lora`` is None where it is x itself (no dropout). Only what the active factors need is kept for backward:
    h = x A^T (r wide) for B; for A x, or where an activation function made it, nothing: that keeps its own input, from
    which x is made again. Neither when both are frozen. Computes in ``dtype``. With many rows the products
    are with W0 + s B A, formed for each of them and not kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_lora: Tensor | None, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
        scaling: float, dtype: torch.dtype, recorder: Any, token: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        _, _, _, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
        xc = cast(x, dtype)
        xl = xc if x_lora is None else cast(x_lora, dtype)
        b = None if bias is None else cast(bias, dtype)
        A, B = cast(lora_A, dtype), cast(lora_B, dtype)
        h: Any = None
        rows = rows_of(xc)
        ctx.merged = x_lora is None and _merging_pays(xc, weight, dtype, recorder)
        if need_B or not ctx.merged:
            h = F.linear(rows if xl is xc else rows_of(xl), A)
        if ctx.merged:
            y = F.linear(rows, torch.addmm(weight, B, A, alpha=scaling), b)
        else:
            y = F.linear(rows, cast(weight, dtype), b)
            y.addmm_(h, B.t(), alpha=scaling)
        ctx.maker = _maker(x) if need_A and xl is x else None
        # The factors as they were cast: small beside h, and a GPU's host would cast them once more.
        ctx.save_for_backward(
            shaped(h, x) if need_B else None, xl if need_A and ctx.maker is None else None, weight, A, B
        )
        ctx.scaling, ctx.dtype = scaling, dtype
        keep(ctx, recorder, token)
        ctx.dtypes = (x.dtype, None if x_lora is None else x_lora.dtype, lora_A.dtype, lora_B.dtype)
        if recorder is not None and token is None and (need_bias or need_A or need_B):
            recorder.note_forward()
        return shaped(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        need_x, need_xl, _, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
        h, xl, weight, lora_A, lora_B = ctx.saved_tensors
        if ctx.maker is not None:
            xl = _made_again(ctx.maker)
        separate = need_x and ctx.dtypes[1] is None and not ctx.merged  # dx takes its low-rank part from dz
        through_A = need_xl or separate
        dx = dxl = None
        dtype, B = dy.dtype, cast(lora_B, dy.dtype)
        dy2 = rows_of(dy)
        dz, dA, dB, db = low_rank_backward(ctx, dy, B, h, xl, through_A, need_A, need_B, need_bias, ctx.dtypes[2:])
        if need_x:
            w, A = cast(weight, dtype), cast(lora_A, dtype)
            if ctx.merged:
                w = torch.addmm(w, B, A, alpha=ctx.scaling)
            dx = torch.mm(dy2, w)
            if separate:
                dx.addmm_(rows_of(dz), A)
            dx = cast(dx if dy2 is dy else dx.view(*dy.shape[:-1], weight.shape[1]), ctx.dtypes[0])
        if need_xl:
            dxl = (rows_of(dz) @ cast(lora_A, dtype)).view(*dy.shape[:-1], weight.shape[1]).to(ctx.dtypes[1])
        return dx, dxl, None, db, dA, dB, None, None, None, None


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, *,
    x_lora: Tensor | None = None, recorder: Any = None,
) -> Tensor:  # fmt: skip
    """The adapted linear map, for plain (``recorder=None``) and private training; honours autocast.

    x (..., n), weight (m,n), bias (m,) or None, lora_A (r,n), lora_B (m,r) -> (..., m). Factors kept in another dtype
    than x (float32 masters beside a bfloat16 base) are cast to x's for the products.
    """
    dtype = x.dtype
    if not torch.is_autocast_enabled(x.device.type):
        return apply(LoRAFunction, x, x_lora, weight, bias, lora_A, lora_B, scaling, dtype, *traced(recorder))
    if dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        return apply(LoRAFunction, x, x_lora, weight, bias, lora_A, lora_B, scaling, dtype, *traced(recorder))


def _positions(t: Tensor) -> Tensor:
    """(N,C,H,W) -> (N, H*W, C): each pixel a position."""
    return t.flatten(2).transpose(1, 2)


class LoRAConv2dFunction(torch.autograd.Function):
    """y = W0 * x + b + s B (A * x_lora), * the convolution; x (N,n,H,W), W0 (m,n,kh,kw), A (r,n,kh,kw), B (m,r,1,1).

    A linear map of patches, so what a recorder is given are a linear layer's dy, h and x: one row for each pixel of the
    output, x unfolded into patches only where A trains. ``x`` comes padded where padding is not the same on both sides.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_lora: Tensor | None, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
        scaling: float, stride: Any, padding: Any, dtype: torch.dtype, recorder: Any, token: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        _, _, _, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
        xc = x.to(dtype)
        xl = xc if x_lora is None else x_lora.to(dtype)
        y = F.conv2d(xc, weight.to(dtype), None if bias is None else bias.to(dtype), stride, padding)
        h = F.conv2d(xl, lora_A.to(dtype), None, stride, padding)
        y += F.conv2d(h, scaling * lora_B.to(dtype))
        ctx.save_for_backward(h if need_B else None, xl if need_A else None, weight, lora_A, lora_B)
        ctx.scaling, ctx.stride, ctx.padding = scaling, stride, padding
        keep(ctx, recorder, token)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, None if x_lora is None else x_lora.dtype)
        if recorder is not None and token is None and (need_bias or need_A or need_B):
            recorder.note_forward()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        need_x, need_xl, _, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
        h, xl, weight, lora_A, lora_B = ctx.saved_tensors
        through_A = need_xl or (need_x and ctx.dtypes[1] is None)
        dx = dxl = patches = None
        rows, B = _positions(dy), lora_B.to(dy.dtype).flatten(1)
        h = None if h is None else _positions(h)
        if xl is not None:
            patches = F.unfold(xl, lora_A.shape[2:], padding=ctx.padding, stride=ctx.stride).transpose(1, 2)
        dz, dA, dB, db = low_rank_backward(
            ctx, rows, B, h, patches, through_A, need_A, need_B, need_bias, (lora_A.dtype, lora_B.dtype)
        )
        dA, dB = None if dA is None else dA.view_as(lora_A), None if dB is None else dB.view_as(lora_B)
        if through_A:
            low = dz.reshape(len(dy), -1, B.shape[1]).transpose(1, 2).reshape(len(dy), -1, *dy.shape[2:])
            low = conv2d_input(ctx.shape, lora_A.to(dy.dtype), low, ctx.stride, ctx.padding)
        if need_x:
            dx = conv2d_input(ctx.shape, weight.to(dy.dtype), dy, ctx.stride, ctx.padding)
            dx = (dx if ctx.dtypes[1] is not None else dx + low).to(ctx.dtypes[0])
        if need_xl:
            dxl = low.to(ctx.dtypes[1])
        return dx, dxl, None, db, dA, dB, None, None, None, None, None, None


def lora_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, stride: Any,
    pad: Sequence[int], *, x_lora: Tensor | None = None, recorder: Any = None,
) -> Tensor:  # fmt: skip
    """The adapted convolution, as ``lora_linear``; ``pad`` = (left, right, top, bottom). (N,n,H,W) -> (N,m,H',W')."""
    padding = (pad[2], pad[0])
    if pad[0] != pad[1] or pad[2] != pad[3]:
        padding = (0, 0)
        x, x_lora = F.pad(x, pad), None if x_lora is None else F.pad(x_lora, pad)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        return LoRAConv2dFunction.apply(
            x, x_lora, weight, bias, lora_A, lora_B, scaling, stride, padding, dtype, *traced(recorder)
        )


class LoRAEmbeddingFunction(torch.autograd.Function):
    """y = W0[ids] + s A[:, ids]^T B^T; ids any shape of integers, W0 (V,m), A (r,V), B (m,r) -> (..., m).

    h = A[:, ids]^T (..., r) is kept where B trains. The gradient of A at ``padding_idx`` is zero, as torch has it.
    """

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, padding_idx: int | None,
        recorder: Any, token: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        h = F.embedding(ids, lora_A.t())
        ctx.save_for_backward(ids, h if ctx.needs_input_grad[3] else None, lora_A, lora_B)
        ctx.scaling, ctx.padding_idx = scaling, padding_idx
        keep(ctx, recorder, token)
        if recorder is not None and token is None and (ctx.needs_input_grad[2] or ctx.needs_input_grad[3]):
            recorder.note_forward()
        return F.embedding(ids, weight) + (scaling * (h @ lora_B.t())).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        ids, h, lora_A, lora_B = ctx.saved_tensors
        dA = dB = None
        if ctx.token is not None:
            opaque.record_embedding(ctx.token, dy, lora_B.to(dy.dtype), h, ids, ctx.scaling, ctx.recorder)
        elif ctx.recorder is not None:
            recorder_of(ctx).record_embedding(dy, lora_B.to(dy.dtype), ctx.scaling, h, ids)
        else:
            dy = rows_of(dy).to(lora_B.dtype)
            if ctx.needs_input_grad[2]:
                dz = ctx.scaling * (dy @ lora_B)
                if ctx.padding_idx is not None:
                    dz = torch.where((ids == ctx.padding_idx).view(-1, 1), 0.0, dz)
                dA = torch.zeros_like(lora_A).index_add_(1, ids.flatten(), dz.t())
            if ctx.needs_input_grad[3]:
                dB = ctx.scaling * (dy.t() @ rows_of(h))
        return None, None, dA, dB, None, None, None, None


def lora_embedding(
    ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, padding_idx: int | None, *,
    recorder: Any = None,
) -> Tensor:  # fmt: skip
    """The adapted table, as ``lora_linear``; ids any shape of integers -> (..., m). The factors' dtype is kept."""
    with torch.autocast(weight.device.type, enabled=False):
        return apply(LoRAEmbeddingFunction, ids, weight, lora_A, lora_B, scaling, padding_idx, *traced(recorder))


def _record(ctx: Any, dy: Tensor, x: Tensor | None) -> None:
    if ctx.token is not None:
        opaque.record(ctx.token, dy, x, ctx.recorder)
    else:
        recorder_of(ctx).record(dy, x)


def _record_scale(ctx: Any, dy: Tensor, normalized: Tensor | None, axis: int) -> None:
    if ctx.token is not None:
        opaque.record_scale(ctx.token, dy, normalized, axis, ctx.recorder)
    else:
        recorder_of(ctx).record_scale(dy, normalized, axis)


class LinearFunction(torch.autograd.Function):
    """y = x W^T + b with W (m,n) and b (m,), either of them trainable: a head, or a bias alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recorder: Any, token: Tensor | None = None
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        keep(ctx, recorder, token)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        _record(ctx, dy, x)
        return (dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None), None, None, None, None


class LayerNormFunction(torch.autograd.Function):
    """y = (x - mean) rstd * weight + bias over the last ``len(shape)`` axes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float, recorder: Any,
        token: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.shape = shape
        keep(ctx, recorder, token)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        normalized = (x - mean) * rstd if ctx.needs_input_grad[2] else None
        _record_scale(ctx, dy, normalized, -len(ctx.shape))
        dx = None
        if ctx.needs_input_grad[0]:
            # CUDA's autocast normalizes in float32 what is kept here in half precision
            dx = torch.ops.aten.native_layer_norm_backward(
                dy.contiguous(), x.to(dy.dtype), ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        return dx, None, None, None, None, None, None


class ScaleShiftFunction(torch.autograd.Function):
    """y = x * weight + bias, either of them None; they stand along axis 1 of x, or along its last -axis axes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int, recorder: Any, token: Any = None
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.axis = axis
        keep(ctx, recorder, token)
        along = [-1, *[1] * (x.dim() - 2)] if axis == 1 else None
        ctx.along = along
        y = x if weight is None else x * (weight.view(along) if along else weight)
        return (y if bias is None else y + (bias.view(along) if along else bias)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        _record_scale(ctx, dy, x, ctx.axis)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy if weight is None else (dy * (weight.view(ctx.along) if ctx.along else weight)).to(dy.dtype)
        return dx, None, None, None, None, None


class EmbeddingFunction(torch.autograd.Function):
    """y = weight[ids]; weight (V,d), ids any shape of integers."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None, recorder: Any, token: Tensor | None = None
    ) -> Tensor:
        ctx.save_for_backward(ids)
        keep(ctx, recorder, token)
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        _record(ctx, dy, ctx.saved_tensors[0])
        return None, None, None, None, None

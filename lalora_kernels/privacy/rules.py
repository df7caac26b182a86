"""Per-sample gradients of what trains beside the adapters: Linear, LayerNorm and Embedding parameters (SPEC section 5).

A rule replaces a module's forward by an autograd Function that hands (dy, input) to its recorder. Small tensors
(scales, biases) are written to the workspace like a LoRA factor; a full weight is never materialized per sample: its
norm comes from its inputs, its clipped sum from one product.
"""

import types

import torch
from torch import Tensor, nn

from lalora_kernels.autograd import EmbeddingFunction, LayerNormFunction, LinearFunction
from lalora_kernels.privacy.recorders import Recorder

# Relative to sum_t ||x_t|| ||dy_t||, the rounding that the float32 product of a clipped sum may add to a sample's
# share. Norms are raised by it, so that a sample whose terms cancel still keeps the bound.
SLACK = 4e-7


def _linear_forward(module: nn.Linear, x: Tensor) -> Tensor:
    return LinearFunction.apply(x, module.weight, module.bias, module._recorder)


def _layer_norm_forward(module: nn.LayerNorm, x: Tensor) -> Tensor:
    shape = list(module.normalized_shape)
    return LayerNormFunction.apply(x, shape, module.weight, module.bias, module.eps, module._recorder)


def _embedding_forward(module: nn.Embedding, ids: Tensor) -> Tensor:
    return EmbeddingFunction.apply(module.weight, ids, module.padding_idx, module._recorder)


def _recording_forward(module: nn.Module, x: Tensor) -> Tensor:
    if module._recorder is None:  # a copy of a private model is an ordinary model
        return type(module).forward(module, x)
    return FORWARDS[rule_of(module)](module, x)


FORWARDS = {nn.Linear: _linear_forward, nn.LayerNorm: _layer_norm_forward, nn.Embedding: _embedding_forward}
# Subclasses that compute what their base computes, by qualified name, so that nothing is imported for them.
SAME_AS_BASE = {"timm.layers.norm.LayerNorm": nn.LayerNorm}


def rule_of(module: nn.Module) -> type[nn.Module] | None:
    """The type whose rule covers ``module``, or None. Any other subclass may compute something else: not covered."""
    kind = type(module)
    return kind if kind in FORWARDS else SAME_AS_BASE.get(f"{kind.__module__}.{kind.__qualname__}")


class ExtraRecorder(Recorder):
    """Recorder of a Linear, LayerNorm or Embedding; keeps a full weight's (dy, x) until its norm is known."""

    def __init__(self, engine, name: str, module: nn.Module, sites: dict):
        super().__init__(engine, name, sites)
        self.module, self.pairs = module, []
        if not isinstance(module, nn.LayerNorm) and "weight" in sites:
            sites["weight"].deferred = self
        module._recorder = self
        module.forward = types.MethodType(_recording_forward, module)

    def detach(self) -> None:
        del self.module.forward, self.module._recorder

    def reset(self) -> None:
        self.pairs = []

    def record(self, dy: Tensor, x: Tensor | None) -> None:
        """dy (rows, ..., m); x the layer's input, or its normalized input for a LayerNorm."""
        ids = isinstance(self.module, nn.Embedding)
        features = self.module.weight.dim() if isinstance(self.module, nn.LayerNorm) else 1
        dy = self.engine.fold(dy, self.name, features)
        if x is not None:
            x = self.engine.fold(x, self.name, 0 if ids else features)
        if (bias := self.active("bias")) is not None:
            self.engine.add(bias, dy.sum(1, dtype=self.engine.dtype))
        if (weight := self.active("weight")) is not None:
            if isinstance(self.module, nn.LayerNorm):
                self.engine.add(weight, (dy.to(self.engine.dtype) * x).sum(1))
            else:
                self.engine.mark(weight)
                self.pairs.append((dy.to(self.engine.dtype), x if ids else x.to(self.engine.dtype)))

    def _inputs(self) -> tuple[Tensor, Tensor]:
        """All calls of this backward side by side along the position axis: dy (N,T,m), x (N,T,n) or ids (N,T)."""
        dys, xs = zip(*self.pairs)
        return (dys[0], xs[0]) if len(dys) == 1 else (torch.cat(dys, 1), torch.cat(xs, 1))

    def squared_norms(self) -> Tensor:
        """||G_i||^2 of the weight, (N,) float64, from the inputs alone."""
        dy, x = self._inputs()
        if isinstance(self.module, nn.Embedding):
            sample, _, rows = self._token_sums(dy, x)
            return torch.zeros(len(dy), dtype=torch.float64, device=dy.device).index_add_(
                0, sample, rows.double().square().sum(1)
            )
        dy, x = dy.double(), x.double()
        N, T, m = dy.shape
        if T == 1:
            return dy.square().sum((1, 2)) * x.square().sum((1, 2))
        if 2 * T * T <= m * x.shape[2]:
            sq = ((x @ x.mT) * (dy @ dy.mT)).sum((1, 2)).clamp(min=0.0)
        else:
            sq = torch.stack([(d.t() @ v).square().sum() for d, v in zip(dy, x)]) if N else dy.new_zeros(0)
        slack = SLACK * (dy.square().sum(2).sqrt() * x.square().sum(2).sqrt()).sum(1)
        return (sq.sqrt() + slack).square()

    def add_weighted_sum(self, weights: Tensor, out: Tensor) -> None:
        """out += sum_i weights[i] G_i for the weight; samples of weight 0 are masked, whatever they hold."""
        dy, x = self._inputs()
        keep = (weights != 0).view(-1, 1, 1)
        dy = torch.where(keep, weights.to(dy.dtype).view(-1, 1, 1) * dy, 0.0)
        if isinstance(self.module, nn.Embedding):
            _, token, rows = self._token_sums(dy, x)
            out.index_add_(0, token, rows)
        else:
            x = torch.where(keep, x, 0.0)
            out.addmm_(dy.flatten(0, 1).t(), x.flatten(0, 1))

    def _token_sums(self, dy: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of dy over equal tokens of one sample: (sample (U,), token (U,), sums (U,d)); padding is left out."""
        N, T = ids.shape
        V = self.module.num_embeddings
        key = (torch.arange(N, device=ids.device).view(-1, 1) * V + ids).flatten()
        dy = dy.flatten(0, 1)
        if self.module.padding_idx is not None:
            dy = torch.where((ids == self.module.padding_idx).view(-1, 1), 0.0, dy)
        unique, inverse = torch.unique(key, return_inverse=True)
        sums = dy.new_zeros(len(unique), dy.shape[1]).index_add_(0, inverse, dy)
        return unique // V, unique % V, sums

"""Per-sample gradients of what trains beside the adapters: heads, scales, biases and embeddings.

A rule replaces a module's forward by an autograd Function that hands (dy, input) to its recorder. Small tensors
(scales, biases) are written to the workspace like a LoRA factor; a full weight is never materialized per sample: its
norm comes from its inputs, its clipped sum from one product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_kernels.autograd import EmbeddingFunction, LayerNormFunction, LinearFunction, ScaleShiftFunction, traced
from lalora_kernels.nn import embedding_refusal
from lalora_kernels.privacy.recorders import SLACK, Recorder, token_sums, weighted
from lalora_kernels.privacy.ties import WEIGHT, defer
from lalora_kernels.quantized import bits, mixing_refusal

if TYPE_CHECKING:
    from lalora_kernels.privacy.engine import Engine
    from lalora_kernels.privacy.sites import Site

# A head over several positions has its sum, as its norm, from float64: of terms that cancel (an outlier, its opposite
# 500 tokens later) a float32 accumulator keeps roundings of the largest partial sum, its own and the other records',
# many times C in all. SLACK holds a record's terms below C / SLACK, and so what float64 may lose.
UNIT_F64 = 2.0**-53
BLOCK = 1 << 22  # elements of the weight that are summed in float64 at a time


# A module with its _recorder, an attribute that its class does not declare.
def _linear(m: Any, x: Tensor) -> Tensor:
    return LinearFunction.apply(m._recorder.expand(x), m.weight, m.bias, *traced(m._recorder))


def _conv1d(m: Any, x: Tensor) -> Tensor:  # Hugging Face's: a linear layer whose weight is stored (n,m)
    return LinearFunction.apply(m._recorder.expand(x), m.weight.t(), m.bias, *traced(m._recorder))


def _layer_norm(m: Any, x: Tensor) -> Tensor:
    return LayerNormFunction.apply(x, list(m.normalized_shape), m.weight, m.bias, m.eps, *traced(m._recorder))


def _layer_norm_2d(m: Any, x: Tensor) -> Tensor:  # timm's, over the channels of (N, C, H, W)
    return _layer_norm(m, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _group_norm(m: Any, x: Tensor) -> Tensor:
    return ScaleShiftFunction.apply(
        F.group_norm(x, m.num_groups, None, None, m.eps), m.weight, m.bias, 1, *traced(m._recorder)
    )


def _rms_norm(m: Any, x: Tensor) -> Tensor:
    normalized = F.rms_norm(x, m.normalized_shape, None, m.eps)
    return ScaleShiftFunction.apply(normalized, m.weight, None, -m.weight.dim(), *traced(m._recorder))


def _hf_rms_norm(m: Any, x: Tensor) -> Tensor:
    wide = x.float()  # whatever x is, as transformers computes it
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + m.variance_epsilon)
    return ScaleShiftFunction.apply(normalized.to(x.dtype), m.weight, None, -1, *traced(m._recorder))


def _convolution(m: Any, x: Tensor) -> Tensor:
    y = m._conv_forward(m._recorder.expand(x), m.weight, None)
    return ScaleShiftFunction.apply(y, None, m.bias, 1, *traced(m._recorder))


def _embedding(m: Any, ids: Tensor) -> Tensor:
    return EmbeddingFunction.apply(m.weight, m._recorder.expand(ids), m.padding_idx, *traced(m._recorder))


@dataclass(frozen=True)
class Rule:
    """How a module records, and which of its parameters that covers."""

    forward: Callable[[nn.Module, Tensor], Tensor]
    covers: frozenset[str] = frozenset({"weight", "bias"})

    @property
    def defers(self) -> bool:
        """Whether the weight's per-sample gradient is kept as (dy, input) and never made in full."""
        return self.forward in (_linear, _conv1d, _embedding)


_HF_RMS_NORM = Rule(_hf_rms_norm)
_BIAS = frozenset({"bias"})
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: Rule(_linear),
    nn.LayerNorm: Rule(_layer_norm),
    nn.GroupNorm: Rule(_group_norm),
    nn.RMSNorm: Rule(_rms_norm),
    nn.Embedding: Rule(_embedding),
    nn.Conv1d: Rule(_convolution, _BIAS),
    nn.Conv2d: Rule(_convolution, _BIAS),
    nn.Conv3d: Rule(_convolution, _BIAS),
}
# By qualified name, so that nothing is imported for them. A subclass that is not named may compute something else.
RULES_BY_NAME: dict[str, Rule] = {
    "timm.layers.linear.Linear": Rule(_linear),  # the head of MobileNets, as nn.Linear but in TorchScript
    "timm.layers.norm.LayerNorm": Rule(_layer_norm),
    "timm.layers.norm.LayerNorm2d": Rule(_layer_norm_2d),
    "transformers.pytorch_utils.Conv1D": Rule(_conv1d),
    **{
        f"transformers.models.{family}.modeling_{family}.{name}": _HF_RMS_NORM
        for family, name in (
            ("bitnet", "BitNetRMSNorm"),
            ("deepseek_v2", "DeepseekV2RMSNorm"),
            ("deepseek_v3", "DeepseekV3RMSNorm"),
            ("exaone4", "Exaone4RMSNorm"),
            ("falcon_mamba", "FalconMambaRMSNorm"),
            ("glm", "GlmRMSNorm"),
            ("glm4", "Glm4RMSNorm"),
            ("granite", "GraniteRMSNorm"),
            ("jamba", "JambaRMSNorm"),
            ("lfm2", "Lfm2RMSNorm"),
            ("llama", "LlamaRMSNorm"),
            ("longt5", "LongT5LayerNorm"),
            ("mamba", "MambaRMSNorm"),
            ("mamba2", "Mamba2RMSNorm"),
            ("mistral", "MistralRMSNorm"),
            ("mixtral", "MixtralRMSNorm"),
            ("mt5", "MT5LayerNorm"),
            ("olmoe", "OlmoeRMSNorm"),
            ("phi3", "Phi3RMSNorm"),
            ("qwen2", "Qwen2RMSNorm"),
            ("qwen2_5_vl", "Qwen2_5_VLRMSNorm"),
            ("qwen2_moe", "Qwen2MoeRMSNorm"),
            ("qwen3", "Qwen3RMSNorm"),
            ("qwen3_moe", "Qwen3MoeRMSNorm"),
            ("seed_oss", "SeedOssRMSNorm"),
            ("smollm3", "SmolLM3RMSNorm"),
            ("switch_transformers", "SwitchTransformersLayerNorm"),
            ("t5", "T5LayerNorm"),
            ("umt5", "UMT5LayerNorm"),
            ("zamba2", "Zamba2RMSNorm"),
        )
    },
}


def rule_of(module: nn.Module) -> Rule | None:
    """The rule that covers ``module``, or None."""
    kind = type(module)
    return RULES.get(kind) or RULES_BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")


def may_mix(m: nn.Module) -> bool:
    """Whether it is a layer that mixes the records of a batch in one of its states: BatchNorm and its kin, LLM.int8."""
    norm = isinstance(m, nn.modules.batchnorm._BatchNorm)  # its kin normalize over a record alone without statistics
    return norm or (isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats) or bits(m) == 8


def refuse_mixing(layers: list[tuple[str, nn.Module]]) -> None:
    """Raise ValueError for one in that state."""
    for name, m in layers:
        if bits(m):
            if why := mixing_refusal(m):
                raise ValueError(f"{name} ({type(m).__name__}) mixes the records of a batch: {why}")
        elif m.training or not m.track_running_stats:
            raise ValueError(
                f"{name} ({type(m).__name__}) mixes the records of a batch in train mode, or without running "
                f"statistics; replace it by GroupNorm or LayerNorm, or keep it in eval mode (after each train())"
            )


def refuse_tables(model: nn.Module) -> None:
    """Raise ValueError for an embedding that a batch rewrites, also a frozen one, or whose gradient others scale."""
    for name, m in model.named_modules():
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and (m.max_norm is not None or m.weight.requires_grad):
            if why := embedding_refusal(m):
                raise ValueError(f"{name} ({type(m).__name__}) cannot be part of a private step: {why}")


def _norms(t: Tensor) -> Tensor:
    """(N,T) float64 of t (N,T,d)."""
    return torch.linalg.vector_norm(t, dim=2, dtype=torch.float64)


def refuse_torchscript(model: nn.Module) -> None:
    """Raise ValueError for a part in TorchScript, also a frozen one."""
    for name, m in model.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            raise ValueError(
                f"{name or 'the model'} is TorchScript, into which neither rules nor the check of the first batch can "
                f"look (a BatchNorm there would go unseen); use the module that it was made from, or torch.compile"
            )


class RecordingForward:
    """What stands in ``module.forward``; that of a copy, or of a file, is the ordinary forward again."""

    def __init__(self, module: Any):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        module = self.module
        if module._recorder is None:
            return type(module).forward(module, *args, **kwargs)
        (x,) = (*args, *kwargs.values())
        return module._recorder.rule.forward(module, x)


class ExtraRecorder(Recorder):
    """Recorder of a module that is not a LoRA layer; keeps a full weight's (dy, x) until its norm is known."""

    def __init__(self, engine: "Engine", name: str, module: Any, sites: "dict[str, Site]"):
        super().__init__(engine, name, sites)
        rule = rule_of(module)
        assert rule is not None  # or trained_tensors has refused it
        if not isinstance(vars(module).get("forward"), (RecordingForward, type(None))):
            raise ValueError(
                f"{name} trains, but its forward was replaced by another than {type(module).__name__}'s, of which no "
                f"per-sample gradients are known; freeze it, or take the replacement away"
            )
        self.module: Any = module
        self.rule, self.pairs = rule, []
        self.ids = isinstance(module, nn.Embedding)
        self.transposed = self.rule.forward is _conv1d
        if "weight" in sites and sites["weight"].kind == WEIGHT:
            defer(sites["weight"], self)
        module._recorder = self
        module.forward = RecordingForward(module)

    def detach(self) -> None:
        del self.module.forward, self.module._recorder

    def reset(self) -> None:
        self.pairs = []
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def record(self, dy: Tensor, x: Tensor | None) -> None:
        """A full weight and its bias: dy (rows, ..., m), x (rows, ..., n) or ids (rows, ...)."""
        dtype = self.engine.dtype
        dy = self.fold(dy)
        if (bias := self.active("bias")) is not None:
            self.engine.add(bias, dy.sum(1, dtype=dtype))
        if (weight := self.active("weight")) is not None:
            self.engine.mark(weight)
            assert x is not None  # kept where the weight trains
            x = self.fold(x.detach(), 0 if self.ids else 1)  # or its graph lives as long as we, and we as long as it
            self.pairs.append((dy.to(dtype), x if self.ids else x.to(dtype)))

    def record_scale(self, dy: Tensor, normalized: Tensor | None, axis: int) -> None:
        """A scale and a shift that stand along ``axis``: 1, or the last -axis axes. dy, normalized (rows, ...)."""
        if self.batch_axis == 1:
            dy, normalized = dy.transpose(0, 1), None if normalized is None else normalized.transpose(0, 1)
        reduce = list(range(2, dy.dim())) if axis == 1 else list(range(1, dy.dim() + axis))
        for key, of in (("weight", normalized), ("bias", dy)):
            if (site := self.active(key)) is not None:
                G = dy.to(self.engine.dtype)
                if key == "weight":
                    assert of is not None  # kept where the scale trains
                    G = G * of
                G = G.sum(reduce) if reduce else G
                self.engine.add(site, self.fold(G, site.param.dim(), axis=0).sum(1))

    def _inputs(self) -> tuple[Tensor, Tensor]:
        """All calls of this backward side by side along the position axis: dy (N,T,m), x (N,T,n) or ids (N,T)."""
        dys, xs = zip(*self.pairs)
        return (dys[0], xs[0]) if len(dys) == 1 else (torch.cat(dys, 1), torch.cat(xs, 1))

    def squared_norms(self) -> Tensor:
        """||G_i||^2 of the weight, (N,) float64, from the inputs alone."""
        dy, x = self._inputs()
        if self.ids:
            sample, _, rows = self._token_sums()
            return torch.zeros(len(dy), dtype=torch.float64, device=dy.device).index_add_(
                0, sample, rows.double().square().sum(1)
            )
        N, T, m = dy.shape
        if T == 1:
            return (_norms(dy) * _norms(x)).square().squeeze(1)
        dy, x = dy.double(), x.double()
        if 2 * T * T <= m * x.shape[2]:
            sq = ((x @ x.mT) * (dy @ dy.mT)).sum((1, 2)).clamp(min=0.0)
            # Of products that cancel, so many roundings may hide a gradient.
            sq = sq + (m + x.shape[2] + T * T + 2) * UNIT_F64 * (_norms(dy) * _norms(x)).sum(1).square()
        else:
            sq = torch.stack([(d.t() @ v).square().sum() for d, v in zip(dy, x)]) if N else dy.new_zeros(0)
        return (sq.sqrt() + self.slack()).square()

    def slack(self) -> Tensor:
        """What rounding may add to a sample's share of a sum that cancels, (N,) float64."""
        dy, x = self._inputs()
        norms = _norms(dy)
        return SLACK * (norms if self.ids else norms * _norms(x)).sum(1)

    def add_weighted_sum(self, weights: Tensor, out: Tensor) -> None:
        """out += sum_i weights[i] G_i for the weight; samples of weight 0 are masked, whatever they hold."""
        if self.ids:
            sample, token, sums = self._token_sums()
            out.index_add_(0, token, weighted(weights, sample, sums.to(out.dtype)))
            return
        dy, x = self._inputs()
        keep = (weights != 0).view(-1, 1, 1)
        if dy.shape[1] > 1 or out.dtype == torch.float64:
            weights = weights.double()
        dy = torch.where(keep, weights.to(torch.promote_types(weights.dtype, dy.dtype)).view(-1, 1, 1) * dy, 0.0)
        self._add_product(dy.flatten(0, 1), torch.where(keep, x, 0.0).flatten(0, 1), out)

    def add_sample(self, i: int, out: Tensor) -> None:
        """out += G_i for the weight."""
        if self.ids:
            sample, token, sums = self._token_sums()
            out.index_add_(0, token[sample == i], sums[sample == i].to(out.dtype))
        else:
            dy, x = self._inputs()
            self._add_product(dy[i].double(), x[i], out)

    def _add_product(self, dy: Tensor, x: Tensor, out: Tensor) -> None:
        """out += dy^T x in the precision of dy."""
        x = x.to(dy.dtype)
        if dy.dtype == out.dtype:
            rows, columns = (x, dy) if self.transposed else (dy, x)
            out.addmm_(rows.t(), columns)
            return
        step = max(64, BLOCK // max(x.shape[1], 1))
        for a in range(0, dy.shape[1], step):
            part = dy[:, a : a + step].t() @ x
            if self.transposed:
                out[:, a : a + step].add_(part.t())
            else:
                out[a : a + step].add_(part)

    def _token_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._sums is None:
            self._sums = token_sums(*self._inputs(), self.module.num_embeddings, self.module.padding_idx)
        return self._sums

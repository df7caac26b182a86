"""LoRA layers: drop-in replacements that hold the frozen weight and the two factors under PEFT's names."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lalora_kernels.autograd import lora_linear

FACTORS = ("", "A", "B", "AB")


class LoRALinear(nn.Linear):
    """``nn.Linear`` plus a low-rank update: y = x W0^T + b + s (dropout(x) A^T) B^T.

    Parameters: ``weight`` (m,n) and ``bias`` (m,), frozen; ``lora_A`` (r,n); ``lora_B`` (m,r), zero at start.
    s = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora`` (2312.03732). The active factors are those whose
    ``requires_grad`` is set, read anew at every forward: see ``set_active``. Input (..., n), output (..., m).

    Raises ValueError for r < 1 or a dropout outside [0, 1).
    """

    fan_in_fan_out = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float = 1.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_lora(r, lora_alpha, lora_dropout, use_rslora)

    def _init_lora(self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> None:
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"r is a positive integer, got {r!r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout lies in [0, 1), got {lora_dropout!r}")
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0.0 else nn.Identity()
        # A half-precision base keeps float32 factors, as PEFT does: their updates are too small for bfloat16.
        w = self.weight
        dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=w.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=w.device, dtype=dtype))
        self.merged = False
        self.recorder = None
        for p in (self.weight, self.bias):
            if p is not None:
                p.requires_grad_(False)
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """A as PEFT draws it (Kaiming uniform, a = sqrt 5), B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, r: int, lora_alpha: float = 1.0, lora_dropout: float = 0.0, use_rslora: bool = False
    ) -> "LoRALinear":
        """Adapt an existing layer; its weight and bias are taken over, not copied, and frozen."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(linear)
        layer._init_lora(r, lora_alpha, lora_dropout, use_rslora)
        layer.train(linear.training)
        return layer

    def _take(self, linear: nn.Linear) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def _weight_mn(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            if torch.is_grad_enabled() and (self.lora_A.requires_grad or self.lora_B.requires_grad):
                raise RuntimeError(
                    "this LoRA layer is merged and cannot train; call unmerge() first, or torch.no_grad()"
                )
            return nn.functional.linear(x, self._weight_mn(), self.bias)
        if self.recorder is not None:
            x = self.recorder.expand(x)
        drops = self.training and not isinstance(self.lora_dropout, nn.Identity)
        return lora_linear(
            x,
            self._weight_mn(),
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            x_lora=self.lora_dropout(x) if drops else None,
            recorder=self.recorder,
        )

    def get_delta_weight(self) -> Tensor:
        """s B A in the weight's own layout and dtype."""
        delta = self.scaling * (self.lora_B @ self.lora_A)
        return (delta.t() if self.fan_in_fan_out else delta).to(self.weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold s B A into the weight; the original is kept, so that ``unmerge`` restores it bit for bit."""
        if self.merged:
            raise RuntimeError("this LoRA layer is already merged")
        delta = self.get_delta_weight()
        if not delta.isfinite().all():
            raise ValueError("the adapter holds NaN or Inf; not merged")
        self._unmerged = self.weight.detach().clone()
        self.weight.add_(delta)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo ``merge``."""
        if not self.merged:
            raise RuntimeError("this LoRA layer is not merged")
        self.weight.copy_(self._unmerged)
        del self._unmerged
        self.merged = False

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, use_rslora={self.use_rslora}"


class LoRAConv1D(LoRALinear):
    """LoRA on Hugging Face's ``Conv1D`` (GPT-2): a linear layer whose weight is stored (n,m).

    PEFT calls this layout ``fan_in_fan_out``. ``nf`` is kept for code that reads it.
    """

    fan_in_fan_out = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = nn.Parameter(self.weight.detach().t().contiguous(), requires_grad=False)
        self.nf = self.out_features

    def _take(self, conv: nn.Module) -> None:
        self.in_features, self.out_features = conv.weight.shape
        self.nf = self.out_features
        self.weight, self.bias = conv.weight, conv.bias

    def _weight_mn(self) -> Tensor:
        return self.weight.t()


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(qualified name, layer) of every adapted layer, in the model's order; a shared layer once."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def set_active(model: nn.Module, factors: str) -> None:
    """Make ``factors`` ("A", "B", "AB" or "") the trainable ones of every adapted layer.

    The inactive factor's gradient is never computed and its ``grad`` is cleared, so that no optimizer moves it.
    """
    if factors not in FACTORS:
        raise ValueError(f"factors is one of {FACTORS}, got {factors!r}")
    for _, layer in lora_layers(model):
        for factor, p in (("A", layer.lora_A), ("B", layer.lora_B)):
            p.requires_grad_(factor in factors)
            if factor not in factors:
                p.grad = None

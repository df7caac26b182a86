"""LoRA layers: drop-in replacements that hold the frozen weight and the two factors under PEFT's names."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lalora_kernels.adapted import Adapted, activate
from lalora_kernels.adapted import factor_parameters as factor_parameters
from lalora_kernels.autograd import lora_conv2d, lora_embedding, lora_linear


class LoRALayer(Adapted):
    """What every LoRA layer has, beside a class of torch.nn: factors, scaling, dropout, merging.

    ``lora_A`` and ``lora_B`` are the factors whatever their names in the state dict (``names``); the active ones are
    those whose ``requires_grad`` is set, read anew at every forward: see ``set_active``.
    """

    names = {"A": "lora_A", "B": "lora_B"}
    fan_in_fan_out = False  # whether the weight is stored (n,m)
    if TYPE_CHECKING:
        weight: Any
        lora_A: Any
        lora_B: Any
        in_features: int
        out_features: int

        def _take(self, layer: Any) -> None: ...

    def _init_lora(self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> None:
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r is a positive integer, got {r!r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout lies in [0, 1), got {lora_dropout!r}")
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0.0 else nn.Identity()
        # A half-precision base keeps float32 factors, as PEFT does: their updates are too small for bfloat16.
        w = self.weight
        dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
        for factor, shape in zip("AB", self.factor_shapes(r)):
            self.register_parameter(self.names[factor], nn.Parameter(torch.empty(shape, device=w.device, dtype=dtype)))
        self.merged = False
        for p in (self.weight, getattr(self, "bias", None)):
            if p is not None:
                p.requires_grad_(False)
        self.reset_lora_parameters()

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank ``r``, as PEFT stores them."""
        return (r, self.in_features), (self.out_features, r)

    def tensors(self) -> dict[str, tuple[nn.Module, str]]:
        roles = {name: f"lora_{factor}" for factor, name in self.names.items()}
        return {roles.get(key, key): (self, key) for key, p in self._parameters.items() if p is not None}

    def reset_lora_parameters(self) -> None:
        """A as PEFT draws it (Kaiming uniform, a = sqrt 5), B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, r: int, lora_alpha: float = 1.0, lora_dropout: float = 0.0, use_rslora: bool = False
    ) -> "LoRALayer":
        """Adapt an existing layer of the kind that this class stands for.

        Its weight and bias are taken over, not copied, and frozen.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(linear)
        layer._init_lora(r, lora_alpha, lora_dropout, use_rslora)
        layer.train(linear.training)
        return layer

    def _now(self, name: str) -> Any:
        """``getattr(self, name)``, at a sixth of its time where the parameter stands where it was registered."""
        p = self._parameters.get(name)
        return getattr(self, name) if p is None else p

    def _dropped(self, x: Tensor) -> Tensor | None:
        drops = self.training and not isinstance(self._modules["lora_dropout"], nn.Identity)
        return self.lora_dropout(x) if drops else None

    def only_rows(self, *parts: slice) -> None:
        """Adapt these outputs only: B's other rows are zero, in the state dict too, and never move."""
        rows = torch.zeros(self.lora_B.shape[0], 1, dtype=self.lora_B.dtype, device=self.lora_B.device)
        for part in parts:
            rows[part] = 1.0
        self.register_buffer("rows", rows, persistent=False)
        with torch.no_grad():
            self.lora_B.mul_(rows)

    def masked_B(self) -> Tensor:
        """B as it acts; see ``only_rows``."""
        rows = self.trained_rows
        B = self._now("lora_B")
        return B if rows is None else B * rows

    def _refuse_training_merged(self) -> None:
        if torch.is_grad_enabled() and (self.lora_A.requires_grad or self.lora_B.requires_grad):
            raise RuntimeError("this LoRA layer is merged and cannot train; call unmerge() first, or torch.no_grad()")

    def get_delta_weight(self) -> Tensor:
        """s B A in the weight's own layout and dtype."""
        delta = self.scaling * (self.masked_B().flatten(1) @ self.lora_A.flatten(1))
        return (delta.t() if self.fan_in_fan_out else delta).to(self.weight.dtype).view_as(self.weight)

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
        """torch's own, and r, lora_alpha, use_rslora."""
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, use_rslora={self.use_rslora}"


class LoRALinear(LoRALayer, nn.Linear):
    """``nn.Linear`` plus a low-rank update: y = x W0^T + b + s (dropout(x) A^T) B^T.

    Parameters: ``weight`` (m,n) and ``bias`` (m,), frozen; ``lora_A`` (r,n); ``lora_B`` (m,r), zero at start.
    ``lora_alpha`` is 1 here where it is not given, and r in ``adapt``. s = lora_alpha / r, or lora_alpha / sqrt(r) with
    ``use_rslora`` (2312.03732). Input (..., n), output (..., m).

    Raises ValueError for r < 1 or a dropout outside [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float = 1.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_lora(r, lora_alpha, lora_dropout, use_rslora)

    def _take(self, linear: nn.Linear) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def _weight_mn(self) -> Tensor:
        return self._now("weight")

    def tensors(self) -> dict[str, tuple[nn.Module, str]]:
        return {key: (self, key) for key, p in self._parameters.items() if p is not None}

    def forward(self, input: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        if self.merged:
            self._refuse_training_merged()
            return nn.functional.linear(input, self._weight_mn(), self.bias)
        x = input if self.recorder is None else self.recorder.expand(input)
        return lora_linear(
            x,
            self._weight_mn(),
            self._now("bias"),
            self._now("lora_A"),
            self.masked_B(),
            self.scaling,
            x_lora=self._dropped(x),
            recorder=self.recorder,
        )


class LoRAConv1D(LoRALinear):
    """LoRA on Hugging Face's ``Conv1D`` (GPT-2): a linear layer whose weight is stored (n,m).

    PEFT calls this layout ``fan_in_fan_out``. ``nf`` is kept for code that reads it.
    """

    fan_in_fan_out = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weight = nn.Parameter(self.weight.detach().t().contiguous(), requires_grad=False)
        self.nf = self.out_features

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank ``r``, as PEFT stores them."""
        # Also asked of transformers' own layer, which knows its sizes by its weight only.
        n, m = (self.in_features, self.out_features) if isinstance(self, LoRALayer) else self.weight.shape
        return (r, n), (m, r)

    def _take(self, conv: Any) -> None:
        self.in_features, self.out_features = conv.weight.shape
        self.nf = self.out_features
        self.weight, self.bias = conv.weight, conv.bias

    def _weight_mn(self) -> Tensor:
        return self.weight.t()


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """``nn.Conv2d`` plus a low-rank update: y = W0 * x + b + s B (A * dropout(x)), * the convolution.

    Parameters, as PEFT shapes them: ``weight`` (m,n,kh,kw) and ``bias`` (m,), frozen; ``lora_A`` (r,n,kh,kw), a
    convolution with the layer's own kernel, stride and padding; ``lora_B`` (m,r,1,1), zero at start. The filter of a
    private step runs along n, the input channels, of A and along m of B; taps of the kernel are positions and are not
    mixed. Input (N,n,H,W), output (N,m,H',W').

    Raises ValueError for r < 1, a dropout outside [0, 1), and where PEFT's adapter is not an update of the weight:
    ``groups`` or ``dilation`` above 1, a ``padding_mode`` other than "zeros".
    """

    def __init__(
        self, *args: Any, r: int, lora_alpha: float = 1.0, lora_dropout: float = 0.0, use_rslora: bool = False,
        **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        if why := conv2d_refusal(self):
            raise ValueError(why)
        self._init_lora(r, lora_alpha, lora_dropout, use_rslora)

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank ``r``, as PEFT stores them."""
        return (r, self.in_channels, *self.kernel_size), (self.out_channels, r, 1, 1)

    def _take(self, conv: nn.Conv2d) -> None:
        if why := conv2d_refusal(conv):
            raise ValueError(why)
        for name in (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(conv, name))
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, input: Tensor) -> Tensor:
        """(N,n,H,W) -> (N,m,H',W')."""
        if input.dim() != 4:
            shape = tuple(input.shape)
            raise ValueError(f"LoRAConv2d takes (N, channels, height, width), got {shape}; add the batch axis")
        if self.merged:
            self._refuse_training_merged()
            return self._conv_forward(input, self.weight, self.bias)
        x = input if self.recorder is None else self.recorder.expand(input)
        return lora_conv2d(
            x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.stride,
            tuple(self._reversed_padding_repeated_twice),  # as F.pad takes it: "same" may differ from side to side
            x_lora=self._dropped(x),
            recorder=self.recorder,
        )


def conv2d_refusal(conv: nn.Conv2d) -> str | None:
    """Why PEFT's adapter of this convolution would be no update of its weight; None where it is one."""
    if conv.groups != 1:
        return f"it has groups={conv.groups}, and PEFT's lora_A would read all channels, which no merged weight can"
    if tuple(conv.dilation) != (1, 1):
        return f"it has dilation={tuple(conv.dilation)}, which PEFT's lora_A would ignore"
    if conv.padding_mode != "zeros":
        return f"it has padding_mode={conv.padding_mode!r}, and PEFT's lora_A would pad with zeros"
    return None


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """``nn.Embedding`` plus a low-rank update: row v of the table is W0[v] + s B A[:, v].

    Parameters, as PEFT names and shapes them: ``weight`` (V,m), frozen; ``lora_embedding_A`` (r,V);
    ``lora_embedding_B`` (m,r), zero at start. PEFT starts the other way round, A zero and B normal; a method that
    freezes A would then train nothing, so A is normal here, with zeros at ``padding_idx``. Dropout does not act, as in
    PEFT. The filter of a private step runs along V of A and along m of B; neighbours in a vocabulary have little in
    common, so ``smoothing=None`` is worth a try where A trains. Input ids, output (..., m).

    Raises ValueError for r < 1, and for ``max_norm`` or ``scale_grad_by_freq``, which tie records together.
    """

    names = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
    is_table = True

    def __init__(
        self, *args: Any, r: int, lora_alpha: float = 1.0, lora_dropout: float = 0.0, use_rslora: bool = False,
        **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        if why := embedding_refusal(self):
            raise ValueError(why)
        self._init_lora(r, lora_alpha, lora_dropout, use_rslora)

    lora_A = property(lambda self: self.lora_embedding_A)
    lora_B = property(lambda self: self.lora_embedding_B)

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank ``r``, as PEFT stores them."""
        return (r, self.num_embeddings), (self.embedding_dim, r)

    def get_delta_weight(self) -> Tensor:
        """s (B A)^T in the weight's dtype."""
        return (self.scaling * (self.lora_B @ self.lora_A)).t().to(self.weight.dtype)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """A standard normal, zero for the padding; B zero."""
        nn.init.normal_(self.lora_A)
        if self.padding_idx is not None:
            self.lora_A[:, self.padding_idx] = 0.0
        nn.init.zeros_(self.lora_B)

    def _take(self, embedding: nn.Embedding) -> None:
        if why := embedding_refusal(embedding):
            raise ValueError(why)
        for name in nn.Embedding.__constants__:
            setattr(self, name, getattr(embedding, name))
        self.weight = embedding.weight

    def forward(self, input: Tensor) -> Tensor:
        """Token numbers, any shape of integers -> (..., m)."""
        if self.merged:
            self._refuse_training_merged()
            return super().forward(input)
        ids = input if self.recorder is None else self.recorder.expand(input)
        return lora_embedding(
            ids, self.weight, self.lora_A, self.lora_B, self.scaling, self.padding_idx, recorder=self.recorder
        )


def embedding_refusal(embedding: nn.Embedding | nn.EmbeddingBag) -> str | None:
    """Why this table's rows or gradients depend on other records; None where they do not."""
    if embedding.max_norm is not None:
        return "it has max_norm, which rewrites its rows according to what a batch looks up; set it to None"
    if embedding.scale_grad_by_freq:
        return "it has scale_grad_by_freq, which divides one record's gradient by all records' counts; set it to False"
    return None


def factor_of(name: str) -> str | None:
    """Which factor, "A" or "B", a parameter of this name is, qualified or not; None for any other parameter."""
    return {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}.get(name.rpartition(".")[2])


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """(qualified name, layer) of every adapted layer, in the model's order; a shared layer once."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module


def set_active(model: nn.Module, factors: str) -> None:
    """Make ``factors`` ("A", "B", "AB" or "") the trainable ones of every adapted layer.

    The inactive factor's gradient is never computed and its ``grad`` is cleared, so that no optimizer moves it.
    """
    activate(factor_parameters(model), factors)

"""What stands between a module's backward and the engine: a tensor's site, and the recorder of a LoRA layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lalora_kernels import functional, opaque

if TYPE_CHECKING:
    from lalora_kernels.privacy.engine import Engine


@dataclass(eq=False)
class Site:
    """One tensor that may train: its stream of noise, its axis of smoothing, its places in the workspaces."""

    name: str
    module: nn.Module
    key: str  # the parameter's name in its module
    param: nn.Parameter
    index: int  # nonce word 0 of its noise
    smooth_dim: int | None
    trained: bool  # whether it was trainable when the model was attached
    deferred: Recorder | None = None  # holds a full weight's factors; no per-sample gradient is materialized
    row: int = -1  # row of the squared norms while active
    G: Tensor | None = None  # (N, *shape) of this physical batch
    S: Tensor | None = None  # running clipped sum over physical batches
    released: Tensor | None = None  # the gradient last put into param.grad
    marked: bool = False  # something was recorded in this physical batch
    fused: bool = False  # ... and clipped into S on the way; G holds nothing

    def __post_init__(self) -> None:
        self.made_for = (self.param.device, self.param.dtype, self.param.shape)

    def verify(self) -> None:
        """Raises RuntimeError where the tensor is no longer the one that was attached."""
        if self.module._parameters.get(self.key) is not self.param:
            raise RuntimeError(
                f"{self.name} was replaced or tied to another tensor after make_private; detach() the optimizer and "
                f"call make_private again"
            )
        if (self.param.device, self.param.dtype, self.param.shape) != self.made_for:
            now, then = (" ".join(map(str, t)) for t in ((self.param.device, self.param.dtype), self.made_for[:2]))
            raise RuntimeError(
                f"{self.name} was moved from {then} to {now} after make_private; move the model first, or detach() "
                f"and call make_private again"
            )

    @property
    def materialized(self) -> bool:
        """Whether G holds this physical batch's per-sample gradients."""
        return self.marked and not self.fused and self.deferred is None


class Recorder:
    """Stands between one module's backward and the engine; never copied or pickled with the module."""

    def __init__(self, engine: Engine, name: str, sites: dict[str, Site]):
        self.engine, self.name, self.sites = engine, name, sites
        self.handle, self.token = opaque.register(self), torch.zeros(1, device=next(iter(sites.values())).param.device)

    def __deepcopy__(self, memo) -> None:
        return None

    def __reduce__(self):
        return type(None), ()

    def active(self, parameter: str) -> Site | None:
        """The parameter's site while it trains, else None."""
        site = self.sites.get(parameter)
        return site if site is not None and site.param.requires_grad else None

    def expand(self, x: Tensor) -> Tensor:
        """x with a row for each record where it came with one for all (position embeddings of batch 1)."""
        if torch.compiler.is_compiling():  # one graph for every batch size; fold refuses what does not divide
            return x
        batch = self.engine.batch
        if batch is None or batch.rows == 1 or x.dim() < 2 or x.shape[0] != 1 or not torch.is_grad_enabled():
            return x
        return x.expand(batch.rows, *x.shape[1:])

    def reset(self) -> None:
        """A physical batch begins or is done."""


class LoRARecorder(Recorder):
    """Recorder of one LoRA layer: sites "lora_A", "lora_B" and, where it trains, "bias"."""

    TWICE = (
        "{} was backpropagated twice in one batch, but clipping='per_layer' clips at the first; add the losses up and "
        "call backward once"
    )
    calls = 0  # forwards of this physical batch
    summed = False  # its gradient of this physical batch is clipped and summed already

    def note_forward(self) -> None:
        self.calls += 1

    def reset(self) -> None:
        self.calls, self.summed = 0, False

    def record_lora(self, dy, B, scaling, h, x, need_dz, need_bias) -> Tensor | None:
        """Per-sample gradients of the active factors from dy (..., m), h (..., r), x (..., n); returns dz (..., r)."""
        e = self.engine
        lead = dy.shape[:-1]
        dy3 = e.fold(dy, self.name)
        h3 = None if h is None else e.fold(h, self.name)
        x3 = None if x is None else e.fold(x, self.name)
        a, b = self.active("lora_A") if x is not None else None, self.active("lora_B") if h is not None else None
        if need_bias:
            e.add(self.sites["bias"], dy3.sum(1, dtype=e.dtype))
        again = any(s is not None and s.marked for s in (a, b))
        # The one-pass kernel clips during backward, when a GradScaler's scale is not the engine's to know yet.
        if e.clipping == "per_layer" and self.calls == 1 and e.grad_scaler is None:
            if again:
                raise RuntimeError(self.TWICE.format(self.name))
            self.summed = True
            for s in (a, b):
                if s is not None:
                    s.fused = True
            dz, _, sq_b, _, sq_a = functional.sample_grad_clip(
                dy3,
                B,
                scaling,
                max_norm=e.tensor_bound,
                grad_scale=e.grad_scale,
                valid=e.batch.valid,
                h=h3,
                x=x3,
                need_dz=need_dz,
                S_B=None if b is None else e.sum_of(b),
                S_A=None if a is None else e.sum_of(a),
                backend=e.backend,
            )
        else:
            if again and self.summed:
                raise RuntimeError(self.TWICE.format(self.name))
            dz, _, sq_b, _, sq_a = functional.sample_grad(
                dy3,
                B,
                scaling,
                h=h3,
                x=x3,
                need_dz=need_dz,
                G_B=None if b is None else e.gradient_of(b),
                G_A=None if a is None else e.gradient_of(a),
                accumulate=again,
                backend=e.backend,
            )
        for site, sq in ((a, sq_a), (b, sq_b)):
            if site is not None:
                e.mark(site)
                e.sq[site.row].copy_(sq)
        return None if dz is None else dz.view(*lead, -1)


class Undo:
    """Clears a LoRA layer's recorder, in the shape of torch's removable handles."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def remove(self) -> None:
        self.layer.recorder = None

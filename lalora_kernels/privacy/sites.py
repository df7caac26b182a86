"""What the engine keeps of one tensor that may train, and the norms of them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lalora_kernels.privacy.accounts import AGAIN
from lalora_kernels.privacy.ties import Deferring, TiedWeight


@dataclass(eq=False)
class Site:
    """One tensor that may train: its stream of noise, its axis of smoothing, its places in the workspaces."""

    name: str
    module: nn.Module
    key: str  # the parameter's name in its module
    role: str  # "lora_A" and "lora_B" of an adapted layer; else what the recorder calls it
    param: nn.Parameter
    index: int  # nonce word 0 of its noise
    smooth_dim: int | None
    trained: bool  # whether it was trainable when the model was attached
    deferred: Deferring | TiedWeight | None = None  # holds a full weight's factors, from which no G is made
    row: int = -1  # row of the squared norms while active
    G: Tensor | None = None  # (N, *shape) of this physical batch
    sq: Tensor | None = None  # (N,) float64: the squared norms of this physical batch's per-sample gradients
    S: Tensor | None = None  # running clipped sum over physical batches
    released: Tensor | None = None  # the gradient last put into param.grad
    not_yet: Tensor | None = None  # what param.grad is between backward and step
    kind: str = ""  # how its gradient comes about; see ties.kind_of
    places: list[tuple[str, nn.Module, str]] = field(init=False)  # (name, module, key) of each use
    made_for: tuple[torch.device, torch.dtype, torch.Size] = field(init=False)  # what the tensor was when attached
    marked: bool = False  # something was recorded in this physical batch
    fused: bool = False  # ... and clipped into S on the way; G holds nothing

    def __post_init__(self) -> None:
        self.places = [(self.name, self.module, self.key)]
        self.made_for = (self.param.device, self.param.dtype, self.param.shape)

    def verify(self) -> None:
        """Raises RuntimeError where the tensor is no longer the one that was attached."""
        for name, module, key in self.places:
            if module._parameters.get(key) is not self.param:
                raise RuntimeError(f"{name} was replaced or tied to another tensor after make_private; {AGAIN}")
        self.verify_kind()

    def verify_kind(self) -> None:
        """Raises RuntimeError where the tensor has another device, dtype or shape than when it was attached."""
        p = self.param
        if (p.device, p.dtype, p.shape) != self.made_for:
            now, then = (" ".join(map(str, t)) for t in ((p.device, p.dtype), self.made_for[:2]))
            raise RuntimeError(
                f"{self.name} was moved from {then} to {now} after make_private; move the model first, or {AGAIN}"
            )

    @property
    def shared(self) -> bool:
        """Whether several modules use it: its gradient is the sum over them, taken before its norm."""
        return len(self.places) > 1

    @property
    def materialized(self) -> bool:
        """Whether G holds this physical batch's per-sample gradients."""
        return self.marked and not self.fused and self.deferred is None

    def made(self) -> Tensor:
        """G, where it has a place in the workspace."""
        assert self.G is not None
        return self.G

    def summed(self) -> Tensor:
        """S, of an active site."""
        assert self.S is not None
        return self.S


def squared_norms(active: list[Site], rows: int, device: torch.device) -> Tensor:
    """(L,N) float64 of the active tensors' per-sample gradients; 0 where nothing was recorded."""
    found: list[Any] = [s.sq for s in active]
    if not all(s.marked for s in active):
        zero = torch.zeros(rows, dtype=torch.float64, device=device)
        found = [s.sq if s.marked else zero for s in active]
    if not found:
        return torch.zeros(0, rows, dtype=torch.float64, device=device)
    return torch.stack([sq if sq.device == device else sq.to(device) for sq in found])

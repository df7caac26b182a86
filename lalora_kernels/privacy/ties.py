"""Tensors that several modules use (an embedding tied to the head, one lora_A in two layers).

Their per-sample gradient is the sum over all uses, and its norm is taken of that sum: clipping each use apart would let
one record move the tensor by C for each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lalora_kernels.privacy.engine import Engine
    from lalora_kernels.privacy.sites import Site
    from lalora_kernels.privacy.trained import Use


class Deferring(Protocol):
    """A recorder that keeps (dy, input) of a tensor instead of per-sample gradients; see recorders.py, rules.py."""

    engine: Engine
    pairs: list[tuple[Tensor, Tensor]]

    def squared_norms(self) -> Tensor: ...

    def add_weighted_sum(self, weights: Tensor, out: Tensor) -> None: ...

    def add_sample(self, i: int, out: Tensor) -> None: ...

    def slack(self) -> Tensor: ...


TABLE = "factor A of an adapted embedding"
WEIGHT = "full weight"
SMALL = "scale or bias"


def kind_of(role: str, adapted: bool, table: bool, defers: bool) -> str:
    """How a tensor's per-sample gradient comes about: uses of one tensor are added up where they agree in this.

    ``role`` in its module, which is ``adapted``, an embedding (``table``), or keeps its weight's inputs (``defers``).
    """
    if adapted and role in ("lora_A", "lora_B"):
        return TABLE if table and role == "lora_A" else f"factor {role[-1]}"
    return WEIGHT if role == "weight" and defers else SMALL


def tie(site: Site, use: Use) -> Site:
    """Add another use of the site's tensor. Raises ValueError, naming both places, where the two do not add up."""
    if site.kind != use.kind:
        raise ValueError(
            f"{use.name} ({use.kind}) and {site.name} ({site.kind}) are one parameter in two modules, and their "
            f"gradients cannot be added up per sample; freeze it, or untie them by giving one of them a copy"
        )
    site.places.append((use.name, use.owner, use.key))
    return site


def defer(site: Site, recorder: Deferring) -> None:
    """Have ``recorder`` keep what the site's gradient is made of, beside the recorders of its other uses."""
    if site.deferred is None:
        site.deferred = recorder
    elif isinstance(site.deferred, TiedWeight):
        site.deferred.recorders.append(recorder)
    else:
        site.deferred = TiedWeight(site, [site.deferred, recorder])


class TiedWeight:
    """The recorders of one deferred tensor. For its norm each sample's gradient is made in full, one at a time."""

    def __init__(self, site: Site, recorders: list[Deferring]):
        self.site, self.recorders = site, recorders

    def _used(self) -> list[Deferring]:
        return [r for r in self.recorders if r.pairs]

    def squared_norms(self) -> Tensor:
        """||G_i||^2 of the sum over all uses, (N,) float64."""
        used = self._used()
        if len(used) == 1:
            return used[0].squared_norms()
        G = self._zeros()
        norms = []
        for i in range(len(used[0].pairs[0][0])):
            G.zero_()
            for r in used:
                r.add_sample(i, G)
            norms.append(G.double().norm())
        return (torch.stack(norms) + sum(r.slack() for r in used)).square()

    def add_weighted_sum(self, weights: Tensor, out: Tensor) -> None:
        """out += sum_i weights[i] G_i; samples of weight 0 are masked, whatever they hold."""
        used = self._used()
        total = out if len(used) == 1 else self._zeros()  # uses may cancel, each far above the sum
        for r in used:
            r.add_weighted_sum(weights, total)
        if total is not out:
            out.add_(total)

    def _zeros(self) -> Tensor:
        p = self.site.param
        return torch.zeros(p.shape, dtype=torch.float64, device=p.device)

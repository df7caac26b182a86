"""Experimental: other ways than the 5-tap filter to spend a release's variance. Question 3 of ``lalora reproduce``.

Each reads released gradients only, after the noise, and so costs no privacy. Plain torch in float32, outside the fused
kernels; ``binomial5`` stays inside them. All but "projected" leave white noise 70/256 of its variance, as the filter
does, so that they differ in what they do to the signal alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lalora_kernels.nn import lora_layers
from lalora_kernels.reference.privatize import smooth

if TYPE_CHECKING:
    from lalora_kernels.privacy.engine import Engine
    from lalora_kernels.privacy.sites import Site

KEPT = 70 / 256  # share of white noise's variance behind [1,4,6,4,1]/16
LAPLACE = 0.9652300527505162  # (1 + 2λ) / (1 + 4λ)^1.5 = KEPT
RIDGE = 0.1  # λ of the projected gradient: while a factor is near 0, noise grows at most tenfold
PERMUTATION_SEED = 0  # the order is public


def permuted(t: Tensor, dim: int) -> Tensor:
    """The 5-tap filter along a feature axis in a fixed random order: is there anything in adjacency?"""
    order = torch.randperm(t.shape[dim], generator=torch.Generator().manual_seed(PERMUTATION_SEED)).to(t.device)
    return torch.empty_like(t).index_copy_(dim, order, smooth(t.index_select(dim, order), dim))


def laplacian(t: Tensor, dim: int, strength: float = LAPLACE) -> Tensor:
    """(I − λ Δ)⁻¹ t along ``dim``, Δ the second difference on a ring (Osher et al. 2018, 1806.06317), by its FFT."""
    n = t.shape[dim]
    response = 1 + 2 * strength * (1 - torch.cos(2 * torch.pi * torch.arange(n // 2 + 1, device=t.device) / n))
    shape = [1] * t.dim()
    shape[dim] = len(response)
    return torch.fft.irfft(torch.fft.rfft(t, dim=dim) / response.view(shape).to(t.dtype), n=n, dim=dim)


class Temporal:
    """DOPPLER (2408.13460): m_t = a m_{t-1} + b (g_t + g_{t-1}), divided by the same filter's answer to a constant 1.

    a = 1 − 2 KEPT and b = KEPT: DC gain 1, and KEPT of white noise's variance once it has settled. Each tensor has its
    own history of the steps in which it was active; a federated client starts anew in every round.
    """

    def __init__(self) -> None:
        self.history: dict[str, tuple[Tensor, Tensor, float, bool]] = {}

    def __call__(self, name: str, g: Tensor) -> Tensor:
        m, before, c, seen = self.history.get(name, (torch.zeros_like(g), torch.zeros_like(g), 0.0, False))
        m = (1 - 2 * KEPT) * m + KEPT * (g + before)
        c = (1 - 2 * KEPT) * c + KEPT * (1 + seen)
        self.history[name] = (m, g.clone(), c, True)
        return m / c


def projected(grad: Tensor, other: Tensor, role: str, scaling: float, ridge: float = RIDGE) -> Tensor:
    """B: grad (A Aᵀ + λI)⁻¹ / s²; A: (Bᵀ B + λI)⁻¹ grad / s². ``other`` is the factor that rests."""
    gram = other @ other.T if role == "lora_B" else other.T @ other
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solved = torch.linalg.solve(gram, grad.T if role == "lora_B" else grad)
    return (solved.T if role == "lora_B" else solved) / scaling**2


def factors(sites: Sequence["Site"]) -> Iterator[tuple["Site", Tensor, int]]:
    """(site, its released gradient, its feature axis) of every active factor."""
    for site in sites:
        if site.smooth_dim is not None and (grad := site.param.grad) is not None:
            yield site, grad, site.smooth_dim


class Along:
    """A filter along the feature axis of every active factor."""

    def __init__(self, engine: "Engine", what: Callable[[Tensor, int], Tensor]):
        self.what = what

    @torch.no_grad()
    def __call__(self, sites: Sequence["Site"]) -> None:
        for _, grad, dim in factors(sites):
            grad.copy_(self.what(grad.float(), dim))


class OverTime:
    """``Temporal`` on every active factor."""

    def __init__(self, engine: "Engine"):
        self.filter = Temporal()

    @torch.no_grad()
    def __call__(self, sites: Sequence["Site"]) -> None:
        for site, grad, _ in factors(sites):
            grad.copy_(self.filter(site.name, grad.float()))


class Project:
    """``projected`` on every active factor. Raises ValueError where both train in one step: one has to rest."""

    def __init__(self, engine: "Engine"):
        self.partner, self.scaling = {}, {}
        for name, layer in lora_layers(engine.model):
            for own, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
                if getattr(layer, own, None) is None or getattr(layer, own).dim() != 2:
                    raise ValueError(f"{name}: the projected gradient is defined for adapted linear layers only")
                self.partner[f"{name}.{own}" if name else own] = getattr(layer, other)
            self.scaling[name] = layer.scaling

    @torch.no_grad()
    def __call__(self, sites: Sequence["Site"]) -> None:
        if len({site.role for site in sites if site.smooth_dim is not None}) > 1:
            raise ValueError("the projected gradient needs a method that trains one factor at a step, such as la-lora")
        for site, grad, _ in factors(sites):
            other, scaling = self.partner[site.name].float(), self.scaling[site.name.rpartition(".")[0]]
            grad.copy_(projected(grad.float(), other, site.role, scaling))


# name -> (smoothing inside the kernels, what is made of the released gradient)
EXPERIMENTAL: dict[str, tuple[str | None, Callable[["Engine"], Callable[[Sequence["Site"]], None]]]] = {
    "permuted": (None, lambda engine: Along(engine, permuted)),
    "temporal": (None, OverTime),
    "laplacian": (None, lambda engine: Along(engine, laplacian)),
    "projected": ("binomial5", Project),
}

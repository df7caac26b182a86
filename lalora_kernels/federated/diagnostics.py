"""What is worth knowing of a client's round beside its update, sorted by who may see it.

``public()`` is computed from released gradients, which the ledger has paid for: post-processing, no further cost.
``not_private()`` is computed on the client's records, or times what depends on how many were drawn, without noise. It
is for the eyes of whoever holds the records; nothing sends it, and what shows it says so.
"""

import math
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lalora_kernels.memory import peak_memory
from lalora_kernels.privacy.clipping import tensor_bound
from lalora_kernels.privacy.optimizer import PrivateOptimizer

QUANTILES = (0.1, 0.5, 0.9)
NOT_PRIVATE = "not_private"  # the name in metrics.jsonl under which such figures stand, apart from all others
PRIVATE_TEST = "test_is_private"  # there where accuracy and loss are of records that were set aside from private ones
SET_ASIDE = "accuracy and loss are of private records set aside: ε does not cover them, do not publish them"


def left_out(values: dict[str, Any]) -> tuple[str, ...]:
    """Names of a record's figures that are computed on private data, without noise."""
    return NOT_PRIVATE, *(("accuracy", "before", "loss", "seconds") if PRIVATE_TEST in values else ())


class Diagnostics:
    """Watches one client's round through its optimizer: ``step()`` stands for ``optimizer.step()``."""

    def __init__(self, optimizer: PrivateOptimizer):
        self.optimizer, self.began = optimizer, time.monotonic()
        self.norms: list[Tensor] = []  # of each record's gradient, in units of C
        self.clipped: list[Tensor] = []
        self.released: list[Tensor] = []  # of each released gradient, in units of what the noise alone would have

    def step(self) -> None:
        """One physical batch's share of a private step. Nothing is copied from the device before the round's end."""
        engine = self.optimizer.engine
        batch, C, noise_std = engine.batch, engine.max_grad_norm, engine.noise_std  # adaptive clipping moves them
        self.optimizer.step()
        assert batch is not None
        sq = engine.sq[:, : batch.valid] * engine.grad_scale**2
        bound = tensor_bound(engine.clipping, C, len(engine.active))
        norms = sq.sum(0).sqrt()
        self.norms.append(norms / C)
        per_tensor = engine.clipping == "per_layer"
        self.clipped.append((sq.amax(0).sqrt() if per_tensor else norms) > bound)
        if batch.last and noise_std:
            grads = [cast(Tensor, site.param.grad) for site in engine.active]
            norm = torch.stack([grad.double().norm() for grad in grads]).norm() * engine.divisor
            alone = sum(noise_variance(site.param.shape, site.smooth_dim if engine.smoothing else None)
                        for site in engine.active)  # fmt: skip
            self.released.append(norm / (noise_std * math.sqrt(alone)))

    def public(self) -> dict[str, Any]:
        """{"released": quantiles over the round's steps of ||released gradient|| / that of noise alone}; {} without
        noise. About 1: hardly more than noise."""
        return {"released": quantiles(self.released)} if self.released else {}

    def not_private(self) -> dict[str, Any]:
        """Records drawn, share that was clipped, quantiles of ||g_i|| / C, seconds, peak memory so far (bytes)."""
        norms, clipped = torch.cat(self.norms), torch.cat(self.clipped)
        finite = norms.isfinite()
        return {
            "drawn": len(norms),
            "clipped": float(clipped[finite].double().mean()) if finite.any() else None,
            "norms": quantiles([norms[finite]]) if finite.any() else None,
            "seconds": round(time.monotonic() - self.began, 3),
            "peak_memory": peak_memory(),
        }


def quantiles(values: Sequence[Tensor]) -> list[float]:
    """``QUANTILES`` of all the numbers in these tensors."""
    flat = torch.cat([value.double().flatten() for value in values])
    return torch.quantile(flat, torch.tensor(QUANTILES, dtype=torch.float64, device=flat.device)).tolist()


def noise_variance(shape: Sequence[int], smooth_dim: int | None) -> float:
    """Expected squared norm of a released tensor that holds nothing but noise of standard deviation 1.

    The filter leaves 70/256 of the variance, and by its symmetric padding more at the two ends of each line: 126 and
    78 of 256 in the first and second place from either.
    """
    count = math.prod(shape)
    if smooth_dim is None:
        return float(count)
    length = shape[smooth_dim]
    return count / length * (70 * length + 128) / 256 if length >= 4 else float(count)

"""Adaptive clipping: the bound C follows a quantile of the gradients' norms, itself learned privately.

Andrew, Thakkar, McMahan, Ramaswamy 2021 (1905.03871), for records. With b_i = 1 where ||g_i|| <= C and 0 otherwise,
each release adds to its sum the noisy count Σ (b_i - 1/2) + N(0, σ_b²), and then

    C <- C exp(-η (share - γ)),    share = 1/2 + noisy count / expected batch size.

The count is centred so that a record adds 1/2 at most, whether it is added, removed or not finite. Sum and count
together are one Gaussian release of noise multiplier z, z^-2 = σ^-2 + (2 σ_b)^-2 (their Theorem 1): z is what the
ledger is charged, and the sum's own noise is the larger σ. Opacus' AdaClipDPOptimizer differs in two things: it divides
by the number of records drawn, which is private, and its count is not centred, so that an added record changes it by 1.
"""

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lalora_kernels import functional
from lalora_kernels.privacy.noise import host_backend
from lalora_kernels.privacy.sampling import BatchInfo

if TYPE_CHECKING:
    from lalora_kernels.privacy.engine import Engine


def _is_real(value: object) -> bool:
    return isinstance(value, Real)


class AdaptiveClipping:
    """The bound's rule and the count of one logical batch. Made by ``make_private``; arguments as there."""

    def __init__(
        self,
        *,
        target_unclipped_quantile: float,
        clipbound_learning_rate: float,
        min_clipbound: float,
        max_clipbound: float,
        unclipped_num_std: float | None,
        noise_multiplier: float,
        expected_batch_size: float,
    ):
        gamma: Any = target_unclipped_quantile
        eta: Any = clipbound_learning_rate
        z = noise_multiplier
        if not _is_real(gamma) or not 0.0 <= gamma <= 1.0:
            raise ValueError(f"target_unclipped_quantile is a number in [0, 1], got {gamma!r}")
        if not _is_real(eta) or not 0.0 < eta < math.inf:
            raise ValueError(f"clipbound_learning_rate is a finite number > 0, got {eta!r}")
        if not 0.0 < min_clipbound < max_clipbound < math.inf:
            raise ValueError(f"0 < min_clipbound < max_clipbound, got {min_clipbound!r} and {max_clipbound!r}")
        # Twice z costs the sum 3% of its noise; a twentieth of the batch is the paper's.
        std: Any = max(expected_batch_size / 20, 2 * z) if unclipped_num_std is None else unclipped_num_std
        if not _is_real(std) or not 0.0 < std < math.inf:
            raise ValueError(f"unclipped_num_std is a finite number > 0, got {std!r}")
        if z >= 2 * std:
            raise ValueError(
                f"unclipped_num_std {std:g} is too small: the noise on the count alone would cost more than "
                f"noise_multiplier {z:g} allows; it must be above {z / 2:g}"
            )
        self.gamma, self.eta, self.std = float(gamma), float(eta), float(std)
        self.expected_batch_size = expected_batch_size
        self.low, self.high = float(min_clipbound), float(max_clipbound)
        self.sum_multiplier = (z**-2 - (2 * self.std) ** -2) ** -0.5 if z else 0.0
        self.counted: Tensor | float = 0.0

    def count(self, sq: Tensor, grad_scale: float | Tensor, batch: BatchInfo, max_grad_norm: float) -> None:
        """Add a physical batch's records: sq (L,N), squared norms of gradients that stand ``grad_scale`` too small."""
        unclipped = grad_scale * sq[:, : batch.valid].sum(0).sqrt() <= max_grad_norm  # False for NaN and Inf
        # A logical batch that was left half-way counts no more, as its sum does not.
        self.counted = (0.0 if batch.first else self.counted) + (unclipped.double() - 0.5).sum()

    def release(self, engine: "Engine", number: int) -> None:
        """Noise the count, move the engine's bound, begin anew. ``number``: that of the sum's release.

        The stream is the same key and number under a tensor index of its own, the one after the last tensor's.
        """
        noise = 0.0
        if engine.noise_std:
            stream: dict[str, Any] = {"key": engine.noise.key, "release": number, "tensor_index": len(engine.sites)}
            noise = self.std * float(functional.chacha20_normal(1, **stream, backend=host_backend(engine.backend)))
        share = 0.5 + (float(self.counted) + noise) / self.expected_batch_size
        self.counted = 0.0
        # Beyond this the bound is at one of its ends anyway, and exp would overflow.
        step = min(max(-self.eta * (share - self.gamma), -700.0), 700.0)
        self.set_bound(engine, engine.max_grad_norm * math.exp(step))

    def set_bound(self, engine: "Engine", bound: float) -> None:
        """C for the next logical batch, within the ends; the noise follows it."""
        engine.max_grad_norm = min(max(float(bound), self.low), self.high)
        engine.noise_std = self.sum_multiplier * engine.max_grad_norm

"""The rows of a ledger, what makes one history the beginning of another, and the hashes that show a changed row."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from lalora_kernels.privacy.accountant import MAX_STEPS, check_noise_multiplier
from lalora_kernels.privacy.noise import MAX_RELEASES
from lalora_kernels.privacy.sampling import check_sample_rate

HEADER = ("format", "version", "id", "target_epsilon", "target_delta", "neighboring_relation", "refusals")


@dataclass(frozen=True)
class LedgerEntry:
    """``count`` releases in a row, numbered from ``first_release``, alike in everything below.

    noise_multiplier σ in units of max_grad_norm C, sample_rate q, the clipping rule, C, b, and how records were drawn.
    """

    noise_multiplier: float
    sample_rate: float
    first_release: int
    count: int = 1
    clipping: str = "flat"
    max_grad_norm: float | None = None
    expected_batch_size: float | None = None
    sampling: str = "poisson"

    def __post_init__(self) -> None:
        check_noise_multiplier(self.noise_multiplier)
        check_sample_rate(self.sample_rate)
        for name, top in (("first_release", MAX_RELEASES - 1), ("count", MAX_STEPS)):
            value = getattr(self, name)
            if type(value) is not int or not (name == "count") <= value <= top:
                raise ValueError(f"{name} is a whole number up to {top}, got {value!r}")
        for name in ("clipping", "sampling"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is a string, got {getattr(self, name)!r}")
        for name in ("max_grad_norm", "expected_batch_size"):
            value = getattr(self, name)
            real = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (real and 0 < value < 1e300):
                raise ValueError(f"{name} is a finite number > 0 or None, got {value!r}")


def begins(start: list[LedgerEntry], whole: list[LedgerEntry]) -> bool:
    """Whether ``whole`` is ``start`` and perhaps more; the last entry of ``start`` may have grown since."""
    if len(start) > len(whole):
        return False
    if not start:
        return True
    last, grown = start[-1], whole[len(start) - 1]
    return (
        start[:-1] == whole[: len(start) - 1] and last == replace(grown, count=last.count) and last.count <= grown.count
    )


def chain(state: Mapping[str, Any]) -> list[str]:
    """SHA-256 of the header, then of each hash with the entry after it; hex."""

    def digest(previous: str, content: Mapping[str, Any]) -> str:
        text = json.dumps(dict(content), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256((previous + text).encode()).hexdigest()

    hashes = [digest("", {name: state[name] for name in HEADER})]
    for raw in state["entries"]:
        hashes.append(digest(hashes[-1], {k: v for k, v in raw.items() if k != "hash"}))
    return hashes

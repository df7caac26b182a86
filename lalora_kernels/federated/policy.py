"""A client's own rules: whatever a server asks for, this file says what it may have."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lalora_kernels.data import BadInput
from lalora_kernels.federated.config import Config, read_toml

FILE = "policy.toml"
NAMES = ("targets", "clipping")  # settings of which a policy lists the values


class Refused(Exception):
    """The client does not do what was asked; ``status`` is one of ``wire.STATUS``, the message is for its own log."""

    def __init__(self, status: str, why: str):
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Policy:
    """What this client allows, over all runs and servers.

    max_epsilon, delta: the lifetime budget of one data set; what every run on it costs is added up.
    min_noise_multiplier: least σ in units of C. max_grad_norm: largest C. max_local_steps: largest K.
    max_state_entry: largest absolute value in a state that the server sends; far beyond any honest one, rounding makes
        of it what it likes. max_rank: largest r. targets, clipping: values of these settings that are allowed. With
        "adaptive" clipping C follows the records' norms from the run's max_grad_norm on, wherever that leads.
    """

    max_epsilon: float
    delta: float
    min_noise_multiplier: float = 0.3
    max_grad_norm: float = 10.0
    max_local_steps: int = 1000
    max_rank: int = 64
    max_state_entry: float = 1e4
    targets: tuple[str, ...] = ("all-linear", "qv")
    clipping: tuple[str, ...] = ("flat", "per_layer", "automatic")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in NAMES:
                fits = isinstance(value, tuple) and all(isinstance(name, str) for name in value)
            else:
                whole = field.type is int
                fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
                fits = fits and (value >= 0 if field.name == "min_noise_multiplier" else value > 0)
                fits = fits and (math.isfinite(value) or field.name == "max_epsilon")
            if not fits:
                raise BadInput(f"{FILE}: {field.name} cannot be {value!r}")
        if not self.delta < 1:
            raise BadInput(f"{FILE}: delta is below 1, got {self.delta}")

    @classmethod
    def read(cls, folder: Path) -> "Policy":
        """``folder``/policy.toml. Raises BadInput where it is missing, unreadable or holds other names.

        A client without rules of its own takes part in nothing.
        """
        path = folder / FILE
        values: dict[str, Any] = read_toml(path)
        names = [field.name for field in dataclasses.fields(cls)]
        if strange := sorted(set(values) - set(names)):
            raise BadInput(f"{path}: unknown name {strange[0]!r}; there are {', '.join(names)}")
        if missing := [name for name in ("max_epsilon", "delta") if name not in values]:
            raise BadInput(f"{path}: {missing[0]} is missing")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**values)

    def check(self, config: Config) -> None:
        """Raises Refused for settings that are not allowed, whatever σ they lead to."""
        for what, asked, allowed in (
            ("delta", config.delta, self.delta),
            ("max_grad_norm", config.max_grad_norm, self.max_grad_norm),
            ("local_steps", config.local_steps, self.max_local_steps),
            ("rank", config.rank, self.max_rank),
            ("epsilon", config.epsilon, self.max_epsilon),
        ):
            if asked > allowed:
                raise Refused("policy", f"{what} {asked:g} is asked for, {allowed:g} allowed")
        for name in NAMES:
            asked, names = getattr(config, name), getattr(self, name)
            if asked not in names:
                raise Refused("policy", f"{name} {asked!r} is asked for, {', '.join(names) or 'nothing'} allowed")

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises Refused for a state that no training can start from: it would be paid for and come to nothing."""
        for key, value in state.items():
            if not value.isfinite().all():
                raise Refused("policy", f"the server's state is NaN or Inf in {key}; nothing was spent")
            if value.numel() and (largest := float(value.abs().max())) > self.max_state_entry:
                raise Refused(
                    "policy",
                    f"the server's state has {largest:.3g} in {key}, {self.max_state_entry:g} is allowed; if that is "
                    f"right, raise max_state_entry in {FILE}",
                )

    def check_noise(self, noise_multiplier: float) -> None:
        """Raises Refused for a σ below the least that is allowed."""
        if noise_multiplier < self.min_noise_multiplier:
            least = self.min_noise_multiplier
            raise Refused("policy", f"sigma would be {noise_multiplier:g}, the least that is allowed is {least:g}")


def policy_for(config: Config) -> str:
    """A policy.toml that allows just this run: for simulated clients and as a start for one's own."""
    epsilon = "inf" if math.isinf(config.epsilon) else repr(config.epsilon)
    return (
        f"max_epsilon = {epsilon}\ndelta = {config.delta!r}\n"
        f"min_noise_multiplier = {0.1 if config.private else 0.0}\nmax_grad_norm = {config.max_grad_norm!r}\n"
        f"max_local_steps = {config.local_steps}\nmax_rank = {config.rank}\ntargets = ['{config.targets}']\n"
        f"clipping = ['{config.clipping}']\n"
    )

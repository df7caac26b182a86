"""The client's side of a round: take the server's state, make K private steps, give back what the method sends."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lalora_kernels.adapt import lora_factors, saved_modules
from lalora_kernels.data import text_lengths
from lalora_kernels.federated.config import Config
from lalora_kernels.federated.diagnostics import Diagnostics
from lalora_kernels.federated.methods import Method, base_name
from lalora_kernels.models import Classifier
from lalora_kernels.nn import LoRALinear, factor_of, lora_layers
from lalora_kernels.privacy.ledger import Ledger
from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.privacy.optimizer import PrivateOptimizer
from lalora_kernels.privacy.sampling import PrivateLoader


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a federation moves, by name: every lora_A and lora_B, active or not, and what is trained in full."""
    found: dict[str, nn.Parameter] = dict(lora_factors(model))
    for name in saved_modules(model):
        found |= {f"{name}.{key}": p for key, p in model.get_submodule(name).named_parameters()}
    return dict(sorted(found.items()))


def folded_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen weights of the adapted layers, by name. Raises ValueError for layers other than linear ones."""
    found = {}
    for name, layer in lora_layers(model):
        plain = type(layer) is LoRALinear and layer.trained_rows is None
        if not plain or not layer.weight.is_floating_point():
            raise ValueError(f"{name}: a product can be folded into the plain weight of a linear layer only")
        found[base_name(name)] = layer.weight
    return found


def get_state(model: nn.Module, folds: bool = False) -> dict[str, Tensor]:
    """Copies of ``trainable_tensors``, on the CPU; with ``folded_tensors`` where the method ``folds`` into them."""
    tensors = trainable_tensors(model) | (folded_tensors(model) if folds else {})
    return {key: p.detach().to("cpu", copy=True) for key, p in tensors.items()}


@torch.no_grad()
def set_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write ``state`` into the model. Raises ValueError, naming them, for keys or shapes that are not the model's."""
    tensors = trainable_tensors(model)
    if any(base_name(name) in state for name, _ in lora_layers(model)):
        tensors |= folded_tensors(model)
    if strange := sorted(set(state) ^ set(tensors)):
        raise ValueError(f"the state does not fit the model: {', '.join(strange[:5])} missing or too many")
    for key, value in state.items():
        if value.shape != tensors[key].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(tensors[key].shape)}"
            raise ValueError(f"the state does not fit the model: {key} has shape {shapes}")
        tensors[key].copy_(value)


def make_optimizer(model: nn.Module, config: Config, lr: float) -> torch.optim.Optimizer:
    """A plain torch optimizer over all that trains; B's learning rate is ``lr_b_ratio`` times ``lr``."""
    tensors = trainable_tensors(model)
    b = [p for key, p in tensors.items() if factor_of(key) == "B"]
    rest = [p for key, p in tensors.items() if factor_of(key) != "B"]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": b, "lr": lr * config.lr_b_ratio}]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)


def base_rate(config: Config) -> float:
    """``lr``, or where it is left open 0.5 for SGD and 1.0 behind the filter, 0.01 for AdamW.

    The filter leaves 0.523 of the noise's deviation, so twice the rate makes steps of equal noise.
    """
    if config.lr is not None:
        return config.lr
    if config.optimizer == "adamw":
        return 0.01
    return 0.5 if config.filter is None else 1.0


def learning_rate(config: Config, round: int) -> float:
    """The learning rate of a round (from 1): constant, or falling along half a cosine to almost zero in the last."""
    rate = base_rate(config)
    if config.lr_schedule == "constant":
        return rate
    return rate * 0.5 * (1 + math.cos(math.pi * (round - 1) / config.rounds))


@dataclass
class Client:
    """One participant. Records, ledger and noise key stay here; only what ``train_round`` returns leaves."""

    name: str
    records: Dataset
    noise_multiplier: float
    ledger: Ledger
    noise: NoiseSource
    nonfinite_samples: int = 0  # not privatized; for the client's own eyes
    max_grad_norm: float | None = None  # C of adaptive clipping at the end of its last round
    public: dict[str, Any] = field(default_factory=dict)  # of the last round; see diagnostics.py
    not_private: dict[str, Any] = field(default_factory=dict)

    def train_round(
        self,
        classifier: Classifier,
        method: Method,
        config: Config,
        round: int,
        state: Mapping[str, Tensor],
        on_step: Callable[[], None],
    ) -> dict[str, Tensor]:
        """K private steps from ``state``; returns the tensors that ``method`` sends in this round, on the CPU.

        The ledger is charged before each release; the caller stores it before the returned tensors go anywhere. The
        optimizer is new in each round, so a client that is chosen seldom carries no stale momentum. Raises
        BudgetExceeded before a step that the ledger does not allow.
        """
        set_state(classifier.model, state)
        optimizer, batches = self.private_step(classifier, method, config, round)
        try:
            optimizer.start_round(round)
            watched = Diagnostics(optimizer)
            for batch in batches.steps(config.local_steps):
                loss = classifier.loss(classifier.to_device(batch))
                loss.backward()
                watched.step()
                optimizer.zero_grad()
                on_step()
            self.public, self.not_private = watched.public(), watched.not_private()
        finally:
            self.nonfinite_samples += optimizer.nonfinite_samples
            if config.clipping == "adaptive":
                self.max_grad_norm = optimizer.max_grad_norm
            optimizer.detach()
        return {key: value for key, value in get_state(classifier.model).items() if method.travels(key, round)}

    def private_step(
        self, classifier: Classifier, method: Method, config: Config, round: int
    ) -> tuple[PrivateOptimizer, PrivateLoader]:
        """``make_private`` over this client's records, σ, ledger and noise; raises as it does."""
        model, adaptive = classifier.model, config.clipping == "adaptive"
        model.train()
        optimizer, loader = make_private(
            model,
            make_optimizer(model, config, learning_rate(config, round)),
            DataLoader(self.records, batch_size=config.batch_size, collate_fn=classifier.collate),
            method=method.schedule,
            smoothing=config.filter,
            clipping="flat" if adaptive else config.clipping,
            max_grad_norm=config.max_grad_norm if self.max_grad_norm is None else self.max_grad_norm,
            target_unclipped_quantile=config.target_unclipped_quantile if adaptive else None,
            noise_multiplier=self.noise_multiplier,
            loss_reduction="sum",  # as Classifier.loss
            expected_batch_size=config.batch_size,
            physical_batch_size=config.physical_batch_size,
            lengths=None if config.physical_batch_size is None else text_lengths(self.records),
            ledger=self.ledger,
            noise=self.noise,
            check=False,  # the run checks the model once, before its first round
        )
        assert isinstance(loader, PrivateLoader)
        return optimizer, loader

"""One training step of the same model on the same data: LA-LoRA here, and everything that it is compared with."""

import copy
import time

import torch
from contender import BACKWARD, Contender, adapted, peft_model, plain_name
from recipes import BookKeeping, LayerByLayer
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.profiler import record_function
from zoo import Spec, loader, loss_of

from lalora_kernels.privacy.make_private import make_private
from lalora_kernels.schedule import Schedule


class Peft(Contender):
    """Ordinary LoRA, not private, A and B."""

    clipping = None

    def __init__(self, spec: Spec, noise: float = 1.0, clip: float = 1.0, float32_factors: bool = True):
        super().__init__(spec, peft_model(spec, float32_factors))

    def step(self) -> None:
        x, y = next(self.batches)
        loss = loss_of(self.model(x).logits, y)
        with record_function(BACKWARD):
            loss.backward()
        self.sgd.step()
        self.sgd.zero_grad()


class LaLora(Contender):
    """This library; the active factor follows ``factors``, one letter a step, over and over."""

    def __init__(
        self,
        spec: Spec,
        noise: float = 1.0,
        clip: float = 1.0,
        factors: str = "BA",
        smoothing: str | None = "binomial5",
        clipping: str = "flat",
    ):
        super().__init__(spec, adapted(spec))
        self.clipping = clipping
        self.optimizer, batches = make_private(
            self.model,
            self.sgd,
            loader(spec),
            method=Schedule("bench", lambda _, step: factors[(step - 1) % len(factors)]),
            smoothing=smoothing,
            clipping=clipping,
            max_grad_norm=clip,
            noise_multiplier=noise,
            sample_rate=1.0,
            check=False,  # the first step's check of two records is made once, not once a step
        )
        self.batches = batches.steps(1 << 40)
        self.factors = factors
        self.parts: dict[str, list[float]] = {f"ours, {f} active": [] for f in factors}

    def step(self) -> None:
        x, y = next(self.batches)
        loss = loss_of(self.model(x).logits, y)
        with record_function(BACKWARD):
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def cycle(self) -> None:
        """One step of each factor, each timed by itself."""
        for factor in self.factors:
            start = time.perf_counter()
            self.step()
            self.parts[f"ours, {factor} active"].append(time.perf_counter() - start)


def _folded(kind: type, records: int) -> type:
    """An Opacus module class that takes the k * N windows of N images as N records, which Opacus does not know of."""

    class Folded(kind):
        def rearrange_grad_samples(self, *, module, backprops, loss_reduction, batch_first):
            activations, backprops = super().rearrange_grad_samples(
                module=module, backprops=backprops, loss_reduction="sum", batch_first=batch_first
            )
            module.max_batch_len = records
            if loss_reduction == "mean":
                backprops = backprops * records
            if len(backprops) != records:
                activations = [a.reshape(records, -1, a.shape[-1]) for a in activations]
                backprops = backprops.reshape(records, -1, backprops.shape[-1])
            return activations, backprops

    return Folded


class OpacusHooks(Contender):
    """DP-LoRA (A and B) with Opacus' per-sample gradients from hooks."""

    def __init__(self, spec: Spec, noise: float = 1.0, clip: float = 1.0):
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        model = peft_model(spec)
        kind = _folded(GradSampleModule, spec.batch) if "swin" in spec.model else GradSampleModule
        super().__init__(spec, kind(model, batch_first=True, loss_reduction="mean", strict=False))
        self.optimizer = DPOptimizer(
            self.sgd, noise_multiplier=noise, max_grad_norm=clip, expected_batch_size=spec.batch
        )

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self) -> None:
        x, y = next(self.batches)
        loss = loss_of(self.model(x).logits, y)
        with record_function(BACKWARD):
            loss.backward()

    def per_sample(self) -> dict[str, Tensor]:
        """name -> (N, *shape), each record's gradient of its own loss."""
        self.backward()
        named = self.model.named_parameters()
        return {plain_name(n): p.grad_sample for n, p in named if p.requires_grad}


class OpacusGhost(Contender):
    """DP-LoRA (A and B) with Opacus' fast gradient clipping: norms first, a second backward for the clipped sum.

    Norms come from Gram matrices (T x T), as is Opacus' default; for Swin, whose first layers have T = 3,136, from
    gradients that are formed and dropped, which is many times faster there.
    """

    def __init__(self, spec: Spec, noise: float = 1.0, clip: float = 1.0):
        from opacus.grad_sample import GradSampleModuleFastGradientClipping as Ghost
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        model = peft_model(spec)
        kind = _folded(Ghost, spec.batch) if "swin" in spec.model else Ghost
        wrapped = kind(
            model,
            batch_first=True,
            loss_reduction="mean",
            strict=False,
            max_grad_norm=clip,
            use_ghost_clipping="swin" not in spec.model,
        )
        super().__init__(spec, wrapped)
        self.optimizer = DPOptimizerFastGradientClipping(
            self.sgd, noise_multiplier=noise, max_grad_norm=clip, expected_batch_size=spec.batch
        )
        self.criterion = DPLossFastGradientClipping(wrapped, self.optimizer, nn.CrossEntropyLoss(), "mean")

    def step(self) -> None:
        x, y = next(self.batches)
        loss = self.criterion(self.model(x).logits, y)
        with record_function(BACKWARD):
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class FunctionalVmap(Contender):
    """DP-LoRA (A and B) with torch.func: vmap of grad over the records."""

    def __init__(self, spec: Spec, noise: float = 1.0, clip: float = 1.0):
        super().__init__(spec, peft_model(spec))
        self.noise, self.clip = noise, clip
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss_of(functional_call(self.model, params, (x[None],)).logits, y[None])

        self.per_sample = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")

    def step(self) -> None:
        x, y = next(self.batches)
        G = self.per_sample({n: p.detach() for n, p in self.trainable.items()}, x, y)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in G.values()]).norm(dim=0)
        weights = (self.clip / norms).clamp(max=1.0)
        for n, p in self.trainable.items():
            total = torch.einsum("n,n...->...", weights, G[n])
            p.grad = (total + self.noise * self.clip * torch.randn(total.shape)) / len(x)
        self.sgd.step()
        self.sgd.zero_grad()


CONTENDERS: dict[str, type[Contender]] = {
    "PEFT, not private": Peft,
    "Opacus hooks": OpacusHooks,
    "Opacus ghost": OpacusGhost,
    "torch.func vmap": FunctionalVmap,
    "fastDP's recipe": BookKeeping,
    "FlashDP's recipe": LayerByLayer,
}


def expected(
    G: dict[str, Tensor], clip: float | None, names=lambda name: True, clipping: str | None = "flat"
) -> dict[str, Tensor]:
    """The clipped mean of per-sample gradients over the tensors that ``names`` accepts, in float64."""
    G = {n: g.double() for n, g in G.items() if names(n)}
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in G.values()])
    if clip is None or clipping is None:
        weights = torch.ones_like(norms)
    elif clipping == "per_layer":
        weights = (clip / len(G) ** 0.5 / norms).clamp(max=1.0)
    else:
        weights = (clip / norms.norm(dim=0)).clamp(max=1.0).expand_as(norms)
    return {n: torch.einsum("n,n...->...", w, g) / len(w) for w, (n, g) in zip(weights, G.items())}


def typical_norm(G: dict[str, Tensor]) -> float:
    """A bound under which about half the records are clipped."""
    return float(torch.stack([g.double().flatten(1).norm(dim=1) for g in G.values()]).norm(dim=0).median())


def one_gradient(contender: Contender) -> dict[str, Tensor]:
    """The gradient that the contender's inner optimizer is given in its next step."""
    contender.keep_grads()
    contender.step()
    return copy.copy(contender.grads())

"""What question 5 measures: noise terms of one step, agreement of clients, error of the aggregation, curvature.

All of it is computed from releases that the ledgers hold, or on public test records: post-processing, at no cost.
"""

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lalora_kernels.adapt import unadapt
from lalora_kernels.data import BadInput
from lalora_kernels.federated.client import set_state
from lalora_kernels.federated.methods import Update, get_method, products
from lalora_kernels.nn import LoRALinear, lora_layers
from lalora_kernels.privacy.postprocess import KEPT, permuted
from lalora_kernels.reference.privatize import smooth
from lalora_kernels.reproduce.stored import read_lines

if TYPE_CHECKING:
    from lalora_kernels.federated.run import Run
    from lalora_kernels.models import Classifier


def noise_terms(
    state: Update, std: float, active: str, smoothing: bool, generator: torch.Generator | None = None
) -> dict[str, float]:
    """Norms of what one release's noise does to the products: (B + N_B)(A + N_A) − BA, over all layers of ``state``.

    N has standard deviation ``std`` (σ C / b), behind the filter where ``smoothing``; that of a factor that is not in
    ``active`` is 0. Returns "linear", ‖B N_A + N_B A‖_F, and "quadratic", ‖N_B N_A‖_F, which only a step that trains
    both factors has.
    """
    linear = quadratic = 0.0
    for a, b in products(state).values():
        A, B = state[a].double(), state[b].double()
        noise = []
        for factor, value, dim in (("A", A, 1), ("B", B, 0)):
            n = torch.zeros_like(value)
            if factor in active:
                n = std * torch.randn(value.shape, dtype=torch.float64, generator=generator)
                n = smooth(n, dim) if smoothing else n
            noise.append(n)
        N_A, N_B = noise
        linear += float((B @ N_A + N_B @ A).square().sum())
        quadratic += float((N_B @ N_A).square().sum())
    return {"linear": math.sqrt(linear), "quadratic": math.sqrt(quadratic)}


def cosine(updates: Sequence[Update], reference: Update) -> float | None:
    """Mean over all pairs of clients of the cosine between what they changed; None of fewer than two that did."""
    moved = []
    for update in updates:
        change = torch.cat([(update[k].double() - reference[k].double()).flatten() for k in sorted(update)])
        if float(change.norm()):
            moved.append(change / change.norm())
    pairs = [float(one @ other) for i, one in enumerate(moved) for other in moved[:i]]
    return sum(pairs) / len(pairs) if pairs else None


def aggregation_error(updates: Sequence[Update], reference: Update, weights: Sequence[float]) -> dict[str, float]:
    """"error" ‖mean(BA) − mean(B) mean(A)‖_F over all layers, and "product" ‖mean(BA)‖_F, to compare it with.

    A factor that an update does not hold did not travel: it is the reference's.
    """
    total, error, product = sum(weights), 0.0, 0.0
    zero = torch.zeros((), dtype=torch.float64)
    for a, b in products(reference).values():
        As = [update.get(a, reference[a]).double() for update in updates]
        Bs = [update.get(b, reference[b]).double() for update in updates]
        exact = sum((w * B @ A for w, A, B in zip(weights, As, Bs)), zero) / total
        mean_b, mean_a = (sum((w * X for w, X in zip(weights, Xs)), zero) / total for Xs in (Bs, As))
        means = mean_b @ mean_a
        error += float((exact - means).square().sum())
        product += float(exact.square().sum())
    return {"error": math.sqrt(error), "product": math.sqrt(product)}


def top_eigenvalue(
    loss: Callable[[list[Tensor]], Tensor], at: Sequence[Tensor], iterations: int = 30,
    generator: torch.Generator | None = None,
) -> float:  # fmt: skip
    """The Hessian's largest eigenvalue: power iteration on Hessian-vector products (two backwards each).

    ``loss`` maps tensors like ``at`` to a scalar. Power iteration finds the eigenvalue of largest magnitude; where that
    is negative, a second one finds the other end of the spectrum. Values are last Rayleigh quotients.
    """
    at = [t.detach().requires_grad_() for t in at]
    gradients = torch.autograd.grad(loss(at), at, create_graph=True)

    def power(shift: float) -> float:
        v = [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in at]
        value = 0.0
        for _ in range(iterations):
            length = math.sqrt(sum(float(t.double().square().sum()) for t in v))
            if not length:
                return 0.0
            v = [t / length for t in v]
            dot = sum(((g * t).sum() for g, t in zip(gradients, v)), torch.zeros(()))
            hv = [h - shift * t for h, t in zip(torch.autograd.grad(dot, at, retain_graph=True), v)]
            value = sum(float((h.double() * t.double()).sum()) for h, t in zip(hv, v))
            v = [h.detach() for h in hv]
        return value

    first = power(0.0)
    return first if first >= 0 else first + power(first)


def curvature(classifier: "Classifier", batch: tuple, iterations: int = 30) -> float:
    """``top_eigenvalue`` of the loss on ``batch`` in all factors, of the model as it is. Raises as ``plain_loss``."""
    loss, factors = plain_loss(classifier, batch)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
        return top_eigenvalue(loss, list(factors.values()), iterations, torch.Generator().manual_seed(0))


def filter_gain(
    gradients: Mapping[str, Tensor], what: Callable[[Tensor, int], Tensor] = smooth, kept: float = KEPT
) -> dict[str, float]:
    """What a filter F does to a step's ratio of signal to noise, for "A" and "B": ⟨g, F g⟩ / ‖g‖² / √kept.

    ``gradients`` by the names of the factors, A (r, n) filtered along n and B (m, r) along m; ``kept`` is the share of
    white noise's variance behind F. The numerator is the share of the gradient's own direction that is left of it, to
    first order what a step takes off the loss. 1: no gain, no loss, once the learning rate is tuned; the 5-tap filter
    on a gradient whose neighbours are uncorrelated: 0.375 / 0.523 = 0.72; at most 1.91, where all neighbours are equal.
    A factor whose gradient is zero gives NaN.
    """
    inner, norm = {"A": 0.0, "B": 0.0}, {"A": 0.0, "B": 0.0}
    for name, g in gradients.items():
        factor, dim = ("A", 1) if name.endswith("lora_A") else ("B", 0)
        inner[factor] += float((g.double() * what(g.double(), dim)).sum())
        norm[factor] += float(g.double().square().sum())
    return {f: inner[f] / norm[f] / math.sqrt(kept) if norm[f] else math.nan for f in inner}


def plain_loss(classifier: "Classifier", batch: tuple) -> tuple[Callable[[list[Tensor]], Tensor], dict[str, Tensor]]:
    """(the mean loss on ``batch`` as a function of all factors in order, the factors as they are, by name).

    Runs on a copy with plain layers, whose weights are W0 + s B A: the kernels have no second derivative. Raises
    ValueError for adapters of other layers than linear ones.
    """
    layers = dict(lora_layers(classifier.model))
    fits = lambda layer: type(layer) is LoRALinear and layer.trained_rows is None  # noqa: E731
    if strange := [name for name, layer in layers.items() if not fits(layer)]:
        raise ValueError(f"{strange[0]} is no adapted linear layer whose rows all train; its curvature is not measured")
    factors = {
        f"{name}.{factor}": getattr(layer, factor).detach().float()
        for name, layer in layers.items()
        for factor in ("lora_A", "lora_B")
    }
    plain = unadapt(copy.deepcopy(classifier.model)).eval()
    inputs, labels = classifier.to_device(batch)

    def loss(at: list[Tensor]) -> Tensor:
        weights = {
            f"{name}.weight": layer.weight.detach() + layer.scaling * at[2 * i + 1] @ at[2 * i]
            for i, (name, layer) in enumerate(layers.items())
        }
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
        out = torch.func.functional_call(plain, weights, args, kwargs)
        return F.cross_entropy(getattr(out, "logits", out), labels)

    return loss, factors


class Recorder:
    """``Watch.on_updates`` of a measured run: one line a round into ``path``; ``finish`` adds the curvature."""

    def __init__(self, run: "Run", path: Path):
        """Raises BadInput for a method that leaves a factor with each client: there is no one model to measure."""
        if get_method(run.task.config.method).keeps:
            raise BadInput(f"{run.task.config.method} has no one model that question 5 could measure; leave it out")
        self.run, self.path = run, path

    def __call__(self, round: int, updates: Mapping[int, Update], weights: Mapping[int, float]) -> None:
        config, plan, state = self.run.task.config, self.run.plan, self.run.at.state
        order = sorted(updates)
        sigma = sum(plan.clients[i].noise_multiplier for i in order) / len(order)
        active = get_method(config.method).schedule.active(round, 1)
        terms = noise_terms(
            state, sigma * config.max_grad_norm / config.batch_size, active, config.filter == "binomial5",
            torch.Generator().manual_seed(round),
        )  # fmt: skip
        error = aggregation_error([updates[i] for i in order], state, [weights[i] for i in order])
        self._write({
            "round": round, "sigma": sigma, "noise": terms, "aggregation": error,
            "cosine": cosine([updates[i] for i in order], state),
        })  # fmt: skip

    def finish(self, records: int = 64, gradient_records: int = 512) -> None:
        """Of the final model, on public test records: the largest eigenvalue, and what the filter does to the gradient,
        with the features in their own order and in a random one."""
        classifier = self.run.task.classifier
        set_state(classifier.model, self.run.at.state)
        loss, factors = plain_loss(classifier, self._public(gradient_records))
        at = [t.requires_grad_() for t in factors.values()]
        gradients = dict(zip(factors, torch.autograd.grad(loss(at), at)))
        gains = {"filter gain": filter_gain(gradients), "filter gain, random order": filter_gain(gradients, permuted)}
        told = {name: {k: None if math.isnan(v) else v for k, v in gain.items()} for name, gain in gains.items()}
        self._write({"round": "end", "eigenvalue": curvature(classifier, self._public(records)), **told})

    def _public(self, records: int) -> tuple:
        task = self.run.task
        return task.classifier.collate([task.data.test[i] for i in range(min(records, len(task.data.test)))])

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_measures(path: Path) -> dict[str, float] | None:
    """Means over the rounds of a measured run, and the eigenvalue at its end; None where it did not get there.

    A round that an interrupted run measured twice counts once, as it was at last.
    """
    if not path.exists():
        return None
    lines = {line["round"]: line for line in read_lines(path, f"remove {path.parent} to train it again", "round")}
    if "end" not in lines:
        return None
    end, rounds = lines.pop("end"), list(lines.values())
    gains = {
        f"{name}, {factor}": math.nan if value is None else value
        for name in ("filter gain", "filter gain, random order")
        for factor, value in end.get(name, {}).items()
    }
    cosines = [r["cosine"] for r in rounds if r["cosine"] is not None]
    mean = lambda values: sum(values) / len(values) if values else math.nan  # noqa: E731
    return {
        "sigma": mean([r["sigma"] for r in rounds]),
        "noise, linear": mean([r["noise"]["linear"] for r in rounds]),
        "noise, N_B N_A": mean([r["noise"]["quadratic"] for r in rounds]),
        "aggregation error": mean([r["aggregation"]["error"] for r in rounds]),
        "of ‖mean(BA)‖": mean([r["aggregation"]["product"] for r in rounds]),
        "cosine": mean(cosines),
        "eigenvalue": end["eigenvalue"],
        **gains,
    }

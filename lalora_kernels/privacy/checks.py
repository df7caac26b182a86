"""Does every tensor's per-sample gradient come from its own record alone? Asked of the model itself, in float64."""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lalora_kernels.nn import factor_parameters, set_active
from lalora_kernels.privacy.engine import Engine
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.privacy.sampling import BatchInfo
from lalora_kernels.quantized import dequantize_

# Two evaluations of one gradient in different orders: float64, but for models that compute norms in float32 whatever
# they are (Llama and its kin: 1e-7). What mixes records is off by its share of a record.
RTOL = 1e-6


def tree_map(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``f`` of every tensor in nested mappings, sequences and named tuples; other leaves are kept."""
    if isinstance(tree, Tensor):
        return f(tree)
    if isinstance(tree, Mapping):
        mapped = {k: tree_map(f, v) for k, v in tree.items()}
        kind: Any = type(tree)
        return mapped if kind is dict else kind(mapped)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(f, v) for v in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(tree_map(f, v) for v in tree)
    return tree


def _record(batch: Any, i: int, rows: int) -> Any:
    """Record i alone; a tensor that has no row for each record (one mask for all) stays whole."""
    return tree_map(lambda t: t[i : i + 1] if t.dim() and t.shape[0] == rows else t, batch)


def _leaves(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    tree_map(keep, tree)
    return found


def _double(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode whose factors are not zero, so that no factor's gradient is."""
    try:
        twin = copy.deepcopy(model)
        dequantize_(twin)
        twin = twin.double().eval()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise RuntimeError(
                "the check of the first batch works on a copy of the model in float64, 8 bytes a weight, for which "
                "there is no memory. Let it pass on a smaller model of the same family and loss (check_per_sample, on "
                "a CPU), then pass make_private check=False for this one"
            ) from error
        raise RuntimeError(
            f"the check of the first batch works on a copy of the model, which cannot be copied ({error}). A module "
            f"that keeps an activation (self.last = h) should keep h.detach(); or pass make_private check=False"
        ) from error
    for (_, m), (_, t) in zip(model.named_modules(), twin.named_modules()):
        if isinstance(m, nn.modules.batchnorm._NormBase):
            t.train(m.training)
    generator = torch.Generator().manual_seed(0)
    for _, p in factor_parameters(twin):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data.add_(0.1 * noise.to(p.device))
    return twin


def per_sample_gradients(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], *, loss_reduction: str = "mean"
) -> dict[str, Tensor]:
    """Every trainable tensor's gradient of each record's own loss, {name: (N, *shape)}, as the private step sees it.

    ``loss(model, batch)`` is a scalar; ``batch`` nested tensors with N records along the first axis. The model is left
    as it was found, its ``grad`` untouched. Raises as ``make_private`` does for what no rule covers.
    """
    return _per_sample_gradients(model, batch, loss, loss_reduction, None)


def _per_sample_gradients(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], loss_reduction: str, backend: str | None
) -> dict[str, Tensor]:
    rows = _leaves(batch)[0].shape[0]
    engine = Engine(
        model,
        clipping="flat",
        max_grad_norm=1.0,
        noise_std=0.0,
        noise=NoiseSource(),
        divisor=1.0,
        smoothing=None,
        loss_reduction=loss_reduction,
        charge=_never,
        backend=backend,
    )
    try:
        engine.begin(BatchInfo(rows=rows, valid=rows, first=True, last=True))
        loss(model, batch).backward()
        return {s.name: engine.grad_scale * _materialize(s, rows) for s in engine.active}
    finally:
        engine.detach()


def _never() -> None:
    raise AssertionError("these gradients are not released")


def _materialize(site: Any, rows: int) -> Tensor:
    if not site.marked:
        return site.param.new_zeros(rows, *site.param.shape)
    if site.deferred is None:
        return site.G.clone()
    one_hot = torch.eye(rows, dtype=site.param.dtype, device=site.param.device)
    out = [torch.zeros_like(site.param) for _ in range(rows)]
    with torch.no_grad():
        for w, o in zip(one_hot, out):
            site.deferred.add_weighted_sum(w, o)
    return torch.stack([o.detach() for o in out])


def single_sample_gradients(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """The same by N ordinary backwards of one record each: the definition, {name: (N, *shape)}."""
    rows = _leaves(batch)[0].shape[0]
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    per_record = []
    for i in range(rows):
        value = loss(model, _record(batch, i, rows))
        grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        per_record.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, named.values())])
    return {n: torch.stack(g) for n, g in zip(named, zip(*per_record))}


def check_per_sample(
    model: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    loss_reduction: str = "mean",
    factors: str = "AB",
) -> None:
    """Compare every trainable tensor's per-sample gradient with N single-sample backwards, in float64, on a copy.

    ``loss(model, batch)`` is the scalar that training would backpropagate, for ``batch`` = (x, y) for instance
    ``lambda m, b: criterion(m(b[0]), b[1])``. Two records are enough. Dropout is off in the copy; B factors are moved
    away from zero there.
    Raises ValueError that names the first layer whose output for a record depends on the others, or, where the layers
    are clean, the tensors whose gradient does (a loss that couples records, a wrong ``loss_reduction``, an axis that is
    not the batch). Source: the microbatch oracle of Opacus' GradSampleModule tests.
    """
    batch = tree_map(lambda t: t.double() if t.is_floating_point() else t, batch)
    leaves = _leaves(batch)
    if not leaves or not leaves[0].dim():
        raise ValueError(f"a {type(batch).__name__} is no batch; give two records' tensors, such as (x[:2], y[:2])")
    if isinstance(loss, nn.Module):
        raise ValueError("loss is called as loss(model, batch); wrap it: lambda m, b: criterion(m(b[0]), b[1])")
    rows = leaves[0].shape[0]
    if rows < 2:
        raise ValueError("check_per_sample needs two records or more; one cannot show mixing")
    twin = _double(model)
    set_active(twin, factors)
    try:
        expected = single_sample_gradients(twin, batch, loss)
        found = _per_sample_gradients(twin, batch, loss, loss_reduction, "reference")  # whatever backend is forced
    except (ValueError, RuntimeError):
        _refuse_mixing(twin, batch, loss, rows)  # what fails is told by its cause, if that is it
        raise
    wrong = [
        n for n in expected if (found[n] - expected[n]).norm() > RTOL * max(expected[n].norm(), found[n].norm()) + 1e-30
    ]
    if wrong:
        _refuse_mixing(twin, batch, loss, rows)
        names = ", ".join(wrong[:5]) + (" ..." if len(wrong) > 5 else "")
        raise ValueError(
            f"per-sample gradients of {names} differ from those of single records: the loss couples records, or "
            f"loss_reduction={loss_reduction!r} is not what the loss does"
        )
    idle = [n for n in expected if not found[n].any() and not expected[n].any()]
    if idle:
        names = ", ".join(idle[:5]) + (" ..." if len(idle) > 5 else "")
        warnings.warn(f"no gradient reaches {names}; what nothing reaches is trained by noise alone", stacklevel=2)


def _refuse_mixing(twin: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], rows: int) -> None:
    culprit = _first_mixing_module(twin, batch, loss, rows)
    if culprit is not None:
        raise ValueError(
            f"{culprit}: the output for one record depends on the other records of the batch, or its first axis is "
            f"not the batch; per-sample clipping cannot bound such a layer. Replace it, freeze what lies before it, or "
            f"make it batch-major"
        )


def _first_mixing_module(
    twin: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], rows: int
) -> str | None:
    """The first module, in order of execution, whose outputs in the batch differ from those of single records."""
    calls: list[tuple[str, list[Tensor]]] = []
    handles = _watch(twin, calls)
    try:
        with torch.no_grad():
            loss(twin, batch)
            together, singles = list(calls), []
            for i in range(rows):
                calls.clear()
                try:
                    loss(twin, _record(batch, i, rows))
                except Exception:
                    # What fails on one record alone (BatchNorm in train mode) is the first that did not return.
                    if len(calls) >= len(together):
                        raise
                singles.append(list(calls))
    finally:
        for h in handles:
            h.remove()
    for k, (name, outputs) in enumerate(together):
        for i, single in enumerate(singles):
            if k >= len(single) or single[k][0] != name:
                return name or type(twin).__name__
            for whole, alone in zip(outputs, single[k][1]):
                if not _is_share(whole, alone, i, rows):
                    return name or type(twin).__name__
    return None


def _watch(twin: nn.Module, calls: list[tuple[str, list[Tensor]]]) -> list[Any]:
    """Hooks that append (module, its floating-point outputs) to ``calls`` in order of execution."""
    return [
        m.register_forward_hook(
            lambda _m, _a, out, n=n: calls.append((n, [t.detach() for t in _leaves(out) if t.is_floating_point()]))
        )
        for n, m in twin.named_modules()
    ]


def _same(whole: list[Tensor], other: list[Tensor], i: int) -> bool:
    """Whether the outputs agree in record i of two, where they have a row for each."""
    for a, b in zip(whole, other):
        if a.dim() and a.shape == b.shape and a.shape[0] % 2 == 0:
            x, y = a.chunk(2)[i], b.chunk(2)[i]
            if not torch.allclose(x, y, rtol=RTOL, atol=1e-10, equal_nan=True):
                return False
    return True


def _cards(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.is_cuda})


def _is_share(whole: Tensor, alone: Tensor, i: int, rows: int) -> bool:
    """Whether ``alone`` is record i's part of ``whole`` (batch-major), or does not depend on the batch."""
    if whole.shape == alone.shape:  # a scalar loss, a position embedding, a bias table
        return whole.dim() == 0 or torch.allclose(whole, alone, rtol=RTOL, atol=1e-12)
    if whole.shape[1:] != alone.shape[1:] or whole.shape[0] != rows * alone.shape[0]:
        return False
    k = alone.shape[0]
    return torch.allclose(whole[i * k : (i + 1) * k], alone, rtol=RTOL, atol=1e-10)


def check_inputs(model: nn.Module, args: tuple, kwargs: dict, rows: int) -> bool:
    """``check_per_sample`` of a forward's arguments, on their first two finite records; False where there are not two.

    What make_private runs at the first private step. The loss is a random projection of every output that has a row for
    each record, so it shows what the model mixes, not what the user's criterion couples. Raises as check_per_sample;
    warns of adapters that the two records never reached, which would train on noise alone.
    """
    finite = torch.ones(rows, dtype=torch.bool)
    for t in _leaves((args, kwargs)):
        if t.dim() and t.shape[0] == rows and t.is_floating_point():
            finite &= t.isfinite().flatten(1).all(1).cpu() if t.dim() > 1 else t.isfinite().cpu()
    chosen = finite.nonzero().flatten()[:2]
    if len(chosen) < 2:
        return False
    two = tree_map(lambda t: t[chosen.to(t.device)] if t.dim() and t.shape[0] == rows else t, (args, kwargs))

    def project(m: nn.Module, inputs: tuple) -> Tensor:
        outputs = [t for t in _leaves(m(*inputs[0], **inputs[1])) if t.is_floating_point() and t.dim()]
        generator = torch.Generator().manual_seed(1)
        terms = []
        for t in outputs:
            direction = torch.randn(t.shape[1:], generator=generator, dtype=torch.float64).to(t.device, t.dtype)
            terms.append((t * direction).sum())
        return torch.stack(terms).sum()

    check_outputs(model, two)
    check_per_sample(model, two, project, loss_reduction="sum")
    return True


def check_outputs(model: nn.Module, two: tuple) -> None:
    """Raise ValueError where a record's output or a buffer depends on another record, in float64 and the model's mode.

    ``two``: (args, kwargs) with two records along the first axis. The gradients of a projection that is the same for
    both would not show what is the same in both, such as a mean that is taken off. What (a, b) gives for a must be what
    (a, a) does, and for b what (b, b) does, dropout drawn alike. A buffer that follows activations (running statistics,
    a centre) would leave the training without noise.
    """
    twin = _double(model)
    for (_, m), (_, t) in zip(model.named_modules(), twin.named_modules()):
        t.training = m.training
    two = tree_map(lambda t: t.double() if t.is_floating_point() else t, two)
    before = {n: b.clone() for n, b in twin.named_buffers()}
    after: list[dict[str, Tensor]] = []
    calls: list[tuple[str, list[Tensor]]] = []

    def run(*order: int) -> list[tuple[str, list[Tensor]]]:
        calls.clear()
        with torch.no_grad(), torch.random.fork_rng(devices=_cards(twin)):
            inputs = tree_map(lambda t: t[list(order)] if t.dim() and t.shape[0] == 2 else t, two)
            twin(*inputs[0], **inputs[1])
            after.append({n: b.clone() for n, b in twin.named_buffers()})
            for n, b in twin.named_buffers():
                if n in before:
                    b.copy_(before[n])
        return list(calls)

    handles = _watch(twin, calls)
    try:
        together, alone = run(0, 1), [run(0, 0), run(1, 1)]
    finally:
        for h in handles:
            h.remove()
    for name, value in after[0].items():
        if any(not torch.equal(value, other.get(name, value)) for other in after[1:]):
            raise ValueError(
                f"the buffer {name} follows the records of a batch, which nothing clips or noises; keep its module in "
                f"eval mode, or replace it"
            )
    if all(_same(together[-1][1], one[-1][1], i) for i, one in enumerate(alone)):
        return
    for k, (name, outputs) in enumerate(together):
        if any(k < len(one) and not _same(outputs, one[k][1], i) for i, one in enumerate(alone)):
            raise ValueError(
                f"{name or type(twin).__name__}: the output for one record depends on the other records of the batch; "
                f"per-sample clipping cannot bound such a layer. Replace it, or keep it in eval mode where it mixes in "
                f"train mode alone"
            )

"""Does every tensor's per-sample gradient come from its own record alone? Asked of the model itself, in float64."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lalora_kernels.nn import set_active
from lalora_kernels.privacy.compiled import eagerly
from lalora_kernels.privacy.doubled import Doubled
from lalora_kernels.privacy.drawn import Drawn
from lalora_kernels.privacy.engine import Engine
from lalora_kernels.privacy.noise import NoiseSource
from lalora_kernels.privacy.sampling import BatchInfo
from lalora_kernels.privacy.trees import fresh, have_rows, leaves, of_rows, record, to_double, tree_map
from lalora_kernels.privacy.twin import Apart, double, take_modes
from lalora_kernels.privacy.written import Buffers

# Two evaluations of one gradient in different orders: float64, but for models that compute norms in float32 whatever
# they are (Llama and its kin: 1e-7). What mixes records is off by its share of a record.
RTOL = 1e-6
FLOOR = 1e-12  # of the whole gradient's norm: what is zero in exact numbers (an attention key's bias) is rounding here
NONE: frozenset[str] = frozenset()


class Coupled(ValueError):
    """Records were seen to depend on each other; what else is wrong is a plain ValueError or RuntimeError."""


class Unreached(ValueError):
    """No trainable tensor took part in the forward, so nothing was compared."""


DRAWS = (
    ". The model or the loss draws at random, for a record alone otherwise than beside others, which may be all that "
    "differs: draw before, and have the batch hold what was drawn"
)
ONE_FOR_ALL = (
    "{} is given one input for all records, and what the model does with the output does not keep a row for each of "
    "them, so no record's gradient shows; leave it out of target_modules, or name it in exclude_modules"
)


def per_sample_gradients(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], *, loss_reduction: str = "mean"
) -> dict[str, Tensor]:
    """Every trainable tensor's gradient of each record's own loss, {name: (N, *shape)}, as the private step sees it.

    ``loss(model, batch)`` is a scalar; ``batch`` nested tensors with N records along the first axis. The model is left
    as it was found, its ``grad`` untouched. Raises as ``make_private`` does for what no rule covers.
    """
    rows = leaves(batch)[0].shape[0]
    return recorded_gradients(model, batch, loss, loss_reduction, None, rows)[0]


def recorded_gradients(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], loss_reduction: str, backend: str | None,
    rows: int, sequence_first: frozenset[str] = NONE,
) -> tuple[dict[str, Tensor], set[str]]:  # fmt: skip
    """The gradients, and the layers that were given one input for all records."""
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
        engine.turn(sequence_first)
        engine.begin(BatchInfo(rows=rows, valid=rows, first=True, last=True))
        loss(model, batch).backward()
        return {s.name: engine.grad_scale * _materialize(s, rows) for s in engine.active}, engine.expanded
    except RuntimeError as error:
        if engine.expanded:
            raise ValueError(ONE_FOR_ALL.format(", ".join(sorted(engine.expanded)))) from error
        raise
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
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], batched: Sequence[bool] = ()
) -> dict[str, Tensor]:
    """The same by N ordinary backwards of one record each: the definition, {name: (N, *shape)}."""
    given = leaves(batch)
    batched = batched or have_rows(batch, given[0].shape[0])
    rows = given[batched.index(True)].shape[0]
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = [p.grad for p in named.values()]
    per_record, reached = [], False
    try:
        for i in range(rows):
            value = loss(model, record(batch, i, batched))
            for p in named.values():
                p.grad = None
            if value.requires_grad:
                value.backward()  # not autograd.grad, which reentrant checkpointing does not take
            reached = reached or any(p.grad is not None for p in named.values())
            per_record.append([torch.zeros_like(p) if p.grad is None else p.grad for p in named.values()])
    finally:
        for p, grad in zip(named.values(), before):
            p.grad = grad
    if not reached:
        raise Unreached(
            "no trainable tensor takes part in the loss, so there is no gradient to compare; call this where the "
            "adapters are on (not within PEFT's disable_adapter()) and gradients are"
        )
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
    with Drawn(model, None) as drawn:
        try:
            compare(model, batch, loss, loss_reduction, factors, NONE)
            return
        except Coupled as error:
            refused = error
    raise Coupled(f"{refused}{DRAWS}") if drawn.any else refused


@eagerly
def compare(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], loss_reduction: str, factors: str,
    sequence_first: frozenset[str], batched: Sequence[bool] = (), own_mode: bool = False,
) -> None:  # fmt: skip
    """``check_per_sample`` where these modules are known to have the batch along their second axis, and these leaves
    a row for each record; ``own_mode``: in the model's, not in eval mode."""
    batch = tree_map(fresh, to_double(batch))
    given = leaves(batch)
    if not given or not given[0].dim():
        raise ValueError(f"a {type(batch).__name__} is no batch; give two records' tensors, such as (x[:2], y[:2])")
    if isinstance(loss, nn.Module):
        raise ValueError("loss is called as loss(model, batch); wrap it: lambda m, b: criterion(m(b[0]), b[1])")
    batched = batched or have_rows(batch, given[0].shape[0])
    rows = given[batched.index(True)].shape[0]
    if rows < 2:
        raise ValueError("check_per_sample needs two records or more; one cannot show mixing")
    # The first record twice more: what sorts rows by anything (by length, for an RNN) may leave all others in place,
    # and what turns them round (flip(0)) moves nothing in (a, b, a).
    batch = of_rows(lambda t: torch.cat((t, t[:1], t[:1])), batch, batched)
    rows += 2
    twin = double(model)
    if own_mode:
        take_modes(twin, model)
        loss = from_one_state(twin, loss)
    set_active(twin, factors)
    with Apart(model, twin):
        try:
            with Doubled():
                expected = single_sample_gradients(twin, batch, loss, batched)
                found, expanded = recorded_gradients(
                    twin, tree_map(fresh, batch), loss, loss_reduction, "reference", rows, sequence_first
                )  # whatever backend is forced
        except (ValueError, RuntimeError):
            if not sequence_first:  # where the first axis may be another, the first that differs is no culprit
                _refuse_mixing(twin, batch, loss, rows, batched)  # what fails is told by its cause, if that is it
            raise
        wrong = differing(found, expected)
        if wrong:
            if not sequence_first:
                _refuse_mixing(twin, batch, loss, rows, batched, wrong)
            if once := sorted(e for e in expanded if any(n.startswith(f"{e}.") for n in wrong)):
                raise ValueError(ONE_FOR_ALL.format(", ".join(once)))
            raise Coupled(
                f"per-sample gradients of {listed(wrong)} differ from those of single records: the loss couples "
                f"records, or loss_reduction={loss_reduction!r} is not what the loss does; or a hook or a custom "
                f"backward couples them, or a layer is given positions and no records (arange(T)[None], with a batch "
                f"axis of 1, is taken)"
            )
    idle = [n for n in expected if not found[n].any() and not expected[n].any()]
    if idle:
        warnings.warn(
            f"no gradient reaches {listed(idle)}; what nothing reaches is trained by noise alone", stacklevel=2
        )


def listed(names: list[str]) -> str:
    """The first of them, for a message."""
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def from_one_state(twin: nn.Module, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss whose every forward begins with the twin's present buffers: spectral_norm's move in train mode."""
    buffers = Buffers(twin)

    def value(*inputs: Any) -> Tensor:
        with torch.no_grad():
            buffers.put_back()
        return loss(*inputs)

    return value


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The tensors whose gradients are others than expected, but for rounding."""
    floor = FLOOR * torch.stack([e.norm() for e in expected.values()]).norm() + 1e-30
    return [
        n for n in expected if (found[n] - expected[n]).norm() > RTOL * max(expected[n].norm(), found[n].norm()) + floor
    ]


def _refuse_mixing(
    twin: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], rows: int, batched: Sequence[bool],
    wrong: Sequence[str] = (),
) -> None:  # fmt: skip
    culprit = _first_mixing_module(twin, batch, loss, rows, batched, wrong)
    if culprit is not None:
        raise Coupled(
            f"{culprit}: the output for one record depends on the other records of the batch, or its first axis is "
            f"not the batch; per-sample clipping cannot bound such a layer. Replace it, freeze what lies before it, or "
            f"make it batch-major"
        )


def _first_mixing_module(
    twin: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], rows: int, batched: Sequence[bool],
    wrong: Sequence[str],
) -> str | None:  # fmt: skip
    """The first module, in order of execution, whose outputs in the batch differ from those of single records.

    One that is given as many positions as a router chooses (an expert of a mixture) is passed over where it stands in a
    module that keeps the records apart, and no tensor of its own is ``wrong``.
    """
    calls: list[tuple[str, list[Tensor]]] = []
    handles = watch_modules(twin, calls)
    try:
        with torch.no_grad(), Doubled():
            loss(twin, tree_map(fresh, batch))
            together, singles = _by_module(calls), []
            count = len(calls)
            for i in range(rows):
                calls.clear()
                try:
                    loss(twin, record(batch, i, batched))
                except Exception:
                    # What fails on one record alone (BatchNorm in train mode) is the first that did not return.
                    if len(calls) >= count:
                        raise
                singles.append(_by_module(calls))
    finally:
        for h in handles:
            h.remove()
    kept = {name: _kept_apart(outputs, [s.get(name, []) for s in singles], rows) for name, outputs in together.items()}
    for name, apart in kept.items():
        routed = apart is None and any(kept[other] for other in kept if name != other and _holds(other, name))
        if apart is False or apart is None and (not routed or any(_holds(name, w) for w in wrong)):
            return name or type(twin).__name__
    return None


def _by_module(calls: list[tuple[str, list[Tensor]]]) -> dict[str, list[list[Tensor]]]:
    found: dict[str, list[list[Tensor]]] = {}
    for name, outputs in calls:
        found.setdefault(name, []).append(outputs)
    return found


def _holds(module: str, name: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _kept_apart(together: list[list[Tensor]], singles: list[list[list[Tensor]]], rows: int) -> bool | None:
    """Whether a module's calls on the batch hold what its calls on single records do; None where they are others, or
    others' rows, and so cannot be compared."""
    if any(len(calls) != len(together) for calls in singles):
        return None
    found: bool | None = True
    for i, calls in enumerate(singles):
        for outputs, alone in zip(together, calls):
            for a, b in zip(outputs, alone):
                if _is_share(a, b, i, rows):
                    continue
                of_one_kind = a.dim() == b.dim() and a.shape[1:] == b.shape[1:]
                if not of_one_kind or a.shape[0] in (b.shape[0], rows * b.shape[0]):
                    return False
                found = None
    return found


def watch_modules(twin: nn.Module, calls: list[tuple[str, list[Tensor]]]) -> list[Any]:
    """Hooks that append (module, its floating-point outputs) to ``calls`` in order of execution."""
    return [
        m.register_forward_hook(
            lambda _m, _a, out, n=n: calls.append((n, [t.detach() for t in leaves(out) if t.is_floating_point()]))
        )
        for n, m in twin.named_modules()
    ]


def _is_share(whole: Tensor, alone: Tensor, i: int, rows: int) -> bool:
    """Whether ``alone`` is record i's part of ``whole`` (batch-major), or does not depend on the batch."""
    if whole.shape == alone.shape:  # a scalar loss, a position embedding, a bias table
        return whole.dim() == 0 or torch.allclose(whole, alone, rtol=RTOL, atol=1e-12)
    if whole.dim() != alone.dim() or whole.shape[1:] != alone.shape[1:] or whole.shape[0] != rows * alone.shape[0]:
        return False
    k = alone.shape[0]
    return torch.allclose(whole[i * k : (i + 1) * k], alone, rtol=RTOL, atol=1e-10)

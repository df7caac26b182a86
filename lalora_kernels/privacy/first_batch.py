"""What make_private asks of the model itself at the first batch: whether records mix, or are written down."""

import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lalora_kernels.adapted import Adapted
from lalora_kernels.privacy.checks import (
    RTOL,
    Coupled,
    Unreached,
    watch_modules,
)
from lalora_kernels.privacy.compiled import eagerly
from lalora_kernels.privacy.doubled import Doubled
from lalora_kernels.privacy.drawn import Drawn
from lalora_kernels.privacy.kept import Attributes, Place, tied_attributes
from lalora_kernels.privacy.own_loss import COPIES, LOSS_ORDERS, reductions, tied, without_rows
from lalora_kernels.privacy.own_mode import Weigh, compare_alike, compare_drawn, compare_in_own_mode
from lalora_kernels.privacy.trees import have_rows, leaves, of_rows, tensors, to_double
from lalora_kernels.privacy.twin import Apart, double, take_modes
from lalora_kernels.privacy.written import Buffers, Parameters

# Two records and the first one again: what sorts rows by anything leaves two of them in place, but never these. What
# turns them round (flip(0)) moves nothing there, but where both copies are in front.
ORDER, DRAWN_ORDER = (0, 1, 0), (0, 1, 0, 1)
ORDERS = (ORDER, (0, 0, 1))
TWIN = (
    "This came from the check of the first batch, which runs a copy of the model in float64 on some of its records. If "
    "the model itself takes them, but not in float64, let check_per_sample pass on a smaller one of its family, and "
    "pass make_private check='loss' for this one."
)
SHARED = (
    "An argument that is no batch, but has as many rows as the batch has records (a mask of as many positions), is "
    "taken for one; give it an axis more (mask[None])."
)
WHOLE = (
    "{} went there whole, having no row for each record: what has several (patches, one record's after the other's) "
    "the model takes as (N, several, ...), and a module around it flattens it."
)
DRAWS = 4  # of a model that draws at random: a permutation of four rows that mixes none comes once in six
Seen = tuple[Any, dict[Place, list[Tensor]], bool]  # a forward's output, what it left on the model, whether it drew
Calls = list[tuple[str, list[Tensor]]]  # (module, its outputs) in order of execution
Run = tuple[Calls, bool]  # ... and whether it drew


class Found(NamedTuple):
    """What the check of a first batch tells of a model that passes."""

    tied: set[Any]  # its own losses that tie records together (own_loss), and such attributes (kept)
    sequence_first: frozenset[str]  # trained modules that have positions along the first axis, records along the second
    idle: frozenset[str]  # trained modules that did not run
    drawn: bool = False  # the model draws at random
    owns: bool = False  # it returns what has no row for each record, as a loss, or leaves something on its modules
    keeps: bool = False  # it leaves something there
    reductions: dict[str, str] = {}  # its own losses that are a "mean" or a "sum"
    listed: frozenset[str] = frozenset()  # its outputs that are lists with a tensor for each record
    packed: frozenset[str] = frozenset()  # trained modules with several rows for each record along the first axis


@eagerly
def check_inputs(
    model: nn.Module, args: tuple, kwargs: dict, rows: int, batched: list[bool] | None = None
) -> Found | None:
    """``check_per_sample`` of a forward's arguments, on two of their records; None where no two are finite and differ,
    or nothing trainable takes part in the forward.

    What make_private runs at the first private step. The loss is a random projection of every output that has a row for
    each record, so it shows what the model mixes, not what the user's criterion couples. Raises as check_per_sample;
    warns of adapters that the two records never reached, which would train on noise alone.
    """
    batched = have_rows((args, kwargs), rows) if batched is None else batched
    rowed = [t for t, found in zip(leaves((args, kwargs)), batched) if found]
    if not rowed:
        raise ValueError(
            f"none of the tensors that the model was given has a row for each of the batch's {rows} records, so "
            f"nothing shows which rows are whose; pass the batch as the loader yields it, batch axis first"
        )
    chosen = _two(rowed)
    if chosen is None:
        return None
    two = of_rows(lambda t: t[chosen.to(t.device)], (args, kwargs), batched)
    if any(t.isnan().any() for t in leaves(two) if t.is_floating_point()) and not _takes_nan(model, two):
        return None  # their gradients are NaN, and the step leaves them out

    def project(m: nn.Module, inputs: tuple, weigh: Weigh = lambda k, t: t) -> Tensor:
        outputs = _with_axes(m(*inputs[0], **inputs[1]), found.listed)
        if not outputs:  # though it did for several
            raise ValueError(
                "the model returns no row for a record that is alone, as one of a Poisson batch may be: squeeze() "
                "takes the batch's axis away, too; name the axis that is meant, squeeze(-1)"
            )
        generator = torch.Generator().manual_seed(1)
        terms = []
        for k, t in enumerate(outputs):
            direction = torch.randn(t.shape[1:], generator=generator, dtype=torch.float64).to(t.device, t.dtype)
            terms.append((weigh(k, t) * direction).sum())
        return torch.stack(terms).sum()

    found = check_outputs(model, two, batched)
    try:
        compare_here = compare_drawn if found.drawn else compare_in_own_mode
        compare_here(model, two, project, found.sequence_first, batched)
        compare_alike(model, two, project, found.sequence_first, batched)
    except Unreached:  # a reference under PEFT's disable_adapter(): the forward that trains is still to come
        return None
    return found


def _with_axes(output: Any, listed: Collection[str] = ()) -> list[Tensor]:
    """What may have a row for each record; of a list in ``listed`` all that it holds, one after the other."""
    found: dict[str, list[Tensor]] = {}
    for name, t in tensors(output):
        if t.is_floating_point() and t.dim():
            found.setdefault(next((one for one in _in_lists(name) if one in listed), name), []).append(t)
    return [torch.cat(of_one) for of_one in found.values()]


def _in_lists(name: str) -> Iterator[str]:
    """aux[0][1] -> aux[*][1], aux[0][*]: the lists that a tensor stands in."""
    for index in re.finditer(r"\[\d+\]", name):
        yield f"{name[: index.start()]}[*]{name[index.end() :]}"


def _lists(output: Any, count: int) -> set[str]:
    """The lists of so many tensors that differ in their first axis at most."""
    found: dict[str, list[torch.Size]] = {}
    for name, t in tensors(output):
        if t.is_floating_point() and t.dim():
            for one in _in_lists(name):
                found.setdefault(one, []).append(t.shape[1:])
    return {one for one, shapes in found.items() if len(shapes) == count and len(set(shapes)) == 1}


def _whole(two: tuple, batched: list[bool]) -> list[str]:
    """A note on the arguments that may have several rows for each record, where there are any."""
    named = tensors({f"argument {i + 1}": a for i, a in enumerate(two[0])} | two[1])
    names = [n for (n, t), rowed in zip(named, batched) if not rowed and t.dim() > 1 and len(t) > 1]
    return [WHOLE.format(" and ".join(names))] if names else []


def _two(rowed: list[Tensor]) -> Tensor | None:
    """The first finite record, and of those that differ from it in most of the tensors the first; None where none does:
    what mixes equal records does not show. Where no two are finite, what has infinities, then NaN, is taken."""
    each = [t.detach().flatten(1) if t.dim() > 1 else t.detach().unsqueeze(1) for t in rowed]
    # a mask that is added to scores has -inf in every record, a table with gaps NaN
    for fits in (torch.isfinite, lambda t: ~t.isnan(), lambda t: torch.ones_like(t, dtype=torch.bool)):
        at = torch.stack([fits(t).all(1).cpu() for t in each]).all(0).nonzero().flatten()
        if len(at) > 1:
            first = int(at[0])
            differ = torch.stack([_differ(t, t[first]).any(1).cpu() for t in each]).sum(0)[at]
            second = int(differ.argmax())
            return at[[0, second]] if differ[second] else None
    return None


def _differ(t: Tensor, other: Tensor) -> Tensor:
    return (t != other) & ~(t.isnan() & other.isnan())


@torch.no_grad()
def _takes_nan(model: nn.Module, two: tuple) -> bool:
    """Whether the outputs are finite though these records are not: what fills gaps may do so from the other records."""
    twin = double(model)
    take_modes(twin, model)
    args, kwargs = to_double(two)
    try:
        with Apart(model, twin), Doubled(), Drawn(twin, 0):
            return all(bool(t.isfinite().all()) for t in _with_axes(twin(*args, **kwargs)))
    except Exception:  # check_outputs says why
        return True


def check_outputs(model: nn.Module, two: tuple, batched: list[bool]) -> Found:
    """Raise ValueError where a record's output or a buffer depends on another record, in float64 and the model's mode.

    ``two``: (args, kwargs) with two records along the first axis of the leaves that are ``batched``. The gradients of a
    projection that is the same for both would not show what is the same in both, such as a mean that is taken off. What
    (a, b, a) and (a, a, b) give for a must be what (a, a, a) does, and for b what (b, b, b) does, dropout drawn alike;
    also in each trained layer, where rows in another order would be taken for the others' even if they are put back
    behind it. A model that draws at random is asked again with other draws and (a, b, a, b): a permutation may change
    no row. A buffer that follows activations (running statistics, a centre) would leave the training without noise, and
    so would a frozen tensor. A trained layer may have the records along its second axis instead, if it always has.
    Where a forward leaves anything on a module, all is asked once more of a model on which none has: what the first
    batch's records set (``if self.mean is None``) would be the same for all that follow.
    """
    twin = double(model)
    take_modes(twin, model)
    two = to_double(two)
    buffers, parameters, apart = Buffers(twin), Parameters(twin), Apart(model, twin)
    after: list[dict[str, Tensor]] = []
    calls: Calls = []
    rowless: set[str] = set()
    listed: set[str] = set()

    def forward(seed: int | None, *order: int) -> Seen:
        with torch.no_grad(), apart, Doubled(), Drawn(twin, seed) as drawn:
            inputs = of_rows(lambda t: t[list(order)], two, batched)
            try:
                output = twin(*inputs[0], **inputs[1])
            except Exception as error:
                if hasattr(error, "add_note"):  # Python 3.11
                    error.add_note(" ".join([TWIN, *[SHARED][: sum(batched) - 1], *_whole(two, batched)]))
                raise
            parameters.refuse_written()  # the first time, too: what is set then (ActNorm) is the same in all others
            if not _with_axes(output):
                raise ValueError(
                    "the model returns no tensor with a row for each record (its loss alone?), so nothing shows "
                    "whether it mixes them; let it return its logits, too, or ask check_per_sample and pass "
                    "make_private check='loss'"
                )
            rowless.update(name for name, _ in without_rows(output, len(order)))
            after.append({n: b.clone() for n, b in twin.named_buffers()})
            buffers.put_back()
            if listed:
                calls[-1] = calls[-1][0], _with_axes(output, listed)
        return output, attributes.left(), drawn.any

    def anew(seed: int | None, *order: int) -> Seen:
        attributes.put_back()
        return forward(seed, *order)

    def run(seed: int | None, *order: int, how: Callable[..., Seen] = forward) -> Run:
        calls.clear()
        drawn = how(seed, *order)[2]
        return list(calls), drawn

    def settled() -> None:
        for name, value in after[0].items():
            if any(not torch.equal(value, other.get(name, value)) for other in after[1:]):
                raise ValueError(
                    f"the buffer {name} follows the records of a batch, which nothing clips or noises; keep its module "
                    f"in eval mode, or replace it"
                )
        after.clear()

    axes: dict[str, set[int]] = {
        n: set()
        for n, m in twin.named_modules()
        if isinstance(m, Adapted) or any(p.requires_grad for p in m.parameters(recurse=False))
    }
    handles = watch_modules(twin, calls)
    attributes = Attributes(twin)  # with these hooks
    try:
        output = forward(None, *ORDER)[0]  # what is set up at the first forward (BigBird's attention) may draw, too
        shapes = _shapes(calls)
        if lists := _lists(output, len(ORDER)):  # of layers, or of records: these are more where there are more
            listed |= lists & _lists(forward(None, *DRAWN_ORDER)[0], len(DRAWN_ORDER))
        draws = DRAWS if _compare(run, settled, axes, None, *ORDERS) else 0
        for seed in range(draws):
            _compare(run, settled, axes, seed, DRAWN_ORDER)
        equal = {name for name, s in shapes if not axes.get(name, {0}) and len(s) > 2 and s[1] == len(ORDER)}
        if equal:  # the same for both records (Longformer's first token): a record more tells their axis
            for (name, s), other in zip(shapes, _shapes(run(None, *DRAWN_ORDER)[0])):
                if name in equal:
                    axes[name].add(int(other == (name, (s[0], len(DRAWN_ORDER), *s[2:]))))
        if left := attributes.moved():
            try:
                _compare(partial(run, how=anew), settled, axes, 0, *ORDERS)
            except Coupled:
                raise
            except Exception:  # what cannot be set up twice is not judged
                after.clear()
    finally:
        for h in handles:
            h.remove()
    if buffers.moved:
        after.clear()
        for seed, rows in ((0, 3), (0, 2), (1, 3)):
            forward(seed, *(0,) * rows)
        buffers.refuse_counts(*after)
    losses: set[Any] = set()
    seeds = range(2 if draws else 1) if rowless or left else ()
    for seed in seeds:
        outputs, kept, _ = zip(*(anew(seed, *order) for order in LOSS_ORDERS))
        losses |= tied(outputs) | tied_attributes(kept)
    taken: dict[str, str] = {}
    if rowless:
        twin.eval()  # copies of a record are drawn apart
        try:
            taken = reductions([anew(0, *order)[0] for order in COPIES])
        except Exception:  # what cannot run in eval mode, or of two rows, is not judged
            after.clear()
    idle = frozenset(name for name, found in axes.items() if not found) - {name for name, _ in shapes}
    second = frozenset(name for name, found in axes.items() if found == {1})
    packed = frozenset(name for name, s in shapes if name in axes and s and s[0] not in (1, len(ORDER))) - second
    return Found(losses, second, idle, bool(draws), bool(rowless or left), left, taken, frozenset(listed), packed)


def _compare(
    run: Callable[..., Run], settled: Callable[[], None], axes: dict[str, set[int]], seed: int | None,
    *orders: tuple[int, ...],
) -> bool:  # fmt: skip
    """Raise ValueError where a record's output depends on the other one, in ``orders`` of as many rows. Returns whether
    the model draws at random.

    To ``axes`` of each trained module is added along which one its outputs have the records, where they tell.
    """
    batches = [run(seed, *order) for order in orders]
    alone = [run(seed, *(i for _ in orders[0]))[0] for i in (0, 1)]
    settled()
    for order, (together, _) in zip(orders, batches):
        _refuse_mixed(order, together, alone, axes)
    return batches[0][1]


def _refuse_mixed(order: tuple[int, ...], together: Calls, alone: list[Calls], axes: dict[str, set[int]]) -> None:
    rows = len(order)

    def alike(k: int, axis: int) -> bool | None:
        found = [_same(together[k][1], alone[r][k][1], i, rows, axis) for i, r in enumerate(order) if k < len(alone[r])]
        return False if False in found else (True if True in found else None)

    same_path = all([name for name, _ in together] == [name for name, _ in one] for one in alone)
    last = any(_same(together[-1][1], alone[r][-1][1], i, rows) is False for i, r in enumerate(order))
    for k, (name, _) in enumerate(together):
        apart, ours = alike(k, 0) is not False, same_path and name in axes
        if ours and not last and not _equal(alone[0][k][1], alone[1][k][1]):
            turned = not alike(k, 0) and alike(k, 1) is True
            axes[name].add(int(turned))
            apart = (apart or turned) and len(axes[name]) == 1
        if not apart and (last or ours):
            raise Coupled(
                f"{name or 'the model'}: the output for one record depends on the other records of the batch, or its "
                f"first axis is not the batch; per-sample clipping cannot bound such a layer. Replace it, keep it in "
                f"eval mode where it mixes in train mode alone, or make it batch-major"
                + ("" if name else ". If outputs compare records (CLIP's logits), have it return what each has alone")
            )


def _shapes(calls: Calls) -> list[tuple[str, tuple[int, ...]]]:
    """(module, its first output's shape) in order of execution."""
    return [(name, tuple(outputs[0].shape) if outputs else ()) for name, outputs in calls]


def _same(whole: list[Tensor], other: list[Tensor], i: int, rows: int, axis: int = 0) -> bool | None:
    """Whether the outputs agree in row i of so many along the axis; None where none has as many."""
    found = None
    for a, b in zip(whole, other):
        if a.dim() > 2 * axis and a.shape == b.shape and (a.shape[1] == rows if axis else a.shape[0] % rows == 0):
            found = True
            if not _close(a.chunk(rows, axis)[i], b.chunk(rows, axis)[i]):
                return False
    return found


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(a.shape == b.shape and _close(a, b) for a, b in zip(some, others))


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=RTOL, atol=1e-10, equal_nan=True)

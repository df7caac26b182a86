"""Does the loop's own loss tie records together, or train anything itself? Told before a backward, from its graph.

A mean or a sum of what each record has alone has no second derivative across two records: the gradient at one's
outputs stays as it is whatever another's are. Contrasts, rankings, correlations, survival analysis (Cox), Dice over a
batch and roots of its mean have some, so no clipping bounds what a record changes there. What is linear in the other
records, what was detached from them and what takes them by comparisons alone (a batch's largest) has none, and is not
told here.

Nothing of a loss shows where its model ends, and a backward frees the graph on its way, so ``torch.autograd.backward``
itself is ours while a batch waits for its backward that is to be looked at.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lalora_kernels.privacy.shares import RTOL_HALF, Weights, by_other_sizes, uniform
from lalora_kernels.privacy.trees import leaves

Gradients = Sequence[Tensor | None]  # one for each output

TRIES = 4  # batches that are looked at one after the other; from then on each power of two
LARGE, LARGEST = 1 << 20, 1 << 24  # entries of all outputs, of which up to eight times the memory is taken
RTOL = 1e-6  # of the largest; without rounding there would be zeros
EVEN = 1e-3
KEY = "lalora: outputs"  # of a node's metadata: a graph that we held would hold us by its layers, and none be freed
TIED = (
    "the loss ties the records of the batch together (a contrast, a ranking, a correlation, a Dice or a root over the "
    "batch): the gradient at one record's output moves with another's, and clipping cannot bound what one of them "
    "changes. Take a mean or a sum of a loss that each record has alone, its own views, pairs or negatives with it, as "
    "one record of the data set"
)
BESIDE = (
    "the loss takes a tensor of shape {} that requires a gradient and is no parameter of the model that make_private "
    "was given (a head, a temperature, centres of classes): it would train on private records without clipping and "
    "noise. Make it a part of that model, or requires_grad_(False)"
)


class LoopLoss:
    """Of one engine; a batch's ``forget`` ends what its forwards began."""

    def __init__(self, told: Callable[[list[str]], None]) -> None:
        """``told``: is called with what a loss may take over the records, of "mean", "sum", "shares"."""
        self.asking = False  # the hooks of an output are called then, too
        self._told = told
        self._seen: dict[tuple[int, int], list[Weights]] = {}  # by (output, which derivative), of every batch
        self._rows, self._batches, self._mark = 0, 0, object()
        self._refused = False  # or the loop that was refused so often would run
        self._begun, self._asks = False, False  # this batch, which may call the model several times
        self._compiled = False  # the outputs are those of a compiled model
        self._parameters: set[Tensor] = set()

    def watch(self, model: nn.Module, output: Any, rows: int) -> None:
        """From now on a backward raises ValueError that shows a loss of these outputs to tie records together, or to
        have parameters of its own."""
        if self._begin(model, rows):
            for t in leaves(output):
                if t.is_floating_point() and t.requires_grad and t.dim() and t.shape[0] == rows:
                    node: Any = t.grad_fn
                    if node is not None:
                        node.metadata.setdefault(KEY, []).append((self._mark, t.output_nr))

    def watch_compiled(self, model: nn.Module, rows: int) -> None:
        """The same of a model's outputs that are known once the loss is."""
        self._compiled |= self._begin(model, rows)

    def _begin(self, model: nn.Module, rows: int) -> bool:
        if not self._begun:
            self._begun, self._batches = True, self._batches + 1
            self._asks = self._batches <= TRIES or self._again()
            if self._asks:
                _wait(self)
        if not self._asks:
            return False
        self._rows = rows
        self._parameters |= set(model.parameters())
        return True

    def _again(self) -> bool:
        return self._refused or not self._batches & (self._batches - 1)

    def forget(self) -> None:
        """The batch is over."""
        self._mark, self._begun, self._compiled, self._parameters = object(), False, False, set()
        _end(self)

    def ask(self, losses: Sequence[Tensor], weights: Sequence[Tensor | None] | None) -> None:
        """Raise ValueError where a loss trains anything itself, or ties records together, as far as it can be
        differentiated twice."""
        try:
            self._ask(losses, weights)
        except ValueError:
            self._refused = True
            raise

    def _ask(self, losses: Sequence[Tensor], weights: Sequence[Tensor | None] | None) -> None:
        nodes, outputs = self._outputs([t.grad_fn for t in losses if t.grad_fn is not None])
        size = sum(_shape(e).numel() for e in outputs)
        if not outputs or size > (LARGEST if self._again() else LARGE):
            return
        self.asking = True
        try:
            with torch.enable_grad():
                first = torch.autograd.grad(
                    losses, outputs, weights, retain_graph=True, create_graph=True, allow_unused=True
                )
                tied = self._across(first, outputs)
                even = [] if tied or size > LARGE else self._evenly(first, outputs)
        except RuntimeError:  # an operation that has no second derivative
            tied, even = _compares(nodes, {e.node for e in outputs}), []
        finally:
            self.asking = False
        if tied:
            raise ValueError(TIED)
        for key, now in even:
            self._compare(self._seen.setdefault(key, []), now)

    def _outputs(self, roots: list[Any]) -> tuple[set[Any], list[GradientEdge]]:
        """The loss's nodes, and the outputs of the model that it is computed from, but for what others of them are
        computed from; none where Python had a part in it, whose backward may do more than differentiate (a layer's
        records its gradients)."""

        @functools.cache
        def places(node: Any) -> list[int]:
            """Which of its results are outputs of the model."""
            return [place for mark, place in node.metadata.get(KEY, ()) if mark is self._mark]

        @functools.cache
        def opens(node: Any) -> bool:
            """Whether a function in Python is what the loss is computed from, in an output's stead: a compiled model,
            or one that is put over outputs (a reversal of gradients)."""
            if not _is_python(node) or places(node):
                return False
            if self._compiled and type(node).__name__ == "CompiledFunctionBackward":  # of this model
                below = _reached(_inputs(node), lambda n: False)
                return any(getattr(n, "variable", None) in self._parameters for n in below)
            return any(places(n) for n in _reached(_inputs(node), lambda n: bool(places(n)) or _is_python(n)))

        above = _reached(roots, lambda node: bool(places(node)) or opens(node))
        met = [GradientEdge(n, i) for n in above for i in (range(len(n._input_metadata)) if opens(n) else places(n))]
        met = [e for e in met if len(s := _shape(e)) and s[0] == self._rows]
        ends = {e.node for e in met}
        if ends:
            self._refuse_trained(above)
        if any(_is_python(node) and not opens(node) and not places(node) for node in above):
            return above, []
        below = _reached([n for node in ends for n in _inputs(node)], lambda node: False)
        return above, [e for e in met if e.node not in below]

    def _refuse_trained(self, nodes: set[Any]) -> None:
        for node in nodes:
            t = getattr(node, "variable", None)
            if t is None or t in self._parameters:
                continue
            if isinstance(t, nn.Parameter) or not t.dim() or t.shape[0] != self._rows:  # or it is of the batch
                raise ValueError(BESIDE.format(tuple(t.shape)))

    def _across(self, first: Gradients, outputs: list[GradientEdge]) -> bool:
        """Whether the gradients of half the records, drawn anew for each batch, move with the outputs of the others."""
        generator = torch.Generator().manual_seed(self._batches)
        half = torch.randperm(self._rows, generator=generator) < self._rows // 2

        def direction(g: Tensor) -> Tensor:
            return torch.randn(g.shape, generator=generator).to(g) * _as_rows(half, g)

        found = [h for h in _second(first, outputs, direction) if h is not None]
        largest = max((float(_finite(h).max()) for h in found), default=0.0)
        return any(float((_finite(h) * ~_as_rows(half, h)).max()) > _rtol(h, RTOL) * largest for h in found)

    def _evenly(self, first: Gradients, outputs: list[GradientEdge]) -> list[tuple[tuple[int, int], Weights]]:
        """What a loss gives to its positions, where that is the same for all: of an absolute difference the gradient
        shows it, of a squared one, which has no second derivatives across positions, its second derivative."""
        generator = torch.Generator().manual_seed(self._batches)

        def direction(g: Tensor) -> Tensor:
            return torch.randint(0, 2, g.shape, generator=generator).to(g) * 2 - 1

        found = []
        for order, derivatives in enumerate((first, _second(first, outputs, direction))):
            for at, d in enumerate(derivatives):
                if d is not None and (now := uniform(d.detach().double().abs().reshape(len(d), -1), _rtol(d, EVEN))):
                    found.append(((at, order), now))
        return found

    def _compare(self, before: list[Weights], now: Weights) -> None:
        """Tell what fits, where two earlier batches agree on it."""
        fits = [set(found) for one in before if (found := by_other_sizes(one, now, EVEN))]
        before.append(now)
        if len(fits) > 1 and (common := set.intersection(*fits)):
            self._told([name for name in ("mean", "sum", "shares") if name in common])


def _second(first: Gradients, outputs: list[GradientEdge], direction: Callable[[Tensor], Tensor]) -> Gradients:
    """The second derivatives in a direction."""
    terms = [(g * direction(g)).sum() for g in first if g is not None and g.requires_grad]
    if not terms:  # linear in all outputs
        return [None] * len(outputs)
    return torch.autograd.grad(torch.stack(terms).sum(), outputs, retain_graph=True, allow_unused=True)


def _as_rows(half: Tensor, t: Tensor) -> Tensor:
    return half.to(t.device).view(-1, *[1] * (t.dim() - 1))


def _rtol(t: Tensor, rtol: float) -> float:
    return rtol if t.dtype in (torch.float32, torch.float64) else RTOL_HALF


def _compares(nodes: set[Any], outputs: set[Any]) -> bool:
    """Whether a node that has no second derivative is a distance between all rows of these outputs."""

    def reach(node: Any) -> bool:
        return bool(_reached([node], lambda n: n in outputs) & outputs)

    return any(
        type(n).__name__ == "PdistBackward0"
        or type(n).__name__ == "CdistBackward0"
        and n._saved_x1.dim() == 2
        and all(of is not None and reach(of) for of, _ in n.next_functions)
        for n in nodes
    )


def _finite(t: Tensor) -> Tensor:
    return t.abs().nan_to_num(0.0, 0.0, 0.0)


def _shape(edge: GradientEdge) -> torch.Size:
    return torch.Size(edge.node._input_metadata[edge.output_nr].shape)


def _is_python(node: Any) -> bool:
    return isinstance(node, torch._C._FunctionBase)


def _inputs(node: Any) -> list[Any]:
    return [n for n, _ in node.next_functions if n is not None]


def _reached(roots: Iterable[Any], ends: Callable[[Any], bool]) -> set[Any]:
    """The nodes of autograd's graph from these on, without what is below those that end it."""
    seen: set[Any] = set()
    left = list(roots)
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            if not ends(node):
                left += _inputs(node)
    return seen


_lock = threading.Lock()
_waiting: "weakref.WeakSet[LoopLoss]" = weakref.WeakSet()
_plain: Callable[..., None] = torch.autograd.backward
_installed = False  # also where somebody put a function over ours meanwhile, which calls it


@functools.wraps(torch.autograd.backward)
def _backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    weights = [grad_tensors] if isinstance(grad_tensors, Tensor) else grad_tensors
    if all(isinstance(t, Tensor) for t in losses):
        with _lock:
            asked = list(_waiting)
        for one in asked:
            one.ask(losses, weights)
    _plain(tensors, grad_tensors, *args, **kwargs)
    with _lock:
        _put_back()


def _wait(one: LoopLoss) -> None:
    global _plain, _installed
    with _lock:
        if not _installed:
            _plain, torch.autograd.backward, _installed = torch.autograd.backward, _backward, True
        _waiting.add(one)


def _end(one: LoopLoss) -> None:
    with _lock:
        _waiting.discard(one)
        _put_back()


def _put_back() -> None:
    global _installed
    if not _waiting and torch.autograd.backward is _backward:
        torch.autograd.backward, _installed = _plain, False

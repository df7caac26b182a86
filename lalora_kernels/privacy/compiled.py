"""How the checks of the first batches reach into a model that ``torch.compile`` traced.

Nothing of a hook's Python is left in a compiled graph but the operators that it called. So while it is traced, the
engine's hooks put one before the model, which is given all that the model was called with, and one behind each of its
outputs in the backward; at run time these ask what the hooks ask of a model that is not compiled.
"""

import ast
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from lalora_kernels import opaque

P = ParamSpec("P")
R = TypeVar("R")
_thread = threading.local()  # ``graph``: whether it is in an operator of a graph
STRANGE = (
    "the compiled model was given a {}, which cannot be handed to the check of the first batch; pass tensors, numbers, "
    "strings and plain lists, tuples and dicts of them (a tokenizer's batch as **batch), or train without torch.compile"
)

DIFFERENTIATED = (
    "an input of the compiled model requires a gradient, and what computed it does not show in the graph; make that "
    "a part of the model that make_private is given, detach() the input, or train without torch.compile"
)
ATTRIBUTES = (
    "{}, which the compiled model's forward keeps there, ties the records of the batch together (a balance of experts, "
    "a mean over the batch's tokens), and whether the loss reads it does not show within the graph. Have the forward "
    "not keep it, make it a mean or a sum of what each record has alone, or train without torch.compile"
)


class Carried:
    """A call's arguments as what an operator takes: tensors, numbers, and in ``form`` how they were nested and named.

    The numbers stand apart, or a graph would be made anew for each (of a loss's divisor, say).
    """

    def __init__(self, args: tuple, kwargs: dict):
        self.tensors: list[Tensor] = []
        self.ints: list[int] = []
        self.floats: list[float] = []
        self.refused = ""  # why, if it is
        self.form = self._write((args, kwargs))

    def _write(self, tree: Any) -> str:
        if isinstance(tree, Tensor):
            self.tensors.append(tree)
            if tree.requires_grad:
                self.refused = DIFFERENTIATED
            return "..."
        if tree is None or type(tree) in (bool, str):
            return repr(tree)
        if isinstance(tree, int):
            self.ints.append(tree)
            return "0"
        if isinstance(tree, float):
            self.floats.append(tree)
            return "0.0"
        if type(tree) is dict:
            return "{" + "".join([f"{key!r}:{self._write(value)}," for key, value in tree.items()]) + "}"
        if type(tree) is list:
            return "[" + "".join([f"{self._write(value)}," for value in tree]) + "]"
        if type(tree) in (tuple, torch.Size):
            return "(" + "".join([f"{self._write(value)}," for value in tree]) + ")"
        self.refused = self.refused or STRANGE.format(type(tree).__name__)
        return "None"


def read(form: str, tensors: list[Tensor], ints: list[int], floats: list[float]) -> tuple[tuple, dict]:
    """(args, kwargs) of ``Carried``."""
    given = {type(...): iter(tensors), int: iter(ints), float: iter(floats)}

    def fill(tree: Any) -> Any:
        if type(tree) in given:
            return next(given[type(tree)])
        if isinstance(tree, dict):
            return {key: fill(value) for key, value in tree.items()}
        return type(tree)(map(fill, tree)) if isinstance(tree, (tuple, list)) else tree

    found: tuple[tuple, dict] = fill(ast.literal_eval(form))
    return found


class Look(torch.autograd.Function):
    """An output as it is, whose gradient is shown to ``ReductionCheck`` on the way back."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, name: str, token: Tensor, handle: int) -> Tensor:
        ctx.save_for_backward(z)
        ctx.name, ctx.token, ctx.handle = name, token, handle
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple:
        opaque.look(ctx.token, *ctx.saved_tensors, dz, ctx.name, ctx.handle)
        return dz, None, None, None


def looked(output: Any, token: Tensor, handle: int, name: str = "") -> Any:
    """The same with ``Look`` of every tensor that a loss may be made of; ``name``: as ``trees.tensors`` has it."""
    if isinstance(output, Tensor):
        shown = output.requires_grad and output.is_floating_point()
        return Look.apply(output, name, token, handle) if shown else output
    if isinstance(output, MutableMapping):
        for key in list(output.keys()):
            value = looked(output[key], token, handle, f"{name}.{key}" if name else str(key))
            if value is not output[key]:
                output[key] = value
        return output
    if isinstance(output, (tuple, list)):
        fields = getattr(output, "_fields", None)
        found = []
        for at, value in enumerate(output):
            key = f"[{at}]" if fields is None else f".{fields[at]}" if name else fields[at]
            found.append(looked(value, token, handle, name + key))
        return type(output)(found) if fields is None else type(output)(*found)
    return output


def refuse_attributes(tied: set[Any]) -> None:
    """Raise ValueError where there are attributes among what ties records together (``kept.tied_attributes``)."""
    for name, key in sorted(at for at in tied if isinstance(at, tuple)):
        raise ValueError(ATTRIBUTES.format(f"{name}.{key}" if name else key))


@contextmanager
def within_graph() -> Iterator[None]:
    """A block that runs in an operator of a graph."""
    _thread.graph = True
    try:
        yield
    finally:
        _thread.graph = False


class Forced:
    """A block in which nothing runs compiled, for all threads: torch's stance is the process's, and of two that each
    put back what they found the second would leave the first one's."""

    def __init__(self) -> None:
        self._lock, self._inside, self._stack = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._stack.enter_context(torch.compiler.set_stance("force_eager"))
                self._stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
            self._inside += 1

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stack.close()


_forced = Forced()


def eagerly(check: Callable[P, R]) -> Callable[P, R]:
    """A check of copies of the model, in which whatever is compiled of them runs as it was written: its hooks stand in
    them, and a graph for each of its few forwards would take minutes, and the places of the model's in torch's cache.
    Called within a graph it runs in a thread of its own, since autograd is off below an operator's dispatch.
    """

    @functools.wraps(check)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        asked = partial(_eager, check, *args, **kwargs)
        return _apart(asked) if getattr(_thread, "graph", False) else asked()

    return run


def _eager(check: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    @torch.compiler.disable  # or the stance is refused where a graph broke before it
    def run() -> R:
        with _forced:
            return check(*args, **kwargs)

    return run()


def _apart(run: Callable[[], R]) -> R:
    stream = torch.cuda.stream(torch.cuda.current_stream()) if torch.cuda.is_initialized() else nullcontext()
    found: list[R] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with stream:
                found.append(run())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="lalora-check")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]

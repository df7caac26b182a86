"""What stands in ``p.grad`` between backward and ``optimizer.step()``, where a private gradient does not exist yet.

With None there, ``clip_grad_norm_`` would pass over it without a word and its caller believe in a bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lalora_kernels.privacy.sites import Site

# GradScaler.step looks through p.grad for infinities; the engine does so itself, for each record.
HARMLESS = {torch._amp_foreach_non_finite_check_and_unscale_}
SKIPPED = (
    "the last batch went through the model with gradients on, but no optimizer.step() followed. To skip a batch for "
    "what is in it (a loss that is not finite, its size) is a release that the ledger does not see: call backward and "
    "step on every batch; a record whose gradient is not finite contributes nothing. Where the loop was interrupted, "
    "run it again: that batch is forgotten now"
)
UNSTEPPED = (
    "the last batch was backpropagated but not stepped; call optimizer.step() after each backward (large batches come "
    "in parts by make_private(physical_batch_size=...), not by adding up backwards). Where the loop was interrupted, "
    "run it again: that batch is forgotten now"
)
PASSED = (
    "a batch of this iteration was passed over before this one, without optimizer.step(): fetched ahead (then records "
    "would be taken for those of another batch), or skipped for what is in it. Use each batch that the loader yields "
    "before the next one is asked for, and call backward and step on it; to look at batches, or to evaluate on them, "
    "iterate the loader on its own"
)
GETTERS = {"dtype", "device", "layout", "shape", "is_sparse", "requires_grad"}


class NotYet(torch.Tensor):
    """A tensor of a parameter's shape, dtype and device without memory, of which any use raises RuntimeError."""

    name_of_parameter: str

    @staticmethod
    def __new__(cls, name: str, like: Tensor) -> NotYet:
        self: NotYet = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        self.name_of_parameter = name
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HARMLESS:
            return None
        if func.__name__ == "__get__" and func.__self__.__name__ in GETTERS:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise RuntimeError(
            f"{func.__name__} was called on a gradient between backward and optimizer.step(), where a private one does "
            f"not exist yet: step() clips each record's by make_private's max_grad_norm, and noises their sum. Leave "
            f"clip_grad_norm_ and clip_grad_value_ out (transformers' Trainer: max_grad_norm=0), and read p.grad after "
            f"the step"
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch's is of no class
        # Reached by autograd alone: it adds a gradient that did not come through the engine.
        raise RuntimeError(foreign(next(a for a in args if isinstance(a, cls)).name_of_parameter))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch's own argument changes its name
        return "<no gradient before optimizer.step()>"


def foreign(name: str) -> str:
    """The refusal of a gradient that nothing clips or noises."""
    return (
        f"{name} received a gradient that is not the engine's (a penalty on the weights, a use of the tensor outside "
        f"its module, a p.grad of your own), which nothing clips or noises. Freeze it, or call its module instead"
    )


def refuse_foreign(p: Tensor, name: str) -> None:
    """Raise RuntimeError where another gradient than a NotYet stands."""
    # None: what a private layer's own backward hands to autograd.
    if p.grad is not None and not isinstance(p.grad, NotYet):
        raise RuntimeError(foreign(name))


def refuse_gradients(sites: list[Site], between_steps: bool) -> None:
    """None again where a NotYet stands and, between steps, the last release; any other gradient is refused."""
    for s in sites:
        grad = s.param.grad
        if grad is None:
            continue
        if grad is s.not_yet or between_steps and grad is s.released:
            s.param.grad = None
        else:
            refuse_foreign(s.param, s.name)


def stand_in(sites: list[Site]) -> None:
    """Put a NotYet where a gradient is missing, once this backward is through."""

    def put() -> None:
        for s in sites:
            if s.param.grad is None and s.param.requires_grad:
                s.not_yet = NotYet(s.name, s.param) if s.not_yet is None else s.not_yet
                s.param.grad = s.not_yet

    if torch._C._current_graph_task_id() == -1:  # a CUDA graph's replay: no backward is under way
        put()
    else:
        torch.autograd.Variable._execution_engine.queue_callback(put)


def take_away(sites: list[Site]) -> None:
    """None again where a NotYet stands."""
    for s in sites:
        if s.not_yet is not None and s.param.grad is s.not_yet:
            s.param.grad = None

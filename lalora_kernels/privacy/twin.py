"""A copy of the model in float64, on which the first batch is checked."""

import copy
import functools
import pickle
import threading
from collections.abc import Callable, Iterable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lalora_kernels.nn import factor_parameters
from lalora_kernels.privacy.doubled import LOWER
from lalora_kernels.privacy.kept import attributes
from lalora_kernels.privacy.rules import RecordingForward
from lalora_kernels.privacy.trees import leaves
from lalora_kernels.quantized import dequantize_


def double(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode whose factors are not zero, so that no factor's gradient is."""
    try:
        # Activations that the last forward left on a module: their graph has no copy.
        left = [t for *_, value in attributes(model) for t in leaves(value) if t.grad_fn is not None]
        memo: dict[int, Any] = {id(t): t.detach().clone() for t in left}
        twin = copy.deepcopy(model, memo)
        rebind(model, twin, memo)
        dequantize_(twin)
        twin = twin.double().eval()
        _plain(twin)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise RuntimeError(
                "the check of the first batch works on a copy of the model in float64, 8 bytes a weight, for which "
                "there is no memory. Let it pass on a smaller model of the same family and loss (check_per_sample, on "
                "a CPU), then pass make_private check='loss' for this one"
            ) from error
        raise RuntimeError(
            f"the check of the first batch works on a copy of the model, which cannot be copied ({error}). An object "
            f"of a module's that keeps an activation should keep h.detach(); or pass make_private check=False"
        ) from error
    except (TypeError, AttributeError, NotImplementedError, copy.Error, pickle.PicklingError) as error:
        if (name := _uncopied(model)) is None:
            raise
        raise RuntimeError(
            f"the check of the first batch works on a copy of the model, and {name} cannot be copied ({error}). Make "
            f"what has no copy (a lock, a generator, an open file) where it is used, or give its module a __deepcopy__ "
            f"without it; or pass make_private check=False"
        ) from error
    for (_, m), (_, t) in zip(model.named_modules(), twin.named_modules()):
        if isinstance(m, nn.modules.batchnorm._NormBase):
            t.train(m.training)
    generator = torch.Generator().manual_seed(0)
    for _, p in factor_parameters(twin):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data.add_(0.1 * noise.to(p.device))
    for p in twin.parameters():
        if p.requires_grad and not p.any():  # a new head, behind which nothing would show
            p.data.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device))
    return twin


def _uncopied(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            try:
                if not isinstance(value, Tensor) and key != "_modules":
                    copy.deepcopy(value)
            except Exception:
                return f"{name}.{key}" if name else key
    return None


def _plain(twin: nn.Module) -> None:
    """transformers' mixtures of experts call a grouped product by default, which torch has for no float64. In eval mode
    its models keep a state for generation, RWKV's by writing over what the backward needs. Tensors that are no buffers
    are left as they are by ``double()``."""
    for module in twin.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.dtype in LOWER:
                setattr(module, name, value.double())
        config: Any = getattr(module, "config", None)  # of the copy, and it is one
        if getattr(config, "_experts_implementation", None) not in (None, "eager"):
            config._experts_implementation = "eager"
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False


def take_modes(twin: nn.Module, model: nn.Module) -> None:
    """The twin in train mode where the model is."""
    for (_, m), (_, t) in zip(model.named_modules(), twin.named_modules()):
        t.training = m.training


HOLDS = (FunctionType, MethodType, functools.partial)


def rebind(model: nn.Module, twin: nn.Module, memo: dict[int, Any]) -> None:
    """Functions are kept by deepcopy as they are, so a closure in the place of a module's forward, or a hook, would go
    on with the original that it holds; the copy gets one that holds the copy."""
    originals = {id(d) for m in model.modules() for d in _dicts(m)}  # which a __deepcopy__ may share
    for held in (d for m in twin.modules() for d in _dicts(m) if id(d) not in originals):
        for key, value in [(k, v) for k, v in held.items() if isinstance(v, HOLDS)]:
            dict.__setitem__(held, key, _rebound(value, memo))  # a config's dict may be closed to others (diffusers)


def _dicts(module: nn.Module) -> list[dict]:
    """Where a module has functions: its attributes, its hooks."""
    return [vars(module), *(d for d in vars(module).values() if isinstance(d, dict))]


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        return MethodType(_rebound(value.__func__, memo), _rebound(value.__self__, memo))
    if isinstance(value, functools.partial):
        given = {key: _rebound(v, memo) for key, v in value.keywords.items()}
        made = functools.partial(_rebound(value.func, memo), *(_rebound(v, memo) for v in value.args), **given)
        vars(made).update(vars(value))
        return made
    if isinstance(value, FunctionType) and (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
        return _rebound_function(value, memo)
    return value


def _rebound_function(f: FunctionType, memo: dict[int, Any]) -> FunctionType:
    cells = tuple(CellType() for _ in f.__closure__ or ())
    made = memo[id(f)] = FunctionType(f.__code__, f.__globals__, f.__name__, closure=cells)  # first: f may hold itself
    made.__defaults__ = f.__defaults__ and tuple(_rebound(v, memo) for v in f.__defaults__)
    made.__kwdefaults__ = f.__kwdefaults__ and {key: _rebound(v, memo) for key, v in f.__kwdefaults__.items()}
    vars(made).update({key: _rebound(v, memo) for key, v in vars(f).items()})
    for cell, old in zip(cells, f.__closure__ or ()):
        try:
            cell.cell_contents = _rebound(old.cell_contents, memo)
        except ValueError:  # nothing is in it yet
            continue
    return made


class Apart(TorchFunctionMode):
    """A block in which the model's own modules and tensors raise: what a check of the copy ran of them would be taken
    for the real batch. A function that holds the model in an object, or in a list, is not rebound."""

    def __init__(self, model: nn.Module, twin: nn.Module):
        super().__init__()
        shared = {id(t) for t in (*twin.modules(), *twin.parameters(), *twin.buffers())}  # by a __deepcopy__
        named = (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
        self._names = {id(t): n or type(model).__name__ for n, t in named if id(t) not in shared}
        self._model, self._thread = model, 0

    def __enter__(self) -> Any:
        self._thread = threading.get_ident()
        self._handle = register_module_forward_pre_hook(lambda module, _: self._refuse((module,)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._handle.remove()
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # its shape or dtype may be asked
            for a in (*args, *(kwargs or {}).values()):
                self._refuse(a if isinstance(a, (tuple, list)) else (a,))
        return func(*args, **(kwargs or {}))

    def _refuse(self, used: Iterable[Any]) -> None:
        names = [self._names[id(t)] for t in used if id(t) in self._names]
        if not names or threading.get_ident() != self._thread:  # an evaluation beside the training
            return
        replaced = [
            n or type(self._model).__name__
            for n, m in self._model.named_modules()
            if not isinstance(vars(m).get("forward"), (RecordingForward, type(None)))
        ]
        holder = f"the `forward` that was put in the place of {', '.join(replaced[:5])}'s own" if replaced else (
            "a function of its (a hook's?), or the loss, if it does not use the model that it is given,"
        )  # fmt: skip
        raise ValueError(
            f"the check runs a copy of the model, but the copy went on with the model itself ({names[0]}): {holder} "
            f"holds the original, in a closure or an object. Wrap the model in a Module that calls it instead of "
            f"replacing `forward`, or pass make_private check='loss'"
        )

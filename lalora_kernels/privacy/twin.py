"""A copy of the model in float64, on which the first batch is checked."""

import copy
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from lalora_kernels.nn import factor_parameters
from lalora_kernels.privacy.doubled import LOWER
from lalora_kernels.quantized import dequantize_


def double(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode whose factors are not zero, so that no factor's gradient is."""
    try:
        twin = copy.deepcopy(model)
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
            f"the check of the first batch works on a copy of the model, which cannot be copied ({error}). A module "
            f"that keeps an activation (self.last = h) should keep h.detach(); or pass make_private check=False"
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

"""Every public operation on what nobody would pass: the documented exceptions, and no others.

A few dozen inputs each in the suite, always the same; ``make fuzz`` draws new ones for FUZZ_MINUTES.
"""

import inspect

import numpy as np
import torch
from fuzzing import fuzz
from hypothesis import strategies as st

from lalora_kernels import functional
from lalora_kernels.dispatch import BackendError

# The reference leaves shapes that do not fit to torch, which raises RuntimeError (BackendError is one) or IndexError.
DOCUMENTED = {
    "cpp": (ValueError, TypeError, BackendError),
    "reference": (ValueError, TypeError, RuntimeError, IndexError),
}
NUMBERS = st.floats() | st.sampled_from([0.0, 1.0, -1.0, 1e-45, 3.4e38]) | st.integers(-3, 2**65)


@st.composite
def tensors(draw, *shape):
    """Of this shape, or nearly; any layout, dtype and content; rarely not on the CPU."""
    if draw(st.integers(0, 9)) == 0:
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from([torch.float32] * 6 + [torch.bfloat16, torch.float64, torch.float16, torch.int64]))
    t = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(tuple(shape)).sub(3).div(4)
    if t.numel():
        t.view(-1)[0] = draw(st.floats(width=32))
    t = t.to(dtype)
    layout = draw(st.sampled_from(["plain"] * 5 + ["transposed", "strided", "expanded", "meta", "empty"]))
    if layout == "transposed" and t.dim() > 1:
        t = t.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "strided" and t.dim():
        t = t.repeat_interleave(2, -1)[..., ::2]
    elif layout == "expanded" and t.dim() and t.shape[-1]:
        t = t[..., :1].expand(t.shape)
    elif layout == "meta":
        t = t.to("meta")
    elif layout == "empty" and t.dim():
        t = t[:0]
    return t


@st.composite
def calls(draw):
    """(operation, arguments): mostly fitting, each argument sometimes not."""
    N, T, m, n, r = (draw(st.integers(0 if k < 2 else 1, 6)) for k in range(5))

    def maybe(strategy, none=True):
        return draw(st.one_of(strategy, strategy, st.none()) if none else strategy)

    backend = draw(st.sampled_from(["cpp", "cpp", "reference"]))
    name = draw(st.sampled_from(
        ["sample_grad", "sample_grad_clip", "clip_reduce", "privatize", "smooth", "chacha20_normal"]
    ))  # fmt: skip
    if name in ("sample_grad", "sample_grad_clip"):
        args = [draw(tensors(N, T, m)), draw(tensors(m, r)), draw(NUMBERS)]
        kwargs = {"h": maybe(tensors(N, T, r)), "x": maybe(tensors(N, T, n)), "need_dz": draw(st.booleans())}
        if name == "sample_grad":
            kwargs |= {
                "G_B": maybe(tensors(N, m, r)),
                "G_A": maybe(tensors(N, r, n)),
                "accumulate": draw(st.booleans()),
            }
        else:
            kwargs |= {
                "max_norm": draw(NUMBERS), "grad_scale": draw(NUMBERS), "valid": maybe(st.integers(-2, 8)),
                "S_B": maybe(tensors(m, r)), "S_A": maybe(tensors(r, n)),
            }  # fmt: skip
    elif name in ("clip_reduce", "privatize"):
        shapes = draw(st.lists(st.lists(st.integers(0, 7), max_size=3), max_size=3))
        G = [maybe(tensors(N, *shape), name == "privatize") for shape in shapes]
        out, weights = [draw(tensors(*shape)) for shape in shapes], draw(tensors(len(shapes), N))
        if name == "clip_reduce":
            args, kwargs = [G, weights, out], {}
        else:
            S = [maybe(tensors(*shape)) for shape in shapes]
            args = [G, S, weights, out]
            small = st.integers(-3, 3)
            kwargs = {
                "noise_std": draw(NUMBERS), "key": maybe(st.binary(min_size=32, max_size=32) | st.binary(max_size=40)),
                "release": draw(st.integers(-1, 2**64)), "divisor": draw(NUMBERS),
                "tensor_index": draw(st.lists(st.integers(0, 9) | st.integers(-1, 2**32), max_size=4)),
                "smooth_dim": draw(st.lists(st.none() | small, max_size=4)),
                "padding": draw(st.sampled_from(["symmetric", "reflect", "same"])),
            }  # fmt: skip
            if draw(st.booleans()):
                kwargs |= {"tensor_index": list(range(len(shapes))), "smooth_dim": [0 if s else None for s in shapes]}
    elif name == "smooth":
        args, kwargs = (
            [draw(tensors(m, n)), draw(st.integers(-3, 3)), draw(st.sampled_from(["symmetric", "reflect"]))],
            {},
        )
    else:
        args = [draw(st.integers(-2, 40))]
        kwargs = {
            "key": draw(st.binary(min_size=32, max_size=32) | st.binary(max_size=40)),
            "release": draw(st.integers(-1, 2**64)), "tensor_index": draw(st.integers(-1, 2**32)),
            "start": draw(st.integers(-1, 2**34 + 1)),
            "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32])),
            "device": draw(st.sampled_from(["cpu", "cpu", "meta"])),
        }  # fmt: skip
    return name, args, {**kwargs, "backend": backend}


@fuzz(calls, 300)
def test_operations(case, folder):
    """A crash of the interpreter ends the test run: nothing else would be written out of bounds and live."""
    name, args, kwargs = case
    assert set(kwargs) <= set(inspect.signature(getattr(functional, name)).parameters)
    try:
        getattr(functional, name)(*args, **kwargs)
    except DOCUMENTED[kwargs["backend"]]:
        pass

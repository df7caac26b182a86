"""Weighted sums of per-sample gradients: ``privatize``'s kernel, in place, without noise and filter."""

from collections.abc import Sequence

from torch import Tensor

from lalora_kernels.segments import Release
from lalora_kernels.triton_ops.privatize import launch


def clip_reduce(G: Sequence[Tensor], weights: Tensor, out: Sequence[Tensor]) -> None:
    """See ``lalora_kernels.reference.clip_reduce``. Tensors are float32, of fewer than 2^31 elements each."""
    if not out:
        return
    L = len(out)
    release = Release("clip_reduce", G, out, weights, out, [0] * L, [None] * L)
    launch(release, 0.0, 1.0, [0] * 10, False)

"""Records that steps leave out, per layer of some tensors only, because their gradient is not finite: counted on the
device, told without waiting."""

import warnings

import torch
from torch import Tensor


class NonfiniteCount:
    """Counts stay on the device. On a GPU the warning comes with a later step, once a copy made on the way arrived."""

    def __init__(self) -> None:
        self.total: Tensor | int = 0
        self._said = 0
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None  # on its way to the host

    def add(self, bad: Tensor) -> None:
        """One physical batch's count, a tensor of no axes. Warns of what has become known."""
        self.total = self.total + bad
        if bad.device.type == "cpu":
            self._say(int(self.total))
            return
        if self._copy is not None:
            host, event = self._copy
            if not event.query():
                return
            self._say(int(host))
        host, event = self._copy or (torch.zeros((), dtype=torch.int64, pin_memory=True), torch.cuda.Event())
        host.copy_(self.total, non_blocking=True)
        event.record()
        self._copy = host, event

    def _say(self, known: int) -> None:
        if known > self._said:
            warnings.warn(
                f"{known - self._said} record(s) of this batch, or on a GPU of the last ones, had a gradient that is "
                f"NaN, Inf or beyond float32; they are left out of the step, or with clipping='per_layer' of those "
                f"tensors' sums alone whose gradient is not finite. With a GradScaler, start it at a lower scale",
                stacklevel=5,
            )
        self._said = known

"""What a model's forward writes to: its parameters, which are looked at by value (``.data`` leaves their versions as
they were), and its buffers, which are put back."""

import torch
from torch import Tensor, nn

Values = dict[str, Tensor]
RTOL = 1e-6  # a sum over three records in another order than over two


class Buffers:
    """Those of a model as it was given."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.before = [
            (m, key, b if b is None else b.clone()) for m in model.modules() for key, b in m._buffers.items()
        ]
        self.moved = False  # some were others when they were put back

    def put_back(self) -> None:
        for m, key, before in self.before:
            now = m._buffers[key]
            if before is not None and now is not None and now.shape == before.shape:
                self.moved = self.moved or not torch.equal(now, before)
                now.copy_(before)
            else:  # a table that the model makes as long as the records (ConViT), and makes again
                m._buffers[key] = before if before is None else before.clone()

    def refuse_counts(self, three: Values, two: Values, redrawn: Values) -> None:
        """Raise ValueError for a buffer that three copies of a record leave as two do not, whatever is drawn."""
        before = {f"{n}.{k}" if n else k: b for n, m in self.model.named_modules() for k, b in self._of(m)}
        for name, value in three.items():
            start, other = before.get(name), two.get(name, value)
            if start is None or not start.shape == value.shape == other.shape:
                continue  # as long as the batch, not a count
            if _moves_alike(value, other, start) or not _moves_alike(value, redrawn.get(name, value), start):
                continue
            raise ValueError(
                f"the buffer {name} counts the records of a batch, which nothing clips or noises, and one more or less "
                f"shows in it; count forwards instead, or keep its module in eval mode"
            )

    def _of(self, module: nn.Module) -> list[tuple[str, Tensor | None]]:
        return [(key, b) for m, key, b in self.before if m is module]


def _moves_alike(some: Tensor, other: Tensor, start: Tensor) -> bool:
    """By how far they moved: a large count hides one record in its rounding."""
    if not some.is_floating_point():
        return torch.equal(some, other)
    first, second = some - start, other - start
    return not ((first - second).abs() > RTOL * first.abs().maximum(second.abs())).any()


class Parameters:
    """Those of a model as it was given."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.before = {name: (p._version, _sums(p)) for name, p in model.named_parameters()}

    def refuse_written(self) -> None:
        """Raise ValueError that names one whose value, version or place has changed since."""
        now = dict(self.model.named_parameters())
        for name, (version, sums) in self.before.items():
            p = now.pop(name, None)
            if p is None or p._version != version or not _equal(sums, _sums(p)):
                _refuse(name)
        for name in now:
            _refuse(name)


def _refuse(name: str) -> None:
    raise ValueError(f"the model's forward writes to {name}, which nothing clips or noises; keep it fixed")


def _sums(p: Tensor) -> list[Tensor]:
    """What a write to p changes, in the memory of its rows and columns: a copy of every weight may not fit beside it.

    Sums of the bits as integers, which neither round nor overflow; along both axes, or rows that move would not show.
    """
    p = p.detach()
    if p.dim() < 2 or p.dtype != torch.float64:
        return [p.clone()]
    bits = p.view(torch.int64).flatten(1)
    return [bits.sum(0), bits.sum(1)]


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others))

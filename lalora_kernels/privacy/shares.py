"""What a loss gives to each position of a batch, told from logits and their gradient (see reduction.py)."""

from typing import NamedTuple

import torch
from torch import Tensor

CERTAIN = 0.999  # from here on a gradient may be lost to rounding
SMALL = 1 << 16  # entries of a gradient that is looked at in full, or in every batch
RTOL_HALF = 2e-2  # one rounding of the gradient to 8 bits
STEADY = 2e-5  # between what the shares of two batches add up to in float32, which was 1.2e-5 off at most


def class_axis(z: Tensor, dz: Tensor) -> int | None:
    """Along which a cross-entropy's gradient adds up to zero: the last or the second axis; None where none does."""
    total = dz.abs().sum()
    for axis in (z.dim() - 1, 1):
        if dz.sum(axis).abs().sum() <= RTOL_HALF * total:
            return axis
    return None


def lengths(dz: Tensor, axis: int) -> Tensor:
    """Positions of each record that a gradient (N, ...) with its classes along ``axis`` reaches, (N,)."""
    return (dz != 0).any(axis).flatten(1).sum(1)


def without_gradient(z: Tensor, dz: Tensor) -> Tensor:
    """Which of the N records of outputs z (N, ...) have none though a loss of theirs would have one, (N,) bool."""
    found = (dz == 0).reshape(len(z), -1).all(1)
    axis = class_axis(z, dz) if z.dim() > 1 and found.any() else None
    for i in found.nonzero().flatten().tolist():  # one after the other: a vocabulary is long
        p = torch.sigmoid(z[i].abs()) if axis is None else z[i].softmax(axis - 1).amax(axis - 1)
        found[i] = bool((p <= CERTAIN).any())
    return found


def reductions_of(z: Tensor, dz: Tensor, rtol: float = 1e-3) -> list[str]:
    """What a loss with gradient dz may take over the N records of logits z (N, ...): "mean", "sum", "shares" that
    differ. A mean over records of their sums and a sum of their means are one where each has N positions.

    Empty where dz is not that of a cross-entropy (classes along the last or the second axis) or a logistic loss.
    """
    N = len(z)
    k, certain = _weights(z, dz, rtol)
    if k is None or not k.any():
        return []

    def near(t: Tensor, value: float) -> bool:
        return bool(((t - value).abs() <= rtol * value).all())

    records, positions = k.sum(1), k[k != 0]
    values = {"mean": 1 / N, "sum": 1.0}
    fits = [name for name, v in values.items() if near(records[records != 0], v) or near(positions, v)]
    return fits or (["shares"] if certain and near(records.sum(), 1.0) else [])


def coarse(dz: Tensor, rtol: float) -> bool:
    """Whether some of a gradient is so small that its dtype keeps no digits of it."""
    info, size = torch.finfo(dz.dtype), dz.abs()
    return bool(((size > 0) & (size < info.tiny * info.eps / rtol)).any())


class Shares(NamedTuple):
    """What shows of k, by which one batch's loss weighs its positions, where they may be divided by a count."""

    total: float
    largest: float
    records: int
    even: bool  # all positions, or all records, have as much
    certain: bool  # it could hardly be another loss's


def renormalized(seen: list[Shares], rtol: float) -> bool:
    """Whether all k add up to one number while the largest follows the batch, as a weight does that is divided by the
    sum of all: what a record or class has for itself it has in every batch, or an N-th of it. Weights of their own that
    hardly differ add up to nearly one number."""
    known = STEADY if rtol < RTOL_HALF else rtol
    totals = [s.total for s in seen]
    tops = ([s.largest for s in seen], [s.largest * s.records for s in seen])
    steady = max(totals) - min(totals) <= known * max(totals)
    return steady and all(max(top) - min(top) > 2 * known * max(top) for top in tops)


def shares_of(z: Tensor, dz: Tensor, rtol: float) -> Shares | None:
    """Of logits z (N, ...) and their gradient; None for a mean, and where nothing shows."""
    k, certain = _weights(z, dz, rtol)
    if k is None or not k.any():
        return None
    axis = class_axis(z, dz) if z.dim() > 1 else None
    p = torch.sigmoid(z.abs()) if axis is None else z.float().softmax(axis).amax(axis)
    zero = dz == 0 if axis is None else (dz == 0).all(axis)
    units = [t[t != 0] for t in (k.sum(1), k)]
    if (zero & (p > CERTAIN)).any() or any(((t * len(z) - 1).abs() <= 2 * rtol).all() for t in units):
        return None  # what is lost, or is no share
    even = any(bool(t.max() - t.min() <= 2 * rtol * t.max()) for t in units)
    return Shares(float(k.sum()), float(k.max()), len(z), even, certain)


Weights = dict[str, tuple[float, int, int]]


def uniform_weights(z: Tensor, dz: Tensor, rtol: float) -> Weights:
    """``uniform`` of what a cross-entropy or a logistic loss gives to each position; empty for another loss."""
    k, _ = _weights(z, dz, rtol)
    return {} if k is None else uniform(k, rtol)


def uniform(k: Tensor, rtol: float) -> Weights:
    """{"position" or "record": (k, N, how many)} where each position, or each record in all, of k (N, positions) has
    the same, but for those that have none."""
    found = {}
    for unit, each in (("position", k), ("record", k.sum(1))):
        live = each[each != 0]
        if len(live) > 1 and live.max() - live.min() <= rtol * live.max():
            found[unit] = (float(live.mean()), len(k), len(live))
    return found


def by_other_sizes(before: Weights, now: Weights, rtol: float) -> list[str]:
    """What a loss takes over its records that gave these in two batches: those of "mean", "sum", "shares" that the
    batches tell apart."""
    fits = set()
    for (k, N, count), (l, M, others) in ((now[u], before[u]) for u in now if u in before):
        for name, a, b, told in (
            ("sum", k, l, N != M),
            ("mean", k * N, l * M, N != M),
            ("shares", k * count, l * others, count != others),
        ):
            if told and abs(a - b) <= 2 * rtol * abs(b):
                fits.add(name)
                break
    return [name for name in ("mean", "sum", "shares") if name in fits]


def _weights(z: Tensor, dz: Tensor, rtol: float) -> tuple[Tensor | None, bool]:
    """k (N, positions) float64, zero where a position is ignored, and whether it could hardly be another loss's."""
    for axis in dict.fromkeys((z.dim() - 1, 1)):
        if axis and z.dim() > axis and z.shape[axis] > 1:
            classes = z.shape[axis]
            size = len(z) if z.numel() <= SMALL else 1  # one record after the other: a vocabulary is long
            parts = zip(z.split(size), dz.split(size))
            rows = [tuple(t.movedim(axis, -1).reshape(-1, classes) for t in pair) for pair in parts]
            found = [_softmax_weights(a.double(), d.double(), rtol) for a, d in rows]
            if any(k is None for k in found) and classes > 3:  # a line through two points fits any
                _, u = max(_smoothing(a.double(), d.double()) for a, d in rows)
                found = [_smoothed_weights(a.double(), d.double(), u, rtol) for a, d in rows]
            if all(k is not None for k in found):
                return torch.cat([k for k in found if k is not None]).view(len(z), -1), classes > 2
    z, dz = z.reshape(len(z), -1).double(), dz.reshape(len(z), -1).double()
    k = torch.where(dz < 0, -dz / torch.sigmoid(-z), dz / torch.sigmoid(z))
    live = k[dz != 0]
    if len(live) > 1 and live.isfinite().all() and live.max() <= (1 + rtol) * live.min():
        return torch.where(dz != 0, k, 0.0), True
    return None, False


def _softmax_weights(z: Tensor, dz: Tensor, rtol: float) -> Tensor | None:
    """k (P,) of z, dz (P, classes), or None where dz is not k (softmax(z) - one class)."""
    target = dz.argmin(1, keepdim=True)
    p, d = z.softmax(1).scatter(1, target, 0.0), dz.scatter(1, target, 0.0)
    k = d.sum(1) / p.sum(1)
    fits = (d - k.unsqueeze(1) * p).abs().amax(1) <= rtol * k * p.amax(1)
    # At the target softmax is near 1, and what is left of it after subtracting 1 has lost digits.
    fits &= (dz.gather(1, target).squeeze(1) + k * p.sum(1)).abs() <= k * (rtol * p.sum(1) + rtol**2)
    live = dz.abs().amax(1) > 0
    return torch.where(live, k, 0.0) if bool((fits & k.isfinite() | ~live).all()) else None


def _smoothing(z: Tensor, dz: Tensor) -> tuple[float, float]:
    """(spread, u) of the position that shows it best: with smoothed labels dz = k (softmax(z) - u) off the target."""
    p = z.softmax(1)
    either = torch.cat([dz.argmin(1, keepdim=True), p.argmax(1, keepdim=True)], 1)  # the target is one of the two
    high, low = (t.scatter(1, either, v).argmax(1, keepdim=True) for t, v in ((p, -1.0), (-p, -2.0)))
    spread = (p.gather(1, high) - p.gather(1, low)) * (dz.abs().amax(1, keepdim=True) > 0)
    at = int(spread.argmax())
    k = (dz.gather(1, high) - dz.gather(1, low))[at] / spread[at]
    return float(spread[at]), float(p.gather(1, high)[at] - dz.gather(1, high)[at] / k)


def _smoothed_weights(z: Tensor, dz: Tensor, u: float, rtol: float) -> Tensor | None:
    """As ``_softmax_weights``, for labels smoothed by u = smoothing / classes."""
    p, rest = z.softmax(1), 1.0 - z.shape[1] * u
    if not (0.0 < u and 0.0 < rest):
        return None
    live = dz.abs().amax(1) > 0
    best = torch.zeros_like(dz[:, 0])
    fits = ~live
    for target in (dz.argmin(1, keepdim=True), p.argmax(1, keepdim=True)):  # the second where it is almost certain
        line = (p - u).scatter(1, target, 0.0)
        k = dz.scatter(1, target, 0.0).abs().sum(1) / line.abs().sum(1)
        expected = k.unsqueeze(1) * (p - u).scatter_add(1, target, torch.full_like(p[:, :1], -rest))
        good = live & ((dz - expected).abs().amax(1) <= rtol * k)
        best, fits = torch.where(good, k, best), fits | good
    return best if bool(fits.all()) else None

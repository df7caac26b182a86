"""The table by which one launch serves every tensor of a release, for the Triton and the CUDA kernels.

One row of int64 a tensor: where G, S and out lie and how they are seen. It is built when a set of tensors is first
seen, copied to their device and kept, so that a step moves nothing but its weights. A table belongs to the stream that
copied it: another could read it before the copy, or after its memory has become somebody else's.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of a row; csrc/cuda/segments.cuh and triton_ops/privatize.py read them by these numbers.
G, G_STRIDE, S, OUT, NUMEL, LENGTH, INNER, HALO, FIRST_TILE, TENSOR_INDEX, SMOOTH = range(11)
FIELDS = 12
KEPT = 32  # tables; a run alternates between a handful
MAX_TILE = 16384
MAX_LENGTH = 1 << 28  # of a filtered axis: the padding's index, five lengths at most, has 32 bits


@dataclass(frozen=True)
class Table:
    rows: Tensor  # (L, FIELDS) int64, on the device
    tiles: Tensor  # (tiles,) int32: the row that each tile belongs to
    tile: int  # elements that one tile reads, its two halos included
    aligned: bool  # every pointer, stride and size is a multiple of 16 bytes
    smooth: bool  # some row is filtered


_tables: OrderedDict[tuple[int, tuple], Table] = OrderedDict()  # by stream and tensors
_captured: dict[tuple, Table] = {}  # by tensors; kept for good, as a CUDA graph knows only their addresses
_lock = threading.Lock()


def lines(op: str, l: int, t: Tensor, dim: int | None) -> tuple[int, int]:
    """(length, inner) of a contiguous tensor that is filtered along ``dim``; (1, 1) where it is not."""
    if dim is None:
        return 1, 1
    if not -t.dim() <= dim < t.dim():
        raise ValueError(f"{op}: smooth_dim[{l}] = {dim} is no axis of a tensor of shape {tuple(t.shape)}")
    dim %= t.dim()
    return t.shape[dim], t.shape[dim + 1 :].numel()


def _build(op: str, rows: Sequence[tuple], smallest_tile: int, device: torch.device) -> Table:
    halos = [-(-2 * row[6] // 4) * 4 if row[8] else 0 for row in rows]
    tile = smallest_tile
    while tile < (16 if tile < 4096 else 4) * max(halos) and tile < MAX_TILE:
        tile *= 2
    if tile < 4 * max(halos):
        raise ValueError(f"{op}: a filtered tensor of rank {max(r[6] for r in rows)}; the kernels take {MAX_TILE // 8}")
    owner: list[int] = []
    table, aligned = [], True
    for l, ((g, g_stride, s, out, numel, length, inner, index, smooth), halo) in enumerate(zip(rows, halos)):
        if numel >= 1 << 31:
            raise ValueError(f"{op}: out[{l}] has {numel} elements; a tensor of one release has fewer than 2^31")
        if smooth and length > MAX_LENGTH:
            raise ValueError(f"{op}: out[{l}] is filtered along an axis of {length} features; the kernels take 2^28")
        table.append([g, g_stride, s, out, numel, length, inner, halo, len(owner), index, int(smooth), 0])
        owner += [l] * -(-numel // (tile - 2 * halo))
        aligned &= not any(address % 16 for address in (g, s, out)) and not (g_stride % 4 or numel % 4)
    places, tiles = torch.tensor(table, dtype=torch.int64).view(-1, FIELDS), torch.tensor(owner, dtype=torch.int32)
    if device.type == "cuda":
        places, tiles = (t.pin_memory().to(device, non_blocking=True) for t in (places, tiles))
    return Table(places, tiles, tile=tile, aligned=aligned, smooth=any(halos))


def table(op: str, rows: Sequence[tuple], smallest_tile: int, device: torch.device) -> Table:
    """The table of ``rows``: (G, G_stride, S, out, numel, length, inner, tensor_index, smooth), addresses integers.

    ``device`` is the CPU, or the current one with its number.
    """
    seen, stream = (tuple(rows), smallest_tile, device), 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _of_capture(op, seen)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    key = stream, seen
    with _lock:
        found = _tables.get(key)
        if found is None:
            found = _tables[key] = _build(op, rows, smallest_tile, device)
            if len(_tables) > KEPT:
                _tables.popitem(last=False)
        _tables.move_to_end(key)
        return found


def _of_capture(op: str, seen: tuple) -> Table:
    """A table that some stream copied before: nothing is copied in a capture, as each replay would copy it again, from
    memory long freed. A replay comes after the run that had it copied, whose results it overwrites."""
    with _lock:
        found = _captured.get(seen) or next((t for (_, other), t in _tables.items() if other == seen), None)
        if found is None:
            raise RuntimeError(f"{op}: tensors not seen before while a CUDA graph is captured; run the step once first")
        _captured[seen] = found
        return found


class Release:
    """Checked tensors of one ``privatize`` or ``clip_reduce`` on one device, contiguous where they have to be."""

    def __init__(
        self,
        op: str,
        G: Sequence[Tensor | None],
        S: Sequence[Tensor | None],
        weights: Tensor | None,
        out: Sequence[Tensor],
        tensor_index: Sequence[int],
        smooth_dim: Sequence[int | None],
    ):
        L = len(out)
        for name, given in (("G", G), ("S", S), ("tensor_index", tensor_index), ("smooth_dim", smooth_dim)):
            if len(given) != L:
                raise ValueError(f"{op}: {len(given)} entries in {name} for {L} tensors in out")
        self.op, self.device, self.N = op, out[0].device, 0
        self.weights = out[0]  # an address for kernels that will not read it
        self.strides = (0, 0)
        if any(g is not None for g in G):
            if weights is None or weights.dim() != 2 or weights.shape[0] != L:
                raise ValueError(f"{op}: weights must have shape ({L}, N)")
            if weights.device != self.device:
                raise ValueError(f"{op}: weights are on {weights.device}, expected {self.device}")
            self.weights, self.N = weights.to(torch.float32), weights.shape[1]
            self.strides = self.weights.stride(0), self.weights.stride(1)
        self.rows: list[tuple] = []
        self._keep: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        for l in range(L):
            self._add(l, G[l], S[l], out[l], tensor_index[l], smooth_dim[l])

    def _fits(self, t: Tensor, shape: Sequence[int]) -> bool:
        return t.device == self.device and t.dtype == torch.float32 and t.shape == shape

    def _check(self, name: str, t: Tensor, shape: Sequence[int]) -> None:
        if t.device != self.device:
            raise ValueError(f"{self.op}: {name} is on {t.device}, expected {self.device}")
        if t.dtype != torch.float32:
            raise TypeError(f"{self.op}: {name} is {t.dtype}, expected torch.float32")
        if t.shape != tuple(shape):
            raise ValueError(f"{self.op}: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}")

    def _add(self, l: int, g: Tensor | None, s: Tensor | None, o: Tensor, index: int, dim: int | None) -> None:
        shape = o.shape
        if not self._fits(o, shape):
            self._check(f"out[{l}]", o, shape)
        target = o
        if not o.is_contiguous():
            target = o.contiguous()
            self._copies.append((o, target))
        if g is not None:
            if not self._fits(g, (self.N, *shape)):
                self._check(f"G[{l}]", g, (self.N, *shape))
            if not g.is_contiguous() and not (self.N and g[0].is_contiguous()):
                g = self._hold(g.contiguous())
        if s is o:
            s = target
        if s is not None:
            if not self._fits(s, shape):
                self._check(f"S[{l}]", s, shape)
            if not s.is_contiguous() or (dim is not None and s.data_ptr() == target.data_ptr()):
                s = self._hold(s.clone(memory_format=torch.contiguous_format))  # the filter reads what others write
        length, inner = lines(self.op, l, o, dim)
        self.rows.append(
            (
                0 if g is None else g.data_ptr(),
                0 if g is None or self.N < 2 else g.stride(0),
                0 if s is None else s.data_ptr(),
                target.data_ptr(),
                o.numel(),
                length,
                inner,
                index,
                dim is not None,
            )
        )

    def _hold(self, t: Tensor) -> Tensor:
        self._keep.append(t)
        return t

    def table(self, smallest_tile: int) -> Table:
        return table(self.op, self.rows, smallest_tile, self.device)

    def finish(self) -> None:
        """Copy back what a strided ``out`` was written to."""
        for o, target in self._copies:
            o.copy_(target)

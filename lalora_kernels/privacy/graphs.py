"""A private step's forward and backward as a CUDA graph.

What changes from step to step stays outside: the clip factors, the release, whose noise takes a new number each time,
and the optimizer with its learning rate. ``optimizer.step()`` is called as ever, and launches its few kernels itself.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lalora_kernels.privacy.engine import Engine
from lalora_kernels.privacy.noise import refuse_known_seed
from lalora_kernels.privacy.recorders import Recorder
from lalora_kernels.privacy.sites import Site

WARM_UP = 3


class Graph(NamedTuple):
    """What a replay writes, and what the engine would have noted of an ordinary backward."""

    replay: Callable[[], None]
    batch: list[Tensor]  # where the next batch is copied to
    gradients: list[tuple[Site, Tensor | None, Tensor | None]]  # of marked sites, and their squared norms
    pairs: list[tuple[Recorder, list]]
    forwarded: bool  # the model itself was called


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device, which share a pool of memory. torch's own is on whichever was current first."""
    return torch.cuda.Stream(device)


def record(backward: Callable[[], None], pool: Any, device: torch.device) -> tuple[Callable[[], None], Any]:
    """``backward`` captured on ``device``, whatever the current one; (replay, memory pool)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, stream=capture_stream(device)):
        backward()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, graph.pool()


def warm_up(backward: Callable[[], None], device: torch.device) -> None:
    """Run on another stream, as capture demands of what it captures."""
    side, current = capture_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        backward()
    current.wait_stream(side)


class GraphedBackward:
    """``backward(*batch)`` captured once for each set of active tensors, then replayed. Made by ``optimizer.graph``.

    ``rows``: the batch size of the graph, usually the loader's ``physical_batch_size``. Smaller batches are filled up
    with zeros, which contribute nothing; the results are those of the ordinary backward. ``batch``: tensors with a row
    for each record. The loss is not returned. A model of other modules, or in the other mode, is captured anew; what
    else Python decides (autocast, a scaler, a dropout rate) must be the same at every call.

    Raises ValueError for clipping="per_layer", which clips inside backward with numbers that change, and for a batch of
    more than ``rows``; RuntimeError outside a batch of the private loader.
    """

    def __init__(self, engine: Engine, backward: Callable[..., None], rows: int):
        if engine.clipping == "per_layer":
            raise ValueError("clipping='per_layer' clips inside backward, which a graph cannot hold; use 'flat'")
        if type(rows) is not int or rows < 1:
            raise ValueError(f"rows is a whole number >= 1, got {rows!r}")
        self.engine, self.backward, self.rows = engine, backward, rows
        self._graphs: dict[tuple, Graph] = {}
        self._looks = engine.structure.looks
        self._pool: Any = None

    def __call__(self, *batch: Tensor) -> None:
        e = self.engine
        if e.batch is None:
            raise RuntimeError("backward outside a batch of the private loader; iterate the loader of make_private")
        if e.batch.seeded:
            refuse_known_seed()  # a replay calls no forward
        if e.batch.rows > self.rows:
            raise ValueError(
                f"a batch of {e.batch.rows} records for a graph of {self.rows} rows; pass make_private "
                f"physical_batch_size={self.rows}"
            )
        if wrong := [tuple(t.shape) for t in batch if not t.dim() or t.shape[0] != e.batch.rows]:
            raise ValueError(f"tensors of shapes {wrong} in a batch of {e.batch.rows} records")
        if e.model_check is not None and (e.model_check.pending or e.reduction.looks):  # these checks read values
            self.backward(*batch)
            return
        if self._looks != e.structure.looks:  # other modules than were captured
            self._graphs.clear()
            self._looks = e.structure.looks
        e.pad(self.rows)
        filled = [torch.cat((t, t.new_zeros(self.rows - len(t), *t.shape[1:]))) for t in batch]
        places = tuple(s.param.data_ptr() for s in e.sites)
        active, mode = tuple(s.index for s in e.active), e.model.training
        key = (active, places, mode, *((t.shape, t.dtype, t.device) for t in filled))
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._capture(filled)
        for place, t in zip(graph.batch, filled, strict=True):
            place.copy_(t)
        graph.replay()
        e.forwarded = graph.forwarded
        for site, G, sq in graph.gradients:
            e.mark(site)
            site.G, site.sq = G, sq
        for recorder, pairs in graph.pairs:
            recorder.pairs = pairs

    def _capture(self, batch: list[Tensor]) -> Graph:
        e = self.engine
        devices = {s.param.device for s in e.sites}
        if len(devices) > 1:
            raise ValueError(
                f"optimizer.graph() takes a model on one device, and this one's trained tensors are on "
                f"{', '.join(sorted(map(str, devices)))}; move them to one, or call the backward itself"
            )
        (device,) = devices
        for _ in range(WARM_UP):
            warm_up(lambda: self.backward(*batch), device)
            e.clear_batch()
        batch = [t.clone() for t in batch]
        e.graphing = True
        try:
            replay, self._pool = record(lambda: self.backward(*batch), self._pool, device)
        finally:
            e.graphing = False
        marked = [(s, s.G, s.sq) for s in e.active if s.marked]
        pairs = [(r, r.pairs) for r in e.recorders if getattr(r, "pairs", None)]
        graph = Graph(replay, batch, marked, pairs, e.forwarded)
        e.clear_batch()
        return graph

"""The flat buffers that a private step keeps from step to step, and the places of its tensors in them."""

import torch
from torch import Tensor

from lalora_kernels.privacy.sites import Site


class Workspace(dict[str, Tensor]):
    """The buffers by kind: "G" per-sample gradients, "S" running sums, "grad" what is released."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[tuple, list[Tensor]] = {}
        self._most_rows = 1

    def clear(self) -> None:
        """Free the memory."""
        super().clear()
        self._places.clear()

    def flat(self, kind: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of ``count`` elements at least; it grows and never shrinks."""
        have = self.get(kind)
        if have is None or have.numel() < count or have.device != device:
            self._places = {key: places for key, places in self._places.items() if key[0] != kind}
            have = self[kind] = torch.empty(count, dtype=dtype, device=device)
        return have

    def carve(self, kind: str, sites: list[Site], rows: int | None, dtype: torch.dtype) -> list[Tensor]:
        """A place in buffer ``kind`` for each site: its shape, after an axis of ``rows`` where that is not None.

        Laid out for the largest batch so far: addresses, of which the kernels keep tables, are the same for any.
        """
        if not sites:
            return []
        if rows is not None and rows > self._most_rows:
            self._most_rows, self._places = rows, {}
        most = 1 if rows is None else self._most_rows
        shapes = tuple(s.param.shape for s in sites)
        sizes = [most * shape.numel() for shape in shapes]
        flat = self.flat(kind, sum(sizes), dtype, sites[0].param.device)
        # Places follow from the buffer, the most rows and the shapes: they are forgotten with the former two, and found
        # by the last.
        places = self._places.get((kind, shapes))
        if places is None:
            parts = flat[: sum(sizes)].split(sizes)
            lead = () if rows is None else (most,)
            places = self._places[kind, shapes] = [part.view(*lead, *shape) for part, shape in zip(parts, shapes)]
        if kind == "grad":  # a tensor that is the user's, to keep or to change, each time
            return [place.detach() for place in places]
        return places if rows is None or rows == most else [place[:rows] for place in places]

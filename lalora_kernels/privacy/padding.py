"""Does what the model makes of a record depend on how far its batch pads it? Asked where batches differ in length.

A batch that is padded to its longest record ties the others to that one in every model that takes padding for content:
a convolution over tokens, a mean over all positions, absolute positions counted from padding on the left. The two
records of the first batch's check are padded alike, so nothing of it shows there.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lalora_kernels.privacy.compiled import eagerly
from lalora_kernels.privacy.drawn import Drawn
from lalora_kernels.privacy.still import Stilled
from lalora_kernels.privacy.trees import fresh, leaves, tree_map
from lalora_kernels.privacy.twin import double

# Float64, but for models that turn positions in float32 (rotary embeddings); what padding moves, it moves by more.
RTOL = 1e-4
TRIES = 4  # batches: a convolution reaches from the padding into short records alone
LOOKS = 64  # batches that are looked through for a padded record, for which a GPU's host has to wait
MASK = "attention_mask"


class PaddingCheck:
    """Called with a forward's arguments; once batches differ in length it asks ``refuse_padding`` of a few."""

    def __init__(self) -> None:
        self.left, self.looks = TRIES, LOOKS
        self._length: int | None = None
        self._differ = False

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get(MASK)
        if not (self.left and self.looks) or not isinstance(mask, Tensor) or mask.dim() != 2:
            return
        before, self._length = self._length, mask.shape[1]
        self._differ = self._differ or before not in (None, self._length)
        if self._differ:
            refuse_neftune(model)
            self.looks -= 1
            self.left -= refuse_padding(model, args, kwargs)


def refuse_neftune(model: nn.Module) -> None:
    """Raise ValueError for a model in train mode to whose embeddings transformers or TRL adds NEFTune's noise."""
    for name, module in model.named_modules():
        if module.training and getattr(module, "neftune_noise_alpha", None):
            raise ValueError(
                f"NEFTune adds noise to {name} that is the smaller the longer the batch's longest record is, which "
                f"clipping cannot bound. Leave neftune_noise_alpha out, or pad every record to one length "
                f"(padding='max_length')"
            )


@eagerly
def refuse_padding(model: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Raise ValueError where the output for the most padded record changes when its padding is cut away, in eval mode.

    ``kwargs`` holds an ``attention_mask`` (N,T), 0 where a record is padded; whatever else has N rows and T columns is
    cut alike. Returns whether there was such a record; a model that does not take a shorter one is not judged.
    """
    mask = kwargs[MASK].detach() != 0
    rows, length = mask.shape
    counts = mask.sum(1)
    record = int(torch.where(counts > 0, counts, length).argmin())
    held = mask[record].nonzero().flatten()
    start, end = int(held[0]) if len(held) else 0, int(held[-1]) + 1 if len(held) else length
    if end - start == length:
        return False

    def alone(t: Tensor) -> Tensor:
        t = t[record : record + 1] if t.dim() and t.shape[0] == rows else t
        return t.double() if t.is_floating_point() else t

    def cut(t: Tensor) -> Tensor:
        return t[:, start:end] if t.dim() > 1 and t.shape[1] == length else t

    padded = tree_map(alone, (args, kwargs))
    twin = double(model)

    def run(inputs: tuple, change: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
        given = tree_map(lambda t: fresh(change(t)), inputs)  # which a model may change in place
        return leaves(twin(*given[0], **given[1]))

    with torch.no_grad(), Drawn(twin, None) as drawn:
        whole = run(padded)
    with torch.no_grad(), Stilled() if drawn.any else nullcontext():
        whole = run(padded) if drawn.any else whole
        try:
            bare = run(padded, cut)
        except Exception:  # of a length that is no multiple of its windows, say
            return True
    for a, b in zip(whole, bare):
        if not a.dim() or not a.is_floating_point():
            continue
        a = cut(a) if a.shape != b.shape else a
        if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
            continue
        if (a - b).abs().max() > RTOL * b.abs().max() + 1e-12:
            raise ValueError(
                "what the model makes of a record changes when the padding of its batch is cut away, so it depends on "
                "the batch's longest record, which clipping cannot bound. Pad every record to one length "
                "(padding='max_length'), or on the side and with the position_ids that the model needs"
            )
    return True

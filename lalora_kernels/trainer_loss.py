"""Losses of transformers' models, taken record by record.

transformers takes the mean over all tokens of a batch, by which a record's gradient depends on how long the others are;
no clipping bounds what one record changes then. Here a record's loss is the mean over its own positions, which is what
transformers computes for that record alone, and a batch's loss the mean of its records' losses.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # transformers' label of positions that do not count
RTOL, RTOL_HALF = 1e-3, 1e-2  # two ways to one number, and in half precision
TRIES = 8  # records of a batch by which two losses are told apart


def record_losses(logits: Tensor, labels: Tensor, *, shift: bool, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each record, (N,): logits (N,K) with labels (N,), or (N,T,K) with (N,T).

    ``shift``: position t predicts label t + 1 (causal models). Labels of -100 do not count; a record's loss is the mean
    over those that do, 0 without any. ``label_smoothing`` is torch's. Raises ValueError for other shapes.
    """
    if labels.dim() not in (1, 2) or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)} are no classification of "
            f"records, (N, K) for (N,), or of positions, (N, T, K) for (N, T): classes go last. For another loss take "
            f"each record's own and their mean (PrivateTrainer: compute_loss_func=...; if it is the model's, as CTC's "
            f"with config.ctc_loss_reduction='mean', have a Module around the model take the labels by another name, "
            f"and give compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs['loss'])"
        )
    if shift and labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    each = F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten().to(logits.device),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    ).view(len(labels), -1)
    counts = (labels != IGNORED).view(len(labels), -1).sum(1)
    return each.sum(1) / counts.clamp(min=1)


def logits_of(outputs: Any) -> Tensor:
    """The logits of a model's outputs. Raises ValueError where they are not named."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not isinstance(logits, Tensor):
        raise ValueError(
            "the model's outputs have no 'logits', from which PrivateTrainer takes each record's own loss; pass "
            "compute_loss_func=..., the mean over records of each record's own loss"
        )
    return logits


def is_own(labels: Tensor, logits: Tensor) -> bool:
    """Whether the model's own loss is a mean over records already: of regression and multi-label targets it is."""
    return labels.is_floating_point() or (labels.dim() == 1 and logits.shape[-1] == 1)


def find_shift(model: nn.Module, batch: Mapping[str, Any]) -> bool | None:
    """Whether the model's own loss of single records is ``record_losses`` with labels shifted (causal models) or
    without; False where ``is_own``, None where these records do not tell. ``batch`` has "labels"; the model is called
    as it is. Raises ValueError where it is neither."""
    labels = batch["labels"]
    for i in range(min(len(labels), TRIES)):
        record = {k: v[i : i + 1] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}
        outputs = model(**record)
        logits, own = logits_of(outputs), outputs.get("loss")
        if own is not None and is_own(labels, logits):
            return False
        if own is not None and not own.isfinite():
            continue  # a record without a label that counts
        ours = [float(record_losses(logits, record["labels"], shift=shift)) for shift in (False, True)]
        rtol = RTOL_HALF if own is not None and own.dtype.itemsize < 4 else RTOL
        fits = [own is not None and abs(x - float(own)) <= rtol * abs(float(own)) + 1e-6 for x in ours]
        if not any(fits):
            raise ValueError(
                f"the model's own loss of one record is {own} and the cross-entropy of its logits {ours[0]:.6g} "
                f"({ours[1]:.6g} with labels shifted), so it computes something else; pass compute_loss_func=..., the "
                f"mean over records of each record's own loss"
            )
        if labels.dim() == 1 or fits[0] != fits[1]:
            return fits[1]
    return None

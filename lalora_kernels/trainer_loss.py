"""Losses of transformers' models, taken record by record.

transformers takes the mean over all tokens of a batch, by which a record's gradient depends on how long the others are;
no clipping bounds what one record changes then. Here a record's loss is the mean over its own positions, which is what
transformers computes for that record alone, and a batch's loss the mean of its records' losses.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # transformers' label of positions that do not count


def record_losses(logits: Tensor, labels: Tensor, *, shift: bool, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each record, (N,): logits (N,K) with labels (N,), or (N,T,K) with (N,T).

    ``shift``: position t predicts label t + 1 (causal models). Labels of -100 do not count; a record's loss is the mean
    over those that do, 0 without any. ``label_smoothing`` is torch's. Raises ValueError for other shapes.
    """
    if labels.dim() not in (1, 2) or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)} are no classification of "
            f"records, (N, K) for (N,), or of positions, (N, T, K) for (N, T): classes go last. For another loss take "
            f"each record's own and their mean (PrivateTrainer: compute_loss_func=...)"
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

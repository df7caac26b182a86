"""torch's GradScaler in a private step: a fixed scale of a sum, so that what overflows is a record's own matter.

A record whose scaled gradient overflows float16 contributes nothing. If the scale followed overflows, as GradScaler's
does, one record would decide which others overflow from then on; of a mean over the batch, whose scaled gradients
shrink with the number of records, it would decide that within a step. Clipping bounds neither.
"""

import torch

LARGEST = torch.finfo(torch.float16).max


def refuse_scaler(scaler: torch.amp.GradScaler, loss_reduction: str) -> None:
    """Raise ValueError for a mean, and for a scale at which a record's gradient of 1 overflows."""
    if not scaler.is_enabled():
        return
    if loss_reduction != "sum":
        raise ValueError(
            "grad_scaler needs the sum over records: of a mean, how many records a batch has decides which of them "
            "overflow float16 and are left out, and clipping cannot bound that. Take CrossEntropyLoss(reduction='sum') "
            "or record_losses(...).sum(), and pass loss_reduction='sum'; bfloat16 needs no scaler"
        )
    if (scale := scaler.get_scale()) > LARGEST:
        raise ValueError(
            f"at the GradScaler's scale of {scale:g} (its default is 65536) a record's gradient of 1 overflows float16 "
            f"and is left out, and in a private training the scale stays where it starts, or one record would decide "
            f"which others are left out; give GradScaler(init_scale=2.0**10)"
        )


def hold(scaler: torch.amp.GradScaler) -> None:
    """Keep ``scaler.update()`` from moving the scale; at each step, since a ``load_state_dict`` brings the factors."""
    scaler.set_growth_factor(1.0)
    scaler.set_backoff_factor(1.0)

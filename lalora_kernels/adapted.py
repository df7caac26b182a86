"""What the private step needs of an adapted layer, ours or PEFT's."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:  # these classes are mixed into modules
    from torch.nn import Module as _Mixed
else:
    _Mixed = object


class Adapted(_Mixed):
    """What a private step needs of an adapted layer: a place for its recorder, and where its parameters are."""

    recorder: Any = None  # set by the engine (privacy/recorders.py)
    is_table = False  # whether its inputs are ids, and A has a column for each

    def tensors(self) -> dict[str, tuple[nn.Module, str]]:
        """Role -> (module, name in it) of what a forward uses: "lora_A", "lora_B", "weight", "bias", "lora_bias"."""
        raise NotImplementedError

    @property
    def trained_rows(self) -> Tensor | None:
        """(m,1), 1 for the rows of B that the adapter has and 0 for those that stay zero; None: it has all."""
        return self._buffers.get("rows")

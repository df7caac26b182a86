"""What travels between server and client: one safetensors blob a message, tensors by sorted name and a little JSON.

Down go the tensors that the client lacks, the round, the settings and the schema. Up go the method's tensors and
a status out of ``STATUS``; no loss, no counts, no text of an exception. Nothing is ever unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lalora_kernels.files import tensor_digest
from lalora_kernels.nn import factor_of

# Everything that a client says beside its tensors; what it means, for the server's display.
STATUS = {
    "ok": "sent an update",
    "policy": "its policy does not allow these settings or this state",
    "budget": "its privacy budget does not bear this round",
    "stale": "this round is over for it",
    "lost": "it paid for this round, but its update was lost with a crash",
    "schema": "its model or its data do not have this schema, or are others than at first",
    "settings": "the settings of this run changed, or cannot be read",
    "resync": "it lacks part of the state",
    "failed": "an error; its own log has the details",
}
SLACK, SLACK_OF_A_TENSOR = 1 << 16, 512  # bytes of a blob's header


class WireError(ValueError):
    """A blob that is not a message. The text is one of a few fixed ones: it holds nothing that the sender wrote."""


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, Any], wire: str = "float32") -> bytes:
    """A message; equal contents give equal bytes. ``wire`` "bfloat16" halves float32 tensors, rounding them."""
    out = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
    if wire == "bfloat16":
        out = {key: value.bfloat16() if value.dtype == torch.float32 else value for key, value in out.items()}
    return save(out, metadata={"lalora": json.dumps(dict(about), sort_keys=True)})


def unpack(blob: bytes, wire: str = "float32", limit: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by sorted name, the rest) of a message that ``pack`` made with the same ``wire``.

    Raises WireError for more than ``limit`` bytes, before they are parsed, and for what is not a message.
    """
    if limit is not None and len(blob) > limit:
        raise WireError("the message is larger than any valid one")
    try:
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        about = json.loads(header["__metadata__"]["lalora"])
        tensors = load(blob)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise WireError("the message cannot be read") from error
    if not isinstance(about, dict):
        raise WireError("the message cannot be read")
    return upcast({key: tensors[key] for key in sorted(tensors)}, wire), about


def upcast(tensors: Mapping[str, Tensor], wire: str) -> dict[str, Tensor]:
    """What arrived by ``wire`` as the float32 that it stands for."""
    if wire == "float32":
        return dict(tensors)
    return {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in tensors.items()}


def as_sent(tensors: Mapping[str, Tensor], wire: str) -> dict[str, Tensor]:
    """The values that arrive at the other end."""
    if wire == "float32":
        return dict(tensors)
    return {k: v.bfloat16().float() if v.dtype == torch.float32 else v for k, v in tensors.items()}


def size_limit(reference: Mapping[str, Tensor]) -> int:
    """Bytes that a message with tensors like ``reference`` cannot exceed."""
    return SLACK + sum(t.numel() * t.element_size() + SLACK_OF_A_TENSOR for t in reference.values())


def state_digest(tensors: Mapping[str, Tensor], wire: str) -> str:
    """Equal where both ends hold the same state, as it arrives; 32 hex digits."""
    return tensor_digest(as_sent(tensors, wire))[:32]


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Equal for equal settings, in any process; 32 hex digits."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:32]


def group(key: str) -> str:
    """ "A" or "B" for a LoRA factor, "rest" for what else trains: what changes together is sent together."""
    return factor_of(key) or "rest"


def lacking(state: Mapping[str, Tensor], changed: Mapping[str, int], known: int) -> dict[str, Tensor]:
    """The tensors of ``state`` whose group changed in a round after ``known``, the last one that a client has seen.

    Everybody knows the state of round 0: it follows from the base model and the public seed.
    """
    return {key: value for key, value in state.items() if changed.get(group(key), 0) > known}

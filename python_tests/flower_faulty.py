"""A client app that spoils what its client sends, each round in another way, put over the product's own.

test_flower_processes.py makes it part of the app that Flower carries. It does nothing but for a client whose folder
holds a file ``faults``: a line a round, each a key of ``SPOILED``, "throws", "exits hard" or "sound".
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from lalora_flower.client_app import hello, train

from lalora_kernels.federated.wire import pack, unpack

SECRET = "record 7 has label 3"


def each(change: Callable) -> Callable[..., bytes]:
    return lambda tensors, about: pack({name: change(value) for name, value in tensors.items()}, about)


SPOILED: dict[str, Callable[..., bytes]] = {
    "NaN": each(lambda value: value + math.nan),
    "Inf": each(lambda value: value + math.inf),
    "wrong shapes": each(lambda value: value.T.contiguous()),
    "wrong keys": lambda tensors, about: pack({"x" + name: value for name, value in tensors.items()}, about),
    "garbage": lambda tensors, about: bytes(range(256)) * 40,
    "oversized": lambda tensors, about: pack(tensors | {"z": next(iter(tensors.values())).new_zeros(10**6)}, about),
    "huge": each(lambda value: value + 1e6),
    "stale round": lambda tensors, about: pack(tensors, about | {"round": about["round"] - 1}),
}

app = ClientApp()
app.query("hello")(hello)


@app.train()
def spoil(message: Message, context: Context) -> Message:
    faults = Path(str(context.node_config["home"])) / "faults"
    number = unpack(_blob(message))[1]["round"]
    kind = faults.read_text().splitlines()[number - 1] if faults.exists() else "sound"
    if kind == "throws":
        raise ValueError(SECRET)
    reply = train(message, context)
    if kind == "exits hard":
        os._exit(1)
    if kind not in SPOILED:
        return reply
    blob = np.frombuffer(SPOILED[kind](*unpack(_blob(reply))), dtype=np.uint8)
    return Message(RecordDict({"lalora": ArrayRecord({"blob": Array(blob)})}), reply_to=message)


def _blob(message: Message) -> bytes:
    return message.content["lalora"]["blob"].numpy().tobytes()

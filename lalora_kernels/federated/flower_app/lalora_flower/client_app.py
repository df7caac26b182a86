"""The client's end: hand a message's blob to this machine's node, send its answer back."""

import os
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def number(context: Context) -> int:
    """Which client this is: the supernode's ``--node-config "client=2"``, or the simulation's own numbering."""
    return int(context.node_config.get("client", context.node_config.get("partition-id", -1)))


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Tell the server which client this is; kept free of imports that take seconds."""
    return Message(RecordDict({"hello": ConfigRecord({"client": number(context)})}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round: the answer of ``lalora_kernels.federated.node.Node``, which never raises."""
    from lalora_kernels.federated.node import Node

    client = number(context)
    home = context.node_config.get("home") or Path(os.environ["LALORA_CLIENTS"]) / str(client)
    blob = message.content["lalora"]["blob"].numpy().tobytes()
    answer = np.frombuffer(Node(str(home), client).answer(blob), dtype=np.uint8)
    return Message(RecordDict({"lalora": ArrayRecord({"blob": Array(answer)})}), reply_to=message)

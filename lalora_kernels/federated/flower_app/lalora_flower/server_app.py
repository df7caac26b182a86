"""The server's end: a ``coordinator.Transport`` over Flower's grid, and the run that uses it."""

import re
import time
from collections.abc import Iterator, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from lalora_kernels.federated.coordinator import serve

AT_ONCE = 8  # replies in memory
POLL = 0.5  # seconds between two looks at the SuperLink
HELLO_TTL = 3600.0  # seconds within which a node has to say which client it is

app = ServerApp()


class GridTransport:
    """Finds out which node is which client, carries blobs, and gives a client that comes back its message again.

    A node that was registered under the name "client-2" is client 2 and no other, and nobody else is; one without
    such a name (a SuperLink without node keys, a simulation) is what it says.
    """

    def __init__(self, grid: Grid):
        self.grid = grid
        self.nodes: dict[int, int] = {}  # client -> node
        self.since: dict[int, str] = {}  # node -> its last activation
        self.asked: dict[str, int] = {}  # hello's message id -> node
        self.registered: set[int] = set()  # clients whose node is known by its key

    def exchange(self, messages: Mapping[int, bytes], timeout: float) -> Iterator[tuple[int, bytes | None]]:
        """As ``coordinator.Transport``: one blob a message, replies as they come, at most ``timeout`` seconds."""
        pending = dict(messages)
        sent: dict[str, int] = {}  # message id -> client
        told: dict[int, tuple[int, str]] = {}  # client -> (node, its activation) that has the message
        deadline = time.monotonic() + timeout
        while pending and (left := deadline - time.monotonic()) > 0:
            self._greet()
            for client in pending:
                node = self.nodes.get(client)
                if node is not None and told.get(client) != (node, self.since[node]):
                    told[client] = (node, self.since[node])
                    sent[self._push(node, pending[client], left)] = client
            for reply in self._pull(list(sent)):
                client = sent.pop(reply.metadata.reply_to_message_id, None)
                blob = _blob(reply)
                if client not in pending or (blob is None and client in sent.values()):
                    continue  # it came back as another node, which has the message now
                del pending[client]
                yield client, blob
            time.sleep(POLL)

    def _pull(self, ids: list[str]) -> Iterator[Message]:
        """The replies that are there, a few at a time, so that memory does not grow with the number of clients."""
        for first in range(0, len(ids), AT_ONCE):
            yield from self.grid.pull_messages(ids[first : first + AT_ONCE])

    def _push(self, node: int, blob: bytes, ttl: float) -> str:
        content = RecordDict({"lalora": ArrayRecord({"blob": Array(np.frombuffer(blob, dtype=np.uint8))})})
        return next(iter(self.grid.push_messages([Message(content, node, "train", ttl=max(ttl, 1.0))])))

    def _greet(self) -> None:
        """Notice nodes that are new, or came back, and which client each is."""
        online = {n.node_id: n for n in self.grid.get_nodes()}
        for node, about in online.items():
            if self.since.get(node) == about.last_activated_at:
                continue
            self.since[node] = about.last_activated_at
            if match := re.fullmatch(r"client-(\d+)", about.name):
                self.nodes[int(match[1])] = node
                self.registered.add(int(match[1]))
            elif node not in self.nodes.values():
                message = Message(RecordDict({"hello": ConfigRecord({})}), node, "query.hello", ttl=HELLO_TTL)
                self.asked[next(iter(self.grid.push_messages([message])))] = node
        for reply in self._pull(list(self.asked)):
            node = self.asked.pop(reply.metadata.reply_to_message_id, None)
            client = reply.content.get("hello", {}).get("client") if reply.has_content() else None
            if type(client) is int and node in online and client not in self.registered:
                self.nodes[client] = node


def _blob(reply: Message) -> bytes | None:
    """What a client sent, if it sent a blob; None for an error of Flower's, whose text is not looked at."""
    if not reply.has_content():
        return None
    try:
        return reply.content["lalora"]["blob"].numpy().tobytes()
    except Exception:  # a record of another kind, another name, another dtype: all that a client may send
        return b""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Start or resume the run of the app's settings; ``result.json`` in its folder says how it ended."""
    asked = {name: str(value) for name, value in context.run_config.items()}
    serve(asked["folder"], asked["settings"], asked["sizes"], float(asked["timeout"]), GridTransport(grid))

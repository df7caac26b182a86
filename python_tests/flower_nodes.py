"""Clients of a small federation for tests of Flower's side: their folders, fixed noise keys, a transport of calls."""

import json
import logging
from pathlib import Path

import pytest
import torch
from small import digits_npz, vit_folder

from lalora_kernels.federated.config import make_config
from lalora_kernels.federated.node import Node
from lalora_kernels.federated.policy import policy_for
from lalora_kernels.privacy.ledger import Ledger
from lalora_kernels.privacy.noise import NoiseSource

CLIENTS, ROUNDS, K = 4, 3, 2


@pytest.fixture(scope="module", name="world")
def small_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return vit_folder(folder / "vit"), digits_npz(folder / "d.npz", 160, 40)


@pytest.fixture(autouse=True)
def close_logs():
    yield
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("lalora.client") and isinstance(logger, logging.Logger):
            for handler in list(logger.handlers):
                handler.close()
                logger.removeHandler(handler)


def settings(world, **changes):
    values = {
        "model": world[0], "dataset": world[1], "clients": CLIENTS, "fraction": 1.0, "rounds": ROUNDS, "local_steps": K,
        "rank": 2, "batch_size": 8, "partition": "iid", "epsilon": 8.0, "delta": 1e-4, "lr": 1.0, "device": "cpu",
    }  # fmt: skip
    return make_config(values | changes)


def fixed(client: int) -> NoiseSource:
    return NoiseSource.fixed(bytes([client + 1]) * 32)


def make_home(home: Path, client: int, config, key=True, **policy) -> Path:
    """A client's folder, with the policy that allows the run but for ``policy``; ``key``: its noise is ``fixed``."""
    home.mkdir(parents=True, exist_ok=True)
    lines = dict(line.split(" = ") for line in policy_for(config).splitlines()) | policy
    (home / "policy.toml").write_text("".join(f"{name} = {value}\n" for name, value in lines.items()))
    if key:
        (home / "test_key").write_text((bytes([client + 1]) * 32).hex())
    return home


def make_nodes(folder, config, key=True, **policy):
    return [Node(make_home(folder / f"client{i}", i, config, key, **policy), i) for i in range(config.clients)]


class Calls:
    """A transport to nodes of this process. ``faults`` (client -> function) changes or replaces what a client sends."""

    def __init__(self, nodes, faults=None):
        self.nodes, self.faults, self.down, self.up = nodes, faults or {}, [], []

    def exchange(self, messages, timeout):
        for client in sorted(messages, reverse=True):  # not in the order in which they are averaged
            self.down.append((client, messages[client]))
            fault = self.faults.get(client)
            reply = (
                fault(self.nodes[client], messages[client]) if fault else self.nodes[client].answer(messages[client])
            )
            if reply == "silence":
                continue
            self.up.append((client, reply))
            yield client, reply


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def ledger_of(client: Node | Path) -> Ledger:
    """The only ledger of a client, by its node or its folder."""
    home = client.home if isinstance(client, Node) else client
    (path,) = (home / "ledgers").glob("*/ledger.json")
    ledger = Ledger()
    ledger.load_state_dict(json.loads(path.read_text())["ledger"])
    return ledger

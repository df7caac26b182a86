"""What a server sends is clipped, counted or refused whatever its adapter state and settings are."""

import json
import math
import shutil

import pytest
import torch
from flower_nodes import close_logs, ledger_of, make_nodes, settings, small_world  # noqa: F401
from small import digits_npz, text_tsv

from lalora_kernels.federated import node as node_module
from lalora_kernels.federated.client import get_state
from lalora_kernels.federated.guard import schema
from lalora_kernels.federated.node import Node
from lalora_kernels.federated.task import prepare
from lalora_kernels.federated.wire import pack, state_digest, unpack


def message(config, round=1, change=lambda value: value):
    """What a server with this task sends to one who has seen nothing, its state changed."""
    task = prepare(config)
    state = {key: change(value) for key, value in get_state(task.classifier.model).items()}
    about = {
        "run": "0" * 16, "round": round, "settings": json.loads(config.to_json()), "schema": schema(state),
        "base": task.fingerprints["base model"], "data": task.fingerprints["data"],
        "state": state_digest(state, config.wire),
    }  # fmt: skip
    return pack(state, about)


def said(node, blob):
    """(status, the client's own log) after a message."""
    status = unpack(node.answer(blob))[1]["status"]
    log = node.home / "client.log"
    return status, log.read_text() if log.exists() else ""


def test_a_records_gradient_has_the_same_bits_however_many_others_were_drawn(world, monkeypatch):
    """Of a mean 1/N rounds it, and in a state whose terms cancel that is no small thing. N = 13 is no power of two."""
    task = prepare(settings(world))
    task.classifier.model.eval()
    scores = task.classifier.logits(task.classifier.collate([task.data.train[0]])[0]).detach()
    found = []
    for n in (1, 13):
        logits = scores.repeat(n, 1).requires_grad_()
        monkeypatch.setattr(task.classifier, "logits", lambda inputs, model, logits=logits: logits)
        loss = task.classifier.loss((None, torch.full((n,), 3)))
        found.append(torch.autograd.grad(loss, logits)[0][0])
    assert torch.equal(*found)


@pytest.mark.parametrize("value, why", [(math.nan, "NaN or Inf"), (math.inf, "NaN or Inf"), (2e4, "10000 is allowed")])
def test_a_state_that_nothing_can_come_of_is_refused_before_it_costs(world, tmp_path, value, why):
    config = settings(world, clients=1)
    (node,) = make_nodes(tmp_path, config, key=False)
    status, log = said(node, message(config, change=lambda old: torch.full_like(old, value)))
    assert status == "policy" and why in log and not list(node.home.glob("ledgers/*/ledger.json"))


def test_the_server_does_not_choose_the_columns_of_a_private_table(world, tmp_path):
    config = settings(world, text_column="diagnosis", label_column="ward", test_dataset="x.tsv")
    (node,) = make_nodes(tmp_path, settings(world, clients=1))
    (node.home / "client.toml").write_text(f"dataset = '{text_tsv(tmp_path / 't.tsv')}'\ntext_column = 'sentence'\n")
    seen = []

    def prepared(config, part):
        seen.append((config.text_column, config.label_column, config.test_dataset))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_module, "_prepare", prepared)
        node._task(config, {})
    assert seen == [("sentence", None, None)]


def test_data_that_are_not_the_servers_public_ones_are_not_dealt(world, tmp_path):
    other = settings((world[0], digits_npz(tmp_path / "private.npz", 161, 39)), clients=1)
    config, (node,) = settings(world, clients=1), make_nodes(tmp_path, other, key=False)
    tensors, about = unpack(message(config))
    asked = pack(tensors, about | {"settings": json.loads(other.to_json())})
    status, log = said(node, asked)
    assert status == "schema" and "name their file as dataset" in log and not list(node.home.glob("ledgers/*/*"))
    assert said(node, message(other))[0] == "ok"


def test_another_number_of_records_within_a_run_is_refused(world, tmp_path):
    config, own = settings(world, clients=1), tmp_path / "own.npz"
    (node,) = make_nodes(tmp_path, config, key=False)
    for number, records, expected in ((1, 100, "ok"), (2, 60, "schema"), (2, 100, "ok")):
        (node.home / "client.toml").write_text(f"dataset = '{digits_npz(own, records, 40)}'\n")
        node_module._loaded.cache_clear()  # each message is a new process
        status, log = said(node, message(config, number))
        assert status == expected, log
    assert "had 100 records when this run began and has 60 now" in log


def test_a_ledger_that_is_an_old_copy_is_no_budget(world, tmp_path):
    config = settings(world, clients=1)
    (node,) = make_nodes(tmp_path, config, key=False)
    assert said(node, message(config, 1))[0] == "ok"
    shutil.copytree(node.home / "ledgers", tmp_path / "old")
    assert said(node, message(config, 2))[0] == "ok"
    shutil.copytree(node.home / "ledgers", tmp_path / "new")
    for copy, expected in (("old", "failed"), ("new", "ok")):
        shutil.rmtree(node.home / "ledgers")
        shutil.copytree(tmp_path / copy, node.home / "ledgers")
        status, log = said(node, message(config, 3))
        assert status == expected and "holds 2 releases, and had 4" in log


@pytest.mark.parametrize("damaged", ["", "{", "[]"])
def test_what_a_run_left_is_named_where_it_is_damaged(world, tmp_path, damaged):
    """It says how many releases the ledger must hold, in whatever run."""
    config = settings(world, clients=1)
    (node,) = make_nodes(tmp_path, config, key=False)
    assert said(node, message(config, 1))[0] == "ok"
    (left,) = node.home.glob("runs/*/run.json")
    left.parent.rename(left.parent.with_name("f" * 16))
    (node.home / "runs" / ("f" * 16) / "run.json").write_text(damaged)
    status, log = said(node, message(config, 2))
    assert status == "failed" and "run.json is damaged, and says how much the ledger must hold" in log


def test_one_home_answers_a_run_as_one_client(world, tmp_path):
    config = settings(world, clients=2)
    node, _ = make_nodes(tmp_path, config, key=False)
    (node.home / "client.toml").write_text(f"dataset = '{world[1]}'\n")
    assert said(node, message(config))[0] == "ok"
    steps = ledger_of(node).steps
    status, log = said(Node(node.home, 1), message(config))
    assert status == "settings" and "a --home of its own" in log and ledger_of(node).steps == steps


def test_a_model_that_mixes_records_is_refused_before_it_costs(world, tmp_path):
    """The client's own check: its steps have none."""
    config = settings(world, clients=1)
    (node,) = make_nodes(tmp_path, config, key=False)
    node_module._loaded.cache_clear()
    model = node_module._loaded(config)[0].classifier.model
    hook = model.vit.layernorm.register_forward_hook(lambda module, args, out: out - out.mean(0, keepdim=True))
    status, log = said(node, message(config))
    assert status == "failed" and "layernorm: the output for one record depends on the other records" in log
    assert not list(node.home.glob("ledgers/*/*"))
    hook.remove()
    assert said(node, message(config))[0] == "ok"

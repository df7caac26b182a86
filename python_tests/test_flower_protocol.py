"""Server and clients over a transport of function calls: the in-process run to the last bit, what travels, a kill.

Faulty clients: test_flower_faults.py; what a client refuses: test_flower_client.py; Flower: test_flower_processes.py.
"""

import json

import pytest
import torch
from flower_nodes import (  # noqa: F401
    CLIENTS,
    ROUNDS,
    Calls,
    K,
    close_logs,
    fixed,
    ledger_of,
    make_nodes,
    same,
    settings,
    small_world,
)
from safetensors.torch import save

from lalora_kernels.data import BadInput
from lalora_kernels.federated.coordinator import Coordinator
from lalora_kernels.federated.run import Run, prepare
from lalora_kernels.federated.wire import WireError, pack, size_limit, state_digest, unpack

# ---------------------------------------------------------------- one client step, whatever carries the messages


@pytest.mark.parametrize("method", ["dp-lora", "ffa-lora", "rolora", "la-lora"])
def test_equals_the_in_process_run_bit_for_bit_and_sends_what_the_method_says(world, tmp_path, method):
    config = settings(world, method=method, train_head="yes")
    here = Run.start(prepare(config), tmp_path / "here", noise=fixed)
    here.train()
    calls = Calls(make_nodes(tmp_path, config))
    there = Coordinator.start(prepare(config), tmp_path / "there")
    there.train(calls)
    assert same(here.at.state, there.at.state)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "here/adapter" / name).read_bytes() == (tmp_path / "there/adapter" / name).read_bytes()
    for ours, theirs in zip(here.clients, calls.nodes):
        assert ours.ledger.entries == ledger_of(theirs).entries

    # bytes: one factor for RoLoRA and FFA, both for the others; before the first change nothing goes down at all
    sizes = {f: 4 * sum(v.numel() for k, v in here.at.state.items() if k.endswith(f)) for f in ("lora_A", "lora_B")}
    head = 4 * sum(v.numel() for k, v in here.at.state.items() if "lora_" not in k)
    sends = {"ffa-lora": ("B", "B", "B"), "rolora": ("B", "A", "B")}.get(method, ("AB",) * 3)
    up = [head + sum(sizes["lora_" + f] for f in factors) for factors in sends]
    down = [0, *up[:-1]]
    for n in range(ROUNDS):
        for blobs, expected in ((calls.up, up[n]), (calls.down, down[n])):
            for _, blob in blobs[n * CLIENTS : (n + 1) * CLIENTS]:
                assert sum(t.numel() * t.element_size() for t in unpack(blob)[0].values()) == expected
                assert len(blob) - expected < 6000
    assert [r["bytes_sent"] for r in there.at.history[1:]] == [
        sum(len(b) for _, b in calls.up[n * CLIENTS : (n + 1) * CLIENTS]) for n in range(ROUNDS)
    ]
    assert [r["bytes_down"] for r in there.at.history[1:]] == [
        sum(len(b) for _, b in calls.down[n * CLIENTS : (n + 1) * CLIENTS]) for n in range(ROUNDS)
    ]


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_partial_participation_by_size_is_bit_equal_too(world, tmp_path, clipping):
    changes = {"fraction": 0.5, "rounds": 4, "partition": "dirichlet", "average": "size", "clipping": clipping}
    config = settings(world, method="rolora", **changes)
    here = Run.start(prepare(config), tmp_path / "here", noise=fixed)
    here.train()
    there = Coordinator.start(prepare(config), tmp_path / "there")
    calls = Calls(make_nodes(tmp_path, config))
    there.train(calls)
    assert same(here.at.state, there.at.state)
    for name in ("clients", "accuracy", "loss"):
        assert [r[name] for r in here.at.history] == [r[name] for r in there.at.history]

    # one factor down to who took part in the round before, both to who missed one, nothing before the first change
    for client, blob in calls.down:
        tensors, about = unpack(blob)
        turns = [n for n in range(1, about["round"]) if client in there.at.history[n]["clients"]]
        missed = range(max(turns, default=1), about["round"])
        assert {key[-1] for key in tensors} == {"AB"[n % 2] for n in missed}  # B trains in odd rounds, A in even ones


def test_bfloat16_on_the_wire_halves_the_bytes_and_still_trains(world, tmp_path):
    sent, states = {}, {}
    for wire in ("float32", "bfloat16"):
        config = settings(world, wire=wire)
        calls = Calls(make_nodes(tmp_path / wire, config))
        run = Coordinator.start(prepare(config), tmp_path / wire / "run")
        run.train(calls)
        assert all(r["statuses"] == dict.fromkeys("0123", "ok") for r in run.at.history[1:])
        sent[wire] = [
            sum(t.numel() * t.element_size() for t in unpack(b)[0].values()) for _, b in calls.up + calls.down
        ]
        states[wire] = run.at.state
    assert sent["bfloat16"] == [n // 2 for n in sent["float32"]]
    assert not same(*states.values())
    for key, value in states["float32"].items():
        assert (states["bfloat16"][key] - value).norm() < 0.05 * max(float(value.norm()), 0.1)


def test_a_message_up_holds_tensors_and_a_status_and_nothing_else(world, tmp_path):
    config = settings(world)
    calls = Calls(make_nodes(tmp_path, config))
    Coordinator.start(prepare(config), tmp_path / "run").train(calls)
    for client, blob in calls.up:
        tensors, about = unpack(blob)
        assert set(about) == {"run", "round", "client", "status"} and about["client"] == client
        assert about["status"] == "ok" and all("lora_" in key for key in tensors)
        assert list(tensors) == sorted(tensors)


def test_equal_messages_are_equal_bytes_whatever_the_order_of_the_keys():
    tensors = {f"k{i}": torch.full((i + 1,), float(i)) for i in range(40)}
    blob = pack(tensors, {"a": 1, "b": 2})
    assert blob == pack(dict(reversed(tensors.items())), {"b": 2, "a": 1})
    assert list(unpack(blob)[0]) == sorted(tensors)


def test_a_states_digest_tells_the_last_bit_of_what_arrives():
    """A client that holds another state than the server's would train, and pay, on that."""
    one, next_to_it = ({"k": torch.nextafter(torch.ones(3), torch.tensor(to))} for to in (1.0, 2.0))
    assert state_digest(one, "float32") != state_digest(next_to_it, "float32")
    assert state_digest(one, "bfloat16") == state_digest(next_to_it, "bfloat16")
    assert state_digest(one, "bfloat16") != state_digest({"k": torch.full((3,), 1.01)}, "bfloat16")


def test_the_limit_takes_tensors_of_any_size_and_not_as_much_again():
    reference = {f"layers.{i}.lora_B": torch.rand(400, 100) for i in range(3)}
    blob, limit = pack(reference, {"run": "0" * 16, "round": 1}), size_limit(reference)
    assert same(unpack(blob, limit=limit)[0], reference)
    with pytest.raises(WireError, match="larger"):
        unpack(pack({f"{i}{key}": t.clone() for i in "01" for key, t in reference.items()}, {}), limit=limit)


# ---------------------------------------------------------------- the server is killed


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 2, 5, 6, 7, 11])
def test_a_killed_server_resumes_to_the_same_state_and_nobody_pays_twice(world, tmp_path, after):
    """Killed after so many replies, with test keys: what was stored counts, what was lost is sent again."""
    config = settings(world)
    calls = Calls(make_nodes(tmp_path / "a", config))
    whole = Coordinator.start(prepare(config), tmp_path / "whole")
    whole.train(calls)

    class Cut(Calls):
        def exchange(self, messages, timeout):
            for client, reply in super().exchange(messages, timeout):
                if len(self.up) == after:
                    raise Killed
                yield client, reply

    nodes = make_nodes(tmp_path / "b", config)
    run = Coordinator.start(prepare(config), tmp_path / "run")
    with pytest.raises(Killed):
        run.train(Cut(nodes))
    assert json.loads((tmp_path / "run/result.json").read_text())["outcome"] == "failed"
    resumed = Coordinator.resume(tmp_path / "run")
    assert resumed.at.round == (after - 1) // CLIENTS
    resumed.train(Calls(nodes))
    assert same(resumed.at.state, whole.at.state) and not list((tmp_path / "run/updates").glob("*"))
    assert all(ledger_of(node).steps == ROUNDS * K for node in nodes)
    assert json.loads((tmp_path / "run/result.json").read_text()) == {"outcome": "finished", "why": "", "round": ROUNDS}
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    (tmp_path / "run/metrics.jsonl").write_text(metrics[: metrics[:-1].rindex("\n") + 1])  # killed before the last line
    again = Coordinator.resume(tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_text() == metrics
    again.train(Calls([]))  # nothing is left to do
    with pytest.raises(BadInput, match="holds a run already"):
        Coordinator.start(prepare(config), tmp_path / "run")


def test_unpack_refuses_before_it_parses():
    with pytest.raises(WireError, match="larger"):
        unpack(b"\xff" * 100, limit=99)
    for blob in (b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", (1 << 62).to_bytes(8, "little") + b"{" * 50):
        with pytest.raises(WireError, match="cannot be read"):
            unpack(blob)
    for about in ("[]", "7", "null", "{"):  # of which the server asks .get
        blob = save({}, metadata={"lalora": about})
        with pytest.raises(WireError, match="cannot be read"):
            unpack(blob)

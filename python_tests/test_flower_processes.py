"""Over Flower itself: the simulation, and a SuperLink with SuperNodes as real processes on loopback.

Without FLOWER=1 (``make flower-test``) only the app's own parts run: the rest takes minutes.
"""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import flower_nodes
import pytest
import torch
from flower_nodes import ROUNDS, Calls, K, fixed, ledger_of, make_home, make_nodes, same, small_world  # noqa: F401

flwr = pytest.importorskip("flwr", reason="Flower is not installed; make flower-test installs it")

from lalora_kernels import cli  # noqa: E402
from lalora_kernels.data import BadInput  # noqa: E402
from lalora_kernels.federated import flower  # noqa: E402
from lalora_kernels.federated.checkpoint import load_checkpoint  # noqa: E402
from lalora_kernels.federated.coordinator import Coordinator  # noqa: E402
from lalora_kernels.federated.flower import (  # noqa: E402
    APP,
    OFFLINE,
    Control,
    Process,
    alive,
    descendants,
    environment,
    follow,
    free_port,
    make_certificates,
    superlink_command,
    supernode_command,
    wait_for,
)
from lalora_kernels.federated.run import Run, prepare  # noqa: E402
from lalora_kernels.federated.wire import STATUS, unpack  # noqa: E402

CLIENTS = 3
slow = pytest.mark.skipif(not os.environ.get("FLOWER"), reason="minutes of real processes: make flower-test")


def settings(world, **changes):
    return flower_nodes.settings(world, **{"clients": CLIENTS} | changes)


def client_homes(folder, config):
    return [make_home(folder / str(client), client, config) for client in range(config.clients)]


@contextlib.contextmanager
def one_thread():
    """As the processes have: other threads sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_process(world, folder, **changes):
    run = Run.start(prepare(settings(world, **changes)), folder, noise=fixed)
    with one_thread():
        run.train()
    return run.at.state


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(home) -> int:
    return ledger_of(home).steps if list(home.glob("ledgers/*/ledger.json")) else 0


# ---------------------------------------------------------------- the app and what surrounds it


def test_the_app_is_one_that_flower_builds_and_it_holds_the_two_thin_files():
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import get_fab_metadata

    fab = build_fab_from_disk(APP)
    assert get_fab_metadata(fab) == ("lalora/lalora-flower", "0.1.0")
    lines = [len(path.read_text().splitlines()) for path in (APP / "lalora_flower").glob("*_app.py")]
    assert len(lines) == 2 and sum(lines) < 150


def test_nothing_phones_home_and_nothing_is_installed_at_run_time(tmp_path):
    env = environment(tmp_path)
    assert OFFLINE == {
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    assert OFFLINE.items() <= env.items() and env["FLWR_HOME"] == str(tmp_path)


def test_certificates_are_for_the_hosts_and_flower_takes_the_keys(tmp_path):
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.cli.supernode.register import try_load_public_key

    make_certificates(tmp_path / "keys", ["fl.example.org", "10.0.0.7"], 2)
    ca, server = (x509.load_pem_x509_certificate((tmp_path / f"keys/{n}.crt").read_bytes()) for n in ("ca", "server"))
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "127.0.0.1"]
    for client in range(2):
        private = load_ssh_private_key((tmp_path / f"keys/client-{client}").read_bytes(), None)
        assert private.curve.name == "secp384r1" and try_load_public_key(tmp_path / f"keys/client-{client}.pub")
    for secret in ("ca.key", "server.key", "client-0"):
        assert (tmp_path / "keys" / secret).stat().st_mode & 0o077 == 0
    with pytest.raises(BadInput, match="holds keys already"):
        make_certificates(tmp_path / "keys", [], 1)


def test_refusals_of_the_command_say_what_to_do(world, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    for arguments, message in (
        (
            ["supernode", "--superlink", "h:1", "--client", "0", "--home", str(tmp_path / "home")],
            "policy.toml is missing",
        ),
        (["superlink", "--host", "0.0.0.0"], "without --certificates the SuperLink stays on 127.0.0.1"),
        (["run", "--resume", str(tmp_path), "--rounds", "3"], "leave the other flags out"),
        (["keys", str(tmp_path / "k"), "--clients", "1", "--host", "h"], ""),
        (["keys", str(tmp_path / "k"), "--clients", "1", "--host", "h"], "holds keys already"),
    ):
        code = cli.main(["flower", *arguments])
        assert code == (2 if message else 0) and message in capsys.readouterr().err


def test_a_stopped_process_takes_along_all_that_it_started(tmp_path):
    script = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
    process = Process(["python", "-c", script], tmp_path / "log", environment(tmp_path))
    deadline = time.monotonic() + 20
    while not (family := descendants(process.popen.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.stop(patience=0.5)
    assert process.popen.poll() is not None
    assert not any(map(alive, family))


# ---------------------------------------------------------------- simulation


@slow
@pytest.mark.parametrize("method", ["la-lora", "rolora"])
def test_the_simulation_gives_the_in_process_adapter_bit_for_bit(world, tmp_path, capsys, monkeypatch, method):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected = in_process(world, tmp_path / "here", method=method, train_head="yes")
    config = settings(world, method=method, train_head="yes")
    client_homes(tmp_path / "there/clients", config)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(config).items() if value is not None]
    assert cli.main(["train", "--engine", "flower-sim", "--out", str(tmp_path / "there"), *flags]) == 0
    assert f"finished after {ROUNDS} rounds" in capsys.readouterr().out
    assert same(load_checkpoint(tmp_path / "there").state, expected)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        here, there = tmp_path / "here/adapter" / name, tmp_path / "there/adapter" / name
        assert here.read_bytes() == there.read_bytes()


# ---------------------------------------------------------------- deployment


class Federation:
    """A SuperLink and SuperNodes on loopback, insecure or with TLS and node keys."""

    def __init__(self, folder, config, secure):
        self.folder, self.config = folder, config
        self.keys = folder / "keys" if secure else None
        self.ca = self.keys / "ca.crt" if secure else None
        if secure:
            make_certificates(self.keys, [], config.clients)
        self.address, self.port = (lambda port: (f"127.0.0.1:{port}", port))(free_port())
        self.homes = client_homes(folder / "clients", config)
        self.nodes = {}
        self.link = None
        self.control = Control(folder / "control", self.address, self.ca)

    def __enter__(self):
        env = environment(self.folder / "link")
        command = superlink_command("127.0.0.1", self.port, self.keys)
        self.link = Process(command, self.folder / "superlink.log", env)
        wait_for(self.link, self.address, self.ca)
        return self

    def __exit__(self, *error):
        for process in [*self.nodes.values(), self.link]:
            process.stop(patience=3)

    def start_node(self, client, register=True):
        key = self.keys / f"client-{client}" if self.keys else None
        if key and register:
            self.control.register(key.with_suffix(".pub"))
        home = self.homes[client]
        command = supernode_command(self.address, client, home, free_port(), self.ca, key)
        env = environment(home / ".flower", OMP_NUM_THREADS="1")
        self.nodes[client] = Process(command, home / "supernode.log", env)

    def kill_node(self, client):
        self.nodes.pop(client).stop(patience=0)


def until(condition, seconds=540):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@slow
@pytest.mark.parametrize("secure", [False, True], ids=["insecure", "TLS and node keys"])
def test_a_deployment_gives_the_in_process_adapter_bit_for_bit(world, tmp_path, secure):
    expected = in_process(world, tmp_path / "here")
    config, run = settings(world), tmp_path / "run"
    with Federation(tmp_path, config, secure) as federation:
        for client in range(CLIENTS):
            federation.start_node(client)
        number = federation.control.submit(run, config)
        result = follow(federation.control, number, run, processes=[federation.link])
    assert result == {"outcome": "finished", "why": "", "round": ROUNDS}
    assert same(load_checkpoint(run).state, expected)
    assert all(record["clients"] == [0, 1, 2] for record in records(run)[1:])
    assert [steps_of(home) for home in federation.homes] == [ROUNDS * K] * CLIENTS


@slow
def test_killed_in_a_round_and_back_again(world, tmp_path):
    """Client 2 is killed while it trains, comes back as a new node in the same round, and nobody paid twice."""
    expected = in_process(world, tmp_path / "here", rounds=2)
    config, run = settings(world, rounds=2), tmp_path / "run"
    with Federation(tmp_path, config, secure=False) as federation:
        for client in (0, 1):
            federation.start_node(client)
        number = federation.control.submit(run, config, timeout=900)
        until(lambda: steps_of(federation.homes[0]) and steps_of(federation.homes[1]))
        federation.start_node(2)
        lock = federation.homes[2] / "ledgers"
        until(lock.exists)  # it has the message
        federation.kill_node(2)
        federation.start_node(2)
        result = follow(federation.control, number, run, processes=[federation.link])
    assert result["outcome"] == "finished"
    assert [steps_of(home) for home in federation.homes] == [2 * K] * CLIENTS
    assert all(record["clients"] == [0, 1, 2] for record in records(run)[1:])
    assert same(load_checkpoint(run).state, expected)


FAULTS = {  # what flower_faulty.py can do -> what the server says of it
    "NaN": "is NaN or Inf",
    "Inf": "is NaN or Inf",
    "wrong shapes": "has shape",
    "wrong keys": "other tensors than the method sends",
    "garbage": "the message cannot be read",
    "oversized": "the message is larger than any valid one",
    "huge": "away from the reference",
    "stale round": "it answers another run, round or client",
    "throws": STATUS["failed"],
    "exits hard": STATUS["failed"],
}


@slow
@pytest.mark.timeout(1800)  # eleven rounds of three new processes, and a minute until Flower misses the one that exited
def test_a_client_faulty_in_every_way_is_named_and_the_rest_is_the_run_without_it(world, tmp_path, monkeypatch):
    """Client 2 spoils each round in another way; in the last it is sound, and counts again."""
    kinds = [*FAULTS, "sound"]
    config, run = settings(world, rounds=len(kinds)), tmp_path / "run"

    def unheard(node, blob):
        kind = kinds[unpack(blob)[1]["round"] - 1]
        reply = "silence" if kind == "throws" else node.answer(blob)
        return reply if kind == "sound" else "silence"

    nodes = make_nodes(tmp_path / "nodes", config)
    without = Coordinator.start(prepare(config), tmp_path / "without")
    with one_thread():
        without.train(Calls(nodes, {2: unheard}))

    app = shutil.copytree(APP, tmp_path / "app")
    shutil.copy(Path(__file__).with_name("flower_faulty.py"), app / "lalora_flower/faulty.py")
    about = (app / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(about.replace("lalora_flower.client_app:", "lalora_flower.faulty:"))
    monkeypatch.setattr(flower, "APP", app)
    with Federation(tmp_path, config, secure=False) as federation:
        (federation.homes[2] / "faults").write_text("\n".join(kinds))
        for client in range(CLIENTS):
            federation.start_node(client)
        number = federation.control.submit(run, config, timeout=900)
        result = follow(federation.control, number, run, processes=[federation.link])
    assert result == {"outcome": "finished", "why": "", "round": len(kinds)}
    *faulty, sound = records(run)[1:]
    for (kind, why), record in zip(FAULTS.items(), faulty, strict=True):
        assert record["clients"] == [0, 1] and list(record["dropped"]) == ["2"], (kind, record)
        assert why in record["dropped"]["2"], (kind, record)
    assert sound["clients"] == [0, 1, 2] and not sound["dropped"]
    assert same(load_checkpoint(run).state, without.at.state)
    assert [ledger_of(home).entries for home in federation.homes] == [ledger_of(node).entries for node in nodes]
    assert [steps_of(home) for home in federation.homes] == [len(kinds) * K] * 2 + [(len(kinds) - 1) * K]
    assert not any(b"record 7" in path.read_bytes() for path in run.rglob("*") if path.is_file())


@slow
def test_the_server_killed_in_a_round_and_resumed_gives_the_same_state(world, tmp_path):
    expected = in_process(world, tmp_path / "here", rounds=2)
    config, run = settings(world, rounds=2), tmp_path / "run"
    with Federation(tmp_path, config, secure=False) as federation:
        for client in (0, 1):  # without client 2, so that a round cannot end
            federation.start_node(client)
        federation.control.submit(run, config, timeout=900)
        until(lambda: len(list((run / "updates/1").glob("[01]"))) == 2)
        for pid in descendants(federation.link.popen.pid):
            if b"flwr-serverapp" in open(f"/proc/{pid}/cmdline", "rb").read():
                os.kill(pid, 9)
        time.sleep(1)
        federation.start_node(2)
        number = federation.control.submit(run, None, timeout=900)
        result = follow(federation.control, number, run, processes=[federation.link])
    assert result["outcome"] == "finished"
    assert same(load_checkpoint(run).state, expected)
    assert [steps_of(home) for home in federation.homes] == [2 * K] * CLIENTS


@slow
def test_a_server_that_dies_without_a_word_has_failed(world, tmp_path):
    config, run = settings(world), tmp_path / "run"
    with Federation(tmp_path, config, secure=False) as federation:
        number = federation.control.submit(run, config, timeout=900)
        until(lambda: (run / "metrics.jsonl").exists())
        federation.control.stop(number)
        result = follow(federation.control, number, run, processes=[federation.link])
        bad = federation.control.submit(tmp_path / "other", settings(world, dataset="/nowhere.npz"))
        refused = follow(federation.control, bad, tmp_path / "other", processes=[federation.link])
    assert result["outcome"] == "failed"
    assert refused["outcome"] == "failed" and "/nowhere.npz: no such file" in refused["why"]


@slow
def test_a_node_without_a_registered_key_stays_out(world, tmp_path):
    config, run = settings(world, rounds=1, quorum=0.6), tmp_path / "run"
    with Federation(tmp_path, config, secure=True) as federation:
        federation.start_node(0)
        federation.start_node(1)
        federation.start_node(2, register=False)
        number = federation.control.submit(run, config, timeout=60)
        result = follow(federation.control, number, run, processes=[federation.link])
    assert result["outcome"] == "finished" and records(run)[1]["clients"] == [0, 1]
    assert records(run)[1]["dropped"] == {"2": "no answer in time"} and steps_of(federation.homes[2]) == 0

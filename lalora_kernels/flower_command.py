"""``lalora flower``: a federation over Flower, deployed or simulated; ``lalora train --engine flower-sim``."""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lalora_kernels.data import BadInput
from lalora_kernels.federated.config import Config, make_config
from lalora_kernels.federated.flower import (
    INTERRUPTED,
    Control,
    FlowerFailed,
    Process,
    environment,
    follow,
    free_port,
    make_certificates,
    superlink_command,
    supernode_command,
    wait_for,
)
from lalora_kernels.federated.lock import refuse_in_use
from lalora_kernels.federated.policy import FILE as POLICY
from lalora_kernels.federated.policy import policy_for
from lalora_kernels.flower_display import FlowerDisplay
from lalora_kernels.settings_flags import CONFIG


def add_flower(commands: Any, add_settings: Callable[..., None]) -> None:
    """The command's arguments."""
    flower = commands.add_parser(
        "flower",
        help="the same training between machines, over Flower",
        description="Federation over Flower (docs/flower.md). Needs pip install 'lalora_kernels[flower]'.",
    )
    parts = flower.add_subparsers(dest="part", required=True, metavar="PART")

    run = parts.add_parser("run", usage="lalora flower run [options]", help="start a run on a SuperLink and follow it")
    ask = run.add_argument_group("the run")
    ask.add_argument("--superlink", metavar="HOST:PORT", default="127.0.0.1:8000", help="(default: 127.0.0.1:8000)")
    ask.add_argument("--certificates", metavar="FOLDER", help="with ca.crt; without it the SuperLink is insecure")
    ask.add_argument("--config", metavar="FILE", help=CONFIG)
    ask.add_argument("--out", metavar="FOLDER", help="run folder, on the SuperLink's machine")
    ask.add_argument("--resume", metavar="FOLDER", help="continue this run, with its own settings")
    ask.add_argument("--sizes", metavar="N,N,...", default="", help="the clients' public record counts")
    ask.add_argument("--round-timeout", type=float, metavar="SECONDS", default=600.0, help="(default: 600)")
    ask.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_settings(run)

    link = parts.add_parser("superlink", help="run Flower's SuperLink, offline, with TLS and node keys")
    link.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    link.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    link.add_argument("--certificates", metavar="FOLDER", help="of lalora flower keys; without it: insecure")
    link.add_argument("--database", metavar="FILE", help="keep the registered nodes there")

    node = parts.add_parser("supernode", help="run Flower's SuperNode for one client, offline")
    node.add_argument("--superlink", metavar="HOST:PORT", required=True)
    node.add_argument("--client", type=int, metavar="N", required=True, help="this client's number")
    node.add_argument("--home", metavar="FOLDER", required=True, help="policy.toml, client.toml, ledgers and log")
    node.add_argument("--ca", metavar="FILE", help="ca.crt of the server; without it: insecure")
    node.add_argument("--key", metavar="FILE", help="this node's private key")
    node.add_argument("--port", type=int, default=0, help="for its own processes, on loopback (default: a free one)")

    keys = parts.add_parser("keys", help="make a CA, the server's certificate and the nodes' keys")
    keys.add_argument("folder", metavar="FOLDER")
    keys.add_argument("--host", action="append", default=[], help="name or address of the server; may be repeated")
    keys.add_argument("--clients", type=int, metavar="N", required=True)

    register = parts.add_parser("register", help="let nodes in by their public keys, client-N.pub")
    register.add_argument("keys", nargs="+", metavar="KEY.pub")
    register.add_argument(
        "--superlink", metavar="HOST:PORT", default="127.0.0.1:8000", help="(default: 127.0.0.1:8000)"
    )
    register.add_argument("--certificates", metavar="FOLDER", help="with ca.crt")

    demo = parts.add_parser("demo", usage="lalora flower demo [options]", help="all of it on loopback, with TLS")
    demo.add_argument("--out", metavar="FOLDER", help="(default: runs/flower-demo-TIME)")
    add_settings(demo)
    for part in (link, node, keys, register, demo):
        part.add_argument("--debug", action="store_true", help="show the traceback of an error")


def flower(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """``lalora flower``; ``given`` are the settings of the command line. Returns the exit code."""
    if args.part == "keys":
        make_certificates(Path(args.folder), args.host, args.clients)
        print(f"{args.folder}: keep ca.key and server.key on the server, send client-N and ca.crt to client N")
        return 0
    _need_flower()
    signal.signal(signal.SIGTERM, _interrupt)  # so that what was started is stopped
    return {"run": _run, "superlink": _superlink, "supernode": _supernode, "register": _register, "demo": _demo}[
        args.part
    ](args, given)


def simulate(
    config: Config | None,
    folder: Path,
    display: FlowerDisplay,
    kinds: Sequence[str] = (),
    log_private: bool = False,
) -> int:
    """``lalora train --engine flower-sim``: clients as Ray actors on this machine; no ``config``: resume ``folder``.

    ``kinds``: the writers of loggers.py that take the rounds too; ``log_private``: with what is of private records.
    """
    _need_flower("ray")
    signal.signal(signal.SIGTERM, _interrupt)
    if config is None:
        config = make_config(_resumable(folder)["settings"], folder / "config.json")
        resumed = True
    else:
        _refuse_taken(folder)
        resumed = False
    homes = folder / "clients"
    for client in range(config.clients):
        _own_policy(homes / str(client), config)
    home, port, cores = folder / ".flower", free_port(), os.cpu_count() or 1
    env = environment(home, LALORA_CLIENTS=str(homes.absolute()))
    federation = {
        "num-supernodes": config.clients, "client-resources-num-cpus": 1, "client-resources-num-gpus": 0.0,
        "init-args-num-cpus": cores,
    }  # fmt: skip
    with Process(superlink_command("127.0.0.1", port, simulation=True), home / "superlink.log", env) as link:
        address = f"127.0.0.1:{port}"
        wait_for(link, address)
        control = Control(home, address)
        config = None if resumed else config
        return _to_the_end(control, folder, config, display, [link], kinds, log_private, simulate=federation)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _run(args: argparse.Namespace, given: dict[str, Any]) -> int:
    from lalora_kernels.federated.coordinator import read_sizes

    resumed = args.resume is not None  # "" of an unset variable is no new run
    if resumed and (given or args.out or args.sizes):
        raise BadInput("--resume continues a run with its own settings; leave the other flags out")
    read_sizes(args.sizes)  # here, not in the server's log
    if not 1.0 <= args.round_timeout < math.inf:
        raise BadInput(f"--round-timeout is a number of seconds, 1 or more; got {args.round_timeout:g}")
    config = None if resumed else make_config(given)
    folder = Path(args.resume if resumed else args.out or f"runs/flower-{time.strftime('%Y%m%d-%H%M%S')}")
    if config is None:
        _resumable(folder)
    else:
        _refuse_taken(folder)
    control = Control(folder / ".flower", args.superlink, _ca(args))
    return _to_the_end(control, folder, config, FlowerDisplay(), [], sizes=args.sizes, timeout=args.round_timeout)


def _to_the_end(
    control: Control,
    folder: Path,
    config: Config | None,
    display: FlowerDisplay,
    processes: Sequence[Process],
    kinds: Sequence[str] = (),
    log_private: bool = False,
    **options: Any,
) -> int:
    """The exit code, 130 for a run that was interrupted, here or elsewhere."""
    run = ""
    with ExitStack() as stack:
        writers: list[Callable[[dict[str, Any]], None]] = []

        def on_round(record: dict[str, Any]) -> None:
            if kinds and not record["round"]:  # a resumed run is told from its beginning too
                from lalora_kernels.loggers import Loggers, Source

                writers.append(stack.enter_context(Loggers(kinds, Source.read(folder), log_private)))
            display.round(folder, record)
            for write in writers:
                write(record)

        try:
            run = control.submit(folder, config, **options)
            display.begin(folder, run)
            result = follow(control, run, folder, on_round, processes)
        except BadInput:
            if run:
                control.stop(run)
            raise
        except KeyboardInterrupt:
            try:
                if run:
                    control.stop(run)
            except FlowerFailed as error:
                print(f"lalora: run {run} may go on: {error}", file=sys.stderr)
            result = {"outcome": INTERRUPTED}
    if result["outcome"] == INTERRUPTED:
        display.interrupted(folder, resumable=(folder / "config.json").exists())
        return 130
    display.finish(folder, result)
    return 0 if result["outcome"] == "finished" else 1


def _superlink(args: argparse.Namespace, _: dict[str, Any]) -> int:
    certificates = Path(args.certificates) if args.certificates else None
    if certificates is None and args.host != "127.0.0.1":
        raise BadInput("without --certificates the SuperLink stays on 127.0.0.1; make some with lalora flower keys")
    command = superlink_command(args.host, args.port, certificates, database=args.database)
    return _replace_this_process(command, Path.home() / ".flwr")


def _supernode(args: argparse.Namespace, _: dict[str, Any]) -> int:
    home = Path(args.home)
    if not (home / POLICY).is_file():
        raise BadInput(f"{home / POLICY} is missing: this client has to say what it allows (docs/flower.md)")
    ca, key = (Path(p) if p else None for p in (args.ca, args.key))
    port = args.port or free_port()
    return _replace_this_process(
        supernode_command(args.superlink, args.client, home, port, ca, key), home.absolute() / ".flower"
    )


def _replace_this_process(command: list[str], home: Path) -> int:
    home.mkdir(parents=True, exist_ok=True)
    env = environment(home)
    os.execvpe(command[0], command, env)


def _register(args: argparse.Namespace, _: dict[str, Any]) -> int:
    control = Control(Path.home() / ".flwr" / "lalora", args.superlink, _ca(args))
    for key in args.keys:
        control.register(Path(key))
        print(f"{key} registered")
    return 0


def _demo(args: argparse.Namespace, given: dict[str, Any]) -> int:
    config = make_config({"clients": 3, "fraction": 1.0, "rounds": 3} | given)
    folder = Path(args.out or f"runs/flower-demo-{time.strftime('%Y%m%d-%H%M%S')}")
    _refuse_taken(folder)
    began = time.monotonic()

    def note(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    certificates, home = folder / "keys", folder / ".flower"
    make_certificates(certificates, [], config.clients)
    note(f"a CA, the server's certificate and {config.clients} node keys in {certificates}")
    address = f"127.0.0.1:{free_port()}"
    port = int(address.rpartition(":")[2])
    if config.model == "embedded":
        from lalora_kernels.models import load_model

        load_model("embedded")  # pre-trained once, before every process would do it
    with ExitStack() as stack:
        env = environment(home)
        command = superlink_command("127.0.0.1", port, certificates)
        processes = [stack.enter_context(Process(command, folder / "superlink.log", env))]
        wait_for(processes[0], address, certificates / "ca.crt")
        note(f"SuperLink on {address}, with TLS, for registered nodes only")
        control = Control(home, address, certificates / "ca.crt")
        for client in range(config.clients):
            control.register(certificates / f"client-{client}.pub")
            own = folder / "clients" / str(client)
            _own_policy(own, config)
            command = supernode_command(
                address, client, own, free_port(), certificates / "ca.crt", certificates / f"client-{client}"
            )
            env = environment(own / ".flower")
            processes.append(stack.enter_context(Process(command, own / "supernode.log", env)))
            note(f"client {client}: key registered, SuperNode started, its policy in {own / POLICY}")
        code = _to_the_end(control, folder, config, FlowerDisplay(note=note), processes)
    if config.private:
        for client in range(config.clients):
            note(f"client {client} has spent {_spent(folder / 'clients' / str(client), config.delta)}")
    return code


def _spent(home: Path, delta: float) -> str:
    """ε on a client's own ledgers, rounded up."""
    from lalora_kernels.privacy.ledger import Ledger

    found = []
    for path in home.glob("ledgers/*/ledger.json"):
        ledger = Ledger()
        ledger.load_state_dict(json.loads(path.read_text())["ledger"])
        found.append(f"ε = {math.ceil(100 * ledger.epsilon(delta) - 1e-9) / 100:.2f}")
    return ", ".join(found) or "nothing"


def _own_policy(home: Path, config: Config) -> None:
    """A policy for just this run, where the client has none of its own."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / POLICY).exists():
        (home / POLICY).write_text(policy_for(config))


def _resumable(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises BadInput where there is none, or its run still goes on, whose files stay as they
    are."""
    from lalora_kernels.federated.run import CONFIG, read_json

    about = read_json(folder / CONFIG)
    refuse_in_use(folder)
    if not isinstance(about, dict) or "settings" not in about:
        raise BadInput(f"{folder / CONFIG} holds no settings; restore it from a copy, or start a new run")
    return about


def _refuse_taken(folder: Path) -> None:
    if (folder / "config.json").exists():
        raise BadInput(f"{folder} holds a run already; --resume {folder} continues it, another --out starts anew")


def _ca(args: argparse.Namespace) -> Path | None:
    return Path(args.certificates) / "ca.crt" if args.certificates else None


def _need_flower(*more: str) -> None:
    import importlib.util

    if missing := [name for name in ("flwr", *more) if importlib.util.find_spec(name) is None]:
        raise BadInput(f"{missing[0]} is not installed; pip install 'lalora_kernels[flower]'")


__all__ = ["FlowerFailed", "add_flower", "flower", "simulate"]

"""Flower's processes: the environment that keeps them offline, keys, SuperLink, SuperNodes, submitting a run, its end.

Flower's own commands do the work. What phones home or installs packages at run time is switched off for all of them.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lalora_kernels.data import BadInput
from lalora_kernels.federated.config import Config
from lalora_kernels.federated.lock import refuse_in_use
from lalora_kernels.files import write_atomic

APP = Path(__file__).with_name("flower_app")
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
PRIORITY = {"RAY_worker_niceness": "0"}  # Ray's default of 15 starves simulated clients beside anything else
STARTS_WITHIN = 90.0  # seconds that a SuperLink may take until it answers
INTERRUPTED = "interrupted"  # an outcome of result.json, beside running, finished, stopped and failed
ASK_AGAIN = 30.0  # seconds between two looks at a run that wrote nothing


class FlowerFailed(RuntimeError):
    """A process of Flower's ended or did not answer; the message names its log."""


def environment(home: Path, **more: str) -> dict[str, str]:
    """This process' environment for one of Flower's: offline, its files under ``home``, our commands in the path."""
    here = str(Path(sys.executable).parent)
    path = os.pathsep.join([here, os.environ.get("PATH", "")])
    quick = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": os.environ.get("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.3")}
    return {**os.environ, **OFFLINE, **PRIORITY, **quick, "FLWR_HOME": str(home), "PATH": path, **more}


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(pid: int) -> list[int]:
    """Every process that this one started, and those that they did; Flower gives them sessions of their own."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Process:
    """One of Flower's processes in a session of its own, with a log file; ``stop`` ends all that it started."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str]):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.name, self.log = command[0], log
        with open(log, "ab") as out:
            self.popen = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )

    def require(self) -> None:
        """Raises FlowerFailed where the process has ended."""
        if (code := self.popen.poll()) is not None:
            raise FlowerFailed(f"{self.name} ended with code {code}; its log is {self.log}")

    def stop(self, patience: float = 10.0) -> None:
        """SIGTERM, and after ``patience`` seconds SIGKILL to what is left of it and of all that it started."""
        family = descendants(self.popen.pid)
        self.popen.terminate()
        deadline = time.monotonic() + patience
        while (self.popen.poll() is None or any(map(alive, family))) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.popen.kill()
        self.popen.wait()
        while left := [pid for pid in family if alive(pid)]:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


# ---------------------------------------------------------------- certificates and keys


def make_certificates(folder: Path, hosts: Sequence[str], clients: int, days: int = 365) -> None:
    """ca.crt, ca.key, server.crt, server.key, and client-N, client-N.pub for each client: keys of the curve P-384.

    The server's certificate is for ``hosts`` (names or addresses) and for 127.0.0.1, which Flower's own processes use.
    Raises BadInput where the folder holds a ca.key already: to replace it would lock everybody out.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    if (folder / "ca.key").exists():
        raise BadInput(f"{folder} holds keys already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    now = datetime.datetime.now(datetime.timezone.utc)

    def store(name: str, data: bytes, secret: bool) -> None:
        write_atomic(folder / name, data)
        (folder / name).chmod(0o600 if secret else 0o644)

    def pem(key: Any, form: Any = serialization.PrivateFormat.PKCS8) -> bytes:
        return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())

    def certificate(name: str, key: Any, issuer: x509.Name | None, signer: Any) -> Any:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer or subject)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(minutes=5))
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        return (
            builder.not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(authority, critical=False)
        )

    ca, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    use = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"), False
    )  # fmt: skip
    root = certificate("lalora federation CA", ca, None, ca)
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    root = root.add_extension(x509.KeyUsage(**use | {"key_cert_sign": True, "crl_sign": True}), critical=True)
    root = root.sign(ca, hashes.SHA384())
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    leaf = certificate(next(iter([*hosts, "localhost"])), server, root.subject, ca)
    leaf = leaf.add_extension(x509.SubjectAlternativeName(names), critical=False)
    leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    leaf = leaf.sign(ca, hashes.SHA384())
    store("ca.key", pem(ca), True)
    store("ca.crt", root.public_bytes(serialization.Encoding.PEM), False)
    store("server.key", pem(server), True)
    store("server.crt", leaf.public_bytes(serialization.Encoding.PEM), False)
    for client in range(clients):
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        store(f"client-{client}", pem(key, serialization.PrivateFormat.OpenSSH), True)
        store(f"client-{client}.pub", public + f" client-{client}\n".encode(), False)


# ---------------------------------------------------------------- SuperLink and SuperNodes


def superlink_command(
    host: str, port: int, certificates: Path | None = None, simulation: bool = False, database: Path | None = None
) -> list[str]:
    """``flower-superlink`` with TLS and node keys, or without either where there are no ``certificates``."""
    command = ["flower-superlink", "--host", host, "--port", str(port)]
    if certificates is None:
        command += ["--insecure"]
    else:
        command += [
            "--ssl-ca-certfile",
            str(certificates / "ca.crt"),
            "--ssl-certfile",
            str(certificates / "server.crt"),
        ]
        command += ["--ssl-keyfile", str(certificates / "server.key"), "--enable-supernode-auth"]
    command += ["--simulation"] if simulation else []
    return command + (["--database", str(database)] if database else [])


def supernode_command(
    superlink: str, client: int, home: Path, port: int, ca: Path | None = None, key: Path | None = None
) -> list[str]:
    """``flower-supernode`` for one client; without ``ca`` insecure; ``port`` is for its own processes, on loopback."""
    command = ["flower-supernode", "--superlink", superlink, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--insecure"] if ca is None else ["--root-certificates", str(ca)]
    command += ["--auth-supernode-private-key", str(key)] if key else []
    return [*command, "--node-config", f"client={client} home='{home.absolute()}'"]


def wait_for(superlink: Process, address: str, ca: Path | None = None) -> None:
    """Until the SuperLink answers. Raises FlowerFailed where it ends or takes too long."""
    import ssl

    context = ssl.create_default_context(cafile=str(ca)) if ca else None
    url = f"{'https' if ca else 'http'}://{address}/health"
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline:
        superlink.require()
        try:
            with urllib.request.urlopen(url, timeout=2, context=context):
                return
        except OSError:
            time.sleep(0.2)
    raise FlowerFailed(f"the SuperLink at {address} did not answer; its log is {superlink.log}")


# ---------------------------------------------------------------- a run


class Control:
    """A SuperLink's control interface by ``flwr``: whoever reaches it can run code there, so it stays on loopback."""

    def __init__(self, home: Path, address: str, ca: Path | None = None):
        self.home, self.address = home, address
        security = "insecure = true" if ca is None else f"root-certificates = {json.dumps(str(ca.absolute()))}"
        text = f'[superlink]\ndefault = "lalora"\n\n[superlink.lalora]\naddress = "{address}"\n{security}\n'
        write_atomic(home / "config.toml", text)

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        command = ["flwr", *arguments, "--format", "json"]
        done = subprocess.run(command, env=environment(self.home), capture_output=True, text=True, timeout=120)
        try:
            answer = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            answer = {}
        if done.returncode or not answer.get("success", True):
            said = (answer.get("error-message") or done.stderr or done.stdout).strip()
            raise FlowerFailed(f"flwr {arguments[0]} at {self.address} failed: {said[-600:]}")
        return answer

    def register(self, public_key: Path) -> None:
        """Let the node with this key in, under the file's name: "client-2.pub" can be client 2 and no other."""
        self._flwr("supernode", "register", str(public_key), "lalora", "--name", public_key.stem)

    def submit(
        self,
        folder: Path,
        config: Config | None,
        *,
        sizes: str = "",
        timeout: float = 600.0,
        simulate: dict[str, Any] | None = None,
    ) -> str:
        """Start the app on ``folder``: a new run with ``config``, without it the continuation; returns Flower's id.

        Raises BadInput for a folder whose run still goes on: result.json is that run's.
        """
        refuse_in_use(folder)
        (folder / "result.json").unlink(missing_ok=True)
        settings = "" if config is None else json.dumps(json.loads(config.to_json()))
        values = {"folder": str(folder.absolute()), "settings": settings, "sizes": sizes, "timeout": int(timeout)}
        lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
        write_atomic(self.home / "run.toml", lines)
        federation = " ".join(f"{name}={value}" for name, value in (simulate or {}).items())
        more = ["--federation-config", federation] if federation else []
        return str(self._flwr("run", str(APP), "lalora", "--run-config", str(self.home / "run.toml"), *more)["run-id"])

    def ended(self, run: str) -> str | None:
        """Flower's own word on how the run ended, or None while it goes on."""
        runs = self._flwr("ls", "lalora", "--run-id", run)["runs"]
        status = runs[0]["status"] if runs else "finished:unknown"
        return status if status.startswith("finished") else None

    def stop(self, run: str) -> None:
        """End the run; its folder can be resumed."""
        self._flwr("stop", run, "lalora")


def follow(
    control: Control,
    run: str,
    folder: Path,
    on_round: Callable[[dict[str, Any]], None] = lambda record: None,
    processes: Sequence[Process] = (),
) -> dict[str, Any]:
    """Report rounds, also those that are there already; returns result.json: what the server says, and never Flower's
    exit code alone.

    A round is reported once config.json is there. A server that ended without a word has failed, or was interrupted
    where Flower says that it was stopped. Raises FlowerFailed where one of ``processes`` ended.
    """
    asked, shown = time.monotonic(), 0
    while True:
        result = _read(folder / "result.json")
        lines = _lines(folder / "metrics.jsonl") if (folder / "config.json").exists() else []
        for line in lines[shown:]:
            on_round(json.loads(line))
            asked = time.monotonic()
        shown = max(shown, len(lines))
        if result.get("outcome", "running") != "running":
            return result
        for process in processes:
            process.require()
        if time.monotonic() - asked > ASK_AGAIN:
            asked = time.monotonic()
            if (status := control.ended(run)) is not None:
                result = _read(folder / "result.json")
                if result.get("outcome", "running") == "running":
                    outcome = INTERRUPTED if status == "finished:stopped" else "failed"
                    return {"outcome": outcome, "why": f"the server's process ended ({status})", "round": None}
                continue
        time.sleep(0.3)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []

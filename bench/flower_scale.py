"""Memory of a simulation over Flower against the number of clients; ten of them a round.

    python bench/flower_scale.py --clients 10 100 --out bench/results/flower-scale.md

Every process of the simulation is looked at once a second: proportional set size (each shared page counted once over
all processes), of the server, of Ray's client workers, and of Ray itself.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lalora_kernels.federated.flower import descendants

KINDS = {"flwr-simulation": "server", "ray::ClientAppActor": "client workers", "flower-superlink": "SuperLink"}


def memory(pid: int) -> tuple[str, float]:
    """(which part of the simulation a process is, its proportional set size in MiB)"""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    kind = next((kind for mark, kind in KINDS.items() if mark in command), "Ray and others")
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return kind, next(int(row.split()[1]) for row in rows if row.startswith("Pss:")) / 1024


def simulate(clients: int, rounds: int, folder: Path) -> dict:
    """One run of the tiny transformer on 12 digits a client; peaks over time of each part."""
    command = [
        str(Path(sys.executable).with_name("lalora")), "train", "--engine", "flower-sim", "--out", str(folder / "run"),
        "--dataset", "mnist", "--clients", str(clients), "--fraction", str(10 / clients), "--rounds", str(rounds),
        "--partition", "iid", "--batch-size", "4", "--min-records", "12", "--local-steps", "2", "--rank", "4",
        "--device", "cpu",
    ]  # fmt: skip
    began, peaks = time.monotonic(), {}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            now: dict[str, float] = {}
            for pid in descendants(process.pid):
                try:
                    kind, mib = memory(pid)
                except (OSError, StopIteration):  # it has just ended
                    continue
                now[kind] = now.get(kind, 0.0) + mib
            peaks = {kind: max(peaks.get(kind, 0.0), now.get(kind, 0.0)) for kind in peaks.keys() | now.keys()}
            time.sleep(1.0)
    finally:
        process.terminate()  # where this was interrupted
        process.wait()
    if process.returncode:
        raise RuntimeError(f"the run with {clients} clients ended with code {process.returncode}")
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    answered = sum(len(record["clients"]) for record in records[1:])
    return {"clients": clients, "peaks": peaks, "answered": answered, "seconds": time.monotonic() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for clients in args.clients:
        folder = Path(tempfile.mkdtemp())
        try:
            rows.append(simulate(clients, args.rounds, folder))
        finally:
            shutil.rmtree(folder)
    parts = ["server", "client workers", "SuperLink", "Ray and others"]
    cores = os.cpu_count()
    text = [
        f"Simulation over Flower, 10 clients a round, {args.rounds} rounds, embedded model, r = 4; {cores} cores, "
        f"Python {platform.python_version()}. Peak proportional set size in MiB (python bench/flower_scale.py); the "
        f"time includes starting Ray, on a machine that did other work too.",
        "",
        f"| clients | answers | {' | '.join(parts)} | seconds |",
        "|---:|---:|" + "---:|" * (len(parts) + 1),
    ]
    for row in rows:
        cells = " | ".join(f"{row['peaks'].get(part, 0):.0f}" for part in parts)
        text.append(f"| {row['clients']} | {row['answered']} | {cells} | {row['seconds']:.0f} |")
    print("\n".join(text))
    if args.out:
        args.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()

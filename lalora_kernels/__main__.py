"""``python -m lalora_kernels``: what is installed, what this machine has, and which backend serves each operation."""

import os
import platform
import sys

import torch

from lalora_kernels import __version__, dispatch


def _native() -> list[tuple[str, str]]:
    from lalora_kernels import native

    try:
        module = native.require()
    except ImportError as error:
        return [("cpp", f"not available: {error}")]
    compiled = ", ".join(name for name, _ in module.isas())
    features = ", ".join(name for name, found in module.cpu_features().items() if found)
    forced = " (LALORA_CPU_ISA)" if os.environ.get("LALORA_CPU_ISA") else ""
    return [
        ("compiled with", module.compiler),
        ("compiled for", f"{compiled}; OpenMP {'yes' if module.openmp else 'no'}"),
        ("CPU features", features or "none that matter here"),
        ("CPU kernels", module.isa() + forced),
    ]


def _devices() -> list[tuple[str, str]]:
    rows = [("threads", str(torch.get_num_threads()))]
    found = [f"cpu ({platform.machine()})"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            found.append(f"cuda:{i} ({torch.cuda.get_device_name(i)}, sm_{major}{minor})")
    return rows + [("devices", ", ".join(found))]


def main() -> int:
    """Print the report; 0, or 1 where the CPU kernels cannot run."""
    versions = [("lalora_kernels", __version__), ("python, torch", f"{platform.python_version()}, {torch.__version__}")]
    rows = [*versions, *_native(), *_devices()]
    for name, value in rows:
        print(f"{name:<15} {value}")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    columns = [(d, t) for d in devices for t in (torch.float32, torch.bfloat16, torch.float64)]
    heads = [f"{d} {str(t).removeprefix('torch.')}" for d, t in columns]
    print("\n" + f"{'backend of':<17}" + "".join(f"{h:<15}" for h in heads) + "available")
    errors: dict[str, None] = {}
    for op, row in dispatch.explain(devices).items():
        cells = []
        for column in columns:
            cell = row[column]
            if cell.startswith("error"):
                errors[cell] = None
                cell = "error"
            cells.append(f"{cell:<15}")
        print(f"{op:<17}" + "".join(cells) + ", ".join(row["available"]))
    for error in errors:
        print(error)
    if any("/cuda" in row[column] for row in dispatch.explain(devices).values() for column in columns):
        print("triton/cuda: cuda serves layers that are small (docs/gpu.md)")
    print("unproven: no committed result of bench/gpu.sh shows that it passed its tests on a card; chosen only by name")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory of this process, as the system counts it."""

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def start_peak() -> int | None:
    """Let the peak be counted from here; bytes that are resident now. None where the system keeps one peak for good."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide the next growth
        CLEAR.write_text("5")  # proc(5): the peak becomes what is resident now
        return _resident("VmRSS")
    except (OSError, AttributeError):
        return None


def peak_memory() -> int | None:
    """Most bytes resident since ``start_peak``, else since the process began; None where the system does not tell."""
    try:
        return _resident("VmHWM")
    except (OSError, AttributeError):
        pass
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_device_memory(device: torch.device) -> int | None:
    """Most bytes that torch held on a CUDA device since ``start_peak``; None for another device."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.M)
    if found is None:
        raise OSError(f"{STATUS} has no {field}")
    return 1024 * int(found.group(1))

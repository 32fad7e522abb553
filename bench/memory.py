"""Memory of this process, as the system counts it, and on a GPU as torch's allocator does."""

import contextlib
import ctypes
import gc
import re
from pathlib import Path

import torch


def used(device: str = "cpu") -> int | None:
    """Bytes in use now; None where the system does not tell."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def peak(device: str = "cpu") -> int | None:
    """The most bytes in use since `forget_peak`; None where the system does not tell."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def forget_peak(device: str = "cpu") -> None:
    """Let the peak start again from what is in use now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    # On another system, or where it is not allowed, the peak includes what came before.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _status(kind: str) -> int | None:
    status = Path("/proc/self/status")
    found = re.search(rf"{kind}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None

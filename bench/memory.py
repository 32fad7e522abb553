"""Memory of this process, as the system counts it."""

import contextlib
import ctypes
import gc
import re
from pathlib import Path


def resident(kind: str = "VmRSS") -> int | None:
    """Bytes resident now (VmRSS) or at most since `forget_peak` (VmHWM); None where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(rf"{kind}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def forget_peak() -> None:
    """Let VmHWM start again from what is resident now."""
    gc.collect()
    # On another system, or where it is not allowed, the peak includes what came before.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

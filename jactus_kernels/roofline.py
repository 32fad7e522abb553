"""Predicted time of a list of launches on a named GPU: the larger of arithmetic and traffic, plus the launch itself; eagerly,
no less than the host takes to launch them.

Peaks are the vendors' data sheets; the shares of them that are reached are assumptions, the same for every GPU, and
hold until a measurement corrects them (see `policy`). Nothing here is a measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .launches import LIBRARY, Launch


@dataclass(frozen=True)
class Gpu:
    """Data-sheet peaks: TFLOP/s of dense 16-bit, TF32 and plain float32 products, GB/s of memory, multiprocessors."""

    name: str
    family: str
    half: float
    tf32: float
    fp32: float
    bandwidth: float
    multiprocessors: int


GPUS = (
    Gpu("A100", "sm_80", 312, 156, 19.5, 2039, 108),
    Gpu("H100", "sm_90", 989, 494, 67, 3350, 132),
    Gpu("H200", "sm_90", 989, 494, 67, 4800, 132),
    Gpu("B200", "sm_100", 2250, 1125, 75, 8000, 148),
    Gpu("MI300X", "gfx942", 1307, 653, 163, 5300, 304),
)

# Our assumptions, until measured.
CUBLAS_SHARE = 0.80  # of peak arithmetic, by the vendor's library
TRITON_SHARE = 0.65  # of peak arithmetic, by these kernels
BANDWIDTH_SHARE = 0.90
LAUNCH_US = 2.0  # from one kernel's end to the next one's start
# Of the host, a launch: the fastest eager calls of one token on an H100 (two kernels 86 us, three products 34 us).
KERNEL_HOST_US = 43.0
LIBRARY_HOST_US = 11.0


def find_gpu(name: str, family: str | None = None) -> Gpu | None:
    """The entry whose name occurs in a device's name, else the family's first, else None."""
    named = [gpu for gpu in GPUS if gpu.name in name]
    return next(iter(named or [gpu for gpu in GPUS if gpu.family == family]), None)


def products_per_second(gpu: Gpu, dtype: str, precision: str) -> float:
    """Peak FLOP/s for inputs of "half" or "fp32", the latter made as `precision` says."""
    if dtype == "half":
        return gpu.half * 1e12
    return {"ieee": gpu.fp32, "tf32": gpu.tf32, "tf32x3": gpu.tf32 / 3}[precision] * 1e12


def predict(
    launches: Sequence[Launch],
    gpu: Gpu,
    dtype: str,
    precision: str,
    library_precision: str = "ieee",
    captured: bool = False,
) -> float:
    """Microseconds for the launches one after another, each at the share of the peaks assumed of its origin, and in the
    precision of float32 products that the kernels, or the library, make. `captured`: in a CUDA graph, which has no host."""
    total = host = 0.0
    for launch in launches:
        library = launch.kernel in (LIBRARY, "torch")
        peak = products_per_second(gpu, dtype, library_precision if library else precision)
        reached = CUBLAS_SHARE if library else TRITON_SHARE
        filled = min(1.0, max(1, launch.blocks) / gpu.multiprocessors)
        arithmetic = launch.flops / (peak * reached)
        traffic = launch.bytes / (gpu.bandwidth * 1e9 * BANDWIDTH_SHARE)
        total += max(arithmetic, traffic) / filled * 1e6 + LAUNCH_US
        host += LIBRARY_HOST_US if library else KERNEL_HOST_US
    return total if captured else max(total, host)


def floor(launches: Sequence[Launch], gpu: Gpu, dtype: str, precision: str) -> float:
    """Microseconds that no implementation of these launches can beat: full peaks, a full device, free launches."""
    peak = products_per_second(gpu, dtype, precision)
    return sum(max(x.flops / peak, x.bytes / (gpu.bandwidth * 1e9)) for x in launches) * 1e6

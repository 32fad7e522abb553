"""Which implementation runs for which shape: the roofline model's choice, corrected by measurements.

A measurement file (`measured/<device>.csv`, written by `make gpu`) holds, per shape, the microseconds of a call of both
implementations: eager, launching included, and captured in a CUDA graph, where launching is free. A call that is being captured goes by
the latter. A prediction is scaled by what the nearest measured shape of the same operator took against
its own prediction, so a measured shape is decided by its measurement. A GPU without a file of its own takes that of its family,
or else of whichever was measured. JACTUS_POLICY names another file, or is "none".
"""

import csv
import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

from . import settings
from .device import find_family_of, resolve_precision
from .errors import JactusError
from .launches import LIBRARY, Launch, Shape, torch_launches, triton_launches
from .roofline import GPUS, Gpu, find_gpu, floor, predict

OPERATORS = (
    "covariance_update",
    "core_linear",
    "core_linear_train",
    "core_linear_backward",
    "folded_linear",
    "narrow",
    "widen",
)
MARGIN = 0.95  # the kernel must be predicted this much faster: between equals, the vendor's library
MEASURED = Path(__file__).parent / "measured"
COLUMNS = ("op", "dtype", "T", "m", "n", "r", "triton_us", "torch_us", "mode")  # of a measurement file
# A training step of a layer is measured whole: its forward, that keeps h, and its backward.
PASSES = {"training": ("core_linear_train", "core_linear_backward")}
MEASURED_AS = {op: whole for whole, ops in PASSES.items() for op in ops}
EXACT_TOKENS = 64  # above it, numbers of tokens are decided alike within an eighth of a power of two
AS_MEASURED = settings.Settings("fused", "auto")  # with plain float32 products in torch


@dataclass(frozen=True)
class Decision:
    """Which backend runs, and why; times in microseconds, None where nothing was predicted. Printable."""

    op: str
    backend: str  # "triton" or "torch"
    reason: str
    triton_us: float | None = None
    torch_us: float | None = None
    floor_us: float | None = None
    launches: tuple[Launch, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}, because {self.reason}"]
        if self.triton_us is not None:
            kernels = " + ".join(launch.kernel for launch in self.launches)
            lines += [f"  triton {self.triton_us:10.1f} us  {kernels}", f"  torch  {self.torch_us:10.1f} us"]
            lines += [f"  floor  {self.floor_us:10.1f} us  data-sheet peaks, free launches"]
        return "\n".join(lines)


def explain(
    op: str,
    *,
    T: int,
    n: int,
    m: int = 0,
    r: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    gpu: str | None = None,
    captured: bool = False,
) -> Decision:
    """Which backend `op` would run on for a shape, and why; print the result to read it.

    op: one of OPERATORS; T tokens, m outputs, n inputs, r rank; gpu: a name such as "H100", by default the current
    CUDA device; captured: in a CUDA graph. The settings in force (JACTUS_BACKEND, `use`, torch's own of TF32) are honoured.

    Raises JactusError for an operator or a GPU that is not known.
    """
    op = op.removesuffix("_")  # as the function is called
    if op not in OPERATORS:
        raise JactusError(f"explain: no operator {op!r}; there are {', '.join(OPERATORS)}")
    shape = Shape(T, n if op == "covariance_update" else m, n, r, dtype.itemsize)
    if gpu is not None:
        known = find_gpu(gpu)
        if known is None:
            raise JactusError(f"explain: no data sheet for {gpu!r}; there are {', '.join(g.name for g in GPUS)}")
        return decide(op, shape, dtype, known.name, known.family, settings.current(), captured)
    if not torch.cuda.is_available():
        return Decision(op, "torch", "there is no GPU here (pass gpu= to ask about one)")
    return for_device(op, shape, dtype, torch.cuda.current_device(), captured)


def for_device(op: str, shape: Shape, dtype: torch.dtype, index: int, captured: bool = False) -> Decision:
    """`decide` for a CUDA device of this process; asked on every call, so lengths that differ little are decided alike."""
    return decide(op, _coarse(shape), dtype, _name(index), find_family_of(index), settings.current(), captured)


def _coarse(shape: Shape) -> Shape:
    """T cut to its four leading bits: batches of ragged texts would otherwise be decided anew each."""
    if shape.T <= EXACT_TOKENS:
        return shape
    cut = shape.T.bit_length() - 4
    return replace(shape, T=shape.T >> cut << cut)


@lru_cache(maxsize=64)
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def decide(
    op: str,
    shape: Shape,
    dtype: torch.dtype,
    name: str,
    family: str | None,
    asked: settings.Settings,
    captured: bool = False,
) -> Decision:
    """The decision for one shape on a named device, under these settings, torch's and the environment's."""
    precision = "tf32" if dtype == torch.float32 and _torch_uses_tf32() else "ieee"
    return _decide(op, shape, dtype, name, family, asked, precision, os.environ.get("JACTUS_POLICY"), captured)


@lru_cache(maxsize=1 << 16)
def _decide(
    op: str,
    shape: Shape,
    dtype: torch.dtype,
    name: str,
    family: str | None,
    asked: settings.Settings,
    torch_precision: str,
    file: str | None,
    captured: bool,
) -> Decision:
    if asked.backend == "torch":
        return Decision(op, "torch", "JACTUS_BACKEND or use(backend=...) says so")
    gpu, lacking = find_gpu(name, family), _lacking(dtype, name, family)
    if lacking or gpu is None or family is None:
        if asked.backend != "auto":
            raise JactusError(f"{op}: backend {asked.backend} was asked for, but {lacking}; use auto or torch")
        return Decision(op, "torch", lacking)
    ours, theirs = _launches(op, shape, gpu, asked), torch_launches(op, shape)
    predicted = _predicted(op, shape, gpu, asked, torch_precision, captured)
    scales, where = _corrections(op, shape, gpu, _file(file, name, family), captured)
    triton_us, torch_us = (us * scale for us, scale in zip(predicted, scales))
    kind, precision = _kind(shape), resolve_precision(asked.fp32, family)
    least = min(floor(ours, gpu, kind, precision), floor(theirs, gpu, kind, torch_precision))
    if asked.backend != "auto":
        backend, reason = "triton", "JACTUS_BACKEND or use(backend=...) says so"
    elif all(launch.kernel == LIBRARY for launch in ours):
        backend, reason = "torch", "at this shape no kernel fuses anything"
    else:
        backend = "triton" if triton_us < MARGIN * torch_us else "torch"
        reason = f"{where} {torch_us / triton_us:.2f} times the speed of torch for the kernels"
    return Decision(op, backend, reason, triton_us, torch_us, least, ours)


def _lacking(dtype: torch.dtype, name: str, family: str | None) -> str:
    if find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels have no {dtype}"
    return "" if family else f"no kernel configuration was checked for {name}"


def _launches(op: str, shape: Shape, gpu: Gpu, asked: settings.Settings) -> tuple[Launch, ...]:
    library = asked.backend != "triton"
    return tuple(triton_launches(op, shape, gpu.family, gpu.multiprocessors, library=library))


def _torch_uses_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    # torch 2.9 has one setting in place of another, and raises where both were used
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _kind(shape: Shape) -> str:
    return "half" if shape.itemsize == 2 else "fp32"


def _predicted(
    op: str, shape: Shape, gpu: Gpu, asked: settings.Settings, torch_precision: str, captured: bool
) -> tuple[float, float]:
    """Microseconds of the kernels and of torch, as the roofline model has them; for "training", of both its passes."""
    precision, ours, theirs = resolve_precision(asked.fp32, gpu.family), 0.0, 0.0
    for part in PASSES.get(op, (op,)):
        how = (gpu, _kind(shape), precision, torch_precision, captured)
        ours += predict(_launches(part, shape, gpu, asked), *how)
        theirs += predict(torch_launches(part, shape), *how)
    return ours, theirs


def _corrections(op: str, shape: Shape, gpu: Gpu, file: Path | None, captured: bool) -> tuple[tuple[float, float], str]:
    """Measured over predicted time of both backends at the nearest measured shape, and where the claim comes from."""
    found, mode = _measurements(file) if file else {}, "graph" if captured else "eager"
    op = MEASURED_AS.get(op, op)
    kind, other = ("half", "fp32") if shape.itemsize == 2 else ("fp32", "half")
    rows = found.get((op, kind, mode)) or found.get((op, other, mode))
    if file is None or not rows:
        return (1.0, 1.0), "the roofline model, not a measurement, predicts"
    wanted = _logarithms(shape)
    near = min(rows, key=lambda row: sum(abs(a - b) for a, b in zip(row.logarithms, wanted)))
    on = find_gpu(file.stem.upper()) or gpu
    triton_us, torch_us = _predicted(op, near.shape, on, AS_MEASURED, "ieee", captured)
    exact = near.logarithms == wanted and near.shape.itemsize == shape.itemsize
    where = "measured here:" if exact else "the nearest measured shape corrects the prediction to"
    if on.name != gpu.name:
        where = f"measurements of another GPU, {on.name}, correct the prediction to"
    return (near.triton_us / triton_us, near.torch_us / torch_us), where


@dataclass(frozen=True)
class _Measured:
    shape: Shape
    logarithms: tuple[float, ...]
    triton_us: float
    torch_us: float


def _logarithms(shape: Shape) -> tuple[float, ...]:
    return tuple(math.log2(size + 1) for size in (shape.T, shape.m, shape.n, shape.r))


@lru_cache(maxsize=64)
def _file(asked: str | None, name: str, family: str) -> Path | None:
    """The measurements to go by: those asked for, the device's own, its family's, or another's."""
    if asked:
        return None if asked == "none" else Path(asked)
    shipped = sorted(MEASURED.glob("*.csv"))
    own = [path for path in shipped if path.stem == slug(name)]
    kin = [path for path in shipped if (gpu := find_gpu(path.stem.upper())) and gpu.family == family]
    return next(iter([*own, *kin, *shipped]), None)


@lru_cache(maxsize=16)
def _measurements(path: Path) -> dict[tuple[str, str, str], list[_Measured]]:
    """The rows of a file by operator, "half" or "fp32", and "eager" or "graph"; those of before there was a mode are eager."""
    found: dict[tuple[str, str, str], list[_Measured]] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                T, m, n, r = (int(row[size]) for size in ("T", "m", "n", "r"))
                shape = Shape(T, m, n, r, 4 if row["dtype"] == "fp32" else 2)
                times = float(row["triton_us"]), float(row["torch_us"])
                if min(times) <= 0:
                    raise ValueError(f"a time of {min(times)}")
                key = (row["op"], row["dtype"], row.get("mode") or "eager")
                found.setdefault(key, []).append(_Measured(shape, _logarithms(shape), *times))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise JactusError(
            f"{path}: not a measurement file of `make gpu` ({error!r}); name another in JACTUS_POLICY, or none, or "
            "measure again"
        ) from None
    return found


def slug(name: str) -> str:
    """A device's name as a file name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")

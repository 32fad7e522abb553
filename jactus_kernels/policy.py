"""Which implementation runs for which shape: the roofline model's choice, corrected by measurements if there are any.

A measurement file (written by `make gpu`) holds, per shape, the microseconds of both implementations. A prediction is
scaled by what the nearest measured shape of the same operator and dtype took against its own prediction, so a measured
shape is decided by its measurement. No file is shipped until a GPU has made one.
"""

import json
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

from . import settings
from .device import find_family_of, resolve_precision
from .errors import JactusError
from .plan import Launch, Shape, torch_launches, triton_launches
from .roofline import GPUS, find_gpu, floor, predict

OPERATORS = ("covariance_update", "core_linear", "core_linear_train", "core_linear_backward", "folded_linear")
MARGIN = 0.95  # the kernel must be predicted this much faster: between equals, the vendor's library
MEASURED = Path(__file__).parent / "measured"


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
    op: str, *, T: int, n: int, m: int = 0, r: int = 0, dtype: torch.dtype = torch.bfloat16, gpu: str | None = None
) -> Decision:
    """Which backend `op` would run on for a shape, and why; print the result to read it.

    op: one of OPERATORS; T tokens, m outputs, n inputs, r rank; gpu: a name such as "H100", by default the current
    CUDA device. The settings in force (JACTUS_BACKEND, `use`) are honoured.

    Raises JactusError for an operator or a GPU that is not known.
    """
    op = op.removesuffix("_")  # as the function is called
    if op not in OPERATORS:
        raise JactusError(f"explain: no operator {op!r}; there are {', '.join(OPERATORS)}")
    if gpu is not None:
        known = find_gpu(gpu)
        if known is None:
            raise JactusError(f"explain: no data sheet for {gpu!r}; there are {', '.join(g.name for g in GPUS)}")
        return decide(op, Shape(T, m, n, r, dtype.itemsize), dtype, known.name, known.family, settings.current())
    if not torch.cuda.is_available():
        return Decision(op, "torch", "there is no GPU here (pass gpu= to ask about one)")
    return for_device(op, Shape(T, m, n, r, dtype.itemsize), dtype, torch.cuda.current_device())


def for_device(op: str, shape: Shape, dtype: torch.dtype, index: int) -> Decision:
    """`decide` for a CUDA device of this process."""
    return decide(op, shape, dtype, _name(index), find_family_of(index), settings.current())


@lru_cache(maxsize=64)
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@lru_cache(maxsize=8192)
def decide(
    op: str, shape: Shape, dtype: torch.dtype, name: str, family: str | None, asked: settings.Settings
) -> Decision:
    """The decision for one shape on a named device; cached, since it is asked on every call."""
    if asked.backend == "torch":
        return Decision(op, "torch", "JACTUS_BACKEND or use(backend=...) says so")
    gpu, lacking = find_gpu(name, family), _lacking(dtype, name, family)
    if lacking or gpu is None or family is None:
        if asked.backend != "auto":
            raise JactusError(f"{op}: backend {asked.backend} was asked for, but {lacking}; use auto or torch")
        return Decision(op, "torch", lacking)
    half = "half" if shape.itemsize == 2 else "fp32"
    precision = resolve_precision(asked.fp32, family)
    ours, theirs = (
        tuple(triton_launches(op, shape, family, gpu.multiprocessors, library=asked.backend != "triton")),
        torch_launches(op, shape),
    )
    torch_precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    triton_us, torch_us = predict(ours, gpu, half, precision), predict(theirs, gpu, half, torch_precision)
    triton_scale, torch_scale, where = _corrections(op, shape, half, name)
    triton_us, torch_us = triton_us * triton_scale, torch_us * torch_scale
    least = min(floor(ours, gpu, half, precision), floor(theirs, gpu, half, torch_precision))
    if asked.backend != "auto":
        backend, reason = "triton", "JACTUS_BACKEND or use(backend=...) says so"
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


def _corrections(op: str, shape: Shape, dtype: str, name: str) -> tuple[float, float, str]:
    """Measured over predicted time of both backends at the nearest measured shape, and where the claim comes from."""
    rows = [row for row in _measurements(name) if row["op"] == op and row["dtype"] == dtype]
    if not rows:
        return 1.0, 1.0, "the roofline model, not a measurement, predicts"

    def distance(row: dict) -> float:
        return sum(abs(math.log2((getattr(shape, key) + 1) / (row[key] + 1))) for key in ("T", "m", "n", "r"))

    row = min(rows, key=distance)
    exact = distance(row) == 0
    where = "measured here:" if exact else "the nearest measured shape corrects the prediction to"
    return row["triton_us"] / row["triton_predicted_us"], row["torch_us"] / row["torch_predicted_us"], where


@lru_cache(maxsize=16)
def _measurements(name: str) -> list[dict]:
    path = Path(os.environ.get("JACTUS_POLICY") or MEASURED / f"{slug(name)}.json")
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["rows"]
    except (ValueError, KeyError) as error:
        raise JactusError(
            f"{path}: not a measurement file of `make gpu` ({error}); remove it or measure again"
        ) from None


def slug(name: str) -> str:
    """A device's name as a file name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")

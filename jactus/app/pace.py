"""How fast this machine multiplies and factors, measured in a few seconds, and what stages take at that pace."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from ..planning.subspace import directions, metric
from ..planning.subspace import seen as seen_metric
from .estimate import Estimate

SIDE = 1024  # of what is measured: smaller matrices are factored at another rate
FACTORING = 5  # planning takes m²(n + 5m) of the shorter side m, to a tenth from 512 to 2,048


@dataclass(frozen=True)
class Pace:
    """`flops`: a second, in the slower of float32, which sums are in, and the dtype that weights have there; `layer`: seconds to plan
    a layer of SIDE × SIDE; `where` they were measured."""

    flops: float
    layer: float
    where: str


def here() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measured(dtype: torch.dtype, device: torch.device | None = None) -> Pace:
    """The pace of a device (None: the GPU, where there is one)."""
    device = device or here()
    square = torch.randn(SIDE, SIDE, device=device)
    W = square.double() / SIDE**0.5
    G = W @ W.T

    def product(kind: torch.dtype) -> float:
        a = square.to(kind)
        return 2 * SIDE**3 / _seconds(lambda: a @ a, device)

    def layer() -> None:
        directions(W, metric(G, 0.01, device), seen_metric(G, 1.0, 0.01, device), SIDE, 0)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Pace(min(map(product, {torch.float32, dtype})), _seconds(layer, device, 3), name)


def seconds(e: Estimate, pace: Pace) -> dict[str, float]:
    """What calibrating and planning take by stage, at the least: attention, reading and the disk are not counted."""
    again = (
        (e.passes - 1) * 2.0 * e.targeted * e.tokens
    )  # each pass goes forward through all layers, and back to its first
    planning = sum(k.count * _work(k.m, k.n) for k in e.kinds) / _work(SIDE, SIDE)
    return {"calibrate": (e.flops + again) / pace.flops, "plan": planning * pace.layer}


def line(e: Estimate, pace: Pace) -> str:
    """The same as a line of text."""
    took = seconds(e, pace)
    return (
        f"on this machine ({pace.where}), at the least: calibrating {_spoken(took['calibrate'])} at {pace.flops / 1e9:,.0f} GFLOP/s, "
        f"planning {_spoken(took['plan'])}"
    )


def _work(m: int, n: int) -> float:
    small, large = sorted((m, n))
    return float(small**2 * (large + FACTORING * small))


def _seconds(call: Callable[[], object], device: torch.device, times: int = 5) -> float:
    taken = []
    for _ in range(times + 1):  # the first warms up
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return median(taken[1:])


def _spoken(seconds: float) -> str:
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"

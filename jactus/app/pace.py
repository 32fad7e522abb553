"""How fast this machine multiplies and factors, measured in a few seconds, and what stages take at that pace."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config import JactusConfig
from ..planning.subspace import directions, metric
from ..planning.subspace import seen as seen_metric
from .estimate import Estimate, estimate
from .subject import DEVICE

SIDE = 1024  # of what is measured: smaller matrices are factored at another rate
FACTORING = 5  # planning takes m²(n + 5m) of the shorter side m, to a tenth from 512 to 2,048


@dataclass(frozen=True)
class Pace:
    """`flops`: a second, in the slower of float32, which sums are in, and the dtype that weights have there; `layer`: seconds to plan
    a layer of SIDE × SIDE; `where` they were measured."""

    flops: float
    layer: float
    where: str


def measured(dtype: torch.dtype) -> Pace:
    """The pace of the device that `jactus fit` uses."""
    square = torch.randn(SIDE, SIDE, device=DEVICE)
    W = square.double() / SIDE**0.5
    G = W @ W.T

    def product(kind: torch.dtype) -> float:
        a = square.to(kind)
        return 2 * SIDE**3 / _median(lambda: a @ a)

    def layer() -> None:
        directions(W, metric(G, 0.01, W.device), seen_metric(G, 1.0, 0.01, W.device), SIDE, 0)

    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Pace(min(map(product, {torch.float32, dtype})), _median(layer), where)


def of_run(source: str | os.PathLike, config: JactusConfig, memory_limit: int | None) -> tuple[dict[str, float], str]:
    """Seconds by stage of a run on this machine, and the line that says so; weights are in the dtype that `jactus fit` gives them."""
    e = estimate(source, config, dtype=torch.float32 if DEVICE == "cpu" else None, memory_limit=memory_limit)
    pace = measured(getattr(torch, e.dtype))
    return seconds(e, pace), line(e, pace)


def seconds(e: Estimate, pace: Pace) -> dict[str, float]:
    """What calibrating and planning take by stage, at the least: attention, reading and the disk are not counted."""
    # each pass goes forward through all layers, and back to its first
    again = (e.passes - 1) * 2.0 * e.targeted * e.tokens
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


def _median(run: Callable[[], object]) -> float:
    from torch.utils.benchmark import Timer  # here: few need it, and it takes a tenth of a second to import

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


def _spoken(seconds: float) -> str:
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"

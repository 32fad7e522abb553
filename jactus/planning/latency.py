"""How long a deployed layer takes: measured here, on the device of the weights, for `Budget(unit="latency")`.

What is smaller is not always faster: two narrow products in the place of a small one cost two calls. So under this unit a
layer's cost is its measured time, and ranks that do not pay are not on offer. Our choice, beyond the paper.
"""

import copy
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..config import JactusConfig
from ..model.lowrank import FoldedLinear
from ..model.targets import Target
from .allocation import admissible_ranks

RANKS = 5  # of each shape, evenly spread; on a CPU the time between them is nearly a straight line
ROUNDS = 3
# Between two calls of one layer a model reads all the others, so its weights come from memory and not from a cache: each layer is
# timed over copies of itself, as many as the model has layers, of this many bytes at most (all six layers of a shape: six
# times that), and fewer where many tokens use a weight once it is there.
COPIED = 64 * 2**20


@dataclass(frozen=True)
class Times:
    """Median seconds a call: `dense`, and folded at each of `ranks`."""

    dense: float
    ranks: tuple[int, ...]
    folded: tuple[float, ...]

    def at(self, ranks: np.ndarray) -> np.ndarray:
        """Seconds at each of `ranks` (J,), rising: interpolated, and no rank quicker than a smaller one."""
        if not self.ranks:  # none but the full one
            return np.full(len(ranks), self.dense)
        return np.interp(ranks, self.ranks, np.maximum.accumulate(self.folded)) + 1e-9 * self.dense * ranks


@dataclass(frozen=True)
class Kind:
    """What the time of a layer depends on: `weight` and `basis` are the dtypes it has dense, and of its factors."""

    m: int
    n: int
    transposed: bool
    bias: bool
    weight: torch.dtype
    basis: torch.dtype
    device: torch.device

    def folded(self, rank: int) -> FoldedLinear:
        """Such a layer, all its numbers alike and written: memory that never was is read from one page."""
        with torch.device(self.device):
            layer = FoldedLinear(self.m, self.n, rank, self.bias, self.transposed, self.basis)
        for p in layer.parameters():
            p.fill_(1 / self.n)
        layer.order.copy_(torch.randperm(min(self.m, self.n), device=self.device).expand(2, -1))  # type: ignore[union-attr]
        return layer


def measured(targets: dict[str, Target], config: JactusConfig) -> dict[str, Times]:
    """The times of every target layer, each kind measured once, for `config.budget.latency_tokens` in the dtype of the weights."""
    found: dict[Kind, Times] = {}
    times = {}
    for name, t in targets.items():
        dtype = t.module.get_parameter("weight").dtype
        bias = t.module.bias is not None
        kind = Kind(t.m, t.n, t.transposed, bias, dtype, config.basis_dtype(dtype), t.device)
        if kind not in found:
            found[kind] = _measure(kind, config, len(targets))
        times[name] = found[kind]
    return times


@torch.no_grad()
def _measure(kind: Kind, config: JactusConfig, layers: int) -> Times:
    from torch.utils.benchmark import Timer  # here: few need it, and it takes a tenth of a second to import

    offered = admissible_ranks(kind.m, kind.n, config.allocation.rank_multiple)[:-1]
    chosen = np.unique(np.linspace(0, len(offered) - 1, min(RANKS, len(offered))).round().astype(int))
    ranks = tuple(int(r) for r in offered[chosen])
    x = torch.ones(config.budget.latency_tokens, kind.n, dtype=kind.weight, device=kind.device)
    contenders: list[nn.Module] = [*map(kind.folded, ranks), kind.folded(1).dense().to(kind.weight)]
    timers = []
    for layer in contenders:
        each = sum(p.numel() * p.element_size() for p in layer.parameters())
        count = max(1, min(COPIED // (each * len(x)), layers))
        run = _run([layer, *(copy.deepcopy(layer) for _ in range(count - 1))], x)
        timers.append((count, Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())))
    # the timer synchronises the current device, which need not be the layer's
    with torch.cuda.device(kind.device) if kind.device.type == "cuda" else nullcontext():
        rounds = [[timer.blocked_autorange(min_run_time=0.05).median / k for k, timer in timers] for _ in range(ROUNDS)]
    *folded, dense = (statistics.median(column) for column in zip(*rounds))
    return Times(dense, ranks, tuple(folded))


def _run(layers: list[nn.Module], x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            for layer in layers:
                layer(x)

    return run

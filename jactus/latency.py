"""How long a deployed layer takes: measured here, on the device of the weights, for `budget_unit="latency"`.

What is smaller is not always faster: two narrow products in the place of a small one cost two calls. So under this unit a
layer's cost is its measured time, and ranks that do not pay are not on offer. Our choice, beyond the paper.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer

from .allocation import admissible_ranks
from .config import JactusConfig
from .layers import FoldedLinear
from .targets import Target

RANKS = 5  # of each shape, evenly spread; the time between them is nearly a straight line
ROUNDS = 3
# Layers are timed in turn over copies of this many bytes together (or as many as the model has, if fewer): between two
# calls of one layer a model reads all the others, so its weights come from memory and not from a cache.
COPIED = 128 * 2**20


@dataclass(frozen=True)
class Times:
    """Median seconds a call: `dense`, and folded at each of `ranks`."""

    dense: float
    ranks: tuple[int, ...]
    folded: tuple[float, ...]

    def at(self, ranks: np.ndarray) -> np.ndarray:
        """Seconds at each of `ranks` (J,), rising: interpolated, and no rank quicker than a smaller one."""
        if not len(ranks):
            return np.zeros(0)
        seconds = np.maximum.accumulate(np.interp(ranks, self.ranks, self.folded))
        return seconds + 1e-6 * self.dense * np.arange(len(seconds))


def measured(targets: dict[str, Target], config: JactusConfig) -> dict[str, Times]:
    """The times of every target layer, each shape measured once, in the dtype the factors are stored in."""
    size = sum(t.weight.numel() * t.weight.element_size() for t in targets.values())
    found: dict[tuple, Times] = {}
    times = {}
    for name, target in targets.items():
        weight = target.weight
        dtype = getattr(torch, config.dtype) if config.dtype else weight.dtype
        kind = (target.m, target.n, target.transposed, target.module.bias is not None, dtype, weight.device)
        if kind not in found:
            found[kind] = _measure(*kind, config.rank_multiple, config.latency_tokens, min(size, COPIED))
        times[name] = found[kind]
    return times


@torch.no_grad()
def _measure(
    m: int, n: int, transposed: bool, bias: bool, dtype: torch.dtype, device: torch.device, multiple: int, tokens: int,
    copied: int,
) -> Times:  # fmt: skip
    offered = admissible_ranks(m, n, multiple, folded=True)
    chosen = (
        np.unique(offered[np.linspace(0, len(offered) - 1, RANKS).round().astype(int)]) if len(offered) else offered
    )
    ranks = tuple(int(r) for r in chosen)
    x = torch.ones(tokens, n, dtype=dtype, device=device)
    layers: list[nn.Module] = [_filled(m, n, r, bias, transposed, dtype, device) for r in ranks]
    layers.append(_filled(m, n, 1, bias, transposed, dtype, device).dense())
    timers = []
    for layer in layers:
        each = sum(p.numel() * p.element_size() for p in layer.parameters())
        copies = [layer, *(copy.deepcopy(layer) for _ in range(copied // each))]
        timers.append(
            (len(copies), Timer("run()", globals={"run": _run(copies, x)}, num_threads=torch.get_num_threads()))
        )
    rounds = [[t.blocked_autorange(min_run_time=0.05).median / k for k, t in timers] for _ in range(ROUNDS)]
    *folded, dense = (statistics.median(column) for column in zip(*rounds))
    return Times(dense, ranks, tuple(folded))


def _filled(m: int, n: int, rank: int, bias: bool, transposed: bool, dtype: torch.dtype, device: Any) -> FoldedLinear:
    with torch.device(device):
        layer = FoldedLinear(m, n, rank, bias, transposed, dtype)
    for p in layer.parameters():
        p.fill_(1 / n)  # written: memory that never was is read from one page
    return layer


def _run(layers: list[nn.Module], x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            for layer in layers:
                layer(x)

    return run

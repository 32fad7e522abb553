"""One deployed layer, alone: without its pivots against a pair of factors of the same size, and against dense."""

from collections.abc import Iterator

import torch
from torch import nn

from jactus import FoldedLinear
from jactus.model.pivots import pivots
from jactus.planning.allocation import admissible_ranks, parameters

from ..report import versions
from . import checks
from .race import race, ratio
from .store import Row, Setting, compared

SHAPES = ((768, 768), (3072, 768), (768, 3072), (4096, 4096))  # ViT-B's, and one of a Llama-7B's
TOKENS = 512
BUDGETS = (0.8, 0.5)


@torch.inference_mode()
def layers() -> Iterator[Row]:
    """A call for TOKENS tokens, one thread, weights stored in the dtype. Errors are those of the layer without its pivots against
    float64; its pair's and the dense layer's are rows of their own, since they have no pivots to lose digits by."""
    torch.set_num_threads(1)
    for m, n in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for budget in BUDGETS:
                yield from _layer(m, n, dtype, budget)


def _layer(m: int, n: int, dtype: torch.dtype, budget: float) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, n, generator=generator).to(dtype)
    found: dict[str, nn.Module] = {}
    errors = {}
    for name, accounting in (("compact", "compact"), ("pair", "folded")):
        rank = _rank(m, n, budget, accounting)
        left = torch.randn(m, rank, generator=generator, dtype=torch.float64) / rank**0.5
        right = torch.randn(rank, n, generator=generator, dtype=torch.float64) / n**0.5
        layer = FoldedLinear(m, n, rank, bias=False, pivoted=name == "compact")
        if name == "pair":
            layer.left, layer.right = (nn.Parameter(t.to(dtype), requires_grad=False) for t in (left, right))
        else:
            near, far = (left, right.T) if m <= n else (right.T, left)
            order, B = pivots(near)
            layer.hold(order, B, far @ near[order[0, :rank]].T, dtype)
        found[name], exact = layer, x.double() @ (left @ right).T
        errors[name] = checks.relative(layer(x), exact)
        checks.within(f"{name}, {m}×{n} in {dtype}", errors[name], LARGEST[dtype])
    found["dense"] = nn.Linear(n, m, bias=False, dtype=dtype)
    times = race({name: lambda layer=layer: layer(x) for name, layer in found.items()}, seconds=6.0)  # type: ignore[misc]
    size = {name: sum(p.numel() for p in layer.parameters()) for name, layer in found.items()}
    at = Setting(f"{m} × {n}", str(dtype).removeprefix("torch."), 1, 1, TOKENS)
    for ours, theirs in (("compact", "pair"), ("compact", "dense"), ("pair", "dense")):
        measure = "folded layer" if ours == "compact" else "folded layer, a pair"
        floor = size[ours] / size[theirs]
        yield compared(measure, at, budget, theirs, ratio(times[ours], times[theirs]), floor, errors[ours], versions())


LARGEST = {torch.float32: 1e-5, torch.bfloat16: 6e-2}


def _rank(m: int, n: int, budget: float, accounting: str) -> int:
    ranks = admissible_ranks(m, n, 16, accounting)
    return int(ranks[parameters(m, n, ranks, accounting) <= budget * m * n][-1])

"""Step 4: how much rank each layer gets under one budget, by marginal gain per unit of cost.

A layer offers points (cost, gain) at its admissible ranks, the last of which is its full one: gain is the loss avoided, the sum
of the squared singular values kept in the metric (one unit over all layers), cost is parameters, bytes, FLOPs or seconds.
Marginal gain per cost along the upper concave hull of these points falls, so the best steps of all layers, sorted by slope and
taken until the budget is spent, are optimal up to one step. A matrix of rank r has r(m+n−r) degrees of freedom and is deployed
in as many numbers, at full rank m·n: the curve of cost has no jump.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jactus_kernels import JactusError


@dataclass(frozen=True)
class Offer:
    """What one layer offers: parallel arrays over its admissible ranks, rising in rank, cost and gain.

    ranks, cost, gain: (J,), J ≥ 1. dense_cost: what it costs as it is.
    """

    name: str
    ranks: np.ndarray
    cost: np.ndarray
    gain: np.ndarray
    dense_cost: float


def admissible_ranks(m: int, n: int, multiple: int, accounting: str = "compact") -> np.ndarray:
    """Multiples of `multiple` at which a layer costs less than the dense m×n, and its full rank, at which it costs as much."""
    ranks = np.arange(multiple, min(m, n), multiple)
    return np.append(ranks[parameters(m, n, ranks, accounting) < m * n], min(m, n))


def parameters(m: int, n: int, rank: Any, accounting: str = "compact") -> Any:
    """What a layer of some rank counts: r(m+n−r), its degrees of freedom; as a pair of factors r(m+n), with its core r(m+n)+r²,
    and at full rank m·n in any case."""
    more = {"compact": -1, "folded": 0, "three_factor": 1}[accounting]
    return np.where(np.asarray(rank) == min(m, n), m * n, rank * (m + n) + more * rank * rank)


def allocate(
    offers: list[Offer], budget: float, fraction: float, uniform: bool, floor: int = 0, part: float = 0.0
) -> list[int]:
    """For each offer the index of the point chosen, at a total cost of `budget` at most.

    fraction: the budget as a part of the dense cost, which is what every layer gets when `uniform`.
    floor, part: under global allocation a layer's least rank, and its least part of its uniform rank; the greater holds.

    Raises JactusError when the floors alone cost more than the budget.
    """
    even = _evenly(offers, budget, fraction)
    if uniform:
        chosen = even
    else:
        floors = [_floor_index(o, e, floor, part) for o, e in zip(offers, even)]
        chosen = _by_marginal_gain(offers, budget, floors)
    spent = sum(o.cost[c] for o, c in zip(offers, chosen))
    if spent > budget * (1 + 1e-12):
        least = sum(o.cost[0] for o in offers) / sum(o.dense_cost for o in offers)
        whole = sum(o.cost[0] >= o.dense_cost for o in offers)
        raise JactusError(
            f"a budget of {fraction:.4g} of the targeted layers is less than their least ranks cost; raise the budget, "
            f"lower rank_floor or rank_multiple (the least of all costs {least:.4g}, with {whole} of {len(offers)} layers "
            "whole because no rank of theirs is cheaper)"
        )
    return chosen


def _evenly(offers: list[Offer], budget: float, fraction: float) -> list[int]:
    """What every layer affords with the same part of its dense cost: `fraction`, or less where some layers' least ranks
    cost more than that and the others must make up for it."""

    def at(part: float) -> list[int]:
        return [_affordable(o, part * o.dense_cost) for o in offers]

    def fits(part: float) -> bool:
        return sum(o.cost[c] for o, c in zip(offers, at(part))) <= budget * (1 + 1e-12)

    if fits(fraction):
        return at(fraction)
    low, high = 0.0, fraction
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return at(low)


def _affordable(offer: Offer, cost: float) -> int:
    """The last point that costs no more, or the first."""
    return max(int(np.searchsorted(offer.cost, cost * (1 + 1e-12), side="right")) - 1, 0)


def _floor_index(offer: Offer, even: int, floor: int, part: float) -> int:
    """The first point whose rank is not below the floors."""
    least = min(int(np.searchsorted(offer.ranks, floor)), len(offer.ranks) - 1)
    return max(least, min(int(np.searchsorted(offer.ranks, int(part * offer.ranks[even]))), even))


def _by_marginal_gain(offers: list[Offer], budget: float, floors: list[int]) -> list[int]:
    """A threshold on the slopes of all hulls at once; then, in the same order, what still fits of the steps cut off."""
    chosen = np.array(floors)
    left = budget - sum(o.cost[c] for o, c in zip(offers, floors))
    hulls = [upper_hull(o.cost[c:], o.gain[c:]) + c for o, c in zip(offers, floors)]
    layer = np.repeat(np.arange(len(offers)), [len(h) - 1 for h in hulls])
    goal = np.concatenate([h[1:] for h in hulls])
    cost = np.concatenate([np.diff(o.cost[h]) for o, h in zip(offers, hulls)])
    gain = np.concatenate([np.diff(o.gain[h]) for o, h in zip(offers, hulls)])
    order = np.argsort(-gain / cost, kind="stable")  # stable: ties go to the earlier layer, in its own order
    taken = int(np.searchsorted(np.cumsum(cost[order]), left * (1 + 1e-12), side="right"))
    np.maximum.at(chosen, layer[order[:taken]], goal[order[:taken]])
    left -= float(cost[order[:taken]].sum())
    for step in order[taken:]:
        offer, now = offers[layer[step]], chosen[layer[step]]
        best = min(_affordable(offer, offer.cost[now] + left), int(goal[step]))
        if best > now and offer.gain[best] > offer.gain[now]:
            left -= offer.cost[best] - offer.cost[now]
            chosen[layer[step]] = best
    return chosen.tolist()


def upper_hull(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Indices of the upper concave hull of points rising in x, from the first to the highest."""
    top = int(np.argmax(y))
    hull: list[int] = []
    for k in range(top + 1):
        while len(hull) > 1:
            i, j = hull[-2], hull[-1]
            if (y[j] - y[i]) * (x[k] - x[i]) > (y[k] - y[i]) * (x[j] - x[i]):
                break
            hull.pop()
        hull.append(k)
    return np.array(hull)

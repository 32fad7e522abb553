"""Allocation: against brute force on small cases, and within the budget on all."""

from itertools import product

import numpy as np
import pytest

from jactus.planning.allocation import Offer, admissible_ranks, allocate, parameters, upper_hull
from jactus_kernels import JactusError


def offer(name, m, n, seed, multiple=1, folded=False, dense=True):
    energy = np.sort(np.random.default_rng(seed).exponential(size=min(m, n)))[::-1] ** 3
    kept = np.concatenate([[0], np.cumsum(energy)])
    ranks = admissible_ranks(m, n, multiple, folded)
    cost, gain = parameters(m, n, ranks, folded), kept[ranks]
    if dense:
        ranks, cost, gain = np.append(ranks, min(m, n)), np.append(cost, m * n), np.append(gain, kept[-1])
    return Offer(name, ranks, cost.astype(float), gain, dense, float(m * n))


def totals(offers, chosen):
    return sum(o.cost[c] for o, c in zip(offers, chosen)), sum(o.gain[c] for o, c in zip(offers, chosen))


def brute_force(offers, budget):
    every = product(*(range(len(o.ranks)) for o in offers))
    return max(gain for cost, gain in (totals(offers, c) for c in every) if cost <= budget + 1e-9)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.8])
def test_equals_brute_force_where_steps_cost_the_same(seed, fraction):
    offers = [offer(f"l{i}", 8, 8, 10 * seed + i, folded=True, dense=False) for i in range(4)]
    budget = fraction * 4 * 64
    cost, gain = totals(offers, allocate(offers, budget, fraction, uniform=False, floor=1))
    assert cost <= budget
    assert gain == pytest.approx(brute_force(offers, budget))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("folded", [False, True])
def test_is_within_one_step_of_brute_force_for_layers_of_all_shapes(seed, folded):
    shapes = [(6, 9), (12, 5), (8, 8), (4, 14)]
    offers = [offer(f"l{i}", m, n, 10 * seed + i, folded=folded) for i, (m, n) in enumerate(shapes)]
    dense = sum(o.dense_cost for o in offers)
    for fraction in (0.5, 0.7, 0.9):
        cost, gain = totals(offers, allocate(offers, fraction * dense, fraction, uniform=False, floor=1))
        assert cost <= fraction * dense
        # the hull's step that no longer fitted is all that can be lost
        steps = [np.diff(o.gain[upper_hull(o.cost, o.gain)]).max(initial=0.0) for o in offers]
        assert gain >= brute_force(offers, fraction * dense) - max(steps) - 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_never_exceeds_the_budget_and_beats_uniform_up_to_a_step(seed):
    rng = np.random.default_rng(seed)
    offers = [
        offer(f"l{i}", *rng.integers(20, 90, size=2), seed=100 * seed + i, multiple=int(rng.choice([1, 4, 8])))
        for i in range(10)
    ]
    dense = sum(o.dense_cost for o in offers)
    for fraction in (0.35, 0.5, 0.8, 1.0):
        found = {
            uniform: totals(offers, allocate(offers, fraction * dense, fraction, uniform, part=0.0))
            for uniform in (False, True)
        }
        assert all(cost <= fraction * dense for cost, _ in found.values())
        step = max(np.diff(o.gain[upper_hull(o.cost, o.gain)]).max(initial=0.0) for o in offers)
        assert found[False][1] >= found[True][1] - step


def test_the_whole_budget_is_everything_dense():
    offers = [offer("a", 10, 20, 1), offer("b", 7, 7, 2)]
    assert allocate(offers, 249.0, 1.0, False, part=0.5) == [len(o.ranks) - 1 for o in offers]
    assert all(o.is_dense(c) for o, c in zip(offers, allocate(offers, 249.0, 1.0, True, part=0.5)))


def test_a_layer_that_needs_all_its_rank_stays_dense_and_one_that_does_not_pays_for_it():
    flat, steep = np.ones(10), np.array([100.0] + [1e-6] * 9)
    offers = []
    for name, energy in (("flat", flat), ("steep", steep)):
        ranks = admissible_ranks(10, 10, 1, False)
        kept = np.concatenate([[0], np.cumsum(energy)])
        cost = np.append(parameters(10, 10, ranks, False), 100).astype(float)
        offers.append(Offer(name, np.append(ranks, 10), cost, np.append(kept[ranks], 10 * 1.0), True, 100.0))
    chosen = allocate(offers, 130.0, 0.65, False, 1)
    assert offers[0].is_dense(chosen[0])
    assert offers[1].ranks[chosen[1]] == 1


def test_floors():
    offers = [offer("a", 40, 40, 1), offer("b", 40, 40, 2)]
    uniform = [int(o.ranks[c]) for o, c in zip(offers, allocate(offers, 1600.0, 0.5, True, 0))]
    for floor in (0.5, 0.9, 1.0):
        chosen = allocate(offers, 1600.0, 0.5, False, part=floor)
        assert all(o.ranks[c] >= int(floor * u) for o, c, u in zip(offers, chosen, uniform))
    chosen = allocate(offers, 1600.0, 0.5, False, 7)
    assert all(o.ranks[c] >= 7 for o, c in zip(offers, chosen))


def test_a_budget_below_the_floors_is_refused_with_the_least_that_is_possible():
    offers = [offer("a", 40, 40, 1), offer("b", 40, 40, 2)]
    with pytest.raises(JactusError, match="raise the budget"):
        allocate(offers, 0.01 * 3200, 0.01, False, part=0.5)
    with pytest.raises(JactusError, match="rank_floor"):
        allocate(offers, 0.5 * 3200, 0.5, False, 15)


@pytest.mark.parametrize("folded", [False, True])
def test_admissible_ranks_are_cheaper_than_dense_and_none_is_missed(folded):
    for m, n, multiple in ((30, 50, 1), (64, 64, 8), (5, 5, 8), (2, 2, 1)):
        ranks = admissible_ranks(m, n, multiple, folded)
        assert all(parameters(m, n, int(r), folded) < m * n for r in ranks)
        following = (ranks[-1] if len(ranks) else 0) + multiple
        assert following > min(m, n) or parameters(m, n, following, folded) >= m * n

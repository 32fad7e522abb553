"""Allocation: against brute force on small cases, and within the budget on all."""

from itertools import product

import numpy as np
import pytest

from jactus.planning.allocation import Offer, admissible_ranks, allocate, parameters, upper_hull
from jactus_kernels import JactusError

ACCOUNTINGS = ("compact", "folded", "three_factor")
accountings = pytest.mark.parametrize("accounting", ACCOUNTINGS)


def offer(name, m, n, seed, multiple=1, accounting="compact"):
    energy = np.sort(np.random.default_rng(seed).exponential(size=min(m, n)))[::-1] ** 3
    return of_energies(name, m, n, energy, multiple, accounting)


def of_energies(name, m, n, energy, multiple=1, accounting="compact"):
    ranks = admissible_ranks(m, n, multiple, accounting)
    kept = np.concatenate([[0], np.cumsum(energy)])
    return Offer(name, ranks, parameters(m, n, ranks, accounting).astype(float), kept[ranks], float(m * n))


def is_full(offer, chosen):
    return chosen == len(offer.ranks) - 1


def totals(offers, chosen):
    return sum(o.cost[c] for o, c in zip(offers, chosen)), sum(o.gain[c] for o, c in zip(offers, chosen))


def brute_force(offers, budget):
    every = product(*(range(len(o.ranks)) for o in offers))
    return max(gain for cost, gain in (totals(offers, c) for c in every) if cost <= budget + 1e-9)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.8])
def test_equals_brute_force_where_steps_cost_the_same(seed, fraction):
    layers = [offer(f"l{i}", 8, 8, 10 * seed + i, accounting="folded") for i in range(4)]
    # up to rank 3 each costs 16 more; the full rank, which costs as much again, is not theirs here
    offers = [Offer(o.name, o.ranks[:-1], o.cost[:-1], o.gain[:-1], o.dense_cost) for o in layers]
    assert all(np.ptp(np.diff(o.cost)) == 0 for o in offers)
    budget = fraction * 4 * 64
    cost, gain = totals(offers, allocate(offers, budget, fraction, uniform=False, floor=1))
    assert cost <= budget
    assert gain == pytest.approx(brute_force(offers, budget))


@pytest.mark.parametrize("seed", range(12))
@accountings
def test_is_within_one_step_of_brute_force_for_layers_of_all_shapes(seed, accounting):
    shapes = [(6, 9), (12, 5), (8, 8), (4, 14)]
    offers = [offer(f"l{i}", m, n, 10 * seed + i, accounting=accounting) for i, (m, n) in enumerate(shapes)]
    dense = sum(o.dense_cost for o in offers)
    for fraction in (0.5, 0.7, 0.9):
        cost, gain = totals(offers, allocate(offers, fraction * dense, fraction, uniform=False, floor=1))
        assert cost <= fraction * dense
        # the hull's step that no longer fitted is all that can be lost
        steps = [np.diff(o.gain[upper_hull(o.cost, o.gain)]).max(initial=0.0) for o in offers]
        assert gain >= brute_force(offers, fraction * dense) - max(steps) - 1e-9


@accountings
@pytest.mark.parametrize("seed", range(20))
def test_never_exceeds_the_budget_and_beats_uniform_up_to_a_step(seed, accounting):
    rng = np.random.default_rng(seed)
    offers = [
        offer(f"l{i}", *rng.integers(20, 90, size=2), 100 * seed + i, int(rng.choice([1, 4, 8])), accounting)
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


@accountings
def test_of_layers_of_one_shape_global_allocation_spends_the_budget_to_within_a_step(accounting):
    for seed in range(5):
        offers = [offer(f"l{i}", 24, 36, 10 * seed + i, multiple=2, accounting=accounting) for i in range(6)]
        dense = sum(o.dense_cost for o in offers)
        for fraction in (0.3, 0.5, 0.7, 0.9):
            chosen = allocate(offers, fraction * dense, fraction, False)
            left = fraction * dense - totals(offers, chosen)[0]
            following = [o.cost[c + 1] - o.cost[c] for o, c in zip(offers, chosen) if not is_full(o, c)]
            assert 0 <= left < min(following), "none of them can have its next rank as well"


@accountings
def test_the_whole_budget_is_the_full_rank_of_everything(accounting):
    offers = [offer("a", 10, 20, 1, accounting=accounting), offer("b", 7, 7, 2, accounting=accounting)]
    for uniform in (False, True):
        chosen = allocate(offers, 249.0, 1.0, uniform, part=0.5)
        assert [int(o.ranks[c]) for o, c in zip(offers, chosen)] == [10, 7]


@accountings
def test_a_layer_that_needs_all_its_rank_has_it_and_one_that_does_not_pays_for_it(accounting):
    flat, steep = np.ones(10), np.array([100.0] + [1e-6] * 9)
    offers = [of_energies("flat", 10, 10, flat, 1, accounting), of_energies("steep", 10, 10, steep, 1, accounting)]
    chosen = allocate(offers, 130.0, 0.65, False, 1)
    assert is_full(offers[0], chosen[0])
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


def test_a_budget_that_layers_with_only_a_full_rank_exceed_is_refused_and_they_are_counted():
    offers = [offer("a", 40, 40, 1, multiple=8), offer("b", 6, 40, 2, multiple=8)]
    least = (8 * 72 + 6 * 40) / (40 * 40 + 6 * 40)
    with pytest.raises(JactusError, match=rf"least of all costs {least:.4g}, with 1 of 2 layers whole"):
        allocate(offers, 0.1 * 1840, 0.1, False)


SHAPES = [(30, 50, 1), (50, 30, 4), (64, 64, 8), (16, 40, 16), (5, 5, 8), (2, 2, 1), (1, 7, 1)]
shapes = pytest.mark.parametrize("m, n, multiple", SHAPES)


@accountings
@shapes
def test_admissible_ranks_are_cheaper_than_dense_but_the_full_one_and_none_is_missed(m, n, multiple, accounting):
    *lower, full = admissible_ranks(m, n, multiple, accounting).tolist()
    assert full == min(m, n)
    every = [r for r in range(multiple, full, multiple) if parameters(m, n, r, accounting) < m * n]
    assert lower == every
    if accounting == "compact":
        assert lower == list(range(multiple, full, multiple)), "of degrees of freedom no lower rank has too many"


@accountings
@shapes
def test_cost_rises_with_rank_and_ends_at_the_dense_one(m, n, multiple, accounting):
    ranks = admissible_ranks(m, n, multiple, accounting)
    cost = parameters(m, n, ranks, accounting)
    assert (np.diff(cost) > 0).all()
    assert cost[-1] == m * n
    more = {"compact": -1, "folded": 0, "three_factor": 1}[accounting]
    assert cost[:-1].tolist() == [r * (m + n) + more * r**2 for r in ranks[:-1].tolist()]


def test_the_curve_of_the_compact_cost_has_no_jump_at_full_rank():
    ranks = np.arange(1, 31)
    cost = parameters(30, 50, ranks)
    assert np.diff(cost).tolist() == [30 + 50 - 2 * r - 1 for r in range(1, 30)]
    assert (cost[-1], parameters(30, 50, 30)) == (30 * 50, 30 * 50)

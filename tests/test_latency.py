"""A budget of time: what layers were measured to take decides, and what does not pay has its full rank, which folds to dense."""

import copy
import math
import re
import types
from typing import ClassVar

import numpy as np
import pytest
import torch

import jactus
from jactus import JactusError, Plan
from jactus.model.targets import find_targets
from jactus.planning.allocation import Offer, admissible_ranks, allocate
from jactus.planning.latency import Times, measured
from tests.models import BERT, GPT2, SMALL

TIMED = SMALL.replace(budget_unit="latency", rank_multiple=1)


def invented(targets, config):
    """Square layers take a nanosecond for each number; the others are slower folded, at any rank."""

    def times(t):
        ranks = tuple(range(1, min(t.m, t.n)))
        folded = [1e-9 * r * (t.m + t.n - r) if t.m == t.n else 2e-9 * t.m * t.n for r in ranks]
        return Times(1e-9 * t.m * t.n, ranks, tuple(folded))

    return {name: times(t) for name, t in targets.items()}


@pytest.fixture
def timed(monkeypatch):
    monkeypatch.setattr("jactus.planning.planner.measured", invented)
    model = BERT.model()
    statistics = jactus.calibrate(model, BERT.batches(), TIMED, progress=False)
    return model, jactus.plan(model, statistics, TIMED, progress=False)


@pytest.mark.parametrize("budget", [0.9, 0.8])
def test_what_is_slower_at_every_rank_has_its_full_one_and_the_rest_pays_for_it(timed, budget):
    plan = timed[1].at(budget)
    oblong = {name for name, layer in plan.layers.items() if layer.m != layer.n}
    for name, layer in plan.layers.items():
        offered = layer.offer(plan.config)
        # a rank below the full one is on offer where it is quicker, and nowhere else
        assert offered.ranks.tolist() == ([16] if name in oblong else list(range(1, 17)))
        assert offered.cost[-1] == offered.dense_cost == layer.seconds(None) == layer.seconds(16)
        assert (np.diff(offered.cost) > 0).all()
    assert all(plan.ranks[name] == 16 for name in oblong)
    assert any(rank < 16 for rank in plan.ranks.values())
    spent = sum(r * (layer.m + layer.n - r) for n, layer in plan.layers.items() if (r := plan.ranks[n]) < 16)
    dense = sum(layer.m * layer.n for n, layer in plan.layers.items() if plan.ranks[n] == 16)
    expected = (spent + dense) / plan.dense_parameters
    assert math.isclose(plan.predicted_time, expected, rel_tol=1e-6)
    assert plan.folded_parameters == spent + dense
    assert budget - 0.1 < expected <= budget


def test_a_time_that_the_layers_of_full_rank_alone_exceed_is_refused(timed):
    plan = timed[1]
    oblong = {name for name, layer in plan.layers.items() if layer.m != layer.n}
    part = sum(plan.layers[n].m * plan.layers[n].n for n in oblong) / plan.dense_parameters
    with pytest.raises(JactusError, match=f"with {len(oblong)} of {len(plan.layers)} layers whole") as e:
        plan.at(0.3)
    least = float(re.search(r"the least of all costs ([\d.e-]+)", str(e.value))[1])
    assert part < least < part + 0.1


def test_times_are_saved_with_the_plan_and_older_plans_have_none(timed, tmp_path):
    model, plan = timed
    plan.save(tmp_path / "plan.safetensors")
    loaded = Plan.load(tmp_path / "plan.safetensors")
    assert {n: layer.times for n, layer in loaded.layers.items()} == {
        n: layer.times for n, layer in plan.layers.items()
    }
    assert loaded.at(0.8).ranks == plan.at(0.8).ranks
    assert "of dense" in str(loaded.at(0.8))
    by_count = jactus.plan(model, None, SMALL.replace(metric="identity", union=("weight",)), progress=False)
    by_count.save(tmp_path / "counted.safetensors")
    with pytest.raises(JactusError, match=r"unit='latency'"):
        _ = Plan.load(tmp_path / "counted.safetensors").predicted_time


def test_no_rank_is_taken_to_be_quicker_than_a_smaller_one():
    ranks = np.array([4, 8, 12, 16])
    seconds = Times(10.0, (4, 8, 16), (3.0, 2.0, 6.0)).at(ranks)
    assert (np.diff(seconds) > 0).all()
    np.testing.assert_allclose(seconds, [3.0, 3.0, 4.5, 6.0], rtol=1e-4)


class Clock:
    """Stands for torch's timer: a call takes a second for each parameter, and what was timed is kept."""

    timed: ClassVar[list] = []

    def __init__(self, stmt, globals, num_threads):
        self.layers, self.x = globals["run"].__closure__[0].cell_contents, globals["run"].__closure__[1].cell_contents
        Clock.timed.append((self.layers, self.x))
        globals["run"]()

    def blocked_autorange(self, min_run_time):
        seconds = sum(p.numel() for layer in self.layers for p in layer.parameters())
        return types.SimpleNamespace(median=float(seconds))


@pytest.mark.parametrize(("family", "dtype"), [(BERT, None), (GPT2, None), (BERT, "bfloat16")])
def test_each_shape_is_timed_once_dense_and_at_ranks_it_may_have(monkeypatch, family, dtype):
    monkeypatch.setattr("torch.utils.benchmark.Timer", Clock)
    monkeypatch.setattr(Clock, "timed", [])
    targets = find_targets(family.model(), TIMED)
    found = measured(targets, TIMED.replace(dtype=dtype, latency_tokens=3))
    assert found.keys() == targets.keys()
    kinds = {(t.m, t.n): found[name] for name, t in targets.items()}
    assert len(Clock.timed) == sum(len(times.ranks) + 1 for times in kinds.values())
    for name, t in targets.items():
        times, bias = found[name], t.module.bias is not None
        assert times.dense == t.m * t.n + bias * t.m
        assert times.folded == tuple(r * (t.m + t.n - r) + bias * t.m for r in times.ranks)
        *lower, full = admissible_ranks(t.m, t.n, 1).tolist()
        assert full not in times.ranks, "that one folds to a dense layer, whose time is known"
        assert (times.ranks[0], times.ranks[-1]) == (lower[0], lower[-1])
        assert len(times.ranks) == 5
        assert set(times.ranks) <= set(lower)
    for layers, x in Clock.timed:
        assert x.shape[0] == 3
        assert x.dtype == torch.float32, "activations are of the weights' dtype, whatever the factors are stored in"
        folded = isinstance(layers[0], jactus.FoldedLinear)
        assert next(layers[0].parameters()).dtype == (torch.bfloat16 if folded and dtype else torch.float32)
        assert 1 < len(layers) <= len(targets)
        assert len({p.data_ptr() for layer in layers for p in layer.parameters()}) == sum(
            1 for m in layers for _ in m.parameters()
        )


def test_many_tokens_use_a_weight_often_enough_for_one_copy(monkeypatch):
    monkeypatch.setattr("torch.utils.benchmark.Timer", Clock)
    monkeypatch.setattr("jactus.planning.latency.COPIED", 10_000)
    for tokens, copied in ((1, True), (4096, False)):
        monkeypatch.setattr(Clock, "timed", [])
        measured(find_targets(BERT.model(), TIMED), TIMED.replace(latency_tokens=tokens))
        assert any(len(layers) > 1 for layers, _ in Clock.timed) == copied


def test_a_layer_without_a_rank_that_is_smaller_has_only_its_dense_time(monkeypatch):
    monkeypatch.setattr("torch.utils.benchmark.Timer", Clock)
    config = TIMED.replace(rank_multiple=64)
    found = measured(find_targets(BERT.model(), TIMED), config)
    for times in found.values():
        assert times.ranks == ()
        assert times.dense > 0
        assert times.at(np.array([16])).tolist() == [times.dense]
        assert times.at(np.array([], dtype=int)).shape == (0,)


def test_uniform_ranks_use_what_layers_of_full_rank_leave():
    """Two of four layers have nothing but their full rank to offer; the others' steps are a third of a layer."""
    whole = [Offer(f"d{i}", np.array([48]), np.array([1.0]), np.array([1.0]), 1.0) for i in range(2)]
    steps = [
        Offer(f"s{i}", np.array([16, 32, 48]), np.array([0.2, 0.533, 1.0]), np.array([0.5, 0.8, 0.9]), 1.0)
        for i in range(2)
    ]
    assert allocate([*whole, *steps], 3.6, 0.9, True, 0) == [0, 0, 1, 1]


@pytest.mark.parametrize("changes", [{"allocation": "uniform"}, {"uniform_part": 0.0}])
def test_a_time_is_kept_under_every_allocation(monkeypatch, changes):
    monkeypatch.setattr("jactus.planning.planner.measured", invented)
    model = BERT.model()
    config = TIMED.replace(**changes)
    plan = jactus.plan(model, jactus.calibrate(model, BERT.batches(), config, progress=False), config, progress=False)
    for budget in (0.9, 0.8):
        assert budget - 0.15 < plan.at(budget).predicted_time <= budget


def test_a_model_compressed_to_a_time_works_as_any_other(timed):
    model, plan = timed
    small = jactus.fold(jactus.compress(copy.deepcopy(model), plan.at(0.8)).eval())
    batch = BERT.batch()
    assert small(**batch).logits.shape == model(**batch).logits.shape
    assert (
        jactus.size(small).stored == jactus.size(model).stored - plan.dense_parameters + plan.at(0.8).folded_parameters
    )

"""A budget of time: what layers were measured to take decides, and what does not pay stays dense."""

import copy
import math

import numpy as np
import pytest

import jactus
from jactus import JactusError, Plan
from jactus.latency import Times, measured
from jactus.targets import find_targets
from tests.models import BERT, SMALL

TIMED = SMALL.replace(accounting="folded", budget_unit="latency", rank_multiple=1)


def invented(targets, config):
    """Square layers take as long as they have weights; the others are slower folded, at any rank."""

    def times(t):
        most = t.m * t.n // (t.m + t.n)
        folded = (0.0, float(most * (t.m + t.n))) if t.m == t.n else (2.0 * t.m * t.n,) * 2
        return Times(float(t.m * t.n), (0, most), folded)

    return {name: times(t) for name, t in targets.items()}


@pytest.fixture
def timed(monkeypatch):
    monkeypatch.setattr("jactus.planning.measured", invented)
    model = BERT.model()
    statistics = jactus.calibrate(model, BERT.batches(), TIMED, progress=False)
    return model, jactus.plan(model, statistics, TIMED, progress=False)


@pytest.mark.parametrize("budget", [0.9, 0.8])
def test_what_is_slower_at_every_rank_stays_dense_and_the_rest_pays_for_it(timed, budget):
    plan = timed[1].at(budget)
    oblong = {name for name, layer in plan.layers.items() if layer.m != layer.n}
    assert {name for name, rank in plan.ranks.items() if rank is None} == oblong
    spent = {n: r * (layer.m + layer.n) for n, layer in plan.layers.items() if (r := plan.ranks[n]) is not None}
    dense = sum(plan.layers[n].m * plan.layers[n].n for n in oblong)
    expected = (sum(spent.values()) + dense) / plan.dense_parameters
    assert math.isclose(plan.predicted_time, expected, rel_tol=1e-9)
    assert budget - 0.1 < expected <= budget


def test_a_time_that_the_dense_layers_alone_exceed_is_refused(timed):
    with pytest.raises(JactusError, match="less than their least ranks cost"):
        timed[1].at(0.3)


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
    with pytest.raises(JactusError, match="budget_unit='latency'"):
        _ = Plan.load(tmp_path / "counted.safetensors").predicted_time


def test_no_rank_is_taken_to_be_quicker_than_a_smaller_one():
    ranks = np.array([4, 8, 12, 16])
    seconds = Times(10.0, (4, 8, 16), (3.0, 2.0, 6.0)).at(ranks)
    assert (np.diff(seconds) > 0).all()
    np.testing.assert_allclose(seconds, [3.0, 3.0, 4.0, 6.0], rtol=1e-4)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_each_shape_is_measured_once_at_ranks_it_may_have(monkeypatch, dtype):
    monkeypatch.setattr("jactus.latency.COPIED", 1000)
    targets = find_targets(BERT.model(), TIMED)
    found = measured(targets, TIMED.replace(dtype=dtype))
    assert found.keys() == targets.keys()
    assert len({id(times) for times in found.values()}) == len({(t.m, t.n) for t in targets.values()})
    for name, t in targets.items():
        times = found[name]
        assert 0 < times.dense < 1
        assert all(0 < s < 1 for s in times.folded)
        assert len(times.ranks) == len(times.folded) > 1
        assert all(r * (t.m + t.n) < t.m * t.n for r in times.ranks)


def test_a_model_compressed_to_a_time_works_as_any_other(timed):
    model, plan = timed
    small = jactus.fold(jactus.compress(copy.deepcopy(model), plan.at(0.8)).eval())
    batch = BERT.batch()
    assert small(**batch).logits.shape == model(**batch).logits.shape
    assert (
        jactus.size(small).stored == jactus.size(model).stored - plan.dense_parameters + plan.at(0.8).folded_parameters
    )

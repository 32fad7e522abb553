"""How far steps of the cores move the layers: against steps that are taken."""

import copy
import math
from dataclasses import replace

import pytest
import torch

import jactus
from jactus import JactusError
from jactus.coordinates import RELATIVE_STEP, factors, step_scales
from jactus.layers import core_layers
from jactus.subspace import metric
from tests.models import BERT, SMALL

CONFIGS = {
    "square": {},
    "orthonormal": {"coordinates": "orthonormal"},
    "input metric": {"metric": "input"},
    "wide": {"accounting": "folded", "core_width": 1.5},
    "full rank": {"accounting": "folded", "full_rank": True},
    "leading block": {"trainable_rank": 2},
}


@pytest.fixture(scope="module")
def bert():
    model = BERT.model()
    return model, jactus.calibrate(model, BERT.batches(), SMALL, progress=False)


def planned(bert, **changes):
    model, statistics = bert
    return jactus.plan(model, statistics, SMALL.replace(**{"budget": 0.7, **changes}), progress=False)


def reaches(plan):
    scales = step_scales(plan)
    ranks = {name: rank for name, rank in plan.ranks.items() if rank is not None}
    return {name: factors(plan.layers[name], rank, plan.config, scales[name])[3] for name, rank in ranks.items()}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_the_reach_is_how_far_random_steps_move_the_layer(bert, changes):
    plan = planned(bert, **changes)
    model = jactus.compress(copy.deepcopy(bert[0]), plan)
    expected = reaches(plan)
    assert set(expected) == set(core_layers(model))
    generator = torch.Generator().manual_seed(0)
    config, statistics = plan.config, bert[1]
    for name, layer in core_layers(model).items():
        A, G = (
            metric(S if wanted else None, config.damping, torch.device("cpu"))
            for S, wanted in (
                (statistics.input_covariance(name), True),
                (statistics.output_covariance(name), config.metric == "fisher"),
            )
        )
        L_A = torch.linalg.cholesky(A)
        L_G = torch.eye(layer.out_features, dtype=A.dtype) if G is None else torch.linalg.cholesky(G)
        p = layer.core if layer.block is None else layer.block
        signs = torch.randint(0, 2, (400, *p.shape), generator=generator).double() * 2 - 1
        k = layer.block.shape[0] if layer.block is not None else None
        left, right = L_G.T @ layer.U.detach().double()[:, :k], L_A.T @ layer.V.detach().double()[:, :k]
        moved = (left @ signs @ right.T).square().sum((1, 2))
        whole = (L_G.T @ bert[0].get_submodule(name).weight.detach().double() @ L_A).square().sum()
        # the mean of 400 draws whose squares vary by less than their mean: a twentieth, three times over, and its root half of it
        assert expected[name] == pytest.approx(float((moved.mean() / whole).sqrt()), rel=3 / 400**0.5 / 2)


def test_the_rate_moves_the_layers_by_the_same_part_whatever_the_budget_and_the_scale_of_the_weights(bert, tmp_path):
    model = bert[0]
    for plan in (planned(bert), planned(bert, budget=0.4), planned(bert, core_width=1.5, accounting="folded")):
        small = jactus.compress(copy.deepcopy(model), plan)
        logs = [math.log(jactus.learning_rate(small) * reach) for reach in reaches(plan).values()]
        assert math.exp(sum(logs) / len(logs)) == pytest.approx(RELATIVE_STEP)
    plan = planned(bert)
    found, lower = (jactus.learning_rate(jactus.compress(copy.deepcopy(model), p)) for p in (plan, plan.at(0.3)))
    assert lower > found, "low ranks bear larger steps"
    doubled = {name: replace(layer, directions=times(layer.directions, 2)) for name, layer in plan.layers.items()}
    twice = jactus.compress(copy.deepcopy(model), replace(plan, layers=doubled))
    assert jactus.learning_rate(twice) == pytest.approx(2 * found)
    jactus.save_pretrained(twice.eval(), tmp_path)
    assert jactus.learning_rate(BERT.auto.from_pretrained(tmp_path)) == jactus.learning_rate(twice)


def times(directions, factor):
    return replace(directions, sigma=factor * directions.sigma, task_core=factor * directions.task_core)


def test_a_model_without_cores_has_no_rate(bert):
    with pytest.raises(JactusError, match="no three-factor layer"):
        jactus.learning_rate(bert[0])
    small = jactus.compress(copy.deepcopy(bert[0]), planned(bert))
    for layer in core_layers(small).values():
        layer.reach = math.nan
    with pytest.raises(JactusError, match="none of the 13 three-factor layers"):
        jactus.learning_rate(small)

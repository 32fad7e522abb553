"""How far steps of the cores move the layers: against steps that are taken."""

import math
from dataclasses import replace

import pytest
import torch

import jactus
from jactus import JactusError
from jactus.compression.coordinates import OF_LANGUAGE, RELATIVE_STEP
from jactus.model.lowrank import core_layers
from jactus.planning.subspace import metric
from tests.models import BERT, LLAMA, SMALL, compressed, planned

CONFIGS = {
    "square": {},
    "orthonormal": {"coordinates": "orthonormal"},
    "input metric": {"metric": "input"},
    "wide": {"core_width": 1.5},
    "folded": {"accounting": "folded"},
    "three factors": {"accounting": "three_factor"},
    "full rank": {"budget": 1.0},
    "leading block": {"trainable_rank": 2},
}


def changed(**changes):
    return SMALL.replace(**{"budget": 0.7, **changes})


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_the_reach_is_how_far_random_steps_move_the_layer(changes):
    config, dense = changed(**changes), BERT.model()
    statistics = jactus.calibrate(dense, BERT.batches(), SMALL, progress=False)
    layers = core_layers(compressed(BERT, config))
    assert layers.keys() == {name for name, rank in planned("bert", config).ranks.items() if rank is not None}
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
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
        U, V = layer.bases()
        left, right = L_G.T @ U[:, :k], L_A.T @ V[:, :k]
        moved = (left @ signs @ right.T).square().sum((1, 2))
        whole = (L_G.T @ dense.get_submodule(name).weight.detach().double() @ L_A).square().sum()
        # the mean of 400 draws whose squares vary by less than their mean: a twentieth, three times over, and its root half of it
        assert layer.reach == pytest.approx(float((moved.mean() / whole).sqrt()), rel=3 / 400**0.5 / 2)


def test_the_rate_moves_the_layers_by_the_same_part_whatever_the_budget_and_the_scale_of_the_weights(tmp_path):
    cases = (
        *((BERT, changed(**of), RELATIVE_STEP) for of in ({}, {"budget": 0.4}, {"core_width": 1.5})),
        (LLAMA, changed(), OF_LANGUAGE),
    )
    for family, config, step in cases:
        small = compressed(family, config)
        logs = [math.log(jactus.learning_rate(small) * layer.reach) for layer in core_layers(small).values()]
        assert math.exp(sum(logs) / len(logs)) == pytest.approx(step)
    plan = planned("bert", changed())
    found, lower = (jactus.learning_rate(jactus.compress(BERT.model(), p)) for p in (plan, plan.at(0.3)))
    assert lower > found, "low ranks bear larger steps"
    doubled = {name: replace(layer, directions=times(layer.directions, 2)) for name, layer in plan.layers.items()}
    twice = jactus.compress(BERT.model(), replace(plan, layers=doubled))
    assert jactus.learning_rate(twice) == pytest.approx(2 * found)
    jactus.save_pretrained(twice.eval(), tmp_path)
    assert jactus.learning_rate(BERT.auto.from_pretrained(tmp_path)) == jactus.learning_rate(twice)


def times(directions, factor):
    return replace(directions, sigma=factor * directions.sigma, task_core=factor * directions.task_core)


def test_a_model_without_cores_has_no_rate():
    with pytest.raises(JactusError, match="no three-factor layer"):
        jactus.learning_rate(BERT.model())
    small = compressed(BERT, changed())
    for layer in core_layers(small).values():
        layer.reach = math.nan
    with pytest.raises(JactusError, match="none of the 13 three-factor layers"):
        jactus.learning_rate(small)

"""Bases are orthonormal, and the suggested rate moves the layers by a fixed part of themselves: against steps that are taken."""

import math
from dataclasses import replace

import pytest
import torch

import jactus
from jactus import JactusError
from jactus.compression.coordinates import OF_LANGUAGE, RELATIVE_STEP
from jactus.model.lowrank import core_layers
from tests.models import BERT, LLAMA, SMALL, compressed, planned

CONFIGS = {
    "square": {},
    "plain SVD": {"metric": "identity"},
    "input metric": {"metric": "input"},
    "task directions": {"union_share": 0.25},
    "wide": {"core_width": 1.5},
    "folded": {"accounting": "folded"},
    "three factors": {"accounting": "three_factor"},
    "full rank": {"budget": 1.0},
    "leading block": {"trainable_rank": 2},
}
configs = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)


def changed(**changes):
    return SMALL.replace(**{"budget": 0.7, **changes})


@configs
def test_bases_are_orthonormal(changes):
    config = changed(**changes)
    layers = core_layers(compressed(BERT, config))
    assert layers.keys() == {name for name, rank in planned("bert", config).ranks.items() if rank is not None}
    for layer in layers.values():
        for B in layer.bases():
            # in float32: pivots and coefficients of a basis have conditions of some tens at most
            torch.testing.assert_close(B.T @ B, torch.eye(B.shape[1], dtype=B.dtype), rtol=0, atol=1e-5)


@configs
def test_steps_at_the_rate_move_the_layers_by_the_relative_step(changes):
    model = compressed(BERT, changed(**changes))
    rate = jactus.learning_rate(model)
    before = {name: layer.dense_weight().double() for name, layer in core_layers(model).items()}
    with torch.no_grad():
        for layer in core_layers(model).values():
            trained = layer.core if layer.block is None else layer.block
            trained.add_(rate * torch.randn_like(trained).sign())  # as Adam's first step
    moved = [
        (layer.dense_weight().double() - before[name]).norm() / before[name].norm()
        for name, layer in core_layers(model).items()
    ]
    # weights come in float32, and a step is 0.6% of them: some 1e-7 of 6e-3
    assert math.exp(sum(map(math.log, moved)) / len(moved)) == pytest.approx(RELATIVE_STEP, rel=1e-3)


def test_the_rate_follows_the_scale_of_the_weights_and_survives_a_file(tmp_path):
    plan = planned("bert", changed())
    model, lower = (jactus.compress(BERT.model(), p) for p in (plan, plan.at(0.3)))
    found = jactus.learning_rate(model)
    assert jactus.learning_rate(lower) > found, "low ranks bear larger steps"
    doubled = {name: replace(layer, directions=times(layer.directions, 2)) for name, layer in plan.layers.items()}
    twice = jactus.compress(BERT.model(), replace(plan, layers=doubled))
    assert jactus.learning_rate(twice) == pytest.approx(2 * found)
    jactus.save_pretrained(model.eval(), tmp_path)
    assert jactus.learning_rate(BERT.auto.from_pretrained(tmp_path)) == found


def times(directions, factor):
    return replace(directions, sigma=factor * directions.sigma, task_core=factor * directions.task_core)


def test_a_language_model_takes_smaller_steps():
    model = compressed(LLAMA, changed())
    elements = [
        float(layer.core.detach().norm()) / math.sqrt(layer.core.numel()) for layer in core_layers(model).values()
    ]
    mean = math.exp(sum(map(math.log, elements)) / len(elements))
    assert jactus.learning_rate(model) == pytest.approx(OF_LANGUAGE * mean)


def test_a_model_without_cores_has_no_rate():
    with pytest.raises(JactusError, match="no three-factor layer"):
        jactus.learning_rate(BERT.model())
    small = compressed(BERT, changed())
    for layer in core_layers(small).values():
        layer.reach = math.nan
    with pytest.raises(JactusError, match="none of the 13 three-factor layers"):
        jactus.learning_rate(small)

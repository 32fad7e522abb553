"""Statistics, plans, checkpoints and cores written by version 0.1.0 are read, and mean what they meant."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import jactus
from tests.models import BY_NAME

OLD = Path(__file__).parent / "files" / "0.1.0"
old = pytest.mark.parametrize("name", ["bert", "llama"])


def expected(name):
    return json.loads((OLD / name / "expected.json").read_text())


@torch.no_grad()
def logits(model, name):
    return model(**BY_NAME[name].batch()).logits


@old
def test_statistics(name):
    statistics = jactus.Statistics.load(OLD / name / "statistics.safetensors")
    assert (statistics.tokens, statistics.terms) == (expected(name)["tokens"], expected(name)["terms"])


@old
def test_a_plan_has_its_ranks_and_its_predicted_loss(name):
    plan = jactus.Plan.load(OLD / name / "plan.safetensors")
    assert plan.ranks == expected(name)["ranks"]
    assert plan.at(0.6).ranks == expected(name)["at_half"]
    assert plan.predicted_loss == pytest.approx(expected(name)["predicted_loss"], rel=1e-12)


@old
def test_old_statistics_make_the_old_plan_under_its_configuration(name):
    statistics = jactus.Statistics.load(OLD / name / "statistics.safetensors")
    config = jactus.Plan.load(OLD / name / "plan.safetensors").config
    plan = jactus.plan(BY_NAME[name].model(), statistics, config, progress=False)
    assert plan.ranks == expected(name)["ranks"]
    assert plan.predicted_loss == pytest.approx(expected(name)["predicted_loss"], rel=1e-4)  # float32 sums


@old
@pytest.mark.parametrize("form", ["core", "folded"])
def test_a_checkpoint_computes_what_it_computed(name, form):
    model = BY_NAME[name].auto.from_pretrained(OLD / name / form).eval()
    wanted = load_file(OLD / name / "logits.safetensors")["logits"]
    # other threads and processors sum in another order: some 1e-6 in float32 over two blocks
    assert ((logits(model, name) - wanted).norm() / wanted.norm()).item() < 1e-5
    if form == "core":
        assert jactus.learning_rate(model) == pytest.approx(expected(name)["learning_rate"], rel=1e-12)


@old
def test_cores_go_into_a_model_compressed_by_the_old_plan(name):
    model = jactus.compress(BY_NAME[name].model(), jactus.Plan.load(OLD / name / "plan.safetensors"))
    jactus.load_cores(model, OLD / name / "cores.safetensors")
    wanted = load_file(OLD / name / "logits.safetensors")["logits"]
    assert ((logits(model.eval(), name) - wanted).norm() / wanted.norm()).item() < 1e-5

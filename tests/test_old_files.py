"""Statistics, plans, checkpoints and cores written by version 0.1.0 are read, and mean what they meant."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import jactus
from jactus import JactusError
from jactus.compression.coordinates import OF_LANGUAGE, RELATIVE_STEP
from jactus.model.families import output_embedding
from jactus.model.lowrank import compressed_layers, core_layers
from tests.models import BY_NAME
from tests.unchanged import assert_same, state

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
    for layer in plan.layers.values():  # no rank is on offer that it kept too few directions for
        assert layer.offer(plan.config).ranks.max() <= layer.directions.kept


@old
def test_old_statistics_make_a_plan_that_loses_no_more_for_the_same_cost(name):
    statistics = jactus.Statistics.load(OLD / name / "statistics.safetensors")
    before = jactus.Plan.load(OLD / name / "plan.safetensors")
    plan = jactus.plan(BY_NAME[name].model(), statistics, before.config, progress=False)
    for layer in plan.layers.values():  # the full rank is on offer too
        assert layer.offer(plan.config).ranks.max() == layer.directions.kept == min(layer.m, layer.n)
    assert cost(plan) <= before.config.budget.fraction * plan.dense_parameters
    assert plan.predicted_loss <= expected(name)["predicted_loss"] * (1 + 1e-4)  # float32 sums
    old_ranks = dataclasses.replace(plan, ranks=expected(name)["ranks"])
    assert old_ranks.predicted_loss == pytest.approx(expected(name)["predicted_loss"], rel=1e-4)
    if before.config.budget.accounting == "folded":  # it kept all directions, so nothing is on offer that was not
        assert plan.ranks == expected(name)["ranks"]


def cost(plan):
    more = {"folded": 0, "three_factor": 1}[plan.config.budget.accounting]
    total = 0
    for name, layer in plan.layers.items():
        m, n, rank = layer.m, layer.n, plan.ranks[name]
        total += m * n if rank == min(m, n) else rank * (m + n + more * rank)
    return total


def test_a_width_that_an_old_plan_kept_too_few_directions_for_is_refused_and_changes_nothing():
    model = BY_NAME["bert"].model()
    before = state(model)
    plan = jactus.Plan.load(OLD / "bert" / "plan.safetensors").with_config(accounting="folded", core_width=2.0)
    with pytest.raises(
        JactusError, match=r"\(16×16\) is to have 12 directions a side, and the plan kept 6.*plan again"
    ):
        jactus.compress(model, plan)
    assert_same(before, state(model))


@old
@pytest.mark.parametrize("form", ["core", "folded"])
def test_a_checkpoint_computes_what_it_computed(name, form):
    model = BY_NAME[name].auto.from_pretrained(OLD / name / form).eval()
    wanted = load_file(OLD / name / "logits.safetensors")["logits"]
    # other threads and processors sum in another order: some 1e-6 in float32 over two blocks
    assert ((logits(model, name) - wanted).norm() / wanted.norm()).item() < 1e-5
    if form == "core":
        then = expected(name)["learning_rate"] / 0.004  # the relative step of 0.1.0
        now = RELATIVE_STEP if output_embedding(model) is None else OF_LANGUAGE
        assert jactus.learning_rate(model) == pytest.approx(now * then, rel=1e-12)


@torch.no_grad()
def changed(model):
    for layer in core_layers(model).values():
        layer.core.mul_(1.5)
    return model


@old
def test_cores_go_into_a_model_of_the_same_bases(name):
    model = changed(BY_NAME[name].auto.from_pretrained(OLD / name / "core").eval())
    wanted = load_file(OLD / name / "logits.safetensors")["logits"]
    assert ((logits(model, name) - wanted).norm() / wanted.norm()).item() > 1e-3
    jactus.load_cores(model, OLD / name / "cores.safetensors")
    assert ((logits(model, name) - wanted).norm() / wanted.norm()).item() < 1e-5


@old
def test_cores_do_not_go_into_a_model_compressed_anew_whose_bases_are_stored_otherwise(name):
    model = jactus.compress(BY_NAME[name].model(), jactus.Plan.load(OLD / name / "plan.safetensors")).eval()
    before = state(model)
    with pytest.raises(JactusError, match="does not fit: its cores belong to other bases"):
        jactus.load_cores(model, OLD / name / "cores.safetensors")
    assert_same(before, state(model))


@old
def test_an_old_plan_makes_layers_of_the_subspaces_that_it_made(name):
    model = jactus.compress(BY_NAME[name].model(), jactus.Plan.load(OLD / name / "plan.safetensors")).eval()
    saved = BY_NAME[name].auto.from_pretrained(OLD / name / "core").eval()
    assert compressed_layers(model).keys() == compressed_layers(saved).keys()
    lower = {n: x for n, x in core_layers(saved).items() if x.rank < min(x.in_features, x.out_features)}
    assert lower
    for key, layer in lower.items():  # of a full rank the longer side had task directions beyond it, and has none now
        new = model.get_submodule(key)
        # both are stored in float32, row by row and whitened there, orthonormal here; the cores there were trained
        for ours, theirs in zip(new.bases(), layer.bases()):
            torch.testing.assert_close(ours @ (ours.T @ theirs), theirs, rtol=0, atol=3e-5 * float(theirs.abs().max()))


@old
def test_an_old_checkpoint_trains_folds_and_is_saved_as_it_was(name, tmp_path):
    model = BY_NAME[name].auto.from_pretrained(OLD / name / "core").eval()
    assert not any(layer.pivoted for layer in core_layers(model).values())
    assert not dict(model.named_buffers()).keys() & {f"{key}.rows" for key in core_layers(model)}
    model(**BY_NAME[name].batch()).loss.backward()
    assert all(layer.core.grad.any() for layer in core_layers(model).values())
    expected_logits = logits(model, name)
    jactus.save_pretrained(model, tmp_path / "again")
    again = BY_NAME[name].auto.from_pretrained(tmp_path / "again").eval()
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in model.state_dict().items())
    # folded it is compact as any other, and computes what its own fold did
    deployed = jactus.size(model).folded
    folded = jactus.fold(model)
    assert jactus.size(folded).stored == deployed
    assert all(layer.pivoted for layer in compressed_layers(folded).values())
    assert ((logits(folded, name) - expected_logits).norm() / expected_logits.norm()).item() < 1e-5
    pairs = BY_NAME[name].auto.from_pretrained(OLD / name / "folded").eval()
    assert not any(layer.pivoted for layer in compressed_layers(pairs).values())
    assert jactus.size(pairs).stored > deployed

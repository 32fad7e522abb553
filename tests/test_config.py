"""The settings: groups and their flat names, what a plan may change afterwards, and what statistics remember."""

import dataclasses

import pytest
import torch

import jactus
from jactus import Allocation, Budget, Core, JactusConfig, JactusError
from tests.models import BERT, SMALL, planned


def test_a_number_or_a_word_stands_for_its_group():
    assert JactusConfig(budget=0.5) == JactusConfig(budget=Budget(0.5))
    assert JactusConfig(allocation="uniform") == JactusConfig(allocation=Allocation("uniform"))
    folded = JactusConfig(budget=Budget(0.5, accounting="folded"), allocation=Allocation(rank_multiple=4))
    assert folded.replace(budget=0.6).budget == Budget(0.6, accounting="folded")
    assert folded.replace(allocation="uniform").allocation == Allocation("uniform", rank_multiple=4)
    assert folded.replace(budget=Budget(0.6)).budget == Budget(0.6)


def test_every_field_of_a_group_has_a_flat_name_for_replace():
    flat = {
        "budget_unit": "bytes",
        "accounting": "folded",
        "scope": "targets",
        "latency_tokens": 3,
        "rank_floor": 4,
        "uniform_part": 0.25,
        "rank_multiple": 8,
        "core_width": 2.0,
        "core_dtype": "bfloat16",
    }
    config = JactusConfig().replace(**flat)
    assert config.budget == Budget(0.8, "bytes", "folded", "targets", 3)
    assert config.allocation == Allocation("global", 4, 0.25, 8)
    assert config.core == Core(2.0, None, "bfloat16")
    assert JactusConfig().replace(core_dtype=torch.float64).core.dtype == "float64"


@pytest.mark.parametrize(("floor", "expected"), [(3, (3, 0.0)), (0.25, (0, 0.25))])
def test_flat_options_of_0_1_0_are_read_and_those_of_a_run_passed_over(floor, expected):
    old = {"budget": 0.6, "accounting": "folded", "rank_floor": floor, "memory_limit": 7, "statistics_dtype": "float64"}
    config = JactusConfig.from_dict(old)
    assert (config.budget.fraction, config.budget.accounting) == (0.6, "folded")
    assert (config.allocation.rank_floor, config.allocation.uniform_part) == expected
    assert JactusConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("gone", "group", "instead"),
    [
        ("leave_dense", "allocation", "exclude_modules"),
        ("full_rank", "allocation", "exclude_modules"),
        ("coordinates", "core", "orthonormal"),
        ("coordinate_damping", "core", "orthonormal"),
        ("step_scaling", "core", "orthonormal"),
    ],
)
@pytest.mark.parametrize("value", [None, True, False])
def test_options_that_are_no_more_are_refused_and_passed_over_in_old_files(gone, group, instead, value):
    for give in (lambda **changes: JactusConfig(**changes), SMALL.replace, planned("bert").with_config):
        with pytest.raises(JactusError, match=f"there is no option {gone} any more.*{instead}"):
            give(**{gone: value})
    with pytest.raises(JactusError, match=f"there is no option {gone} any more"):
        {"core": Core, "allocation": Allocation}[group](**{gone: value})
    flat, grouped = {"budget": 0.6, gone: value}, SMALL.to_dict()
    grouped[group][gone] = value
    assert JactusConfig.from_dict(flat) == JactusConfig(0.6)
    assert JactusConfig.from_dict(grouped) == SMALL


def test_every_accounting_but_the_papers_allows_wide_cores_and_the_compact_one_a_budget_of_time():
    assert JactusConfig().budget.accounting == "compact"
    for accounting in ("compact", "folded"):
        assert JactusConfig(budget=Budget(accounting=accounting), core=Core(width=2)).core.width == 2
    assert Budget(unit="latency").accounting == "compact"


def test_an_unknown_setting_is_named():
    with pytest.raises(JactusError, match=r"no field \['widht'\]"):
        JactusConfig().replace(widht=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "identity"},
        {"damping": 0.9},
        {"union": ("weight",)},
        {"union_share": 0.3},
        {"target_modules": "query"},
        {"exclude_modules": ("query",)},
        {"dtype": "float64"},
        {"core_dtype": "float64"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_plan_refuses_a_setting_that_made_its_spectra(changes):
    plan = planned("bert")
    with pytest.raises(JactusError, match=r"Plan.with_config: the plan was made under .*a plan of its own"):
        plan.with_config(**changes)


def test_a_plan_takes_what_only_re_allocates():
    plan = planned("bert")
    uniform = plan.with_config(allocation="uniform", budget=0.5, core_width=1.0, trainable_extras=("bias",))
    assert uniform.config.allocation == dataclasses.replace(plan.config.allocation, method="uniform")
    assert uniform.config.budget.fraction == 0.5
    assert uniform.layers is plan.layers
    assert plan.with_config(union_share=0.1).config.union_share == 0.1


def test_statistics_remember_their_configuration_and_a_plan_goes_by_it(tmp_path):
    config = SMALL.replace(metric="input", budget=0.6)
    model = BERT.model()
    found = jactus.calibrate(model, BERT.batches(), config, progress=False)
    assert found.config == config
    found.save(tmp_path / "statistics")
    again = jactus.Statistics.load(tmp_path / "statistics")
    assert again.config == config
    plan = jactus.plan(model, again, progress=False)
    assert (plan.config.metric, plan.config.budget) == ("input", config.budget)
    told = jactus.plan(model, again, config.replace(budget=0.5), progress=False)
    assert told.config.budget.fraction == 0.5


def test_statistics_are_shown_in_a_line():
    found = jactus.calibrate(BERT.model(), BERT.batches(), SMALL, progress=False)
    assert repr(found) == "Statistics(13 layers, 66 tokens, 12 terms, labels given, 0.0 MB)"


@pytest.mark.parametrize(
    "wrong",
    [
        {"statistics_dtype": "bfloat16"},
        {"statistics_device": "gpu"},
        {"loss_scale": 0},
        {"loss_scale": float("inf")},
        {"memory_limit": 0},
        {"memory_limit": 1.5},
    ],
    ids=str,
)
def test_an_argument_of_a_run_out_of_range_is_named(wrong):
    (name,) = wrong
    with pytest.raises(JactusError, match=rf"calibrate: {name}="):
        jactus.calibrate(BERT.model(), BERT.batches(), SMALL, progress=False, **wrong)

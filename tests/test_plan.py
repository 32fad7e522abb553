"""A plan on a real architecture: what it counts, predicts, keeps, and gives back after a file."""

import copy

import pytest
import torch

import jactus
from jactus import JactusConfig, JactusError, Plan
from jactus.model.lowrank import compressed_layers
from jactus.planning.plans import core_width
from jactus.planning.subspace import metric
from tests.models import BERT, LLAMA, SMALL, T5, VIT


@pytest.fixture(scope="module")
def bert():
    model = BERT.model()
    return model, jactus.calibrate(model, BERT.batches(), SMALL, progress=False)


def planned(bert, **changes):
    model, statistics = bert
    return jactus.plan(model, statistics, SMALL.replace(**changes), progress=False)


@pytest.mark.parametrize(
    "more",
    [
        {"accounting": "three_factor"},
        {"accounting": "folded"},
        {"accounting": "folded", "core_width": 1.6},
        {"accounting": "folded", "core_width": 9},
        {"accounting": "folded", "full_rank": True},
        {"accounting": "folded", "full_rank": True, "core_width": 1.6},
    ],
)
@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("budget", [1.0, 0.8, 0.5, 0.35])
def test_counts_are_those_of_the_compressed_model(bert, more, allocation, budget):
    plan = planned(bert, **more, allocation=allocation, rank_multiple=1).at(budget)
    model = copy.deepcopy(bert[0])
    before = jactus.size(model).stored
    jactus.compress(model, plan)
    after = jactus.size(model)
    spent = plan.stored_parameters if more["accounting"] == "three_factor" else plan.folded_parameters
    assert spent <= budget * plan.dense_parameters
    assert before - after.stored == plan.dense_parameters - plan.stored_parameters
    assert before - after.folded == plan.dense_parameters - plan.folded_parameters
    trained = sum(p.numel() for n, p in model.named_parameters() if n.endswith("core"))
    assert trained == plan.core_parameters
    if plan.core_parameters:
        assert jactus.size(jactus.fold(model.eval())).stored == after.folded
    else:
        assert budget == 1.0


def test_the_predicted_loss_is_the_quadratic_form_it_stands_for(bert):
    model, statistics = bert
    plan = planned(bert, union=("weight",), budget=0.5)
    small = jactus.compress(copy.deepcopy(model), plan)
    expected = 0.0
    for name, rank in plan.ranks.items():
        if rank is None:
            continue
        change = (
            small.get_submodule(name).dense_weight().detach().double()
            - model.get_submodule(name).weight.detach().double()
        )
        A, G = statistics.input_covariance(name).double(), statistics.output_covariance(name).double()
        A += SMALL.damping * A.diagonal().mean() * torch.eye(len(A))
        G += SMALL.damping * G.diagonal().mean() * torch.eye(len(G))
        expected += 0.5 * float(torch.trace(G @ change @ A @ change.T))
    assert plan.predicted_loss == pytest.approx(expected, rel=1e-4)


def test_at_is_the_plan_for_that_budget(bert):
    plan = planned(bert, budget=0.8)
    assert plan.at(0.5).ranks == planned(bert, budget=0.5).ranks != plan.ranks
    assert plan.at(0.5).at(0.8).ranks == plan.ranks
    losses = [plan.at(b).predicted_loss for b in (0.3, 0.5, 0.8, 1.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


def test_a_plan_from_a_file_compresses_without_statistics(bert, tmp_path):
    plan = planned(bert, budget=0.6)
    plan.save(tmp_path / "plan.safetensors")
    loaded = Plan.load(tmp_path / "plan.safetensors")
    assert (loaded.ranks, loaded.config) == (plan.ranks, plan.config)
    ours, theirs = (jactus.compress(copy.deepcopy(bert[0]), p) for p in (plan, loaded))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("metric", ["identity", "input", "gradient", "fisher"])
@pytest.mark.parametrize("coordinates", ["fisher", "orthonormal"])
def test_coordinates_do_not_change_the_function(bert, metric, coordinates):
    plan = planned(bert, metric=metric, coordinates=coordinates, budget=0.5)
    reference = planned(bert, metric=metric, coordinates="orthonormal", budget=0.5)
    batch = BERT.batch()
    ours, theirs = (jactus.compress(copy.deepcopy(bert[0]), p)(**batch).logits for p in (plan, reference))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_plain_svd_needs_no_statistics():
    model = BERT.model()
    config = SMALL.replace(metric="identity", union=("weight",), budget=0.5, allocation="uniform")
    small = jactus.compress(copy.deepcopy(model), jactus.plan(model, None, config, progress=False))
    name = "bert.encoder.layer.0.intermediate.dense"
    layer = small.get_submodule(name)
    P, s, Q = torch.linalg.svd(model.get_submodule(name).weight.double(), full_matrices=False)
    best = (P[:, : layer.rank] * s[: layer.rank]) @ Q[: layer.rank]
    assert torch.allclose(layer.dense_weight().double(), best, atol=1e-6)


def test_a_wider_core_computes_what_a_square_one_does_or_better_and_folds_to_the_same_size(bert):
    """The directions that are added lie beyond the rank: only where they meet task directions do they preserve more."""
    config = {"accounting": "folded", "rank_multiple": 1, "budget": 0.5}
    square = jactus.compress(copy.deepcopy(bert[0]), planned(bert, **config))
    wide = jactus.compress(copy.deepcopy(bert[0]), planned(bert, **config, core_width=2))
    statistics = bert[1]
    better = 0
    for name, layer in compressed_layers(wide).items():
        other, W = square.get_submodule(name), bert[0].get_submodule(name).weight.detach().double()
        assert (layer.rank, layer.width) == (other.rank, min(2 * other.rank, *W.shape))
        A, G = (
            metric(S, SMALL.damping, W.device)
            for S in (statistics.input_covariance(name), statistics.output_covariance(name))
        )
        roots = [torch.linalg.cholesky(S) for S in (G, A)]
        lost = [float((roots[0].T @ (W - x.dense_weight().double()) @ roots[1]).square().sum()) for x in (layer, other)]
        assert lost[0] <= lost[1] * (1 + 1e-4)
        better += lost[0] < 0.999 * lost[1]
    assert better > 0
    assert jactus.size(jactus.fold(wide.eval())).stored == jactus.size(jactus.fold(square.eval())).stored


def test_full_rank_is_dense_in_other_coordinates(bert):
    """At a budget of 1 nothing is lost, nothing is frozen, and folding gives the dense layers back."""
    model = bert[0]
    plan = planned(bert, accounting="folded", full_rank=True, budget=1.0)
    assert plan.predicted_loss == 0
    full = jactus.compress(copy.deepcopy(model), plan)
    layers = compressed_layers(full)
    assert set(layers) == set(plan.layers)
    for name, layer in layers.items():
        W = model.get_submodule(name).weight
        assert layer.rank == min(W.shape)
        # float32 storage of three factors whose bases are whitened: conditions of 1/√coordinate_damping and so of about 1
        torch.testing.assert_close(layer.dense_weight(), W, rtol=0, atol=1e-5 * float(W.abs().max()))
        assert layer.core.requires_grad
    jactus.fold(full.eval())
    assert not compressed_layers(full)
    assert jactus.size(full).stored == jactus.size(model).stored


def test_at_full_rank_an_oblong_layer_learns_along_as_many_task_directions_as_elsewhere(bert):
    config = {"accounting": "folded", "full_rank": True, "budget": 1.0, "union_share": 0.25}
    plan = planned(bert, **config)
    model = jactus.compress(copy.deepcopy(bert[0]), plan)
    oblong = {name: layer for name, layer in plan.layers.items() if layer.m != layer.n}
    assert oblong
    for name, layer in compressed_layers(model).items():
        rank = min(layer.in_features, layer.out_features)
        assert (rank < layer.width <= 1.25 * rank and layer.width % 2 == 0) if name in oblong else layer.width == rank
        assert max(layer.U.shape[1], layer.V.shape[1]) == layer.width
        assert (layer.U.shape[1] > layer.V.shape[1]) == (layer.out_features > layer.in_features)
    coarse = planned(bert, **config, rank_multiple=8).layers  # of four directions no eight
    assert all(layer.width(16, plan.config.replace(rank_multiple=8)) == 16 for layer in coarse.values())
    narrow = plan.with_config(union_share=0.0)
    assert all(layer.width(16, narrow.config) == 16 for layer in narrow.layers.values())


def test_full_rank_is_had_where_a_layer_would_have_stayed_dense(bert):
    frozen = planned(bert, accounting="folded", leave_dense=True, budget=0.8)
    full = planned(bert, accounting="folded", full_rank=True, budget=0.8)
    whole = {name for name, rank in frozen.ranks.items() if rank is None}
    assert 0 < len(whole) < len(frozen.ranks)
    assert {name for name, layer in full.layers.items() if full.ranks[name] == min(layer.m, layer.n)} == whole
    assert all(full.ranks[name] == frozen.ranks[name] for name in set(frozen.ranks) - whole)
    assert full.predicted_loss == pytest.approx(frozen.predicted_loss)
    assert full.folded_parameters == frozen.folded_parameters <= 0.8 * full.dense_parameters
    assert full.core_parameters > frozen.core_parameters


def test_a_plan_whose_configuration_was_changed_leaves_the_model_untouched(bert):
    plan = planned(bert, accounting="folded", rank_multiple=1, budget=0.8)
    model = copy.deepcopy(bert[0])
    with pytest.raises(JactusError, match="directions a side"):
        jactus.compress(model, plan.with_config(core_width=1.5, budget=0.6))
    assert not compressed_layers(model)
    with pytest.raises(JactusError, match="full_rank=True needs 16; plan again"):
        plan.with_config(full_rank=True)


@pytest.mark.parametrize(("rank", "factor", "expected"), [(16, 1.3, 32), (32, 2, 64), (32, 3.1, 100), (48, 1e308, 100)])
def test_widths_are_multiples_too_and_not_more_than_the_shorter_side(rank, factor, expected):
    config = JactusConfig().replace(accounting="folded", core_width=factor)
    assert core_width(rank, 100, 400, config) == core_width(rank, 400, 100, config) == expected
    assert core_width(rank, 100, 400, JactusConfig()) == rank


def test_budgets_of_bytes_and_flops():
    model = T5.model().to(torch.bfloat16)
    statistics = jactus.calibrate(model, T5.batches(), SMALL, progress=False)
    by_bytes = jactus.plan(model, statistics, SMALL.replace(budget=0.6, budget_unit="bytes"), progress=False)
    dense = sum(p.numel() * 2 for n, p in model.named_parameters() if n.removesuffix(".weight") in by_bytes.layers)
    small = jactus.compress(copy.deepcopy(model), by_bytes)
    spent = sum(
        p.numel() * p.element_size()
        for n, p in small.named_parameters()
        if any(n.startswith(f"{layer}.") for layer in by_bytes.layers)
    )
    assert spent <= 0.6 * dense
    by_flops = jactus.plan(model, statistics, SMALL.replace(budget=0.6, budget_unit="flops"), progress=False)
    tokens = {name: layer.tokens for name, layer in by_flops.layers.items()}
    assert len(set(tokens.values())) > 1, "encoder and decoder see different numbers of tokens"
    full = sum(layer.m * layer.n * layer.tokens for layer in by_flops.layers.values())
    cost = 0
    for name, layer in by_flops.layers.items():
        rank = by_flops.ranks[name]
        each = layer.m * layer.n if rank is None else rank * (layer.m + layer.n + rank)
        cost += each * layer.tokens
    assert cost <= 0.6 * full


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_a_byte_budget_is_of_the_bytes_there_are_and_counts_dense_layers_in_their_own_dtype(bert, budget):
    model = bert[0]
    plan = planned(bert, budget=budget, budget_unit="bytes", dtype="bfloat16", leave_dense=True)
    small = jactus.compress(copy.deepcopy(model), plan)
    assert None in plan.ranks.values()
    spent = sum(
        p.numel() * p.element_size()
        for n, p in small.named_parameters()
        if any(n.startswith(f"{layer}.") and not n.endswith("bias") for layer in plan.layers)
    )
    assert 0.95 * budget < spent / (4 * plan.dense_parameters) <= budget


def test_no_rank_takes_more_bytes_than_the_layer_it_replaces():
    """Cores are of float32 in a bfloat16 model: at the highest rank that saves parameters they cost more than they save."""
    model = BERT.model().to(torch.bfloat16)
    statistics = jactus.calibrate(model, BERT.batches(), SMALL, progress=False)
    plan = jactus.plan(
        model, statistics, SMALL.replace(budget=0.98, budget_unit="bytes", leave_dense=False), progress=False
    )
    small = jactus.compress(copy.deepcopy(model), plan)
    layers = compressed_layers(small)
    assert layers
    for name, layer in layers.items():
        spent = sum(p.numel() * p.element_size() for p in (layer.U, layer.core, layer.V))
        assert spent < 2 * model.get_submodule(name).weight.numel()


def test_a_budget_of_the_whole_model(bert):
    model = copy.deepcopy(bert[0])
    total = jactus.size(model).stored
    jactus.compress(model, planned(bert, scope="model", budget=0.8))
    assert 0.7 * total < jactus.size(model).stored <= 0.8 * total
    with pytest.raises(JactusError, match="embeddings"):
        planned(bert, scope="model", budget=0.1)


def test_trainable_rank_trains_the_leading_block(bert):
    config = {"budget": 0.7, "leave_dense": False, "rank_multiple": 4}
    plan = planned(bert, trainable_rank=2, **config)
    whole = jactus.compress(copy.deepcopy(bert[0]), planned(bert, **config))
    model = jactus.compress(copy.deepcopy(bert[0]), plan)
    batch = BERT.batch()
    assert torch.allclose(model(**batch).logits, whole(**batch).logits, atol=1e-5), "only the order differs"
    blocks = {n: p for n, p in model.named_parameters() if n.endswith(".block")}
    assert blocks
    assert all(p.shape == (2, 2) and p.requires_grad for p in blocks.values())
    for name in blocks:
        model.get_submodule(name.removesuffix(".block")).core.requires_grad_(True)
    model(**batch).loss.backward()
    for name, block in blocks.items():
        core = model.get_parameter(name.replace(".block", ".core"))
        assert torch.equal(block.grad, core.grad[:2, :2])
        core.requires_grad_(False)
    with torch.no_grad():
        for block in blocks.values():
            block += torch.randn_like(block)
    before = model(**batch).logits
    assert torch.allclose(jactus.fold(model)(**batch).logits, before, atol=1e-5)


def test_a_model_too_small_for_the_rank_multiple_is_refused_not_left_as_it_is(bert):
    with pytest.raises(JactusError, match="rank_multiple"):
        planned(bert, rank_multiple=16)


def test_the_defaults_are_what_the_help_says():
    config = JactusConfig()
    assert JactusConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(JactusConfig(target_modules="all-linear"))


@pytest.mark.parametrize(("family", "share"), [(LLAMA, 0.0), (T5, 0.0), (BERT, 0.1), (VIT, 0.1)])
def test_unless_told_otherwise_the_task_has_a_share_of_the_rank_but_in_language_models(family, share, tmp_path):
    model = family.model()
    config = JactusConfig().replace(rank_multiple=2, leave_dense=False)
    statistics = jactus.calibrate(model, family.batches(), config, progress=False)
    summed = {layer.gradient_sum is not None for layer in statistics.layers.values()}
    assert summed == {share > 0}  # and what has no share need not be summed
    plan = jactus.plan(model, statistics, config, progress=False)
    assert plan.config.union_share == share
    assert plan.ranks == jactus.plan(model, statistics, config.replace(union_share=share), progress=False).ranks
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").config == plan.config
    assert plan.with_config(union_share=None).config == plan.config


def test_a_share_asked_for_in_a_language_model_is_given_and_needs_the_gradients():
    model, config = LLAMA.model(), JactusConfig().replace(rank_multiple=2, leave_dense=False, union_share=0.3)
    statistics = jactus.calibrate(model, LLAMA.batches(), config, progress=False)
    plan = jactus.plan(model, statistics, config, progress=False)
    assert any(layer.weight_rank(plan.ranks[name], config) < plan.ranks[name] for name, layer in plan.layers.items())
    without = jactus.calibrate(model, LLAMA.batches(), config.replace(union_share=None), progress=False)
    with pytest.raises(JactusError, match="no mean gradients"):
        jactus.plan(model, without, config, progress=False)


@pytest.mark.parametrize(("family", "dense"), [(LLAMA, True), (T5, True), (BERT, False), (VIT, False)])
def test_unless_told_otherwise_layers_stay_dense_in_language_models_only(family, dense, tmp_path):
    model = family.model()
    config = JactusConfig().replace(rank_multiple=2)
    statistics = jactus.calibrate(model, family.batches(), config, progress=False)
    plan = jactus.plan(model, statistics, config, progress=False)
    assert plan.ranks == plan.with_config(leave_dense=dense).ranks
    told = plan.with_config(leave_dense=not dense)
    assert (told.config.allocation.leave_dense, None in told.ranks.values()) == (not dense, not dense)
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").ranks == plan.ranks
    config = config.replace(accounting="folded", budget=0.9)
    full = jactus.plan(model, statistics, config.replace(full_rank=True), progress=False)
    assert None not in full.ranks.values()
    # whatever a plan was made for, a changed one is that of the changed configuration
    again = full.with_config(full_rank=False)
    assert again.ranks == jactus.plan(model, statistics, config, progress=False).ranks
    assert (None in again.ranks.values()) == dense
    assert again.with_config(full_rank=True).ranks == full.ranks


def test_layers_the_gradient_reaches_more_strongly_move_faster(bert):
    model, statistics = bert
    scaled = jactus.compress(copy.deepcopy(model), planned(bert, budget=0.5, step_scaling=0.5))
    alike = jactus.compress(copy.deepcopy(model), planned(bert, budget=0.5, step_scaling=0.0))
    sizes, factors = [], []
    for name in statistics.layers:
        A, G = statistics.input_covariance(name), statistics.output_covariance(name)
        sizes.append(float((A.diagonal().mean() * G.diagonal().mean()).sqrt()))
        a, b = scaled.get_submodule(name), alike.get_submodule(name)
        factors.append(float(a.U.norm() / b.U.norm()))
        torch.testing.assert_close(a.U @ a.core, b.U @ b.core, rtol=1e-4, atol=1e-6)  # float32 storage of both
    sizes, factors = torch.tensor(sizes), torch.tensor(factors)
    torch.testing.assert_close(factors, (sizes / sizes.log().mean().exp()).sqrt(), rtol=1e-5, atol=0)
    assert factors.max() > 1.2 * factors.min()

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


ACCOUNTINGS = ("compact", "folded", "three_factor")
accountings = pytest.mark.parametrize("accounting", ACCOUNTINGS)


def counted(m, n, rank, accounting):
    """What a layer costs, written down from the definitions."""
    if rank == min(m, n):
        return m * n
    return {"compact": rank * (m + n - rank), "folded": rank * (m + n), "three_factor": rank * (m + n + rank)}[
        accounting
    ]


@pytest.mark.parametrize(
    "more",
    [
        {"accounting": "three_factor"},
        {"accounting": "folded"},
        {"accounting": "compact"},
        {"accounting": "compact", "core_width": 1.6},
        {"accounting": "compact", "core_width": 9},
        {"accounting": "folded", "core_width": 1.6},
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
    sizes = {name: (layer.m, layer.n, plan.ranks[name]) for name, layer in plan.layers.items()}
    spent = sum(counted(m, n, rank, more["accounting"]) for m, n, rank in sizes.values())
    assert spent <= budget * plan.dense_parameters
    assert plan.folded_parameters == sum(counted(m, n, rank, "compact") for m, n, rank in sizes.values())
    assert plan.folded_parameters <= spent
    if more == {"accounting": "three_factor"}:  # all that trains and is folded later counts
        stored = sum(rank * (m + n + rank) for m, n, rank in sizes.values())
        assert plan.stored_parameters == stored
    if allocation == "global":  # no layer has a next rank that would keep more and still fit
        left = budget * plan.dense_parameters - spent
        for name, layer in plan.layers.items():
            offer = layer.offer(plan.config)
            now = offer.ranks.tolist().index(plan.ranks[name])
            fits = offer.cost - offer.cost[now] <= left
            assert offer.gain[fits].max() == offer.gain[now]
    assert before - after.stored == plan.dense_parameters - plan.stored_parameters
    assert before - after.folded == plan.dense_parameters - plan.folded_parameters
    trained = sum(p.numel() for n, p in model.named_parameters() if n.endswith("core"))
    assert trained == plan.core_parameters
    full = {name for name, (m, n, rank) in sizes.items() if rank == min(m, n)}
    if budget == 1:
        assert full == set(sizes)
    assert jactus.size(jactus.fold(model.eval())).stored == after.folded
    assert set(compressed_layers(model)) == set(sizes) - full


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
    config = {"rank_multiple": 1, "budget": 0.5}
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


@accountings
def test_full_rank_is_dense_in_other_coordinates(bert, accounting):
    """At a budget of 1 nothing is lost, nothing is frozen, and folding gives the dense layers back."""
    model = bert[0]
    plan = planned(bert, accounting=accounting, budget=1.0)
    assert plan.predicted_loss == 0
    full = jactus.compress(copy.deepcopy(model), plan)
    layers = compressed_layers(full)
    assert set(layers) == set(plan.layers)
    for name, layer in layers.items():
        W = model.get_submodule(name).weight.detach()
        assert layer.rank == min(W.shape)
        # float32 storage of three factors, the bases orthonormal
        torch.testing.assert_close(layer.dense_weight(), W, rtol=0, atol=1e-5 * float(W.abs().max()))
        assert layer.core.requires_grad
    jactus.fold(full.eval())
    assert not compressed_layers(full)
    assert jactus.size(full).stored == jactus.size(model).stored


@pytest.mark.parametrize("width", [1.0, 1.5, 9])
def test_at_full_rank_a_core_is_square_and_has_every_direction_of_the_shorter_side(bert, width):
    plan = planned(bert, core_width=width, budget=1.0)
    model = jactus.compress(copy.deepcopy(bert[0]), plan)
    for name, layer in compressed_layers(model).items():
        m, n = layer.out_features, layer.in_features
        rank = min(m, n)
        assert plan.layers[name].weight_rank(rank, plan.config) == rank, "task directions take no place there"
        assert (layer.U.shape, layer.core.shape, layer.V.shape) == ((m, rank), (rank, rank), (n, rank))
        assert ((layer.rows is None), (layer.columns is None)) == (m == rank, n == rank)


@accountings
def test_at_every_budget_some_layers_may_have_their_full_rank_and_others_pay_for_it(bert, accounting):
    plan = planned(bert, accounting=accounting, budget=0.8)
    full = {name for name, layer in plan.layers.items() if layer.is_full(plan.ranks[name])}
    assert 0 < len(full) < len(plan.ranks)
    assert plan.folded_parameters <= 0.8 * plan.dense_parameters
    for name in full:  # nothing of it is lost, and it costs as much as dense
        layer = plan.layers[name]
        assert layer.energies[layer.weight_rank(16, plan.config) :].numel() == 0
        assert layer.folded_parameters(16) == layer.m * layer.n


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.65, 0.8, 0.95])
def test_the_least_is_lost_under_the_compact_accounting(bert, budget):
    # floors are of more where more is had evenly, and what the task's share of a lower rank costs makes large steps to the full one
    common = {"rank_multiple": 1, "budget": budget, "uniform_part": 0.0, "union": ("weight",)}
    compact, folded, three_factor = (planned(bert, accounting=a, **common).predicted_loss for a in ACCOUNTINGS)
    assert compact <= folded
    assert compact < three_factor


@accountings
@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_what_is_spent_is_within_a_step_of_the_budget(bert, accounting, multiple):
    plan = planned(bert, accounting=accounting, rank_multiple=multiple, union=("weight",))
    for budget in (0.55, 0.6, 0.7, 0.8, 0.9):
        at = plan.at(budget)
        left, following = budget * at.dense_parameters, []
        for name, layer in at.layers.items():
            offer = layer.offer(at.config)
            now = offer.ranks.tolist().index(at.ranks[name])
            left -= offer.cost[now]
            following += (offer.cost[now + 1 : now + 2] - offer.cost[now]).tolist()
        assert 0 <= left < min(following)


@pytest.mark.parametrize(("rank", "factor", "expected"), [(16, 1.3, 32), (32, 2, 64), (32, 3.1, 100), (48, 1e308, 100)])
def test_widths_are_multiples_too_and_not_more_than_the_shorter_side(rank, factor, expected):
    config = JactusConfig().replace(core_width=factor)
    assert core_width(rank, 100, 400, config) == core_width(rank, 400, 100, config) == expected
    assert core_width(rank, 100, 400, JactusConfig()) == rank


def deployed_bytes(model, plan):
    """Of the targeted weights, folded; biases are not counted."""
    names = {f"{name}.{key}" for name in plan.layers for key in ("weight", "left", "right")}
    folded = jactus.fold(copy.deepcopy(model))
    return sum(p.numel() * p.element_size() for n, p in folded.named_parameters() if n in names)


@accountings
def test_a_budget_of_bytes(accounting):
    model = T5.model().to(torch.bfloat16)
    statistics = jactus.calibrate(model, T5.batches(), SMALL, progress=False)
    config = SMALL.replace(budget=0.6, budget_unit="bytes", accounting=accounting)
    plan = jactus.plan(model, statistics, config, progress=False)
    small = jactus.compress(copy.deepcopy(model), plan)
    spent = 0
    for layer in compressed_layers(small).values():
        m, n, rank = layer.out_features, layer.in_features, layer.rank
        # of three factors the core is stored in float32
        core = 2 * rank**2 if accounting == "three_factor" and rank < min(m, n) else 0
        spent += 2 * counted(m, n, rank, accounting) + core
    assert 0.97 * 0.6 < spent / (2 * plan.dense_parameters) <= 0.6
    assert deployed_bytes(small, plan) == 2 * plan.folded_parameters <= spent


@accountings
def test_a_budget_of_flops(accounting):
    model = T5.model()
    statistics = jactus.calibrate(model, T5.batches(), SMALL, progress=False)
    config = SMALL.replace(budget=0.6, budget_unit="flops", accounting=accounting)
    plan = jactus.plan(model, statistics, config, progress=False)
    tokens = {name: layer.tokens for name, layer in plan.layers.items()}
    assert len(set(tokens.values())) > 1, "encoder and decoder see different numbers of tokens"
    full = sum(layer.m * layer.n * layer.tokens for layer in plan.layers.values())
    cost = sum(counted(x.m, x.n, plan.ranks[name], accounting) * x.tokens for name, x in plan.layers.items())
    assert 0.97 * 0.6 < cost / full <= 0.6


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_a_byte_budget_is_of_the_bytes_there_are_and_counts_full_ranks_in_their_own_dtype(bert, budget):
    """What is dense again has the dtype it had."""
    plan = planned(bert, budget=budget, budget_unit="bytes", dtype="bfloat16")
    small = jactus.compress(copy.deepcopy(bert[0]), plan)
    full = [name for name, layer in plan.layers.items() if layer.is_full(plan.ranks[name])]
    assert full
    spent = deployed_bytes(small, plan)
    whole = sum(plan.layers[name].m * plan.layers[name].n for name in full)
    assert spent == 4 * whole + 2 * (plan.folded_parameters - whole)
    assert 0.95 * budget < spent / (4 * plan.dense_parameters) <= budget


@accountings
def test_no_rank_takes_more_bytes_than_the_layer_it_replaces(accounting):
    """Cores are of float32 in a bfloat16 model: where they count, the highest rank that saves parameters costs more than it saves."""
    model = BERT.model().to(torch.bfloat16)
    statistics = jactus.calibrate(model, BERT.batches(), SMALL, progress=False)
    config = SMALL.replace(budget=0.98, budget_unit="bytes", rank_multiple=1, accounting=accounting)
    plan = jactus.plan(model, statistics, config, progress=False)
    small = jactus.compress(copy.deepcopy(model), plan)
    folded = jactus.fold(copy.deepcopy(small))
    lower = {name: layer for name, layer in compressed_layers(small).items() if layer.rank < 16}
    assert lower
    for name, layer in lower.items():
        factors = (layer.U, layer.core, layer.V)
        if accounting != "three_factor":
            factors = (folded.get_submodule(name).left, folded.get_submodule(name).right)
        spent = sum(p.numel() * p.element_size() for p in factors)
        assert spent < 2 * model.get_submodule(name).weight.numel()


def test_a_budget_of_the_whole_model(bert):
    model = copy.deepcopy(bert[0])
    total = jactus.size(model).stored
    jactus.compress(model, planned(bert, scope="model", budget=0.8))
    assert 0.78 * total < jactus.size(model).folded <= 0.8 * total
    assert jactus.size(jactus.fold(model)).stored <= 0.8 * total
    with pytest.raises(JactusError, match="embeddings"):
        planned(bert, scope="model", budget=0.1)


def test_trainable_rank_trains_the_leading_block(bert):
    config = {"budget": 0.7, "rank_multiple": 4}
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


def test_a_plan_takes_a_width_that_it_was_not_made_for(bert):
    """Every direction is kept, so that any core can be had of it."""
    plan = planned(bert, rank_multiple=1, budget=0.8).with_config(core_width=1.5, budget=0.6)
    made = planned(bert, rank_multiple=1, budget=0.6, core_width=1.5)
    assert (plan.ranks, plan.config) == (made.ranks, made.config)
    ours, theirs = (jactus.compress(copy.deepcopy(bert[0]), p) for p in (plan, made))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(p, q), name


def test_a_model_too_small_for_the_rank_multiple_is_refused_not_left_as_it_is(bert):
    with pytest.raises(JactusError, match="rank_multiple"):
        planned(bert, rank_multiple=16)


def test_the_defaults_are_what_the_help_says():
    config = JactusConfig()
    assert JactusConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(JactusConfig(target_modules="all-linear"))


@pytest.mark.parametrize("family", [LLAMA, T5, BERT, VIT], ids=lambda f: f.name)
def test_unless_asked_for_the_task_has_no_share_of_the_rank_and_its_gradient_is_not_summed(family, tmp_path):
    model = family.model()
    statistics = jactus.calibrate(model, family.batches(), JactusConfig().replace(rank_multiple=2), progress=False)
    assert all(layer.gradient_sum is None for layer in statistics.layers.values())
    plan = jactus.plan(model, statistics, progress=False)
    assert all(
        layer.weight_rank(plan.ranks[name], plan.config) == plan.ranks[name] for name, layer in plan.layers.items()
    )
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").config == plan.config


@pytest.mark.parametrize("family", [LLAMA, BERT], ids=lambda f: f.name)
def test_a_share_that_is_asked_for_is_given_and_needs_the_gradients(family):
    model, config = family.model(), JactusConfig().replace(rank_multiple=2, union_share=0.3)
    statistics = jactus.calibrate(model, family.batches(), config, progress=False)
    plan = jactus.plan(model, statistics, config, progress=False)
    assert any(layer.weight_rank(plan.ranks[name], config) < plan.ranks[name] for name, layer in plan.layers.items())
    without = jactus.calibrate(model, family.batches(), config.replace(union_share=0.0), progress=False)
    with pytest.raises(JactusError, match="no mean gradients"):
        jactus.plan(model, without, config, progress=False)


@pytest.mark.parametrize("family", [LLAMA, T5, BERT, VIT], ids=lambda f: f.name)
def test_every_layer_has_a_core_whatever_the_model_and_the_budget(family, tmp_path):
    model = family.model()
    config = JactusConfig().replace(rank_multiple=2)
    plan = jactus.plan(model, jactus.calibrate(model, family.batches(), config, progress=False), progress=False)
    for budget in (0.4, 0.8, 1.0):
        at = plan.at(budget)
        assert None not in at.ranks.values()
        at.save(tmp_path / "plan")
        assert Plan.load(tmp_path / "plan").ranks == at.ranks
    assert all(layer.is_full(at.ranks[name]) for name, layer in at.layers.items())
    assert set(compressed_layers(jactus.compress(model, at))) == set(plan.layers)


@pytest.mark.parametrize("budget", [0.9, 1.0])
def test_a_layer_whose_shorter_side_is_shorter_than_the_multiple_stays_as_it_is(budget):
    model = LLAMA.model()
    config = SMALL.replace(rank_multiple=9, budget=budget)
    plan = jactus.plan(model, jactus.calibrate(model, LLAMA.batches(), config, progress=False), config, progress=False)
    short = {name for name in plan.layers if name.endswith(("k_proj", "v_proj"))}  # 8×16
    assert {name for name, rank in plan.ranks.items() if rank is None} == short
    assert all(plan.layers[name].directions.kept == (0 if name in short else 16) for name in plan.layers)
    assert {plan.ranks[name] for name in plan.layers.keys() - short} == ({9, 16} if budget < 1 else {16})
    assert plan.folded_parameters <= budget * plan.dense_parameters  # they count as they are
    before = dict(model.named_modules())
    jactus.compress(model, plan)
    assert set(compressed_layers(model)) == plan.layers.keys() - short
    assert all(model.get_submodule(name) is before[name] for name in short)
    assert not any(before[name].weight.requires_grad for name in short)

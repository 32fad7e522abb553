"""Sums of each layer's smaller side: the same spectra and factors as from whole covariances, in less memory."""

import copy
import weakref

import pytest
import torch

import jactus
from jactus import JactusConfig, JactusError, Statistics
from jactus.calibration.passes import sum_bytes
from jactus.calibration.sides import sides
from jactus.calibration.tracing import trace
from jactus.model.targets import Target
from jactus.planning.planner import planned
from jactus.planning.subspace import directions, metric, seen
from tests.models import BERT, FAMILIES, GPT2, LLAMA, T5, cast
from tests.test_resume import assert_identical, interrupted
from tests.test_statistics import assert_same_sums, calibrated, rows
from tests.test_subspace import covariance, damped, steep
from tests.unchanged import assert_same, state

SEEN = JactusConfig().replace(rank_multiple=2, union_share=0.0)
WHOLE = SEEN.replace(union=("weight", "covariance"), union_share=0.25)
EPS = 2**-52
DAMPING = 0.01
CPU = torch.device("cpu")


def data(kind, d, seed):
    """A covariance (d, d): of many tokens, of fewer than d, or whose eigenvalues fall by ten powers of ten."""
    if kind == "steep":
        return steep(d, 10, seed)
    return covariance(d, 5 if kind == "few tokens" else 4 * d, seed)


def both(W, G, A):
    """The directions from whole covariances (None: the identity), and from what is known with the smaller side alone."""
    m, n = W.shape
    whole = [None if S is None else metric(S, DAMPING, CPU) for S in (G, A)]
    known = list(whole)
    longer, S, X = (1, A, W) if m <= n else (0, G, W.T)
    if S is not None:
        known[longer] = seen(X.double() @ S @ X.double().T, float(S.diagonal().mean()), DAMPING, CPU)
    return directions(W, *whole, min(m, n), 0), directions(W, *known, min(m, n), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["many tokens", "few tokens", "steep"])
@pytest.mark.parametrize("which", ["fisher", "input", "gradient"])
@pytest.mark.parametrize(("m", "n"), [(24, 24), (16, 40), (40, 16), (3, 50)])
def test_spectra_and_factors_are_those_of_whole_covariances(m, n, which, kind, dtype):
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(m), dtype=torch.float64).to(dtype)
    G = data(kind, m, 1) if which in ("fisher", "gradient") else None
    A = data(kind, n, 2) if which in ("fisher", "input") else None
    whole, small = both(W, G, A)
    s = whole.sigma
    # both are roots of eigenvalues of one matrix, made in another order: some roundings of the largest
    slack = 10 * max(m, n) * EPS * s[0] ** 2
    assert bool(((small.sigma - s).abs() <= slack / s).all())
    large = s >= 1e-3 * s[0]  # of which squares leave ten digits
    assert bool(((small.sigma - s).abs() <= 1e-10 * s)[large].all())
    Gd, Ad = (torch.eye(d).double() if S is None else damped(S, DAMPING) for d, S in ((m, G), (n, A)))
    for rank in (1, 2, min(m, n) // 2, min(m, n)):
        (U, C, V), (U0, C0, V0) = small.factors(rank, 0.0), whole.factors(rank, 0.0)
        gap = s[rank - 1] ** 2 - (s[rank] ** 2 if rank < len(s) else 0)  # what tells a subspace from the rest
        assert float((U @ C @ V.T - U0 @ C0 @ V0.T).norm()) <= float(100 * slack / gap * W.double().norm())
        for B, S in ((U, Gd), (V, Ad)):
            assert torch.allclose(B.T @ S @ B, torch.eye(rank).double(), atol=10 * float(slack / s[rank - 1] ** 2))


@pytest.mark.parametrize(("m", "n"), [(16, 40), (40, 16)])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_weight_of_low_rank_is_given_back_and_its_other_directions_are_no_larger_than_average(m, n, rank):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(m, rank, generator=g, dtype=torch.float64) @ torch.randn(rank, n, generator=g, dtype=torch.float64)
    G, A = data("many tokens", m, 1), data("many tokens", n, 2)
    _, small = both(W, G, A)
    assert int((small.sigma > 1e-7 * small.sigma.max()).sum()) == rank
    U, C, V = small.factors(16, 0.0)
    assert torch.allclose(U @ C @ V.T, W, atol=1e-9)
    longer, S = (V, A) if m <= n else (U, G)
    lengths, mean = longer.norm(dim=0), float(S.diagonal().mean())
    assert lengths.max() <= (DAMPING * mean) ** -0.5 * (1 + 1e-9)
    assert int(torch.linalg.matrix_rank(longer)) == 16
    assert torch.equal(longer, (small.right if m <= n else small.left).weight), "the same at every call"


def test_directions_that_float32_sums_do_not_resolve_stay_bounded():
    """Of σ² below 2⁻²⁴ of the largest a float32 sum says nothing: a direction is then as long as the damping says, at most."""
    g = torch.Generator().manual_seed(0)
    W = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64))[0] * torch.logspace(0, -6, 16).double()
    W = W @ torch.randn(16, 40, generator=g, dtype=torch.float64)
    A, G = data("many tokens", 40, 2), data("many tokens", 16, 1)
    scale = float(A.diagonal().mean())
    known = seen((W @ A @ W.T).float(), scale, DAMPING, CPU)
    small = directions(W, metric(G, DAMPING, CPU), known, 16, 0)
    U, C, V = small.factors(16, 0.0)
    assert torch.allclose(U @ C @ V.T, W, atol=1e-9)
    assert V.norm(dim=0).max() <= (DAMPING * scale) ** -0.5 * (1 + 1e-9)
    exact = directions(W, metric(G, DAMPING, CPU), metric(A, DAMPING, CPU), 16, 0).sigma
    assert bool(((small.sigma.square() - exact.square()).abs() <= 16 * 2**-24 * exact[0] ** 2).all())


def plans(model, batches, metric_name, **how):
    whole = jactus.plan(
        model, calibrated(model, batches, WHOLE, **how), SEEN.replace(metric=metric_name), progress=False
    )
    statistics = calibrated(model, batches, SEEN.replace(metric=metric_name), **how)
    return whole, jactus.plan(model, statistics, progress=False), statistics


@pytest.mark.parametrize("metric_name", ["identity", "input", "gradient", "fisher"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_models_plan_is_that_of_whole_covariances(family, metric_name):
    model = family.model(dtype=torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():  # they begin as zeros, which are in nobody's way
            if name.endswith("bias"):
                p.normal_()
    whole, small, statistics = plans(model, [cast(b, torch.float64) for b in family.batches()], metric_name)
    assert small.ranks == whole.ranks
    for name, layer in small.layers.items():
        there = whole.layers[name]
        # to the model's own rounding, which the sums of Wx and of x see in another order
        assert torch.allclose(layer.energies, there.energies, rtol=1e-9, atol=1e-9 * float(there.energies[0]))
    ours, theirs = (jactus.compress(copy.deepcopy(model), p.at(0.6)) for p in (small, whole))
    batch = cast(family.batch(), torch.float64)
    # plans keep directions in float32
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-4, atol=1e-4)
    assert jactus.learning_rate(ours) == pytest.approx(jactus.learning_rate(theirs), rel=1e-4)
    longest = {name: max(layer.m, layer.n) for name, layer in statistics.layers.items()}
    assert all(
        S.shape[0] <= longest[name] for name, s in statistics.layers.items() for S in s.sums().values() if S.dim()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [LLAMA, GPT2], ids=lambda f: f.name)
def test_a_half_precision_model_is_summed_as_exactly_as_from_its_inputs(family, dtype):
    """The layer's own output is rounded to its dtype; the product is made anew of the values as they are."""
    model = family.model(dtype=dtype)
    whole = calibrated(model, family.batches(), WHOLE)
    small = calibrated(model, family.batches(), SEEN)
    found = 0
    for name, layer in small.layers.items():
        W = model.get_submodule(name).weight.detach().double()
        W = W.T if family is GPT2 else W
        if layer.seen_input_sum is not None:
            want = W @ whole.input_covariance(name) @ W.T
            assert torch.allclose(small.seen_input(name), want, rtol=0, atol=1e-12 * float(want.norm()))
            found += 1
        if layer.seen_output_sum is not None:
            want = W.T @ whole.output_covariance(name) @ W
            assert torch.allclose(small.seen_output(name), want, rtol=0, atol=1e-12 * float(want.norm()))
            found += 1
    assert found >= 4


def test_under_autocast_products_are_not_rounded():
    model, batches = LLAMA.model(), LLAMA.batches()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        small, whole = calibrated(model, batches, SEEN), calibrated(model, batches, WHOLE)
    name = next(name for name, layer in small.layers.items() if layer.seen_input_sum is not None)
    W = model.get_submodule(name).weight.detach().double()
    want = W @ whole.input_covariance(name) @ W.T
    assert torch.allclose(small.seen_input(name), want, rtol=0, atol=1e-12 * float(want.norm()))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_neither_the_batch_size_nor_padding_nor_shards_matter(family):
    model = family.model(dtype=torch.float64)
    examples = [cast(b, torch.float64) for b in family.batches(5)]
    whole = calibrated(model, examples, SEEN)
    assert_same_sums(calibrated(model, rows(examples, 1), SEEN), whole)
    parts = [calibrated(model, shard, SEEN) for shard in (examples[:2], examples[2:3], examples[3:])]
    assert_same_sums(parts[0].merge_(parts[1:]), whole)
    assert_same_sums(calibrated(model, examples, SEEN, loss_scale=64.0), whole)


def test_a_file_gives_them_back_and_a_run_goes_on(tmp_path):
    model, batches = LLAMA.model(), LLAMA.batches(5)
    for limit in (None, 12_000):
        found = jactus.calibrate(model, batches, SEEN, progress=False, memory_limit=limit)
        found.save(tmp_path / "s.safetensors")
        assert_identical(Statistics.load(tmp_path / "s.safetensors"), found)
        with pytest.raises(KeyboardInterrupt):
            jactus.calibrate(
                model,
                interrupted(batches, 3),
                SEEN,
                resume=tmp_path / "r",
                resume_every=0,
                progress=False,
                memory_limit=limit,
            )
        again = jactus.calibrate(model, batches, SEEN, resume=tmp_path / "r", progress=False, memory_limit=limit)
        assert_identical(again, found)


def test_layers_with_one_input_take_whichever_is_less():
    found = calibrated(LLAMA.model(), LLAMA.batches(), SEEN)
    for name, layer in found.layers.items():
        ending = name.rpartition(".")[2]
        kinds = set(layer.sums())
        if ending in ("q_proj", "k_proj", "v_proj", "o_proj"):  # 16² for three, or 16² + 8² + 8²; and 16² either way
            assert kinds == {"output_sum"}, name
            assert found.input_covariance(name).shape == (16, 16)
        elif ending in ("gate_proj", "up_proj"):  # 24×16
            assert kinds == {"seen_output_sum", "output_trace"}, name
            assert layer.seen_output_sum.shape == found.input_covariance(name).shape == (16, 16)
        else:  # 16×24
            assert kinds == {"output_sum", "seen_input_sum", "input_trace"}, name
            assert found.input_covariance(name) is None


def test_a_shared_input_of_narrow_layers_is_summed_for_each():
    """Keys and values of few heads in cross-attention: two small sums are less than one large."""
    targets = {name: Target(name, torch.nn.Linear(40, m), m, 40, False) for name, m in (("k", 8), ("v", 8), ("q", 40))}
    pair = {name: targets[name] for name in ("k", "v")}
    assert all(s.Wx and not s.x for s in sides(pair, {"k": "k", "v": "k"}, SEEN).values())
    three = sides(targets, {"k": "k", "v": "k", "q": "k"}, SEEN)
    assert all(s.x and not s.Wx for s in three.values())


def test_a_llama_2_7b_needs_a_third_of_what_whole_covariances_take():
    """Section 9 of the derivation: eleven sums of 4096² a block."""
    with torch.device("meta"):
        shapes = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
        shapes |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
        targets = {name: Target(name, torch.nn.Linear(n, m), m, n, False) for name, (m, n) in shapes.items()}
    owners = {"k": "q", "v": "q", "up": "gate"}

    def numel(config):
        return sum(s.numel(targets[k], k not in owners) for k, s in sides(targets, owners, config).items())

    assert numel(SEEN) == 11 * 4096**2
    assert numel(WHOLE) == 8 * 4096**2 + 3 * 11008**2
    assert sum(sum_bytes(t, SEEN) for t in targets.values()) == 4 * 14 * 4096**2  # before sharing


def test_what_was_not_summed_is_named():
    model, batches = LLAMA.model(), LLAMA.batches()
    statistics = calibrated(model, batches, SEEN)
    for name in ("identity", "input", "gradient", "fisher"):  # all that is without task directions can be had of them
        made = calibrated(model, batches, SEEN.replace(metric=name))
        assert jactus.plan(model, statistics, SEEN.replace(metric=name), progress=False).ranks == (
            jactus.plan(model, made, progress=False).ranks
        )
    before = state(model)
    with pytest.raises(
        JactusError, match=r"gate_proj.*output-gradient covariance \(24×24\).*Wᵀ G W.*calibrate with this"
    ):
        jactus.plan(model, statistics, WHOLE, progress=False)
    with pytest.raises(JactusError, match="no mean gradients"):
        jactus.plan(model, statistics, WHOLE.replace(union=("weight", "gradient")), progress=False)
    only = calibrated(model, batches, SEEN.replace(metric="input"))
    with pytest.raises(JactusError, match="no output-gradient covariances"):
        jactus.plan(model, only, SEEN, progress=False)
    down = SEEN.replace(target_modules=("down_proj",))
    narrow = calibrated(model, batches, down)
    with pytest.raises(JactusError, match=r"down_proj.*input covariance \(24×24\).*W A Wᵀ"):
        jactus.plan(model, narrow, down.replace(union=("weight", "covariance"), union_share=0.2), progress=False)
    with pytest.raises(JactusError, match="another configuration"):
        statistics.merge_([calibrated(model, batches, WHOLE)])
    assert_same(before, state(model))


def test_sums_of_one_weight_say_nothing_of_another():
    statistics = calibrated(LLAMA.model(), LLAMA.batches(), SEEN)
    with pytest.raises(JactusError, match="other weights here"):
        jactus.plan(LLAMA.model(seed=1), statistics, progress=False)


@pytest.mark.parametrize(("module", "what"), [("down_proj", "inputs"), ("up_proj", "gradients")])
def test_values_that_are_not_finite_are_named_where_they_began(module, what):
    model = LLAMA.model()
    layer = model.model.layers[1].mlp
    if what == "inputs":
        layer.down_proj.register_forward_pre_hook(lambda m, args: (args[0] * float("inf"),))
    else:
        layer.up_proj.register_forward_hook(
            lambda m, args, y: y.register_hook(lambda g: g * float("inf")) and None if y.requires_grad else None
        )
    with pytest.raises(JactusError, match=f"NaN or Inf in the {what} of model.layers.1.mlp.{module}"):
        jactus.calibrate(model, LLAMA.batches(), SEEN, progress=False, verify=False)


def test_a_replaced_forward_is_not_taken_for_the_product():
    """accelerate's hooks round what they move: as much as is let pass is not to be in the sums."""
    model = BERT.model(dtype=torch.float64)
    name = "bert.encoder.layer.0.output.dense"
    layer = model.get_submodule(name)
    exact = calibrated(model, BERT.batches(), SEEN).seen_input(name)
    layer.forward = lambda x: type(layer).forward(layer, x) * (1 + 1e-4)
    small = calibrated(model, BERT.batches(), SEEN).seen_input(name)
    layer.__dict__.pop("forward")
    assert torch.allclose(small, exact, rtol=0, atol=1e-12 * float(exact.norm()))


def test_cross_attentions_share_what_they_read():
    found = calibrated(T5.model(), T5.batches(), SEEN)
    cross = {s.inputs for n, s in found.layers.items() if n.endswith(("EncDecAttention.k", "EncDecAttention.v"))}
    assert len(cross) == 1
    assert cross <= set(found.input_sums)


@pytest.mark.parametrize("config", [SEEN, WHOLE], ids=["seen", "whole"])
def test_sums_that_are_planned_make_room_and_the_plan_is_the_same(config):
    model = LLAMA.model()
    statistics = jactus.calibrate(model, LLAMA.batches(), config, progress=False)
    kept = jactus.plan(model, statistics, config, progress=False)
    assert statistics.nbytes > 0
    forgetful = planned(model, statistics, config, progress=False, forget=True)
    assert statistics.nbytes == 0
    assert forgetful.ranks == kept.ranks
    for name, layer in kept.layers.items():
        assert torch.equal(layer.energies, forgetful.layers[name].energies)


@pytest.mark.parametrize("values", [False, True])
def test_the_look_at_the_first_batch_keeps_no_input_or_output_alive(values):
    """As a forward without it; layers that share an input are told all the same."""
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4)))
    targets = {str(i): Target(str(i), layer, 6, 6, False) for i, layer in enumerate(model)}
    alive, most = [], []

    def watch(module, args):
        alive.append(weakref.ref(args[0]))
        most.append(sum(ref() is not None for ref in alive))

    for layer in model:
        layer.register_forward_pre_hook(watch)

    def run():
        y = torch.randn(2, 6)
        for layer in model:
            y = layer(y)
        model[0](y), model[1](y)

    with torch.no_grad():
        run()
    bare = max(most)
    alive.clear(), most.clear()
    found = trace(model, targets, run, values)
    assert max(most) == bare < len(most)
    assert found.owners == {name: name for name in targets}

    def shared():
        y = torch.randn(2, 6)
        for layer in model:
            layer(y)

    assert set(trace(model, targets, shared, values).owners.values()) == {"0"}

"""The peers of the accuracy comparison: what they compute at first, what trains, what they cost."""

import copy
import functools

import eigentune
import pytest
import torch
from peft import PeftModel

import jactus
from bench.accuracy import compressors, peers
from bench.accuracy.compressors import COMPRESSORS
from bench.accuracy.peers import METHODS, Context
from jactus import JactusConfig, JactusError
from jactus.config import SOURCES
from jactus.model.families import head_parameters
from jactus.model.lowrank import FoldedLinear, compressed_layers, replace_module
from jactus.model.pivots import pivots
from jactus.model.targets import find_targets
from tests.models import BERT, BY_NAME, GPT2, LLAMA, VIT

FULL = ("full", "full[linears]")
COMPACT = ("svd-llm-compact",)
ADAPTERS = ("lora", "dora", "rslora", "hira", "pissa", "corda", "eva", "eigentune")
BUDGETS = (0.8, 0.5, 0.3)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers


@functools.cache
def statistics(name, dtype=torch.float32):
    family = BY_NAME[name]
    batches = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in b.items()} for b in batches_of(family)]
    config = JactusConfig(union=SOURCES, union_share=0.1)  # the covariances whole, in a language model too
    return jactus.calibrate(family.model(dtype=dtype), batches, config, statistics_dtype="float64", progress=False)


def batches_of(family):
    return family.batches(3, rows=24)


def context(family, seed=0):
    return Context(statistics(family.name), batches_of(family), seed, rank=4)


def outputs(model, family):
    """Logits of the tokens that are not padding."""
    batch = batches_of(family)[0]
    with torch.no_grad():
        found = model(**batch).logits
    return found[batch["attention_mask"].bool()] if "attention_mask" in batch else found


def weights(pair):
    return pair[1].weight @ pair[0].weight


def norms(name, layer):
    """Per compressor the S (m, m) and T (n, n) of the norm ‖S · T‖ that it minimises, written down independently."""
    known = statistics("vit", torch.float64)
    A, G = known.input_covariance(layer), known.output_covariance(layer)
    values, vectors = torch.linalg.eigh(A)
    I_m, I_n = torch.eye(len(G)).double(), torch.eye(len(A)).double()
    return {
        "svd": (I_m, I_n),
        "fwsvd": (G.diag().sqrt().diag(), I_n),
        "asvd": (I_m, A.diag().pow(0.25).diag()),
        "svd-llm": (I_m, vectors * values.clamp(min=0).sqrt()),  # layer norm leaves A without full rank
    }[name]


@pytest.mark.parametrize("family", [VIT, LLAMA], ids=lambda f: f.name)
@pytest.mark.parametrize("name", COMPRESSORS)
def test_at_full_rank_a_compressor_gives_the_dense_model(name, family):
    model = family.model(dtype=torch.float64)
    whole = (
        1.0 if name in COMPACT else 2.0
    )  # a pair of full rank counts up to twice what is dense, and without its pivots as much
    small = COMPRESSORS[name](copy.deepcopy(model), statistics(family.name, torch.float64), whole)
    for target in find_targets(model, JactusConfig()).values():
        assert small.get_submodule(target.name)[0].out_features == min(target.m, target.n)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batches_of(family)[0].items()}
    torch.testing.assert_close(small(**batch).logits, model(**batch).logits, rtol=1e-9, atol=1e-9)


def test_each_compressor_is_the_best_in_its_own_norm():
    model = VIT.model(dtype=torch.float64)
    known = statistics("vit", torch.float64)
    pairs = {name: make for name, make in COMPRESSORS.items() if name not in COMPACT}
    small = {name: make(copy.deepcopy(model), known, 0.5) for name, make in pairs.items()}
    for own in pairs:
        total = dict.fromkeys(pairs, 0.0)
        for layer, target in find_targets(model, JactusConfig()).items():
            S, T = norms(own, layer)
            rank = compressors.uniform_rank(target.m, target.n, 0.5)
            error = {
                name: (S @ (target.weight - weights(m.get_submodule(layer))) @ T).square().sum().item()
                for name, m in small.items()
            }
            least = torch.linalg.svdvals(S @ target.weight @ T)[rank:].square().sum().item()  # Eckart-Young
            assert error[own] == pytest.approx(least, rel=1e-6)
            for name in pairs:
                assert error[own] <= error[name] * (1 + 1e-6)
                total[name] += error[name] / least
        # or the four would be one method
        assert all(total[own] < 0.999 * total[name] for name in pairs if name != own)


def test_without_its_pivots_a_pair_has_more_rank_for_the_same_budget_and_is_the_best_of_it():
    model, known = VIT.model(dtype=torch.float64), statistics("vit", torch.float64)
    small = COMPRESSORS["svd-llm-compact"](copy.deepcopy(model), known, 0.6)
    for layer, target in find_targets(model, JactusConfig()).items():
        S, T = norms("svd-llm", layer)
        pair = small.get_submodule(layer)
        rank = pair[0].out_features
        assert rank > compressors.uniform_rank(target.m, target.n, 0.6)
        least = torch.linalg.svdvals(S @ target.weight @ T)[rank:].square().sum().item()
        assert (S @ (target.weight - weights(pair)) @ T).square().sum().item() == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("budget", [0.1, 0.35, 0.5, 0.8, 0.99, 1.0])
def test_uniform_ranks_are_the_largest_that_the_budget_bears(budget):
    for m, n in ((64, 64), (30, 50), (50, 30), (16, 400)):
        most = budget * m * n + 1e-6
        r = compressors.uniform_rank(m, n, budget)
        assert r * (m + n) <= most < (r + 1) * (m + n)
        r = compressors.uniform_rank(m, n, budget, compact=True)
        assert r * (m + n - r) <= most
        assert r == min(m, n) or most < (r + 1) * (m + n - r - 1)


def test_factors_are_balanced():
    torch.manual_seed(0)
    W = torch.randn(7, 5).double()
    left, right = compressors.best(W, W, 3)
    sigma = torch.linalg.svdvals(W)[:3].diag()
    torch.testing.assert_close(left.T @ left, sigma)
    torch.testing.assert_close(right @ right.T, sigma)


@pytest.mark.parametrize("W,rank", [(torch.zeros(4, 6).double(), 2), (torch.ones(4, 6).double(), 3)])
def test_weights_without_full_rank_are_factored_all_the_same(W, rank):
    left, right = compressors.best(W, W, rank)
    torch.testing.assert_close(left @ right, W)


def test_cholesky_damps_only_what_needs_it():
    X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    full, deficient = X @ X.T, X.T @ X
    L = compressors.cholesky(full)
    torch.testing.assert_close(L @ L.T, full, rtol=1e-12, atol=1e-12)
    L = compressors.cholesky(deficient.float().double())  # rounding makes eigenvalues negative by about 1e-7
    torch.testing.assert_close(L @ L.T, deficient, rtol=1e-4, atol=1e-4)
    with pytest.raises(JactusError, match="no Cholesky factor"):
        compressors.cholesky(torch.full((2, 2), torch.nan).double())


@pytest.mark.parametrize("family", [VIT, LLAMA], ids=lambda f: f.name)
@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_are_met_and_used(budget, family):
    dense = family.model()
    targets = find_targets(dense, JactusConfig()).values()
    counted = sum(t.m * t.n for t in targets)
    others = jactus.size(dense).stored - counted
    for name in [n for n in METHODS if n not in (*FULL, *ADAPTERS)]:
        spent = peers.sizes(METHODS[name](family.model(), context(family), budget)).folded - others
        assert spent <= budget * counted
        if name != "cersa":
            assert spent > budget * counted - sum(t.m + t.n for t in targets)  # one more rank each is too much


@pytest.mark.parametrize("budget", BUDGETS)
def test_cersa_takes_the_largest_common_energy_that_fits(budget):
    model = LLAMA.model()
    flat, *peaked = find_targets(model, JactusConfig()).values()
    # almost flat, it reaches the cap on its rank long before the others; quite flat, its directions were arbitrary
    torch.nn.init.orthogonal_(flat.module.weight).data.mul_(torch.linspace(1, 0.9, 16))
    for target in peaked:
        target.module.weight.data += 0.2
    plan = jactus.plan(model, None, compressors.CERSA, progress=False)
    energy, ranks = compressors.energy_ranks(plan, budget)

    def cost(ranks):
        return sum(r * (plan.layers[k].m + plan.layers[k].n) for k, r in ranks.items())

    def wanted(energy):
        found = {}
        for name, target in find_targets(model, JactusConfig()).items():
            kept = torch.linalg.svdvals(target.weight.double()).square().cumsum(0)
            reached = [r for r in range(1, len(kept) + 1) if kept[r - 1] >= energy * kept[-1]]
            capped = [r for r in range(1, len(kept) + 1) if r * (target.m + target.n) < target.m * target.n]
            found[name] = min(reached[0], capped[-1])
        return found

    # a hair below and above the level, at which the two computations may round differently
    assert wanted(energy - 1e-9) == ranks
    assert ranks[flat.name] == 7  # 16×16: 8 would cost as much as dense
    assert cost(ranks) <= budget * plan.dense_parameters < cost(wanted(energy + 1e-9))
    small = compressed_layers(compressors.cersa(copy.deepcopy(model), None, budget))
    assert {k: layer.rank for k, layer in small.items()} == ranks
    for name, layer in small.items():
        for basis in layer.bases():
            torch.testing.assert_close(basis.T @ basis, torch.eye(layer.rank).double(), rtol=0, atol=1e-5)
        U, S, Vh = torch.linalg.svd(model.get_submodule(name).weight, full_matrices=False)
        truncated = U[:, : layer.rank] * S[: layer.rank] @ Vh[: layer.rank]
        # float32 rounding, 1e-7, over gaps of 0.007 between singular values turns directions by about 2e-5
        torch.testing.assert_close(layer.dense().weight, truncated, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", [VIT, LLAMA], ids=lambda f: f.name)
@pytest.mark.parametrize("name", [n for n in METHODS if n not in (*FULL, "cersa")])
def test_training_starts_from_the_same_function(name, family):
    model, known = family.model(), context(family)
    base = name.removesuffix("+lora")
    expected = COMPRESSORS[base](copy.deepcopy(model), known.statistics, 0.6) if base in COMPRESSORS else model
    before = outputs(expected, family)
    # PiSSA and CorDA split a float32 weight in two: rounding of a few ulps, over a handful of layers
    torch.testing.assert_close(
        outputs(METHODS[name](copy.deepcopy(model), known, 0.6), family), before, rtol=1e-4, atol=2e-6
    )


@pytest.mark.parametrize("family", [VIT, LLAMA], ids=lambda f: f.name)
@pytest.mark.parametrize("name", [n for n in METHODS if n not in FULL])
def test_only_adapters_and_the_head_train(name, family):
    dense = family.model()
    heads = sum(p.numel() for p in head_parameters(dense).values())
    model = METHODS[name](dense, context(family), 0.6).train()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    for batch in batches_of(family):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert moved == {k for k, p in model.named_parameters() if p.requires_grad}
    adapters = {k for k in moved if "lora_" in k or "hira_" in k or k.endswith(".core")}
    assert sum(before[k].numel() for k in moved - adapters) == heads
    layers = {
        k.split(".lora_")[0].split(".hira_")[0].removesuffix(".core").removeprefix("base_model.model.")
        for k in adapters
    }
    wanted = set(find_targets(family.model(), JactusConfig()))
    if name.endswith("+lora"):
        wanted = {f"{target}.{i}" for target in wanted for i in (0, 1)}
    assert layers == wanted or (name == "eva" and layers < wanted)  # EVA may give a layer no rank
    assert peers.sizes(model).optimizer_bytes == 8 * sum(p.numel() for p in trainable)


def test_full_fine_tuning_trains_everything():
    model = METHODS["full"](VIT.model().requires_grad_(False), context(VIT), 1.0)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", [VIT, LLAMA], ids=lambda f: f.name)
def test_full_fine_tuning_of_linears_trains_their_weights_and_the_head(family):
    model = METHODS["full[linears]"](family.model(), context(family), 1.0)
    wanted = {f"{name}.weight" for name in find_targets(model, JactusConfig())} | set(head_parameters(model))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted


@pytest.mark.parametrize("family", [VIT, LLAMA], ids=lambda f: f.name)
@pytest.mark.parametrize("name", METHODS)
def test_sizes_are_those_of_the_model_really_deployed(name, family):
    dense = jactus.size(family.model()).stored
    model = METHODS[name](family.model(), context(family), 0.6)
    size = peers.sizes(model)
    buffers = sum(b.numel() for b in model.buffers()) - sum(b.numel() for b in family.model().buffers())
    assert size.stored == sum(p.numel() for p in model.parameters()) + (buffers if name == "eigentune" else 0)
    assert size.stored_bytes == 4 * size.stored
    if name in ADAPTERS:
        assert size.folded == dense < size.stored
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    elif name == "eigentune":
        model = eigentune.merge_and_unload(model)
    elif name == "cersa":
        model = jactus.fold(model)
    if name.removesuffix("+lora") in COMPACT:
        before = outputs(model, family)
        model = without_pivots(model)
        torch.testing.assert_close(outputs(model, family), before, rtol=1e-4, atol=2e-6)
    assert size.folded == sum(p.numel() for p in model.parameters())


@torch.no_grad()
def without_pivots(model):
    """Each pair that is counted so as the layer that JACTUS would deploy."""
    for name, pair in [(n, m) for n, m in model.named_modules() if isinstance(m, compressors.CompactPair)]:
        right, left = (layer.weight.double() for layer in pair)
        (m, r), n = left.shape, right.shape[1]
        near, far = (left, right.T) if m <= n else (right.T, left)
        order, B = pivots(near)
        layer = FoldedLinear(m, n, r, bias=False)
        layer.hold(order, B, far @ near[order[0, :r]].T, pair[1].weight.dtype)
        layer.bias = pair[1].bias
        replace_module(model, name, layer)
    return model


@pytest.mark.parametrize("name", ["corda", "eva"])
def test_adapters_that_look_at_data_see_neither_padding_nor_labels(name):
    known = context(LLAMA)
    other = []
    for batch in known.batches:
        mask = batch["attention_mask"] == 1
        # as many labels as there are tokens: taken for a token mask they would broadcast without a complaint
        other.append({**batch, "input_ids": torch.where(mask, batch["input_ids"], 5), "labels": torch.full((7,), -100)})
    models = [METHODS[name](LLAMA.model(), Context(None, b, 0, 4), 1.0) for b in (known.batches, other)]
    for (key, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=key)


def test_rows_are_taken_apart_without_their_padding():
    batch = {
        "input_ids": torch.tensor([[1, 2, 0], [0, 3, 4]]),
        "attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]]),
        "labels": torch.zeros(2),
    }
    rows = list(peers.unpadded_rows([batch, batch], torch.device("cpu")))
    assert [row["input_ids"].tolist() for row in rows] == [[[1, 2]], [[3, 4]]] * 2
    assert all(row["attention_mask"].tolist() == [[1, 1]] and "labels" not in row for row in rows)


def test_the_seed_is_that_of_the_adapters():
    def factors(seed):
        torch.rand(seed)  # whatever was drawn before
        return [p for k, p in METHODS["lora"](VIT.model(), context(VIT, seed), 1.0).named_parameters() if "lora_A" in k]

    first, again, other = factors(1), factors(1), factors(2)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_what_a_compressor_cannot_do_is_refused():
    with pytest.raises(JactusError, match=r"c_attn.*nn\.Linear only"):
        COMPRESSORS["svd"](GPT2.model(), None, 0.5)
    with pytest.raises(JactusError, match="another model"):
        COMPRESSORS["svd-llm"](VIT.model(seed=1), statistics("vit"), 0.5)
    for name in ("fwsvd", "asvd", "svd-llm"):
        with pytest.raises(JactusError, match=r"needs .*covariances"):
            COMPRESSORS[name](VIT.model(), None, 0.5)
    with pytest.raises(JactusError, match="rank 1 in every layer"):
        compressors.cersa(VIT.model(), None, 0.01)


@pytest.mark.parametrize("name,advice", [("corda", "without pooler"), ("eva", "larger batches")])
def test_a_pooler_is_refused_where_peft_would_fail_or_hang(name, advice):
    with pytest.raises(JactusError, match=advice):
        METHODS[name](BERT.model(), Context(None, BERT.batches(1, rows=4), 0, 4), 1.0)

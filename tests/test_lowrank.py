"""The layers themselves: three factors compute what their bases say, gradients too; two deploy it with as few numbers as it has."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import jactus
from jactus import CoreLinear, FoldedLinear, JactusError
from jactus.model.lowrank import core_shape

SHAPES = {"m<n": (20, 36), "m=n": (28, 28), "m>n": (36, 20)}
shapes = pytest.mark.parametrize(("m", "n"), SHAPES.values(), ids=SHAPES)
RANKS = (1, 6, 13)
U32 = 2**-24  # the unit roundoff of float32


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(m, n, rank, width=None):
    """Random bases and a core, float64, so that a layer of them keeps the size of its input."""
    p, q = core_shape(m, n, rank, width or rank)
    U, V = (torch.linalg.qr(noise(d, k, seed=seed)).Q for d, k, seed in ((m, p, 1), (n, q, 2)))
    return U, 2 * torch.linalg.qr(noise(max(p, q), min(p, q), seed=3)).Q.reshape(p, q), V


def made(
    m, n, rank, dtype=torch.float64, core_dtype=None, width=None, trainable_rank=None, bias=True, transposed=False
):
    layer = CoreLinear(m, n, rank, bias, transposed, trainable_rank, dtype, width=width)
    layer.hold(*factors(m, n, rank, width), dtype, core_dtype or dtype)
    if bias:
        layer.bias = nn.Parameter(noise(m, seed=4).to(dtype), requires_grad=True)
    if layer.block is not None:
        layer.block.data = noise(*layer.block.shape, seed=5).to(layer.block.dtype)
    return layer.eval()


KINDS = {
    "square": {},
    "wide": {"width": 1.6},
    "leading block": {"trainable_rank": 4},
    "without bias": {"bias": False},
}


def of_kind(kind, m, n, rank, **options):
    """A layer of one of KINDS, or None where it has no such rank."""
    changes = dict(KINDS[kind])
    if "width" in changes:
        changes["width"] = min(int(changes["width"] * rank) + 1, m, n)
    if rank <= changes.get("trainable_rank", 0):
        changes.pop("trainable_rank")
    return made(m, n, rank, **{**changes, **options})


kinds = pytest.mark.parametrize("kind", KINDS)
every = [(shape, rank) for shape in SHAPES for rank in (*RANKS, "full")]
layers = pytest.mark.parametrize(("shape", "rank"), every, ids=lambda value: str(value))


def sizes(shape, rank):
    m, n = SHAPES[shape]
    return m, n, min(m, n) if rank == "full" else rank


def dense(layer):
    """(W, parameters): the weight by its bases, as autograd sees it."""
    U, V = layer.bases()
    return U @ layer.effective_core.double() @ V.T


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@layers
@kinds
def test_the_bases_are_those_it_was_given(kind, shape, rank):
    m, n, r = sizes(shape, rank)
    layer = of_kind(kind, m, n, r)
    U, _, V = factors(m, n, r, layer.width)
    for ours, given, order in zip(layer.bases(), (U, V), (layer.rows, layer.columns)):
        torch.testing.assert_close(ours, given, rtol=0, atol=1e-13)
        assert (order is None) == (given.shape[0] == given.shape[1])


@layers
@kinds
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 5), (40, 3)], ids=str)
def test_it_computes_what_its_dense_weight_does_and_so_do_its_gradients(kind, shape, rank, lead):
    """Of few tokens and of many, which go by products of other order."""
    m, n, r = sizes(shape, rank)
    layer = of_kind(kind, m, n, r)
    trained = layer.core if layer.block is None else layer.block
    x = noise(*lead, n, seed=6).requires_grad_()
    g = noise(*lead, m, seed=7)
    wanted = x @ dense(layer).T + (0 if layer.bias is None else layer.bias)
    found = layer(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))
    leaves = [x, trained, *([] if layer.bias is None else [layer.bias])]
    for ours, theirs in zip(torch.autograd.grad(found, leaves, g), torch.autograd.grad(wanted, leaves, g)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11 * float(theirs.abs().max()))
    assert not layer.U.requires_grad
    assert not layer.V.requires_grad
    assert layer.core.requires_grad == (layer.block is None)


@shapes
def test_a_gradient_of_a_gradient_is_right_too(m, n):
    layer = made(m, n, 5)
    x = noise(3, n, seed=6).requires_grad_()

    def run(x, core, bias):
        return functional_call(layer, {"core": core, "bias": bias}, (x,))

    leaves = (x, layer.core.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@shapes
@pytest.mark.parametrize("tokens", [2, 30])
def test_gradients_of_each_sample_can_be_had_at_once(m, n, tokens):
    layer = made(m, n, 5)
    x = noise(4, tokens, n, seed=6)

    def loss(core, sample):
        return functional_call(layer, {"core": core}, (sample,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(layer.core.detach(), x)
    for found, sample in zip(each, x):
        (wanted,) = torch.autograd.grad(layer(sample).square().sum(), layer.core)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@layers
@kinds
@pytest.mark.parametrize("tokens", [4, 300])
def test_under_autocast_it_is_close_in_bfloat16(kind, shape, rank, tokens):
    m, n, r = sizes(shape, rank)
    layer = of_kind(kind, m, n, r, dtype=torch.float32)
    trained = layer.core if layer.block is None else layer.block
    x, g = noise(tokens, n, seed=6).float().requires_grad_(), noise(tokens, m, seed=7)
    wanted = x.double() @ dense(layer).T + (0 if layer.bias is None else layer.bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert relative(found, wanted) < 2e-2
    leaves = [x, trained, *([] if layer.bias is None else [layer.bias])]
    ours, theirs = torch.autograd.grad(found, leaves, g.bfloat16()), torch.autograd.grad(wanted, leaves, g)
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype == torch.float32
        assert relative(a, b) < 2e-2


@layers
@pytest.mark.parametrize("tokens", [4, 300])
def test_bases_in_bfloat16_beside_a_float32_core_are_close(shape, rank, tokens):
    m, n, r = sizes(shape, rank)
    layer = made(m, n, r, dtype=torch.bfloat16, core_dtype=torch.float32)
    x = noise(tokens, n, seed=6).bfloat16()
    U, C, V = factors(m, n, r)
    found = layer(x)
    assert found.dtype == torch.bfloat16
    assert relative(found, x.double() @ (U @ C @ V.T).T + layer.bias.double()) < 2e-2
    found.sum().backward()
    assert layer.core.grad.dtype == torch.float32
    assert layer.core.grad.any()


@layers
@kinds
def test_a_folded_layer_has_as_many_numbers_as_the_matrix_has_degrees_of_freedom(kind, shape, rank):
    m, n, r = sizes(shape, rank)
    layer = of_kind(kind, m, n, r)
    folded = layer.folded()
    counted = sum(p.numel() for p in folded.parameters())
    assert counted == r * (m + n - r) + (0 if layer.bias is None else m)
    wanted = ((m - r, r), (r, n)) if m <= n else ((m, r), (n - r, r))
    assert (folded.left.shape, folded.right.shape) == wanted
    assert {name: tuple(b.shape) for name, b in folded.named_buffers()} == {"order": (2, min(m, n))}
    assert folded.bias is layer.bias
    assert not folded.left.requires_grad
    assert not folded.right.requires_grad


def basis_with_its_identity(folded):
    """Π [I; B] and the other side, float64: the weight is their product, or its transpose for m > n."""
    left, right = folded.left.double(), folded.right.double()
    B, far = (left, right.T) if folded.out_features <= folded.in_features else (right, left)
    return torch.cat([torch.eye(folded.rank, dtype=torch.float64), B])[folded.order[1]], far


def bound_on_folding(layer, folded, u):
    """What rounding may change in an element of the weight, to first order: a factor of three in U, C or V is rounded once each (T and
    B of a basis), five in all; and of the folded ones both, once more."""
    sides = []
    for stored, order in ((layer.U, layer.rows), (layer.V, layer.columns)):
        k = stored.shape[1]
        T, B = stored[:k].double().abs(), stored[k:].double().abs()
        sides.append(torch.cat([T, B @ T])[slice(None) if order is None else order[1]])
    three = sides[0] @ layer.effective_core.double().abs() @ sides[1].T
    near, far = (t.abs() for t in basis_with_its_identity(folded))
    two = near @ far.T
    return u * (5 * three + 2 * (two if layer.out_features <= layer.in_features else two.T))


@layers
@pytest.mark.parametrize("kind", ["square", "wide", "without bias"])
def test_folding_in_float32_is_right_to_its_rounding(kind, shape, rank):
    m, n, r = sizes(shape, rank)
    layer = of_kind(kind, m, n, r, dtype=torch.float32)
    U, C, V = factors(m, n, r, layer.width)
    W = U @ C @ V.T
    folded = layer.folded()
    bound = bound_on_folding(layer, folded, 1.01 * U32)
    assert ((folded.dense_weight(torch.float64) - W).abs() <= bound).all()
    assert float(bound.max()) < 1e-5 * float(W.abs().max()) * r, "a bound worth having"
    x = noise(9, n, seed=6).float()
    right = x.double() @ W.T + (0 if layer.bias is None else layer.bias.double())
    # sums of n, and of r or n − r, products, and the bias: each adds that many roundings at most, of the absolute products
    near, far = (t.abs() for t in basis_with_its_identity(folded))
    weight = near @ far.T if m <= n else far @ near.T
    sums = U32 * (m + n + r) * (x.double().abs() @ weight.T + (0 if layer.bias is None else layer.bias.double().abs()))
    assert ((folded(x).double() - right).abs() <= x.double().abs() @ bound.T + sums).all()


@layers
@kinds
def test_folding_in_float64_changes_nothing(kind, shape, rank):
    m, n, r = sizes(shape, rank)
    layer = of_kind(kind, m, n, r)
    folded, x = layer.folded(), noise(2, 5, n, seed=6)
    torch.testing.assert_close(folded.dense_weight(), dense(layer).detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.dense_weight(), dense(layer).detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(folded(x), layer(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(folded(x[0, 0]), layer(x[0, 0]), rtol=0, atol=1e-12)


@layers
@pytest.mark.parametrize("kind", ["square", "wide", "without bias"])
def test_a_folded_layer_is_close_in_bfloat16(kind, shape, rank):
    m, n, r = sizes(shape, rank)
    layer = of_kind(kind, m, n, r, dtype=torch.bfloat16, core_dtype=torch.float32)
    U, C, V = factors(m, n, r, layer.width)
    x = noise(64, n, seed=6).bfloat16()
    right = x.double() @ (U @ C @ V.T).T + (0 if layer.bias is None else layer.bias.double())
    found = layer.folded()(x)
    assert found.dtype == torch.bfloat16
    assert relative(found, right) < 2e-2
    wide = layer.folded().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(wide(x.float()), right) < 2e-2


@pytest.mark.parametrize(("m", "n"), [(512, 512), (768, 256), (256, 768)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["square", "wide", "leading block"])
def test_between_rounded_bases_is_the_core_that_is_right_for_them(m, n, dtype, kind):
    rank = round(0.55 * min(m, n))
    layer = of_kind(kind, m, n, rank, dtype=dtype, core_dtype=torch.float32)
    if layer.block is not None:
        layer.block.data.zero_()
    U, C, V = factors(m, n, rank, layer.width)
    off = relative(layer.dense_weight(torch.float64), U @ C @ V.T)
    assert off < 0.5 * torch.finfo(dtype).eps, "no more than the nearest numbers of a dense weight are at the most"


@pytest.mark.parametrize(("m", "n"), [(512, 512), (768, 256), (256, 768)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folded_layer_is_off_by_little_more_than_a_pair_of_factors_is(m, n, dtype):
    rank = round(0.55 * min(m, n))
    layer = made(m, n, rank, dtype, torch.float32, bias=False)
    W, x = dense(layer).detach(), noise(128, n, seed=6).to(dtype)
    left, _, right = torch.linalg.svd(W)
    pair = [left[:, :rank].to(dtype), (left[:, :rank].T @ W).to(dtype)]
    right = x.double() @ W.T
    assert relative(layer.folded()(x), right) < 1.6 * relative(x @ pair[1].T @ pair[0].T, right)


@shapes
def test_a_core_of_low_rank_or_of_zeros_folds(m, n):
    """What a wide side is after its core is multiplied into it may have fewer directions than columns."""
    for core in (0.0, 1.0):
        layer = made(m, n, 6, width=12)
        layer.core.data.fill_(core)
        folded = layer.folded()
        assert all(torch.isfinite(p).all() for p in folded.parameters())
        torch.testing.assert_close(folded.dense_weight(), dense(layer).detach(), rtol=0, atol=1e-12)


@shapes
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_at_full_rank_it_deploys_dense(m, n, transposed, bias):
    bias = bias or transposed  # a Conv1D has one
    layers = [made(m, n, r, transposed=transposed, bias=bias) for r in (min(m, n), min(m, n) - 1)]
    model = nn.ModuleDict(dict(zip(("whole", "lower"), layers))).eval()
    deployed = sum(p.numel() for p in model.parameters()) - (jactus.size(model).stored - jactus.size(model).folded)
    jactus.fold(model)
    assert type(model["whole"]) is (Conv1D if transposed else nn.Linear)
    assert type(model["lower"]) is FoldedLinear
    x = noise(5, n, seed=6)
    for new, old in zip((model["whole"], model["lower"]), layers):
        torch.testing.assert_close(new(x), old(x), rtol=0, atol=1e-12)
    r = min(m, n) - 1
    assert deployed == sum(p.numel() for p in model.parameters()) == m * n + r * (m + n - r) + 2 * bias * m


@shapes
@pytest.mark.parametrize("kind", ["core", "folded"])
def test_pivots_go_along_and_are_never_cast(m, n, kind):
    layer = made(m, n, 5, dtype=torch.float32)
    layer = layer.folded() if kind == "folded" else layer
    keys = {"order"} if kind == "folded" else {"rows", "columns"}
    x = noise(4, n, seed=6).float()
    expected = layer(x)
    other = FoldedLinear(m, n, 5) if kind == "folded" else CoreLinear(m, n, 5)
    assert keys <= layer.state_dict().keys() == other.state_dict().keys()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert all(b.dtype == torch.int64 for b in half.buffers())
    assert relative(half(x.bfloat16()), expected) < 2e-2
    lacking = {name: t for name, t in layer.state_dict().items() if name not in keys}
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(lacking)


@pytest.mark.parametrize("make", [CoreLinear, FoldedLinear])
def test_layers_row_by_row_have_no_pivots(make):
    """As 0.1.0 saved them."""
    m, n, r = 20, 36, 6
    layer = make(m, n, r, dtype=torch.float64, pivoted=False)
    assert not list(layer.buffers())
    for seed, p in enumerate(layer.parameters()):
        p.data = noise(*p.shape, seed=seed) / 6
    core = layer.core if make is CoreLinear else torch.eye(r, dtype=torch.float64)
    U, V = (layer.U, layer.V) if make is CoreLinear else (layer.left, layer.right.T)
    x = noise(5, n, seed=6)
    torch.testing.assert_close(layer(x), x @ (U @ core @ V.T).T + layer.bias, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.dense_weight(), U @ core @ V.T, rtol=0, atol=1e-13)
    if make is CoreLinear:
        assert all(torch.equal(a, b) for a, b in zip(layer.bases(), (U, V)))
        folded = layer.folded()
        assert folded.pivoted
        assert sum(p.numel() for p in folded.parameters()) == r * (m + n - r) + m
        torch.testing.assert_close(folded(x), layer(x), rtol=0, atol=1e-12)


def test_a_width_below_the_rank_or_beside_a_block_is_refused():
    with pytest.raises(JactusError, match="width=4 must be at least the rank"):
        CoreLinear(20, 36, 6, width=4)
    with pytest.raises(JactusError, match="without trainable_rank"):
        CoreLinear(20, 36, 6, width=8, trainable_rank=2)

"""The layer kernels: every product against float64, and whole layers against the reference in the same dtype."""

import pytest
import torch

from jactus_kernels import launches, reference
from jactus_kernels.tiles import Tile

from .conftest import relative

pytest.importorskip("triton")
from jactus_kernels import chain, core_gradient, decode, fused, matmul, scatter

pytestmark = pytest.mark.kernel
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def small_tiles(monkeypatch):
    """Several blocks along every dimension at sizes a sanitiser can run."""
    for module in (chain, core_gradient, decode, matmul, scatter):
        monkeypatch.setattr(module, "find_tile", lambda *_: Tile(16, 32, 16, 4, 2, 1))


def assert_as_good_as_torch(ours, torchs, exact):
    """err(kernel) ≤ 2 err(torch, same dtype) + ε, where ε is what summing in another order may cost a float32."""
    assert ours.shape == exact.shape
    assert relative(ours, exact) <= 2 * relative(torchs, exact) + 2**-21


def layer(randn, T, m, n, r, dtype):
    scales = (((T, n), 1), ((m, r), r**-0.5), ((r, r), r**-0.5), ((n, r), n**-0.5), ((m,), 1))
    return [randn(*shape, dtype=dtype, scale=scale) for shape, scale in scales]


def doubled(tensors):
    return [t.double() if torch.is_tensor(t) else t for t in tensors]


@pytest.mark.parametrize("M,N,K", [(1, 1, 1), (40, 70, 33), (17, 160, 48), (64, 64, 64), (3, 5, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul(randn, small_tiles, M, N, K, dtype, bias, transposed):
    A, B = randn(M, K, dtype=dtype), randn(N, K, dtype=dtype).T if transposed else randn(K, N, dtype=dtype)
    b = randn(N, dtype=dtype) if bias else torch.zeros(N, dtype=dtype, device="cuda")
    exact = A.double() @ B.double() + b.double()
    assert_as_good_as_torch(matmul.matmul(A, B, b if bias else None), torch.addmm(b, A, B), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shipped_tiles(randn, dtype):
    A, B = randn(130, 72, dtype=dtype), randn(72, 136, dtype=dtype)
    assert_as_good_as_torch(matmul.matmul(A, B), A @ B, A.double() @ B.double())
    x, U, C, V, b = layer(randn, 70, 72, 80, 40, dtype)
    z, h = chain.chain(x, V, C.T, keep=True)
    exact = x.double() @ V.double()
    assert_as_good_as_torch(h, x @ V, exact)
    assert_as_good_as_torch(z, x @ V @ C.T, exact @ C.double().T)
    q = randn(70, 40, dtype=dtype)
    assert_as_good_as_torch(core_gradient.core_gradient(q, h), q.T @ h, q.double().T @ h.double())
    y = decode.decode(x[:3], V, C, U, b)
    exact = reference.core_linear(*doubled((x[:3], U, C, V, b)))
    assert_as_good_as_torch(y, reference.core_linear(x[:3], U, C, V, b), exact)


@pytest.mark.parametrize("T,m,n,r", [(40, 50, 70, 17), (1, 8, 8, 1), (33, 12, 130, 64), (50, 36, 20, 100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chain_keeps_the_inner_product(randn, small_tiles, T, m, n, r, dtype):
    x, U, _, V, b = layer(randn, T, m, n, r, dtype)
    h_exact = x.double() @ V.double()
    outer, inner = chain.chain(x, V, U.T, b, keep=True)
    assert_as_good_as_torch(inner, x @ V, h_exact)
    assert_as_good_as_torch(outer, torch.addmm(b, x @ V, U.T), h_exact @ U.double().T + b.double())
    again, nothing = chain.chain(x, V, U.T, b)
    assert torch.equal(again, outer)
    assert nothing.numel() == 0


@pytest.mark.parametrize("T,r", [(300, 40), (5, 33), (1, 1), (130, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_core_gradient_adds_its_parts(randn, small_tiles, T, r, dtype):
    q, h = randn(T, r, dtype=dtype), randn(T, r, dtype=dtype)
    ours = core_gradient.core_gradient(q, h)
    assert_as_good_as_torch(ours, q.T @ h, q.double().T @ h.double())
    assert torch.equal(ours, core_gradient.core_gradient(q, h))


@pytest.mark.parametrize("T,m,r,processors", [(90, 70, 33, 2), (90, 40, 64, 128), (3, 20, 7, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pair_walks_over_its_token_blocks(randn, small_tiles, monkeypatch, T, m, r, processors, dtype):
    monkeypatch.setattr(core_gradient.device, "multiprocessors", lambda x: processors)
    _, U, C, _, _ = layer(randn, T, m, 8, r, dtype)
    g, h = randn(T, m, dtype=dtype), randn(T, r, dtype=dtype)
    p, g_C = core_gradient.projected_gradients(g, h, U, C)
    q = g.double() @ U.double()
    assert_as_good_as_torch(p, (g @ U) @ C, q @ C.double())
    assert_as_good_as_torch(g_C, (g @ U).T @ h, q.T @ h.double())


@pytest.mark.parametrize("T,m,n,r", [(1, 50, 300, 40), (16, 33, 64, 64), (5, 32, 31, 17), (2, 8, 200, 100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_decode(randn, small_tiles, T, m, n, r, dtype, bias):
    x, U, C, V, b = layer(randn, T, m, n, r, dtype)
    b = b if bias else None
    torchs, exact = (reference.core_linear(*t) for t in ((x, U, C, V, b), doubled((x, U, C, V, b))))
    assert_as_good_as_torch(decode.decode(x, V, C, U, b), torchs, exact)
    right = V.T.contiguous()
    torchs, exact = (reference.folded_linear(*t) for t in ((x, U, right, b), doubled((x, U, right, b))))
    assert_as_good_as_torch(decode.decode(x, right.T, None, U, b), torchs, exact)


# one rank for each way through the launches: pair, chain, tiles
@pytest.mark.parametrize("dtype,r", [(torch.bfloat16, 40), (torch.bfloat16, 130), (torch.bfloat16, 260),
                                     (torch.float32, 48), (torch.float32, 66), (torch.float32, 130)])  # fmt: skip
@pytest.mark.parametrize("T", [20, 3, 0])
def test_whole_layers(randn, monkeypatch, dtype, r, T):
    monkeypatch.setattr(launches, "PAIR_TOKENS", 0)
    x, U, C, V, b = layer(randn, T, 24, 40, r, dtype)
    inputs, g = (x, U, C, V, b), randn(T, 24, dtype=dtype)
    exact_y, exact_h = reference.core_linear_train(*doubled(inputs))
    torch_y, torch_h = reference.core_linear_train(*inputs)
    assert_as_good_as_torch(fused.core_linear(*inputs), torch_y, exact_y)
    y, h = fused.core_linear_train(*inputs)
    assert_as_good_as_torch(y, torch_y, exact_y)
    assert_as_good_as_torch(h, torch_h, exact_h)
    for needs in ((True, True), (True, False), (False, True)):
        back = (g, torch_h, U, C, V)
        exact = reference.core_linear_backward(*doubled(back), *needs)
        torchs = reference.core_linear_backward(*back, *needs)
        for ours, same, true in zip(fused.core_linear_backward(*back, *needs), torchs, exact):
            assert_as_good_as_torch(ours, same, true)
    folded = (x, U @ C, V.T.contiguous(), b)
    exact = reference.folded_linear(*doubled(folded))
    assert_as_good_as_torch(fused.folded_linear(*folded), reference.folded_linear(*folded), exact)


def basis(randn, d, r, dtype):
    """B (d − r, r) and the order (2, d) of its pivots and other rows."""
    first = torch.randperm(d, generator=torch.Generator().manual_seed(d)).to("cuda")
    return randn(d - r, r, dtype=dtype, scale=r**-0.5), torch.stack([first, first.argsort()])


@pytest.mark.parametrize("T,d,r", [(40, 70, 33), (1, 9, 1), (17, 160, 96), (33, 64, 63), (20, 50, 50)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_a_basis_without_its_pivots(randn, small_tiles, T, d, r, dtype, strided):
    B, order = basis(randn, d, r, dtype)
    x, z = randn(T, d, dtype=dtype), randn(T, r, dtype=dtype)
    if strided:  # as a folded layer has it, and columns of something wider
        B, x = B.T.contiguous().T, torch.cat([x, x], dim=1)[:, :d]
    for ours, theirs, inputs in ((scatter.widen, reference.widen, z), (scatter.narrow, reference.narrow, x)):
        exact = theirs(inputs.double(), B.double(), order)
        assert_as_good_as_torch(ours(inputs, B, order), theirs(inputs, B, order), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_basis_without_its_pivots_in_shipped_tiles(randn, dtype):
    B, order = basis(randn, 200, 140, dtype)
    x, z = randn(130, 200, dtype=dtype), randn(130, 140, dtype=dtype)
    for ours, theirs, inputs in ((scatter.widen, reference.widen, z), (scatter.narrow, reference.narrow, x)):
        exact = theirs(inputs.double(), B.double(), order)
        assert_as_good_as_torch(ours(inputs, B, order), theirs(inputs, B, order), exact)


def test_layers_take_strided_tensors(randn, small_tiles):
    x, U, C, V, b = layer(randn, 20, 24, 40, 12, torch.bfloat16)
    wide = torch.zeros(20, 55, dtype=torch.bfloat16, device="cuda")
    wide[:, 3:43] = x
    views = (wide[:, 3:43], U.T.contiguous().T, C.T.contiguous().T, V.T.contiguous().T, b)
    assert torch.equal(fused.core_linear(*views), fused.core_linear(x, U, C, V, b))
    scattered = torch.zeros(40, 80, dtype=torch.bfloat16, device="cuda")[::2, ::2]
    scattered.copy_(x)
    assert torch.equal(fused.core_linear_train(scattered, U, C, V)[0], fused.core_linear(x, U, C, V))

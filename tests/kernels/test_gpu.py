"""On a real GPU only: the operators through torch's dispatcher, compiled, captured, under autocast, at real sizes."""

import pytest
import torch

import jactus_kernels as jk
from jactus_kernels import ops, reference

from .conftest import relative
from .test_core_kernels import assert_as_good_as_torch, doubled, layer

REAL = torch.cuda.is_available() and (torch.version.cuda or torch.version.hip)
pytestmark = pytest.mark.skipif(not REAL, reason="needs a GPU")
BACKENDS = pytest.mark.parametrize("backend", ["fused", "triton", "torch", "auto"])


@BACKENDS
@pytest.mark.parametrize("T", [1, 16, 300, 4096])
@pytest.mark.parametrize("r", [64, 128, 256, 1344])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers_at_real_sizes(randn, backend, T, r, dtype):
    x, U, C, V, b = layer(randn, T, 1024, 4096, r, dtype)
    inputs = x, U, C, V, b
    exact, torchs = (reference.core_linear(*t) for t in (doubled(inputs), inputs))
    with jk.use(backend=backend):
        assert_as_good_as_torch(jk.core_linear(*inputs), torchs, exact)
        x.requires_grad_(), C.requires_grad_(), b.requires_grad_()
        g = randn(T, 1024, dtype=dtype)
        ours = torch.autograd.grad(jk.core_linear(*inputs), (x, C, b), g)
    same = torch.autograd.grad(reference.core_linear(*inputs), (x, C, b), g)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    true = torch.autograd.grad(reference.core_linear(*wide), (wide[0], wide[2], wide[4]), g.double())
    for mine, torchs, exact in zip(ours, same, true):
        assert_as_good_as_torch(mine, torchs, exact)


@BACKENDS
@pytest.mark.parametrize("T,n", [(2048, 768), (16384, 768), (4096, 4096), (333, 5001)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_covariance_at_real_sizes(randn, backend, T, n, dtype):
    X = randn(T, n, dtype=dtype)
    mask = torch.rand(T, device="cuda") > 0.3
    with jk.use(backend=backend):
        S = jk.symmetrize_(jk.covariance_update_(torch.zeros(n, n, device="cuda"), X, mask))
        again = jk.symmetrize_(jk.covariance_update_(torch.zeros(n, n, device="cuda"), X, mask))
    kept = X[mask].double()
    assert relative(S, kept.T @ kept) < 4 * T**0.5 * 2**-23
    assert torch.equal(S, again)


@BACKENDS
def test_opcheck(randn, backend):
    x, U, C, V, b = layer(randn, 40, 48, 64, 32, torch.bfloat16)
    with jk.use(backend=backend):
        torch.library.opcheck(ops._core_linear, (x, U, C, V, b))
        torch.library.opcheck(ops._folded_linear, (x, U, V.T.contiguous(), b))
        torch.library.opcheck(ops._covariance_update, (torch.zeros(64, 64, device="cuda"), x, None, 1.0))
        torch.library.opcheck(ops._core_linear_backward, (x @ V @ U.T, x @ V, U, C, V, True, True))


@BACKENDS
def test_a_cuda_graph_replays_and_nothing_waits_for_the_device(randn, backend):
    x, U, C, V, b = layer(randn, 64, 256, 512, 128, torch.bfloat16)
    S, mask = torch.zeros(512, 512, device="cuda"), torch.rand(64, device="cuda") > 0.5

    def calls():
        jk.covariance_update_(S, x, mask)
        return jk.core_linear(x, U, C, V, b), jk.core_linear(x[:1], U, C, V, b)

    with jk.use(backend=backend):
        calls()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            calls()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = calls()
        S.zero_()
        graph.replay()
        sums, outputs = S.clone(), [y.clone() for y in captured]
        S.zero_()
        expected = calls()
    assert torch.equal(sums.tril(), S.tril())
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected))


@BACKENDS
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(randn, backend, dynamic):
    x, U, C, V, b = layer(randn, 64, 48, 64, 32, torch.bfloat16)
    C.requires_grad_()
    compiled = torch.compile(lambda x: jk.core_linear(x, U, C, V, b).square().sum(), fullgraph=True, dynamic=dynamic)
    with jk.use(backend=backend):
        for T in (64, 33):
            ours = torch.autograd.grad(compiled(x[:T]), C)[0]
            plain = torch.autograd.grad(reference.core_linear(x[:T], U, C, V, b).square().sum(), C)[0]
            assert relative(ours, plain) < 2**-5


@BACKENDS
def test_autocast(randn, backend):
    x, U, C, V, b = layer(randn, 40, 48, 64, 32, torch.float32)
    C.requires_grad_()
    with jk.use(backend=backend), torch.autocast("cuda", dtype=torch.bfloat16):
        y = jk.core_linear(x, U, C, V, b)
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.float().sum(), C)[0].dtype == torch.float32

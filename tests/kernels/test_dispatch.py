"""What a CUDA tensor's operator does: kernels or torch as the policy says, with the launches that the plan lists."""

import pytest
import torch

import jactus_kernels as jk
from jactus_kernels import cuda, launches, reference
from jactus_kernels.launches import Shape, triton_launches

from .conftest import relative
from .test_core_kernels import assert_as_good_as_torch, doubled, layer

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.kernel


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched so far."""
    names, run = [], JITFunction.run

    def recording(self, *args, **kwargs):
        names.append(self.fn.__name__.removesuffix("_kernel").replace("_", " "))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", recording)
    return names


def run(op, x, U, C, V, b):
    if op == "folded_linear":
        return cuda.folded_linear(x, U, V.T.contiguous(), b)
    if op == "core_linear_backward":
        return cuda.core_linear_backward(x @ V @ U.T, x @ V, U, C, V, True, True)
    return getattr(cuda, op)(x, U, C, V, b)


@pytest.mark.parametrize("op", ["core_linear", "core_linear_train", "core_linear_backward", "folded_linear"])
@pytest.mark.parametrize("T,r", [(20, 16), (20, 144), (20, 272), (2, 16), (2, 272)])
@pytest.mark.parametrize("many_from", [0, 1 << 15])
def test_launches_are_those_planned(randn, launched, monkeypatch, op, T, r, many_from):
    monkeypatch.setattr(launches, "PAIR_TOKENS", many_from)
    tensors = layer(randn, T, 16, 24, r, torch.bfloat16)
    with jk.use(backend="triton"):
        run(op, *tensors)
    planned = triton_launches(op, Shape(T, 16, 24, r), "sm_90", 132, library=False)
    assert launched == [launch.kernel for launch in planned]


@pytest.mark.parametrize("op", ["core_linear", "core_linear_train", "core_linear_backward", "folded_linear"])
def test_torch_launches_no_kernel(randn, launched, op):
    tensors = layer(randn, 20, 16, 24, 16, torch.bfloat16)
    with jk.use(backend="torch"):
        run(op, *tensors)
    assert launched == []


@pytest.mark.parametrize("backend,kernels", [("triton", ["narrow", "widen"]), ("torch", [])])
def test_a_basis_without_its_pivots_on_either_backend(randn, launched, backend, kernels):
    order = torch.stack([torch.arange(24).flip(0), torch.arange(24).flip(0)]).to("cuda")
    B, x = randn(10, 14, dtype=torch.bfloat16), randn(2, 5, 24, dtype=torch.bfloat16)
    with jk.use(backend=backend):
        y = cuda.widen(cuda.narrow(x, B, order), B, order)
    assert launched == kernels
    inner = reference.narrow(x, B, order)
    exact = reference.widen(reference.narrow(x.double(), B.double(), order), B.double(), order)
    assert_as_good_as_torch(y, reference.widen(inner, B, order), exact)


def test_fused_leaves_plain_products_to_the_library(randn, launched):
    x, U, C, V, b = layer(randn, 20, 16, 24, 16, torch.bfloat16)
    with jk.use(backend="fused"):
        y = cuda.core_linear_train(x, U, C, V, b)[0]
    assert launched == ["chain"]
    exact = reference.core_linear(*doubled((x, U, C, V, b)))
    assert_as_good_as_torch(y, reference.core_linear(x, U, C, V, b), exact)
    _, U, C, V, _ = layer(randn, 20, 16, 24, 144, torch.bfloat16)
    back = (x @ V @ U.T, x @ V, U, C, V)
    with jk.use(backend="fused"):
        ours = cuda.core_linear_backward(*back, True, True)
    assert launched == ["chain", "chain"]
    torchs = reference.core_linear_backward(*back, True, True)
    for mine, same, true in zip(ours, torchs, reference.core_linear_backward(*doubled(back), True, True)):
        assert_as_good_as_torch(mine, same, true)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("masked", [False, True])
def test_covariance_on_either_backend(randn, monkeypatch, launched, backend, masked):
    monkeypatch.setattr(cuda, "_mm_has_out_dtype", lambda: torch.version.cuda is not None)
    X = randn(20, 24, dtype=torch.bfloat16)
    mask = torch.arange(20, device="cuda") % 3 > 0 if masked else None
    if masked:
        X[::3] = float("nan")
    S = torch.zeros(24, 24, device="cuda")
    with jk.use(backend=backend):
        cuda.covariance_update_(S, X, mask, 0.5)
    kept = X.double() if mask is None else X[mask].double()
    assert relative(S.tril(), 0.5 * (kept.T @ kept).tril()) < 1e-6
    assert launched == (["covariance"] if backend == "triton" else [])


def test_float64_and_strided_sums_run_on_torch(randn, launched):
    X = randn(20, 24)
    for S in (torch.zeros(24, 24, dtype=torch.float64, device="cuda"), torch.zeros(24, 48, device="cuda")[:, ::2]):
        cuda.covariance_update_(S, X, None, 1.0)
        assert relative(S.tril(), (X.double().T @ X.double()).tril()) < 1e-6
    assert launched == []

"""A basis without its pivots on the CPU, worked through in pieces: values and gradients against float64."""

import pytest
import torch
from torch.nn.functional import linear

import jactus_kernels as jk
from jactus_kernels import cpu, cuda, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(11, 9, 5, 7), (4, 8, 3, 3), (1, 6, 1, 2), (0, 5, 2, 4), (13, 7, 6, 1)]  # T, d, r, q; pieces are of 4


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(cpu, "PIECE", 4)
    monkeypatch.setattr(cpu, "GATHERED", 3)


def made(T, d, r, q, dtype):
    """x (T, d), z (T, q), C (r, q), B (d − r, r), order, bias, g (T, d)."""
    generator = torch.Generator().manual_seed(d)
    sizes = (((T, d), 1.0), ((T, q), 1.0), ((r, q), q**-0.5), ((d - r, r), r**-0.5), ((d,), 1.0), ((T, d), 1.0))
    x, z, C, B, bias, g = (
        torch.randn(s, generator=generator, dtype=torch.float64).mul(by).to(dtype) for s, by in sizes
    )
    first = torch.randperm(d, generator=generator)
    return x, z, C, B, torch.stack([first, first.argsort()]), bias, g


def close(found, same, exact):
    """As near to float64 as torch is in the same dtype, within a factor for another order of sums."""
    assert found.dtype == same.dtype
    assert found.shape == exact.shape
    eps = torch.finfo(found.dtype).eps
    found, same, exact = found.detach().double(), same.detach().double(), exact.detach()
    unit = eps * float(exact.abs().max()) if exact.numel() else 0.0
    assert float((found - exact).norm()) <= 2 * float((same - exact).norm()) + 4 * unit


def doubled(*tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,d,r,q", SHAPES)
def test_narrow_and_widen(T, d, r, q, dtype):
    x, _, _, B, order, _, _ = made(T, d, r, q, dtype)
    for ours, theirs, inputs in ((cpu.narrow, reference.narrow, x), (cpu.widen, reference.widen, x[:, :r])):
        close(ours(inputs, B, order), theirs(inputs, B, order), theirs(*doubled(inputs, B, order)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,d,r,q", SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_widen_through_a_core_and_its_gradients(T, d, r, q, dtype, biased):
    _, z, C, B, order, bias, g = made(T, d, r, q, dtype)
    bias = bias if biased else None
    leaves = [t.requires_grad_() for t in (z, C, bias) if t is not None]
    y = jk.widen(z, B, order, bias, C)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    right = reference.core_widen(*exact[:2], B.double(), order, exact[2] if biased else None)
    same = reference.core_widen(z, C, B, order, bias)
    close(y, same, right)
    found = torch.autograd.grad(y, leaves, g)
    theirs = torch.autograd.grad(same, leaves, g)
    for each, other, true in zip(found, theirs, torch.autograd.grad(right, exact, g.double())):
        close(each, other, true)
    g_z, g_C = reference.core_widen_backward(g, z, C, B, order, True, True)
    close(
        found[0],
        g_z,
        torch.autograd.grad(reference.core_widen(*exact[:2], B.double(), order, None), exact[0], g.double())[0],
    )
    assert g_C.shape == found[1].shape


@pytest.fixture
def undefined_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("undefined_memory_is_nan")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("T,d,r,q", [(196, 576, 75, 46), (126, 100, 86, 33), (33, 192, 176, 35)])
def test_nothing_comes_of_memory_that_nobody_wrote(T, d, r, q, dtype, monkeypatch):
    """A product by AMX multiplies what lies beside a row of odd length by zero, and of a NaN that is a NaN."""
    monkeypatch.setattr(cpu, "PIECE", 64)
    x, z, C, B, order, bias, g = made(T, d, r, q, dtype)
    assert torch.empty(3, dtype=dtype).isnan().all()
    close(cpu.narrow(x, B, order), reference.narrow(x, B, order), reference.narrow(*doubled(x, B, order)))
    inputs = (z, C, B, order, bias)
    close(cpu.core_widen(*inputs), reference.core_widen(*inputs), reference.core_widen(*doubled(*inputs)))
    inputs = (x[:, :r], B, order)
    close(cpu.widen(*inputs), reference.widen(*inputs), reference.widen(*doubled(*inputs)))
    inputs = (g, z, C, B, order)
    theirs = reference.core_widen_backward(*inputs, True, True)
    exact = reference.core_widen_backward(*doubled(*inputs), True, True)
    for found in zip(cpu.core_widen_backward(*inputs, True, True), theirs, exact):
        close(*found)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_gradients_asked_for(needs):
    _, z, C, B, order, _, g = made(11, 9, 5, 7, torch.float64)
    z.requires_grad_(needs[0]), C.requires_grad_(needs[1])
    jk.widen(z, B, order, None, C).backward(g)
    assert (z.grad is not None, C.grad is not None) == needs


def test_it_keeps_its_input_alone():
    _, z, C, B, order, bias, _ = made(11, 9, 5, 7, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        jk.widen(z, B, order, bias, C.requires_grad_())
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (z, C, B, order)}


def test_what_comes_out_may_be_changed_in_place():
    x, z, C, B, order, bias, _ = made(12, 9, 5, 7, torch.float64)
    inputs = [t.view(3, 4, -1).requires_grad_() for t in (x, z, z[:, :5].contiguous())]
    for y in (jk.narrow(inputs[0], B, order), jk.widen(inputs[1], B, order, bias, C), jk.widen(inputs[2], B, order)):
        right = y.detach().clone() * 2
        assert torch.equal(y.mul_(2), right)
        y.sum().backward()


def test_nor_does_a_gpu_hand_out_views(monkeypatch):
    x, _, _, B, order, _, _ = made(12, 9, 5, 7, torch.float32)
    monkeypatch.setattr(cuda, "uses_triton", lambda *_: False)
    assert not cuda.narrow(x.view(3, 4, 9), B, order)._is_view()
    assert not cuda.widen(x.view(3, 4, 9)[..., :5], B, order)._is_view()


def test_leading_sizes_and_strides_are_as_they_come():
    x, z, C, B, order, bias, _ = made(12, 9, 5, 7, torch.float32)
    y = jk.widen(z, B, order, bias, C)
    apart = torch.stack([z, z], dim=-1)[..., 0]
    torch.testing.assert_close(jk.widen(z.view(3, 4, 7), B, order, bias, C), y.view(3, 4, 9))
    torch.testing.assert_close(jk.widen(apart, B.T.contiguous().T, order, bias, C.T.contiguous().T), y)
    torch.testing.assert_close(jk.narrow(x.T.contiguous().T, B, order), jk.narrow(x, B, order))


def test_transforms_see_plain_products():
    _, z, C, B, order, bias, _ = made(12, 9, 5, 7, torch.float64)
    y = linear(z, C)
    torch.testing.assert_close(
        torch.func.vmap(lambda z: jk.widen(z, B, order, bias, C))(z), jk.widen(y, B, order, bias)
    )
    tangent = torch.ones_like(z)
    _, out = torch.func.jvp(lambda z: jk.widen(z, B, order, bias, C), (z,), (tangent,))
    torch.testing.assert_close(out, jk.widen(tangent, B, order, None, C))


def test_what_does_not_fit_is_refused():
    _, z, C, B, order, _, _ = made(11, 9, 5, 7, torch.float32)
    with pytest.raises(jk.JactusError, match=r"core \(4, 7\) does not fit B \(4, 5\)"):
        jk.widen(z, B, order, None, C[:4])
    with pytest.raises(jk.JactusError, match=r"z \(\.\.\., q\) for core"):
        jk.widen(z[:, :5], B, order, None, C)
    with pytest.raises(jk.JactusError, match="one dtype"):
        jk.widen(z, B, order, None, C.double())

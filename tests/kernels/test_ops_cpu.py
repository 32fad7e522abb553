"""The operators on CPU: values against float64, gradients, torch.library's own checks, compile, export, autocast."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import jactus_kernels as jk
from jactus_kernels import cpu, ops, reference

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 2**-52}
ragged = pytest.mark.parametrize("T,m,n,r", [(252, 50, 123, 17), (1, 8, 8, 8), (0, 5, 7, 3), (33, 12, 300, 1)])


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


def factors(T, m, n, r, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(*s, generator=g, dtype=torch.float64) for s in ((T, n), (m, r), (r, r), (n, r), (m,))]
    scales = (1.0, r**-0.5, r**-0.5, n**-0.5, 1.0)
    return [(t * s).to(dtype) for t, s in zip(made, scales)]


@pytest.fixture(params=["operator", "plain"])
def route(request, monkeypatch):
    """Everything holds of the operators, which a GPU runs, and of the plain reference that a CPU runs."""
    if request.param == "operator":
        monkeypatch.setattr(ops, "_is_operator", lambda *_: True)
    torch.compiler.reset()


both = pytest.mark.usefixtures("route")


@pytest.mark.parametrize("n", [1, 37, 384, 771, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_covariance_is_as_accurate_as_a_float32_sum(n, dtype, masked):
    torch.manual_seed(n)
    X = torch.randn(65, n).to(dtype)
    mask = torch.rand(65) > 0.3 if masked else None
    start = torch.randn(n, n)
    start = start @ start.T
    kept = X if mask is None else X[mask]
    expected = start.double() + 0.5 * kept.double().T @ kept.double()
    S = jk.symmetrize_(jk.covariance_update_(start.clone(), X, mask, alpha=0.5))
    # T products are added in float32 whatever the input: √T roundings at random, with a factor of slack
    assert relative(S, expected) < 2 * 65**0.5 * EPS[torch.float32]
    assert torch.equal(S, S.T)


def test_covariance_takes_strided_and_empty_inputs():
    X = torch.randn(40, 30)[::3, ::2]
    S = jk.symmetrize_(jk.covariance_update_(torch.zeros(15, 15, dtype=torch.float64), X))
    assert torch.allclose(S, X.double().T @ X.double(), atol=1e-12)
    before = torch.eye(15)
    assert torch.equal(jk.covariance_update_(before.clone(), X[:0]).tril(), before)


def test_cpu_path_equals_reference_in_float64():
    X = torch.randn(50, 1000, dtype=torch.float64)
    ours, theirs = torch.zeros(2, 1000, 1000, dtype=torch.float64)
    cpu.covariance_update_(ours, X)
    reference.covariance_update_(theirs, X)
    assert relative(ours.tril(), theirs.tril()) < 1e-14


def test_bfloat16_products_leave_the_process_setting_as_it_was():
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    jk.covariance_update_(torch.zeros(4, 4), torch.randn(3, 4).bfloat16())
    assert backend.fp32_precision == before
    with pytest.raises(RuntimeError, match="size"):
        cpu.covariance_update_(torch.zeros(5, 5), torch.randn(3, 4).bfloat16())
    assert backend.fp32_precision == before


def test_symmetrize_over_strip_borders():
    S = torch.randn(2100, 2100)
    expected = S.tril() + S.tril(-1).T
    assert torch.equal(jk.symmetrize_(S), expected)


@both
@ragged
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_core_linear_matches_the_dense_layer(T, m, n, r, dtype):
    x, U, C, V, b = factors(T, m, n, r, dtype)
    exact = x.double() @ (U.double() @ C.double() @ V.double().T).T + b.double()
    with torch.no_grad():
        y = jk.core_linear(x, U, C, V, b)
    assert y.dtype == dtype
    assert y.shape == (T, m)
    # three chained products, each rounding its result once in dtype
    assert T == 0 or relative(y, exact) < 4 * EPS[dtype]
    C.requires_grad_()
    assert torch.equal(jk.core_linear(x, U, C, V, b), y)


@both
@ragged
def test_core_linear_gradients(T, m, n, r):
    x, U, C, V, b = factors(T, m, n, r)
    leaves = [t.requires_grad_() for t in (x, C, b)]
    y = jk.core_linear(x, U, C, V, b)
    g = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves, g)
    dense = x @ (U @ C @ V.T).T + b
    for mine, true in zip(ours, torch.autograd.grad(dense, leaves, g)):
        assert torch.allclose(mine, true, atol=1e-11)


@both
def test_gradcheck_and_frozen_inputs():
    x, U, C, V, b = factors(5, 4, 6, 3)
    x.requires_grad_(), C.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, C, b: jk.core_linear(x, U, C, V, b), (x, C, b))
    y = jk.core_linear(x.detach(), U, C, V, None)
    assert torch.autograd.grad(y.sum(), C)[0].shape == C.shape


@both
def test_unfrozen_bases_get_their_gradients():
    x, U, C, V, b = factors(5, 4, 6, 3)
    U.requires_grad_(), V.requires_grad_()
    assert torch.autograd.gradcheck(lambda U, V: jk.core_linear(x, U, C, V, b), (U, V))


@both
@ragged
def test_folded_linear(T, m, n, r):
    x, U, C, V, b = factors(T, m, n, r)
    left, right = U @ C, V.T.contiguous()
    assert torch.allclose(jk.folded_linear(x, left, right, b), x @ (left @ right).T + b, atol=1e-12)
    x.requires_grad_()
    grad = torch.autograd.grad(jk.folded_linear(x, left, right, b).sum(), x)[0]
    assert torch.allclose(grad, (left @ right).sum(0).expand(T, n), atol=1e-12)


@both
def test_leading_dimensions_are_kept():
    x, U, C, V, b = factors(24, 5, 7, 3)
    y = jk.core_linear(x.view(2, 3, 4, 7), U, C, V, b)
    assert torch.allclose(y.view(24, 5), jk.core_linear(x, U, C, V, b), atol=1e-14)
    assert jk.folded_linear(x.view(2, 12, 7), U, V.T, b).shape == (2, 12, 5)


def test_opcheck():
    x, U, C, V, b = factors(9, 5, 7, 3, torch.float32)
    C.requires_grad_(), b.requires_grad_(), x.requires_grad_()
    torch.library.opcheck(ops._core_linear_train, (x, U, C, V, b))
    with torch.no_grad():
        plain = [t.detach() for t in (x, U, C, V, b)]
        torch.library.opcheck(ops._core_linear, tuple(plain))
        torch.library.opcheck(ops._folded_linear, (plain[0], plain[1], plain[3].T, plain[4]))
        for need_x, need_C in ((True, True), (True, False), (False, True)):
            args = (torch.randn(9, 5), torch.randn(9, 3), *plain[1:4], need_x, need_C)
            torch.library.opcheck(ops._core_linear_backward, args)
        mask = torch.rand(9) > 0.5
        torch.library.opcheck(ops._covariance_update, (torch.zeros(7, 7), plain[0], mask, 1.0))


@both
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    x, U, C, V, b = factors(9, 5, 7, 3, torch.float32)
    C.requires_grad_()

    def step(x):
        return (jk.core_linear(x, U, C, V, b) + jk.folded_linear(x, U, V.T, b).detach()).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (9, 4):
        ours = torch.autograd.grad(compiled(x[:T]), C)[0]
        assert torch.allclose(ours, torch.autograd.grad(step(x[:T]), C)[0], rtol=1e-5)


@both
def test_export():
    x, U, C, V, b = factors(9, 5, 7, 3, torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return jk.core_linear(x, U, C, V, b)

    exported = torch.export.export(Layer(), (x,), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})
    assert torch.equal(exported.module()(x[:4]), jk.core_linear(x[:4], U, C, V, b))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype(dtype):
    x, U, C, V, b = factors(9, 5, 7, 3, torch.float32)
    C.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = jk.core_linear(x, U, C, V, b)
        assert y.dtype == dtype == jk.folded_linear(x, U, V.T, b).dtype
    assert torch.autograd.grad(y.float().sum(), C)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: jk.covariance_update_(torch.zeros(3, 3), torch.zeros(2, 4)), r"S \(3, 3\) and X \(2, 4\)"),
        (lambda: jk.covariance_update_(torch.zeros(4, 4).half(), torch.zeros(2, 4)), "float32 or float64"),
        (lambda: jk.covariance_update_(torch.zeros(4, 4), torch.zeros(2, 4).long()), "floating X"),
        (lambda: jk.covariance_update_(torch.zeros(4, 4), torch.zeros(2, 4), torch.ones(3) > 0), "mask"),
        (lambda: jk.core_linear(torch.zeros(2, 5), *factors(2, 3, 4, 2)[1:]), r"x \(2, 5\)"),
        (lambda: jk.core_linear(torch.zeros(2, 4), *factors(2, 3, 4, 2)[1:]), "one dtype"),
        (lambda: jk.folded_linear(torch.zeros(2, 5), torch.zeros(3, 2), torch.zeros(2, 4)), "do not fit"),
    ],
)
def test_bad_input_says_what_to_do(call, says):
    with pytest.raises(jk.JactusError, match=says):
        call()


@both
def test_vmap_over_tokens_cores_and_gradients():
    x, U, C, V, b = factors(12, 5, 7, 3)
    batch = x.view(3, 4, 7)
    over_x = torch.vmap(lambda x: jk.core_linear(x, U, C, V, b))
    assert torch.allclose(over_x(batch).flatten(0, 1), jk.core_linear(x, U, C, V, b), atol=1e-12)
    cores = torch.stack([C, 2 * C])
    over_cores = torch.vmap(lambda C: jk.core_linear(x, U, C, V))(cores)
    assert torch.allclose(over_cores[1], 2 * over_cores[0], atol=1e-12)
    folded = torch.vmap(lambda x: jk.folded_linear(x, U, V.T, b), in_dims=1, out_dims=1)(batch)
    assert torch.allclose(folded, jk.folded_linear(batch, U, V.T, b), atol=1e-12)


def test_plain_autograd_keeps_no_more_than_the_operator():
    x, U, C, V, b = factors(9, 5, 7, 3, torch.float32)
    C.requires_grad_(), x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        jk.core_linear(x, U, C, V, b)
    own = {t.data_ptr() for t in (U, C, V)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(9, 3)]  # h, and no other activation


def test_fake_tensors_of_a_gpu_have_the_right_shape_where_there_is_none():
    with FakeTensorMode():
        x, U, C, V, b = (torch.empty(*shape, device="cuda") for shape in ((5, 7), (6, 4), (4, 4), (7, 4), (6,)))
        y, z = jk.core_linear(x, U, C, V, b), jk.folded_linear(x, U, V.T, b)
    assert (y.shape, y.device.type) == (z.shape, z.device.type) == ((5, 6), "cuda")


def test_float64_factors_under_autocast_are_refused_by_name():
    x, U, C, V, b = factors(5, 6, 7, 4)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(jk.JactusError, match=r"one dtype.*float64"):
        jk.core_linear(x.float(), U, C, V, b)

"""The rows of a basis that span the others: exact in float64, small coefficients, whatever the basis is like."""

import pytest
import torch

from jactus.model.pivots import pivots
from jactus.model.rounding import rounded

LARGEST = 1.03 * (1 + 1e-4)  # rows are chosen in float32

SHAPES = [(1, 1), (2, 1), (7, 3), (16, 15), (40, 40), (64, 16), (96, 48), (200, 120)]
shapes = pytest.mark.parametrize(("d", "r"), SHAPES)


def noise(d, r, seed=0):
    return torch.randn(d, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scaled(d, r):
    """Columns of lengths from 1e-8 to 1."""
    return noise(d, r) * torch.logspace(-8, 0, r, dtype=torch.float64)


def nearly_dependent(d, r):
    """Columns that differ by a millionth."""
    return noise(d, 1) + 1e-6 * noise(d, r, seed=1)


def of_low_rank(d, r):
    return noise(d, (r + 1) // 2) @ noise((r + 1) // 2, r, seed=1)


def twice(d, r):
    """Every row is there again, and could be the pivot as well."""
    return noise((d + 1) // 2, r).repeat(2, 1)[:d]


def graded(d, r):
    """Rows that fall by eight powers of ten, so that the last are next to nothing."""
    return torch.logspace(0, -8, d, dtype=torch.float64)[:, None] * noise(d, r)


BASES = {
    "random": noise,
    "scaled": scaled,
    "nearly dependent": nearly_dependent,
    "of low rank": of_low_rank,
    "twice": twice,
    "graded": graded,
    "zero": lambda d, r: torch.zeros(d, r, dtype=torch.float64),
    "unit rows": lambda d, r: torch.eye(d, dtype=torch.float64)[:, :r],
    "one column again and again": lambda d, r: noise(d, 1).expand(d, r).contiguous(),
}
bases = pytest.mark.parametrize("make", BASES.values(), ids=BASES)


@shapes
@bases
def test_the_order_is_a_permutation_with_its_inverse_and_both_parts_rise(d, r, make):
    order, B = pivots(make(d, r))
    assert (order.shape, order.dtype, B.shape, B.dtype) == ((2, d), torch.int64, (d - r, r), torch.float64)
    assert order[0].sort().values.tolist() == list(range(d))
    assert torch.equal(order[1][order[0]], torch.arange(d))
    for part in (order[0, :r], order[0, r:]):
        assert (part.diff() > 0).all()


@shapes
@bases
def test_the_pivots_span_the_other_rows(d, r, make):
    """A basis of lower rank is no worse: some coefficients fit it all the same."""
    basis = make(d, r)
    order, B = pivots(basis)
    first = basis[order[0]]
    error = (first[r:] - B @ first[:r]).abs()
    # the columns of a QR decomposition are right to some ε times their own length; so is a solve with pivots as good as these
    assert (error <= 100 * d * 2**-52 * basis.norm(dim=0)).all()
    again = torch.cat([first[:r], B @ first[:r]])[order[1]]
    assert ((again - basis).abs() <= 100 * d * 2**-52 * basis.norm(dim=0)).all()


@shapes
@bases
def test_no_coefficient_is_large_and_the_pivots_are_well_conditioned(d, r, make):
    basis = make(d, r)
    order, B = pivots(basis)
    assert d == r or float(B.abs().max()) <= LARGEST
    Q = torch.linalg.qr(basis).Q[order[0, :r]]
    # with |B| ≤ L the rows Π [I; B] T of an orthonormal basis have TᵀT ≥ I / (1 + L² r (d − r))
    assert float(torch.linalg.svdvals(Q)[-1]) >= (1 + LARGEST**2 * r * (d - r)) ** -0.5 * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_coefficients_are_small_for_bases_of_any_size(seed):
    g = torch.Generator().manual_seed(seed)
    d = int(torch.randint(20, 400, (), generator=g))
    r = int(torch.randint(1, d, (), generator=g))
    basis = noise(d, r, seed)
    order, B = pivots(basis)
    assert float(B.abs().max()) <= LARGEST
    torch.testing.assert_close(B @ basis[order[0, :r]], basis[order[0, r:]], rtol=0, atol=1e-11)


@shapes
def test_of_a_square_basis_every_row_is_a_pivot(d, r):
    order, B = pivots(noise(d, d))
    assert order.tolist() == [list(range(d))] * 2
    assert B.shape == (0, d)


def test_a_basis_of_unit_rows_has_these_for_pivots():
    basis = torch.zeros(9, 3, dtype=torch.float64)
    basis[[7, 2, 4], [0, 1, 2]] = torch.tensor([3.0, -1e-6, 1e6], dtype=torch.float64)
    order, B = pivots(basis)
    assert order[0].tolist() == [2, 4, 7, 0, 1, 3, 5, 6, 8]
    assert torch.equal(B, torch.zeros(6, 3, dtype=torch.float64))


def test_the_basis_is_left_as_it_is():
    basis = noise(12, 5)
    before = basis.clone()
    pivots(basis)
    assert torch.equal(basis, before)


def spread(B):
    """[I; B]: what reaches the outputs of the pivots' errors."""
    return torch.cat([torch.eye(B.shape[1], dtype=B.dtype), B])


def hessian(B):
    return spread(B).T @ spread(B)


@shapes
@bases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_that_makes_up_for_itself_is_no_worse_than_the_nearest_numbers(d, r, make, dtype):
    _, B = pivots(make(d, r))
    far = noise(3 * d, r, seed=2)
    found = rounded(far, hessian(B), dtype)
    assert (found.shape, found.dtype) == (far.shape, dtype)
    nearest, made_up = (((x.double() - far) @ spread(B).T).norm() for x in (far.to(dtype), found))
    assert made_up <= 1.02 * nearest
    half_a_step = torch.finfo(dtype).eps / 2
    assert made_up <= half_a_step * far.abs().max() * (3 * d * r) ** 0.5 * torch.linalg.matrix_norm(spread(B), 2)


def test_it_keeps_small_what_coefficients_would_make_large():
    _, B = pivots(noise(512, 280))
    far = noise(400, 280, seed=1)
    errors = [
        ((x.double() - far) @ spread(B).T).norm() for x in (far.bfloat16(), rounded(far, hessian(B), torch.bfloat16))
    ]
    assert errors[1] < 0.6 * errors[0]


def test_what_the_dtype_holds_stays_as_it_is():
    _, B = pivots(noise(64, 40))
    far = noise(30, 40, seed=1)
    held = far.bfloat16()
    assert torch.equal(rounded(held.double(), hessian(B), torch.bfloat16), held)
    assert torch.equal(rounded(far, hessian(B[:0]), torch.bfloat16), held)

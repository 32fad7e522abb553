"""What a narrow dtype, one of two bytes, does to factors, and what is done so that it does less to their product.

Factors are rounded column after column, and what one is off by is made up for by those after it, as far as they can (Frantar et al.
2023, GPTQ): of an error E it is tr(E H Eᵀ) that is to be small, H being what becomes of it in the product. Between bases as they are
then, the core is another than between exact ones.
"""

import torch
from torch import Tensor

TOGETHER = 64  # columns that are rounded before the others follow


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether the nearest numbers of a dtype are not good enough: those of float32 are."""
    return dtype.itemsize < 4


def rounded(far: Tensor, H: Tensor, dtype: torch.dtype) -> Tensor:
    """`far` (n, r), float64, in `dtype`, off by an E of which tr(E H Eᵀ) is small, H (r, r) positive definite."""
    r = far.shape[1]
    root = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).float()
    left, found = far.T.float().contiguous(), far.new_empty(r, len(far), dtype=dtype)
    for start in range(0, r, TOGETHER):
        stop = min(start + TOGETHER, r)
        errors = left.new_empty(stop - start, len(far))
        for j in range(start, stop):
            found[j] = left[j].to(dtype)
            errors[j - start] = (left[j] - found[j].float()) / root[j, j]
            left[j + 1 : stop] -= root[j, j + 1 : stop, None] * errors[j - start]
        left[stop:] -= root[start:stop, stop:].T @ errors
    return found.T


def damped(H: Tensor, unit: float | None = None) -> Tensor:
    """H (r, r) with `unit` on its diagonal, in place; by default a hundredth of its mean, or 1 where H is zero."""
    if unit is None:
        unit = float(H.diagonal().mean()) / 100 or 1.0
    H.diagonal().add_(unit)
    return H


def by_stored(stored: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """X (p, p) with stored X ≈ basis, both (m, p), float64: least squares, but the identity in directions that are shorter than what
    `dtype` rounds off."""
    S, X = stored.T @ stored, stored.T @ basis
    unit = (torch.finfo(dtype).eps / 2) ** 2 * S.diagonal().mean().clamp_min(torch.finfo(S.dtype).tiny)
    S.diagonal().add_(unit)
    X.diagonal().add_(unit)
    return torch.cholesky_solve(X, torch.linalg.cholesky(S))

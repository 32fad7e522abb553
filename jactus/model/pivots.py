"""Which rows of a basis span the others: the coordinates in which these rows are the identity and are not stored.

Rows by Gaussian elimination with partial pivoting, then exchanged while that makes their determinant larger (maxvol: Goreinov
et al. 2010), until no coefficient exceeds 1.03. On SmolLM2's layers the pivots' condition is then 20 to 35, and 40 to 60 without
the exchanges; with pairs or fours of neighbouring rows it is 60 to 200.

What the pivots' outputs are off by reaches the others times B, whose rows are 3 to 9 long in layers 576 to 4,096 wide (`rounding.py`).
"""

import torch
from torch import Tensor

LARGEST = 1.03  # a row with a larger coefficient, in absolute value, is worth an exchange
AT_ONCE, PASSES = 16, 1000  # some hundred passes at a width of 4,096; the bound is for what rounding might go round in
WILD = 1e3  # elimination's coefficients are below 10 on real layers, and may be 2^r on a contrived one


def pivots(basis: Tensor) -> tuple[Tensor, Tensor]:
    """`order` (2, d) and coefficients B (d − r, r) with basis[order[0, r:]] = B basis[order[0, :r]], for a basis (d, r), r ≤ d,
    float64. order[0] has the pivots, rising, then the other rows, rising; order[1] is its inverse.

    A basis of lower rank is completed: B is then one of many that fit.
    """
    d, r = basis.shape
    Q = torch.linalg.qr(basis).Q  # the same span, well-conditioned whatever the lengths of the columns
    chosen = _eliminated(Q)
    if r < d:  # rows are chosen in float32, and the coefficients made in float64
        X = _by(Q.float(), chosen)
        if not X.abs().max() < WILD:
            chosen = _eliminated(Q @ _rotation(r).to(Q))
            X = _by(Q.float(), chosen)
        _exchange_(chosen, X)
    is_other = torch.ones(d, dtype=torch.bool, device=Q.device)
    is_other[chosen] = False
    first = torch.cat([chosen.sort().values, is_other.nonzero()[:, 0]])
    order = torch.stack([first, torch.argsort(first)])
    return order, torch.linalg.solve(Q[first[:r]], Q[first[r:]], left=False)


def is_order(order: Tensor) -> bool:
    """Whether order (2, d) is a permutation of d rows and its inverse."""
    d = order.shape[1]
    inside = bool(((order >= 0) & (order < d)).all())
    return inside and torch.equal(order[0][order[1]], torch.arange(d, device=order.device))


def _eliminated(Q: Tensor) -> Tensor:
    """The r rows that partial pivoting brings to the top."""
    _, swaps = torch.linalg.lu_factor(Q)
    rows = list(range(Q.shape[0]))
    for i, j in enumerate(swaps.tolist()):
        rows[i], rows[j - 1] = rows[j - 1], rows[i]
    return torch.tensor(rows[: Q.shape[1]], device=Q.device)


def _by(Q: Tensor, chosen: Tensor) -> Tensor:
    """Every row by the pivots: theirs are the identity. Not finite where these do not span the others."""
    return torch.linalg.solve_ex(Q[chosen], Q, left=False).result


def _rotation(r: int) -> Tensor:
    """A random orthogonal matrix, always the same: the columns for which elimination chooses badly are few, and not these."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q


def _exchange_(chosen: Tensor, X: Tensor) -> None:
    """Exchange pivots (r,) for other rows, up to AT_ONCE together, while that makes their determinant larger; X (d, r), every row
    by the pivots, follows."""
    for _ in range(PASSES):
        largest, column = X.abs().max(dim=1)
        leading = largest.topk(min(4 * AT_ONCE, len(X)))
        found: dict[int, int] = {}  # pivot → row
        for i, size in zip(leading.indices.tolist(), leading.values.tolist()):
            if size > LARGEST and len(found) < AT_ONCE:
                found.setdefault(int(column[i]), i)
        if not found:
            break
        out, into = list(found), list(found.values())
        # by as much as the determinant of this block the pivots' grows; together that may be less than by the first alone
        while len(out) > 1 and not torch.linalg.det(X[into][:, out]).abs() > X[into[0], out[0]].abs():
            out, into = out[: len(out) // 2], into[: len(into) // 2]
        block, rows = X[into][:, out], X[into]
        rows[torch.arange(len(out)), out] -= 1
        X -= X[:, out] @ torch.linalg.solve(block, rows)
        chosen[out] = torch.tensor(into, device=X.device)

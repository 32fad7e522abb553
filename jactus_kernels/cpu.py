"""The CPU's own covariance update, the same sums as the reference with less arithmetic; and its own gather of columns."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

BLOCKED_FROM = 768  # below this n the products of a blocked triangle are too small to be fast (measured)
BLOCK = 384


@contextmanager
def _products_in_bfloat16() -> Iterator[None]:
    """Let float32 matmuls multiply in bfloat16 and add in float32: exact for inputs that are bfloat16 values."""
    backend: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(backend, "fp32_precision"):  # torch before 2.9: float32 products, as exact and slower
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"  # process-wide, hence restored
    try:
        yield
    finally:
        backend.fp32_precision = before


def covariance_update_(S: Tensor, X: Tensor, mask: Tensor | None = None, alpha: float = 1.0) -> None:
    """S += α · Xᵀ diag(mask) X on the lower triangle of S, in place; the strict upper triangle is left undefined.

    Shapes and dtypes as `reference.covariance_update_`. Row blocks of the triangle halve the arithmetic from
    n = 768 on; bfloat16 inputs are multiplied at bfloat16 speed with float32-accurate sums where the CPU can.
    """
    if mask is not None:
        X = X[mask]
    if X.dtype == torch.bfloat16 and S.dtype == torch.float32:
        with _products_in_bfloat16():
            _lower_triangle_(S, X.float(), alpha)
    else:
        _lower_triangle_(S, X.to(S.dtype), alpha)


def _lower_triangle_(S: Tensor, X: Tensor, alpha: float) -> None:
    n = X.shape[1]
    if n < BLOCKED_FROM:
        S.addmm_(X.T, X, alpha=alpha)
        return
    for i in range(0, n, BLOCK):
        j = min(i + BLOCK, n)
        S[i:j, :j].addmm_(X[:, i:j].T, X[:, :j], alpha=alpha)


GATHERED = (
    256  # rows at a time, so that their float32 copies stay in a cache (measured: a quarter of index_select's time)
)


def gather(x: Tensor, order: Tensor) -> Tensor:
    """x (..., d) with its columns as `order` (d,) has them. Of 2-byte numbers torch gathers one at a time; of float32 it does
    not, so they are gathered as float32."""
    if x.element_size() != 2 or not x.is_floating_point():
        return x.index_select(-1, order)
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(rows.shape, dtype=x.dtype)
    for some, to in zip(rows.split(GATHERED), out.split(GATHERED)):
        to.copy_(some.float().index_select(-1, order))
    return out.view(x.shape)


def narrow(x: Tensor, B: Tensor, order: Tensor) -> Tensor:
    """`reference.narrow`, with its own gather."""
    r = B.shape[1]
    flat = gather(x, order[0]).view(-1, x.shape[-1])
    return torch.addmm(flat[:, :r], flat[:, r:], B).view(*x.shape[:-1], r)


def widen(z: Tensor, B: Tensor, order: Tensor) -> Tensor:
    """`reference.widen`, with its own gather."""
    return gather(torch.cat([z, z @ B.T], dim=-1), order[1])

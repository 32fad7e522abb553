"""The CPU's own covariance update, the same sums as the reference with less arithmetic; and its own gather of columns."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import reference

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


def wide_product(X: Tensor, Y: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.wide_product`, at bfloat16 speed for bfloat16 values where the CPU can."""
    if X.dtype == Y.dtype == torch.bfloat16 and dtype == torch.float32:
        with _products_in_bfloat16():
            return X.float() @ Y.float()
    return reference.wide_product(X, Y, dtype)


def _lower_triangle_(S: Tensor, X: Tensor, alpha: float) -> None:
    n = X.shape[1]
    if n < BLOCKED_FROM:
        S.addmm_(X.T, X, alpha=alpha)
        return
    for i in range(0, n, BLOCK):
        j = min(i + BLOCK, n)
        S[i:j, :j].addmm_(X[:, i:j].T, X[:, :j], alpha=alpha)


PIECE = 1024  # tokens at a time, so that what lies between two products stays in a cache (measured)
GATHERED = 256  # and of these, where their columns are gathered as float32 (measured: a quarter of index_select's time)


def narrow(x: Tensor, B: Tensor, order: Tensor) -> Tensor:
    """`reference.narrow`, a piece at a time."""
    r, flat = B.shape[1], x.reshape(-1, x.shape[-1])
    z, room = x.new_empty(*x.shape[:-1], r), _room(flat, flat.shape[1])  # what autograd hands out must be no view
    for some, to in zip(flat.split(PIECE), z.view(-1, r).split(PIECE)):
        _narrow(some, B, order, room, to)
    return z


def widen(z: Tensor, B: Tensor, order: Tensor) -> Tensor:
    """`reference.widen`, a piece at a time."""
    return _widened(z, None, B, order, None)


def core_widen(z: Tensor, C: Tensor, B: Tensor, order: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.core_widen`, a piece at a time."""
    return _widened(z, C, B, order, bias)


def core_widen_backward(
    g: Tensor, z: Tensor, C: Tensor, B: Tensor, order: Tensor, need_z: bool, need_C: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`reference.core_widen_backward`, a piece at a time. g_C is summed in float32 or wider."""
    (p, q), d = C.shape, g.shape[-1]
    g_z = z.new_empty(z.shape) if need_z else None
    g, z = g.reshape(-1, d), z.reshape(-1, q)
    wide = torch.promote_types(C.dtype, torch.float32)
    g_C = torch.zeros(p, q, dtype=wide) if need_C else None
    room, of_z = _room(g, d), _room(g, p)
    for i in range(0, len(g), PIECE):
        piece = slice(i, i + PIECE)
        g_h = _narrow(g[piece], B, order, room, of_z[: len(g[piece])])
        if g_C is not None and g_C.dtype == C.dtype:
            g_C.addmm_(g_h.T, z[piece])
        elif g_C is not None:
            g_C += g_h.T @ z[piece]
        if g_z is not None:
            torch.mm(g_h, C, out=g_z.view(-1, q)[piece])
    return g_z, None if g_C is None else g_C.to(C.dtype)


def _widened(z: Tensor, C: Tensor | None, B: Tensor, order: Tensor, bias: Tensor | None) -> Tensor:
    d, r = order.shape[1], B.shape[1]
    flat = z.reshape(-1, z.shape[-1])
    y = z.new_empty(*z.shape[:-1], d)
    room = _room(flat, d).zero_()  # AMX multiplies what lies beside a row by zero, and NaN times zero is NaN
    for some, to in zip(flat.split(PIECE), y.view(-1, d).split(PIECE)):
        apart = room[: len(some)]
        if C is None:
            apart[:, :r] = some
        else:
            torch.mm(some, C.T, out=apart[:, :r])
        torch.mm(apart[:, :r], B.T, out=apart[:, r:])
        _gather(apart, order[1], to)
        if bias is not None:
            to += bias
    return y


def _narrow(x: Tensor, B: Tensor, order: Tensor, room: Tensor, to: Tensor) -> Tensor:
    r, apart = B.shape[1], room[: len(x)]
    _gather(x, order[0], apart)
    return torch.addmm(apart[:, :r], apart[:, r:], B, out=to)


def _room(like: Tensor, columns: int) -> Tensor:
    return like.new_empty(min(PIECE, len(like)), columns)


def _gather(x: Tensor, order: Tensor, to: Tensor) -> None:
    """Write x (T, d) into `to` with its columns as `order` (d,) has them. Of 2-byte numbers torch gathers one at a time; of
    float32 it does not, so they are gathered as float32."""
    if x.element_size() == 2:
        for some, there in zip(x.split(GATHERED), to.split(GATHERED)):
            there.copy_(some.float().index_select(1, order))
    else:
        torch.index_select(x, 1, order, out=to)

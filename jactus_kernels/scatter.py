"""A basis without its pivots in one launch: y's pivots are z and its others z Bᵀ, each written into its place; and the way back.

A library call gives a product whose columns still have to be put in order: y is written twice and read once more. Here
`widen` scatters them as it writes, and `narrow` gathers them as it reads.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import device
from .blocks import read, write
from .tiles import find_tile


@triton.jit
def widen_kernel(
    p_z,  # (T, r)
    p_b,  # (w, r), the other rows' coefficients
    p_order,  # (r + w,) integers: the columns of y that are pivots, then the others
    p_y,  # (T, r + w), contiguous
    T,
    r,
    w,
    z_stride_t,
    z_stride_r,
    b_stride_w,
    b_stride_r,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows t … t + BT of BW columns of y: of the others' first, then of the pivots'."""
    t = tl.program_id(0) * BT
    part, others = tl.program_id(1), tl.cdiv(w, BW)
    is_pivot = part >= others
    col = tl.where(is_pivot, part - others, part) * BW
    first, size = tl.where(is_pivot, 0, r), tl.where(is_pivot, r, w)
    b_y = tl.zeros([BT, BW], tl.float32)
    for k in range(0, tl.where(is_pivot, 0, r), BK):
        b_z = read(p_z, t, k, T, r, z_stride_t, z_stride_r, BT, BK)
        b_b = read(p_b, k, col, r, w, b_stride_r, b_stride_w, BK, BW)
        b_y = tl.dot(b_z, b_b, b_y, input_precision=PRECISION)
    if is_pivot:
        b_y = read(p_z, t, col, T, r, z_stride_t, z_stride_r, BT, BW).to(tl.float32)
    o_t, o_c = t + tl.arange(0, BT), col + tl.arange(0, BW)
    at = tl.load(p_order + first + o_c, mask=o_c < size, other=0)
    p = p_y + o_t.to(tl.int64)[:, None] * (r + w) + at[None, :]
    tl.store(p, b_y.to(p_y.dtype.element_ty), mask=(o_t < T)[:, None] & (o_c < size)[None, :])


@triton.jit
def narrow_kernel(
    p_x,  # (T, r + w)
    p_b,  # (w, r)
    p_order,  # (r + w,)
    p_z,  # (T, r), contiguous
    T,
    r,
    w,
    x_stride_t,
    x_stride_n,
    b_stride_w,
    b_stride_r,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows t … t + BT of BR columns of z: x's pivots, and its others times B."""
    t, col = tl.program_id(0) * BT, tl.program_id(1) * BR
    o_t, o_r = t + tl.arange(0, BT), col + tl.arange(0, BR)
    p_rows = p_x + o_t.to(tl.int64)[:, None] * x_stride_t
    pivot = tl.load(p_order + o_r, mask=o_r < r, other=0)
    b_z = tl.load(p_rows + pivot[None, :] * x_stride_n, mask=(o_t < T)[:, None] & (o_r < r)[None, :], other=0.0)
    b_z = b_z.to(tl.float32)
    for k in range(0, w, BK):
        o_k = k + tl.arange(0, BK)
        at = tl.load(p_order + r + o_k, mask=o_k < w, other=0)
        b_x = tl.load(p_rows + at[None, :] * x_stride_n, mask=(o_t < T)[:, None] & (o_k < w)[None, :], other=0.0)
        b_b = read(p_b, k, col, w, r, b_stride_w, b_stride_r, BK, BR)
        b_z = tl.dot(b_x, b_b, b_z, input_precision=PRECISION)
    write(p_z, b_z, t, col, T, r, r, BT, BR)


def widen(z: Tensor, B: Tensor, order: Tensor) -> Tensor:
    """y (T, d) of z (T, r), B (d − r, r) and order (2, d); float32 accumulation."""
    (T, r), w = z.shape, B.shape[0]
    y = z.new_empty((T, r + w))
    if T == 0:
        return y
    shape = find_tile("widen", device.family(z), z.element_size())
    z, B = device.unit_stride(z), device.unit_stride(B)
    grid = (triton.cdiv(T, shape.rows), triton.cdiv(w, shape.cols) + triton.cdiv(r, shape.cols))
    with device.guard(z):
        widen_kernel[grid](
            z, B, order[0], y, T, r, w, *z.stride(), *B.stride(), PRECISION=device.precision(z), BT=shape.rows, BW=shape.cols,
            BK=shape.step, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return y


def narrow(x: Tensor, B: Tensor, order: Tensor) -> Tensor:
    """z (T, r) of x (T, d), B (d − r, r) and order (2, d); float32 accumulation."""
    T, (w, r) = x.shape[0], B.shape
    z = x.new_empty((T, r))
    if T == 0:
        return z
    shape = find_tile("narrow", device.family(x), x.element_size())
    B = device.unit_stride(B)
    with device.guard(x):
        narrow_kernel[(triton.cdiv(T, shape.rows), triton.cdiv(r, shape.cols))](
            x, B, order[0], z, T, r, w, *x.stride(), *B.stride(), PRECISION=device.precision(x), BT=shape.rows, BR=shape.cols,
            BK=shape.step, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return z

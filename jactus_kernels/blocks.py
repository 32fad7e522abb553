"""Reading and writing one block of a matrix from a kernel: masked at the edges, safe past 2³¹ elements."""

import triton
import triton.language as tl


@triton.jit
def read(p, row, col, rows, cols, stride_r, stride_c, R: tl.constexpr, C: tl.constexpr):
    """The (R, C) block at (row, col) of a (rows, cols) matrix, zeros past its edges."""
    o_r, o_c = tl.arange(0, R), tl.arange(0, C)
    # the block's corner in 64 bits, offsets within it in 32: half the registers of 64-bit offsets throughout
    p += tl.cast(row, tl.int64) * stride_r + tl.cast(col, tl.int64) * stride_c
    m = (row + o_r < rows)[:, None] & (col + o_c < cols)[None, :]
    return tl.load(p + o_r[:, None] * stride_r + o_c[None, :] * stride_c, mask=m, other=0.0)


@triton.jit
def write(p, b, row, col, rows, cols, stride_r, R: tl.constexpr, C: tl.constexpr):
    """Store b (R, C), rounded to the matrix's dtype, at (row, col) of a (rows, cols) matrix with unit column stride."""
    o_r, o_c = tl.arange(0, R), tl.arange(0, C)
    p += tl.cast(row, tl.int64) * stride_r + col
    m = (row + o_r < rows)[:, None] & (col + o_c < cols)[None, :]
    tl.store(p + o_r[:, None] * stride_r + o_c[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def add_bias(b, p_bias, col, cols, C: tl.constexpr):
    """b (R, C) plus the bias of columns col … col + C."""
    o_c = col + tl.arange(0, C)
    return b + tl.load(p_bias + o_c, mask=o_c < cols, other=0.0).to(tl.float32)[None, :]


@triton.jit
def sum_parts(p_parts, o, stride, parts, m, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Σ over parts of the elements at offsets o (BLOCK,) where m, in an order that depends on `parts` alone.

    AT_ONCE parts are read together: one by one, a long sum would wait for memory once a part.
    """
    b = tl.zeros([BLOCK], tl.float32)
    for first in range(0, parts, AT_ONCE):
        o_s = first + tl.arange(0, AT_ONCE)
        p = p_parts + o_s.to(tl.int64)[:, None] * stride + o[None, :]
        b += tl.sum(tl.load(p, mask=(o_s < parts)[:, None] & m[None, :], other=0.0), axis=0)
    return b

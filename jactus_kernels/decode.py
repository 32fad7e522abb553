"""The layer for a handful of tokens (T ≤ 16): two launches that read every weight once, for generation.

Time is the reading of the weights, so the first launch spreads the inner product over the device, parts of n included:

    1. part[s] = x[:, part s] B[part s]                    (parts, T, r) float32
    2. h = Σ_s part[s];  z = h Cᵀ;  y = z Lᵀ + b           three factors, r ≤ plan.DECODE_RANK
       h = Σ_s part[s];  y = h Lᵀ + b                      folded, any rank

Each block of the second launch adds up h again, which is small, and forms z again, which needs all of C: hence the
rank limit, past which C read by every block would cost more than a third launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .blocks import add_bias, read, write
from .launches import DECODE_TOKENS, rank_block
from .tiles import find_tile

PARTS = 8  # most parts of n: the second launch adds them up unrolled, and absent ones cost it nothing


@triton.jit
def decode_inner_kernel(
    p_x,  # (T, n)
    p_b,  # (n, r)
    p_parts,  # (parts, T, r) float32
    T,
    n,
    r,
    x_stride_t,
    x_stride_n,
    b_stride_n,
    b_stride_r,
    part_len,  # inputs in one part, a multiple of BK
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """The part of h = x B (T, BR columns) that one part of the inputs gives; its reader sums the parts."""
    col = tl.program_id(0) * BR
    start = tl.program_id(1) * part_len
    stop = min(start + part_len, n)
    b_h = tl.zeros([BT, BR], tl.float32)
    for k in range(start, stop, BK):
        b_x = read(p_x, 0, k, T, stop, x_stride_t, x_stride_n, BT, BK)
        b_b = read(p_b, k, col, stop, r, b_stride_n, b_stride_r, BK, BR)
        b_h = tl.dot(b_x, b_b, b_h, input_precision=PRECISION)
    write(p_parts + tl.program_id(1) * T * r, b_h, 0, col, T, r, r, BT, BR)


@triton.jit
def _inner(p_parts, at, T, r, parts, PARTS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """h[:, at : at + BK], its parts added first to last; unrolled, so that the caller's loop can be pipelined."""
    b_h = tl.zeros([BT, BK], tl.float32)
    for s in tl.static_range(PARTS):
        b_h += read(p_parts + s * T * r, 0, at, tl.where(s < parts, T, 0), r, r, 1, BT, BK)
    return b_h


@triton.jit
def decode_outer_kernel(
    p_parts,  # (parts, T, r) float32
    p_c,  # (r, r), contiguous; unused where CORE is false
    p_l,  # (m, r)
    p_bias,  # (m,); unused where BIAS is false
    p_y,  # (T, m), contiguous
    T,
    r,
    m,
    l_stride_m,
    l_stride_r,
    parts,
    PARTS: tl.constexpr,
    CORE: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,  # r rounded up, where CORE: z is one block
):
    """BM columns of y = (h Cᵀ) Lᵀ + bias, or of h Lᵀ + bias, from the parts of h."""
    row = tl.program_id(0) * BM
    dtype = p_l.dtype.element_ty
    if CORE:
        b_l = read(p_l, 0, row, r, m, l_stride_r, l_stride_m, R, BM)  # first, so that it is under way meanwhile
        b_z = tl.zeros([BT, R], tl.float32)
        for k in range(0, r, BK):
            b_h = _inner(p_parts, k, T, r, parts, PARTS, BT, BK).to(dtype)
            b_c = read(p_c, k, 0, r, r, 1, r, BK, R)  # Cᵀ
            b_z = tl.dot(b_h, b_c, b_z, input_precision=PRECISION)
        b_y = tl.dot(b_z.to(dtype), b_l, input_precision=PRECISION)
    else:
        b_y = tl.zeros([BT, BM], tl.float32)
        for k in range(0, r, BK):
            b_h = _inner(p_parts, k, T, r, parts, PARTS, BT, BK).to(dtype)
            b_l = read(p_l, k, row, r, m, l_stride_r, l_stride_m, BK, BM)
            b_y = tl.dot(b_h, b_l, b_y, input_precision=PRECISION)
    if BIAS:
        b_y = add_bias(b_y, p_bias, row, m, BM)
    write(p_y, b_y, 0, row, T, m, m, BT, BM)


def decode(x: Tensor, B: Tensor, C: Tensor | None, L: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = ((x B) Cᵀ) Lᵀ + bias for x (T ≤ 16, n), B (n, r), C (r, r) or None, L (m, r), bias (m,); y (T, m)."""
    (T, n), (m, r) = x.shape, L.shape
    y = x.new_empty((T, m))
    if T == 0 or m == 0:
        return y
    family, size = device.family(x), x.element_size()
    first, second = (
        find_tile("decode inner", family, size),
        find_tile(f"decode {'core' if C is not None else 'folded'}", family, size),
    )
    cols, steps = max(1, triton.cdiv(r, first.cols)), max(1, triton.cdiv(n, first.step))
    # enough blocks to keep every multiprocessor reading, each with at least two steps to overlap
    parts = min(max(1, 2 * device.multiprocessors(x) // cols), max(1, steps // 2), PARTS)
    part_len = triton.cdiv(steps, parts) * first.step
    parts = max(1, triton.cdiv(n, part_len))
    workspace = x.new_empty((parts, T, r), dtype=torch.float32)
    x, B, L = device.unit_stride(x), device.unit_stride(B), device.unit_stride(L)
    precision = device.precision(x)
    with device.guard(x):
        decode_inner_kernel[(cols, parts)](
            x, B, workspace, T, n, r, *x.stride(), *B.stride(), part_len, PRECISION=precision, BT=DECODE_TOKENS,
            BR=first.cols, BK=first.step, num_warps=first.warps, num_stages=first.stages,
        )  # fmt: skip
        decode_outer_kernel[(triton.cdiv(m, second.cols),)](
            workspace, L if C is None else C.contiguous(), L, L if bias is None else bias, y, T, r, m, *L.stride(),
            parts, PARTS=PARTS, CORE=C is not None, BIAS=bias is not None, PRECISION=precision, BT=DECODE_TOKENS,
            BM=second.cols, BK=second.step, R=16 if C is None else rank_block(r), num_warps=second.warps,
            num_stages=second.stages,
        )  # fmt: skip
    return y

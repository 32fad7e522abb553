"""outer = (A B) K + bias with the inner product kept on chip: two products of a low-rank layer in one launch.

It is the forward's z = (x V) Cᵀ, the backward's p = (g U) C, and a whole folded layer y = (x Rᵀ) Lᵀ + b. The inner
product, which training must keep (h, or q), is also stored on request. The rank is at most `plan.CHAIN_RANK`: the inner
block has to fit in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import device
from .blocks import add_bias, read, write
from .launches import rank_block
from .tiles import find_tile


@triton.jit
def chain_kernel(
    p_a,  # (T, k)
    p_b,  # (k, r)
    p_k,  # (r, w)
    p_bias,  # (w,) or p_a again where BIAS is false
    p_inner,  # (T, r) contiguous, or p_a again where KEEP is false
    p_outer,  # (T, w) contiguous
    T,
    k,
    r,
    w,
    a_stride_t,
    a_stride_k,
    b_stride_k,
    b_stride_r,
    k_stride_r,
    k_stride_w,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,  # r rounded up: the whole rank is one block
    BW: tl.constexpr,
):
    """Rows t … t + BT of (A B) K + bias, the inner product in registers; its file's docstring has the whole."""
    t = tl.program_id(0) * BT
    b_i = tl.zeros([BT, R], tl.float32)
    for at in range(0, k, BK):
        b_a = read(p_a, t, at, T, k, a_stride_t, a_stride_k, BT, BK)
        b_b = read(p_b, at, 0, k, r, b_stride_k, b_stride_r, BK, R)
        b_i = tl.dot(b_a, b_b, b_i, input_precision=PRECISION)
    if KEEP:
        write(p_inner, b_i, t, 0, T, r, r, BT, R)
    b_h = b_i.to(p_a.dtype.element_ty)  # rounded as the stored one would be
    for col in range(0, w, BW):
        b_k = read(p_k, 0, col, r, w, k_stride_r, k_stride_w, R, BW)
        b_o = tl.dot(b_h, b_k, input_precision=PRECISION)
        if BIAS:
            b_o = add_bias(b_o, p_bias, col, w, BW)
        write(p_outer, b_o, t, col, T, w, w, BT, BW)


def chain(A: Tensor, B: Tensor, K: Tensor, bias: Tensor | None = None, keep: bool = False) -> tuple[Tensor, Tensor]:
    """(A B) K + bias for A (T, k), B (k, r), K (r, w), bias (w,); returns (outer (T, w), inner (T, r)).

    Without `keep` the inner product is not stored and comes back with no elements. r ≤ CHAIN_RANK.
    """
    (T, k), (r, w) = A.shape, K.shape
    outer, inner = A.new_empty((T, w)), A.new_empty((T, r) if keep else (0,))
    if T == 0 or w == 0:
        return outer, inner
    R = rank_block(r)
    shape = find_tile(f"chain {R}", device.family(A), A.element_size())
    A, B, K = device.unit_stride(A), device.unit_stride(B), device.unit_stride(K)
    with device.guard(A):
        chain_kernel[(triton.cdiv(T, shape.rows),)](
            A, B, K, A if bias is None else bias, inner if keep else A, outer, T, k, r, w, *A.stride(), *B.stride(),
            *K.stride(), BIAS=bias is not None, KEEP=keep, PRECISION=device.precision(A), BT=shape.rows,
            BK=shape.step, R=R, BW=shape.cols, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return outer, inner

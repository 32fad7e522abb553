"""y = A B + bias, tiled: the product behind every rank too large to stay on chip, and the last one of a small rank.

Where cuBLAS (or hipBLAS) is there, the policy prefers it for these; this kernel makes the Triton backend complete.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import device
from .blocks import add_bias, read, write
from .tiles import find_tile


@triton.jit
def matmul_kernel(
    p_a,  # (M, K)
    p_b,  # (K, N), either stride may be the unit one
    p_bias,  # (N,) or p_a again where BIAS is false
    p_y,  # (M, N), contiguous
    M,
    N,
    K,
    a_stride_m,
    a_stride_k,
    b_stride_k,
    b_stride_n,
    BIAS: tl.constexpr,
    TMA: tl.constexpr,
    K_MAJOR: tl.constexpr,  # b_stride_k is the unit stride
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One (BM, BN) tile of A B + bias."""
    # blocks run in groups of GROUP rows, so that those resident together share columns of B in the L2 cache
    rows, cols = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * cols)
    high = min(rows - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * cols)
    row = (group * GROUP + within % high) * BM
    col = (within // high) * BN
    if TMA:
        d_a = tl.make_tensor_descriptor(p_a, [M, K], [a_stride_m, 1], [BM, BK])
        if K_MAJOR:
            d_b = tl.make_tensor_descriptor(p_b, [N, K], [b_stride_n, 1], [BN, BK])
        else:
            d_b = tl.make_tensor_descriptor(p_b, [K, N], [b_stride_k, 1], [BK, BN])
    b_y = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        if TMA:
            b_a = d_a.load([row, k])
            b_b = tl.trans(d_b.load([col, k])) if K_MAJOR else d_b.load([k, col])
        else:
            b_a = read(p_a, row, k, M, K, a_stride_m, a_stride_k, BM, BK)
            b_b = read(p_b, k, col, K, N, b_stride_k, b_stride_n, BK, BN)
        b_y = tl.dot(b_a, b_b, b_y, input_precision=PRECISION)
    if BIAS:
        b_y = add_bias(b_y, p_bias, col, N, BN)
    write(p_y, b_y, row, col, M, N, N, BM, BN)


def matmul(A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """A (M, K) times B (K, N), plus bias (N,) on every row; one dtype throughout, float32 accumulation.

    B may be a transposed view: both layouts are read as they are.
    """
    (M, K), N = A.shape, B.shape[1]
    y = A.new_empty((M, N))
    if M == 0 or N == 0:
        return y
    shape = find_tile("matmul", device.family(A), A.element_size())
    A, B = device.unit_stride(A), device.unit_stride(B)
    k_major = B.stride(0) == 1
    tma = device.tma_readable(A) and device.tma_readable(B.T if k_major else B)
    with device.guard(A):
        matmul_kernel[(triton.cdiv(M, shape.rows) * triton.cdiv(N, shape.cols),)](
            A, B, A if bias is None else bias, y, M, N, K, *A.stride(), *B.stride(), BIAS=bias is not None, TMA=tma,
            K_MAJOR=k_major, PRECISION=device.precision(A), BM=shape.rows, BN=shape.cols, BK=shape.step, GROUP=8,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return y

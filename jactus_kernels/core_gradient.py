"""g_C = qᵀ h, the core's gradient; for small ranks q = g U, p = q C and g_C in one launch, q never leaving the chip.

The sum runs over tokens, of which there are many, into r × r, of which there are few: tokens are cut into parts whose
sums meet in a float32 workspace and are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .blocks import read, sum_parts, write
from .launches import rank_block, token_parts
from .tiles import find_tile


@triton.jit
def gram_kernel(
    p_q,  # (T, r), contiguous
    p_h,  # (T, r), contiguous
    p_parts,  # (parts, r, r) float32
    T,
    r,
    part_len,  # tokens in one part, a multiple of BT
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    """One (BR, BR) tile of qᵀ h over the tokens of one part."""
    row, col = tl.program_id(0) * BR, tl.program_id(1) * BR
    start = tl.program_id(2) * part_len
    stop = min(start + part_len, T)
    b_c = tl.zeros([BR, BR], tl.float32)
    for t in range(start, stop, BT):
        b_q = read(p_q, row, t, r, stop, 1, r, BR, BT)  # qᵀ, read transposed
        b_h = read(p_h, t, col, stop, r, r, 1, BT, BR)
        b_c = tl.dot(b_q, b_h, b_c, input_precision=PRECISION)
    write(p_parts + tl.cast(tl.program_id(2), tl.int64) * r * r, b_c, row, col, r, r, r, BR, BR)


@triton.jit
def pair_kernel(
    p_g,  # (T, m)
    p_u,  # (m, r)
    p_c,  # (r, r), contiguous
    p_h,  # (T, r), contiguous
    p_p,  # (T, r), contiguous: (g U) C
    p_parts,  # (programs, r, r) float32
    T,
    m,
    r,
    g_stride_t,
    g_stride_m,
    u_stride_m,
    u_stride_r,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    BW: tl.constexpr,
):
    """p = (g U) C by blocks of BT tokens, and this program's share of g_C = (g U)ᵀ h, with g U never stored."""
    b_gc = tl.zeros([R, R], tl.float32)
    for t in range(tl.program_id(0) * BT, T, tl.num_programs(0) * BT):
        b_q = tl.zeros([BT, R], tl.float32)
        for at in range(0, m, BK):
            b_g = read(p_g, t, at, T, m, g_stride_t, g_stride_m, BT, BK)
            b_u = read(p_u, at, 0, m, r, u_stride_m, u_stride_r, BK, R)
            b_q = tl.dot(b_g, b_u, b_q, input_precision=PRECISION)
        b_x = b_q.to(p_g.dtype.element_ty)  # rounded as a stored q would be
        for col in range(0, r, BW):
            b_c = read(p_c, 0, col, r, r, r, 1, R, BW)
            write(p_p, tl.dot(b_x, b_c, input_precision=PRECISION), t, col, T, r, r, BT, BW)
        b_gc = tl.dot(tl.trans(b_x), read(p_h, t, 0, T, r, r, 1, BT, R), b_gc, input_precision=PRECISION)
    write(p_parts + tl.cast(tl.program_id(0), tl.int64) * r * r, b_gc, 0, 0, r, r, r, R, R)


@triton.jit
def sum_parts_kernel(p_parts, p_out, size, parts, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """out = Σ parts, rounded once to out's dtype."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = sum_parts(p_parts, o, size, parts, o < size, BLOCK, AT_ONCE)
    tl.store(p_out + o, b.to(p_out.dtype.element_ty), mask=o < size)


def core_gradient(q: Tensor, h: Tensor) -> Tensor:
    """g_C = qᵀ h (r, r) for contiguous q, h (T, r); summed in float32, rounded once."""
    T, r = h.shape
    if T == 0 or r == 0:
        return q.new_zeros((r, r))
    shape = find_tile("gram", device.family(q), q.element_size())
    side = triton.cdiv(r, shape.rows)
    parts, part_len = token_parts(T, shape, side**2, device.multiprocessors(q) * shape.blocks)
    workspace = q.new_empty((parts, r, r), dtype=torch.float32)
    with device.guard(q):
        gram_kernel[(side, side, parts)](
            q, h, workspace, T, r, part_len, PRECISION=device.precision(q), BR=shape.rows, BT=shape.step,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        return _sum(workspace, q.new_empty((r, r)))


def projected_gradients(g: Tensor, h: Tensor, U: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """p = (g U) C (T, r) and g_C = (g U)ᵀ h (r, r) for g (T, m), h (T, r), U (m, r), C (r, r), in one pass over g."""
    (T, m), r = g.shape, U.shape[1]
    if T == 0 or r == 0:
        return g.new_empty((T, r)), g.new_zeros((r, r))
    R = rank_block(r)
    shape = find_tile(f"pair {R}", device.family(g), g.element_size())
    programs = min(triton.cdiv(T, shape.rows), device.multiprocessors(g) * shape.blocks)
    workspace = g.new_empty((programs, r, r), dtype=torch.float32)
    p = g.new_empty((T, r))
    g, U = device.unit_stride(g), device.unit_stride(U)
    with device.guard(g):
        pair_kernel[(programs,)](
            g, U, C.contiguous(), h, p, workspace, T, m, r, *g.stride(), *U.stride(), PRECISION=device.precision(g),
            BT=shape.rows, BK=shape.step, R=R, BW=shape.cols, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        return p, _sum(workspace, g.new_empty((r, r)))


def _sum(parts: Tensor, out: Tensor) -> Tensor:
    size = out.numel()
    sum_parts_kernel[(triton.cdiv(size, 256),)](parts, out, size, parts.shape[0], BLOCK=256, AT_ONCE=16, num_warps=4)
    return out

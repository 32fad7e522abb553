"""S += α · Xᵀ diag(mask) X on the lower triangle of S: the symmetric rank-k update of calibration.

Only the lower tiles are computed, half the arithmetic of a GEMM. Work items are (tile, part of T): where the tiles are
too few to fill the device, T is cut into parts whose sums meet in a workspace and are added in a fixed order, so
results are reproducible bit for bit; where they are many, a grid of resident blocks walks over them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .blocks import sum_parts
from .launches import token_parts, triangle
from .tiles import find_tile


@triton.jit
def lower_tile(t, WIDE: tl.constexpr):
    """(row, column) of the t-th tile of a lower triangle, counted along rows; of tiles that are WIDE times as wide as high."""
    u = t // WIDE
    k = ((tl.sqrt(8.0 * u + 1.0) - 1.0) * 0.5).to(tl.int32)
    # a float32 root can land on the wrong side of a row's border
    k = tl.where(k * (k + 1) // 2 > u, k - 1, k)
    k = tl.where((k + 1) * (k + 2) // 2 <= u, k + 1, k)
    rest = t - WIDE * (k * (k + 1) // 2)  # in the k-th band of WIDE rows, each of which has k + 1 tiles
    return WIDE * k + rest // (k + 1), rest % (k + 1)


@triton.jit
def _halves(b, R: tl.constexpr, C: tl.constexpr):
    """The left and right halves of b (R, C)."""
    return tl.split(tl.permute(tl.reshape(b, [R, 2, C // 2]), [0, 2, 1]))


@triton.jit
def _add_columns(p_s, b, row, col, n, alpha, R: tl.constexpr, C: tl.constexpr):
    """S[row : row + R, col : col + C] += α b."""
    o_r, o_c = tl.arange(0, R), tl.arange(0, C)
    p = p_s + row.to(tl.int64) * n + col + o_r[:, None] * n + o_c[None, :]
    m = (row + o_r < n)[:, None] & (col + o_c < n)[None, :]
    tl.store(p, tl.load(p, mask=m, other=0.0) + alpha * b, mask=m)


@triton.jit
def covariance_kernel(
    p_x,  # (T, n)
    p_mask,  # (T,) or p_x again where MASKED is false
    p_out,  # S (n, n) when parts == 1, else the workspace (parts, tiles, BM, BN)
    T,
    n,
    x_stride_t,
    x_stride_n,
    alpha,
    tiles,
    parts,
    part_len,  # tokens in one part, a multiple of BT
    MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # BM or a multiple of it
    BT: tl.constexpr,
):
    """α Xᵀ diag(mask) X by items (lower tile, part of T): added to S, or where SPLIT stored for the reduction."""
    if TMA:
        d_j = tl.make_tensor_descriptor(p_x, [T, n], [x_stride_t, 1], [BT, BN])
        d_i = d_j if BM == BN else tl.make_tensor_descriptor(p_x, [T, n], [x_stride_t, 1], [BT, BM])
    for item in range(tl.program_id(0), tiles * parts, tl.num_programs(0)):
        row, col = lower_tile(item % tiles, BN // BM)
        o_i = row * BM + tl.arange(0, BM)  # [BM]
        o_j = col * BN + tl.arange(0, BN)  # [BN]
        start = (item // tiles) * part_len
        b_s = tl.zeros([BM, BN], tl.float32)
        for t in range(start, min(start + part_len, T), BT):
            if TMA:
                b_i = tl.trans(d_i.load([t, row * BM]))  # [BM, BT], zeros past the edges
                b_j = d_j.load([t, col * BN])  # [BT, BN]
            else:
                o_t = t + tl.arange(0, BT)  # [BT]
                m_t = o_t < T
                if MASKED:
                    # a dropped row is not read at all, so what it holds (NaN padding, say) cannot leak
                    m_t = tl.load(p_mask + o_t, mask=m_t, other=0) != 0
                o_x = o_t.to(tl.int64) * x_stride_t
                # read transposed rather than transposed after reading, which would bypass the asynchronous copy
                p_i = p_x + o_x[None, :] + o_i[:, None] * x_stride_n
                b_i = tl.load(p_i, mask=m_t[None, :] & (o_i < n)[:, None], other=0.0)
                p_j = p_x + o_x[:, None] + o_j[None, :] * x_stride_n
                b_j = tl.load(p_j, mask=m_t[:, None] & (o_j < n)[None, :], other=0.0)
            b_s = tl.dot(b_i, b_j, b_s, input_precision=PRECISION)
        if SPLIT:
            o_r, o_c = tl.arange(0, BM), tl.arange(0, BN)
            tl.store(p_out + tl.cast(item, tl.int64) * (BM * BN) + o_r[:, None] * BN + o_c[None, :], b_s)
        else:
            # by quarters: S and the sums together would take the registers of a second resident block
            b_l, b_r = _halves(b_s, BM, BN)
            b_0, b_1 = _halves(b_l, BM, BN // 2)
            b_2, b_3 = _halves(b_r, BM, BN // 2)
            _add_columns(p_out, b_0, row * BM, col * BN, n, alpha, BM, BN // 4)
            _add_columns(p_out, b_1, row * BM, col * BN + BN // 4, n, alpha, BM, BN // 4)
            _add_columns(p_out, b_2, row * BM, col * BN + BN // 2, n, alpha, BM, BN // 4)
            _add_columns(p_out, b_3, row * BM, col * BN + 3 * BN // 4, n, alpha, BM, BN // 4)


@triton.jit
def covariance_reduce_kernel(
    p_parts, p_s, n, alpha, tiles, parts, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr
):
    """S tile += α · Σ parts, in a fixed order, unlike atomics; BLOCK of a tile's elements a program."""
    tile_id = tl.program_id(0)
    row, col = lower_tile(tile_id, BN // BM)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] offsets within the tile
    o_i, o_j = row * BM + o // BN, col * BN + o % BN
    m = (o_i < n) & (o_j < n)
    p_tile = p_parts + tile_id.to(tl.int64) * (BM * BN)
    b_s = sum_parts(p_tile, o, tiles * (BM * BN), parts, m, BLOCK, AT_ONCE)
    p_s += o_i.to(tl.int64) * n + o_j
    tl.store(p_s, tl.load(p_s, mask=m, other=0.0) + alpha * b_s, mask=m)


def covariance_update_(
    S: Tensor, X: Tensor, mask: Tensor | None = None, alpha: float = 1.0, kernel: str = "covariance"
) -> None:
    """Shapes as `reference.covariance_update_`, S float32 and contiguous; its strict upper triangle is undefined. `kernel` is the
    tile table's row."""
    T, n = X.shape
    if T == 0 or n == 0:
        return
    shape = find_tile(kernel, device.family(X), X.element_size())
    tiles = triangle(n, shape)
    slots = device.multiprocessors(X) * shape.blocks
    parts, part_len = token_parts(T, shape, tiles, slots)
    out = S if parts == 1 else X.new_empty((parts, tiles, shape.rows, shape.cols), dtype=torch.float32)
    tma = mask is None and device.tma_readable(X)
    with device.guard(X):
        covariance_kernel[(min(slots, tiles * parts),)](
            X, X if mask is None else mask, out, T, n, X.stride(0), X.stride(1), alpha, tiles, parts, part_len,
            MASKED=mask is not None, SPLIT=parts > 1, TMA=tma, PRECISION=device.precision(X), BM=shape.rows,
            BN=shape.cols, BT=shape.step, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        if parts > 1:
            covariance_reduce_kernel[(tiles, shape.rows * shape.cols // 256)](
                out, S, n, alpha, tiles, parts, BM=shape.rows, BN=shape.cols, BLOCK=256, AT_ONCE=16, num_warps=4
            )

"""Which launches an operator makes, and the arithmetic and traffic of each: needs neither Triton nor a GPU."""

import math
from dataclasses import dataclass

from .tiles import Tile, find_tile

# Largest ranks, by element size, whose blocks stay on chip without spills on every family (from the static lint).
CHAIN_RANK = {2: 256, 4: 128}
PAIR_RANK = {2: 128, 4: 64}
DECODE_RANK = {2: 256, 4: 128}
DECODE_TOKENS = 16
PAIR_TOKENS = 32768  # from the roofline model: below, storing q costs less than one r × r sum a block
FULL = 1 << 20  # blocks enough for any device
LIBRARY = "cuBLAS"  # the launch that is a plain product, made by the vendor's library


def fits_chain(r: int, itemsize: int) -> bool:
    """Whether two products of this rank run in one launch."""
    return r <= CHAIN_RANK[itemsize]


def fits_pair(T: int, r: int, itemsize: int) -> bool:
    """Whether q = g U, (g U) C and g_C run in one launch: from the tokens on that pay for its r × r workspace."""
    return T >= PAIR_TOKENS and r <= PAIR_RANK[itemsize]


def fits_decode(T: int, r: int, itemsize: int, core: bool) -> bool:
    """Whether a layer of T tokens runs in the decode path; a folded one (no core) may have any rank."""
    return T <= DECODE_TOKENS and (not core or r <= DECODE_RANK[itemsize])


def rank_block(r: int) -> int:
    """The power of two, at least 64, that holds a rank kept on chip."""
    return max(64, 1 << (r - 1).bit_length())


def token_parts(T: int, tile: Tile, tiles: int, slots: int) -> tuple[int, int]:
    """Into how many parts a sum over T tokens is cut, and the tokens in one, to give `slots` resident blocks work.

    A part costs the writing and reading of its tile in the workspace: on an H100 about as long as a tenth of
    `tiles` steps of arithmetic, which makes √(10 steps / tiles) parts the best. Fewer than 8 steps are never worth it.
    """
    steps = -(-T // tile.step)
    parts = max(1, min(slots // tiles, steps // 8, math.isqrt(10 * steps // tiles)))
    part_len = -(-steps // parts) * tile.step
    return -(-T // part_len), part_len


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its floating-point operations, bytes moved at the least, and how many blocks share them."""

    kernel: str
    flops: float
    bytes: float
    blocks: int


@dataclass(frozen=True)
class Shape:
    """A call's sizes: T tokens, m outputs, n inputs, r rank (0 where there is none), bytes per element."""

    T: int
    m: int
    n: int
    r: int
    itemsize: int = 2


def torch_launches(op: str, s: Shape) -> list[Launch]:
    """What the same operator costs as plain torch: one cuBLAS product a line."""
    T, m, n, r = s.T, s.m, s.n, s.r
    inner, core, outer = ((T, r, n), (T, r, r), (T, m, r))
    if op == "covariance_update":
        # the product at the input's speed into a float32 temporary (torch.mm with out_dtype), then its addition to S
        whole = 4 * n * n
        return [_product(LIBRARY, s, n, n, T), Launch("torch", 0.0, 3 * whole, FULL)]
    if op in ("narrow", "widen"):
        d, size = max(m, n), s.itemsize
        # the columns put in order are written and read once more, and so is what is left out of a product
        moved = Launch("torch", 0.0, size * T * (2 * d + 2 * (d if op == "widen" else r)), FULL)
        return [_product(LIBRARY, s, *((T, d - r, r) if op == "widen" else (T, r, d - r))), moved]
    products = {
        "core_linear": [inner, core, outer],
        "core_linear_train": [inner, core, outer],
        "core_linear_backward": [(T, r, m), (T, r, r), (T, n, r), (r, r, T)],
        "folded_linear": [inner, outer],
    }[op]
    return [_product(LIBRARY, s, *p) for p in products]


def triton_launches(op: str, s: Shape, family: str, multiprocessors: int, library: bool) -> list[Launch]:
    """The launches of `fused.py` and `covariance.py` for this shape; `library` leaves plain products to cuBLAS."""
    T, m, n, r, size = s.T, s.m, s.n, s.r, s.itemsize

    def matmul(rows: int, cols: int, k: int) -> Launch:
        if library:
            return _product(LIBRARY, s, rows, cols, k)
        return _product("matmul", s, rows, cols, k, find_tile("matmul", family, size))

    if op == "covariance_update":
        return _covariance(s, family, multiprocessors)
    if op in ("narrow", "widen"):
        d, tile = max(m, n), find_tile(op, family, size)
        cols = r if op == "narrow" else d
        blocks = -(-T // tile.rows) * -(-cols // tile.cols)
        return [Launch(op, 2.0 * T * r * (d - r), size * (T * (d + r) + r * (d - r)), blocks)]
    backward = op == "core_linear_backward"
    if not backward and op != "core_linear_train" and fits_decode(T, r, size, core=op == "core_linear"):
        core = r * r if op == "core_linear" else 0
        blocks = 8 * -(-r // 32)
        return [
            Launch("decode inner", 2.0 * T * n * r, size * (T * n + n * r) + 4 * T * r, blocks),
            Launch("decode outer", 2.0 * T * (core + m * r), size * (core + m * r + T * m), -(-m // 32)),
        ]
    k, out = (m, n) if backward else (n, m)
    width = m if op == "folded_linear" else r
    if backward and fits_pair(T, r, size):
        rows = find_tile(f"pair {rank_block(r)}", family, size).rows
        blocks = min(-(-T // rows), multiprocessors)
        traffic = size * (T * k + k * r + 2 * T * r + r * r) + 4 * blocks * r * r
        pair = Launch("pair", 2.0 * T * r * (k + 2 * r), traffic, blocks)
        return [pair, _sum_parts(r, blocks), matmul(T, out, r)]
    if fits_chain(r, size):
        rows = find_tile(f"chain {rank_block(r)}", family, size).rows
        kept = T * r if op in ("core_linear_train", "core_linear_backward") else 0
        traffic = size * (T * k + k * r + r * width + T * width + kept)
        made = [Launch("chain", 2.0 * T * r * (k + width), traffic, -(-T // rows))]
        if op == "folded_linear":
            return made
        made.append(matmul(T, out, r))
    else:
        made = [matmul(T, r, k), matmul(T, width, r)] + ([] if op == "folded_linear" else [matmul(T, out, r)])
    if backward and library:
        made.append(_product(LIBRARY, s, r, r, T))
    elif backward:
        tile = find_tile("gram", family, size)
        tiles = (-(-r // tile.rows)) ** 2
        parts, _ = token_parts(max(T, 1), tile, tiles, multiprocessors * tile.blocks)
        made.append(Launch("gram", 2.0 * T * r * r, 2 * size * T * r + 4 * parts * r * r, tiles * parts))
        made.append(_sum_parts(r, parts))
    return made


def _sum_parts(r: int, parts: int) -> Launch:
    return Launch("sum parts", 0.0, 4 * (parts + 1) * r * r, -(-r * r // 256))


def _product(kernel: str, s: Shape, rows: int, cols: int, k: int, tile: Tile | None = None) -> Launch:
    traffic = s.itemsize * (rows * k + k * cols + rows * cols)
    # cuBLAS picks its own tile and splits a long sum, so its blocks never run short
    return Launch(kernel, 2.0 * rows * cols * k, traffic, _blocks(rows, cols, tile) if tile else FULL)


def _covariance(s: Shape, family: str, multiprocessors: int) -> list[Launch]:
    T, n = s.T, s.n
    tile = find_tile("covariance", family, s.itemsize)
    tiles = triangle(n, tile)
    parts, _ = token_parts(max(T, 1), tile, tiles, multiprocessors * tile.blocks)
    area = tiles * tile.rows * tile.cols
    read, sums = s.itemsize * T * n, 2 * 4 * area  # S is read and written
    if parts == 1:
        return [Launch("covariance", 2.0 * T * area, read + sums, tiles)]
    workspace = 4 * parts * area
    return [
        Launch("covariance", 2.0 * T * area, read + workspace, tiles * parts),
        Launch("covariance reduce", 0.0, workspace + sums, area // 256),
    ]


def triangle(n: int, tile: Tile) -> int:
    """Tiles in the lower triangle of an n × n matrix, each as wide as it is high or a multiple of that."""
    wide, rows = tile.cols // tile.rows, -(-n // tile.rows)
    bands, rest = divmod(rows, wide)  # all rows of the k-th band have k + 1 tiles
    return wide * (bands * (bands + 1) // 2) + rest * (bands + 1)


def _blocks(rows: int, cols: int, tile: Tile) -> int:
    return -(-rows // tile.rows) * -(-cols // tile.cols)

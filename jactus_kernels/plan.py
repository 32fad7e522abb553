"""Which launches an operator makes, and the arithmetic and traffic of each: needs neither Triton nor a GPU."""

from dataclasses import dataclass

from .tiles import Tile, find_tile

# Largest ranks, by element size, whose blocks stay on chip without spills on every family (from the static lint).
CHAIN_RANK = {2: 256, 4: 128}
PAIR_RANK = {2: 128, 4: 64}
DECODE_RANK = {2: 256, 4: 128}
DECODE_TOKENS = 16


def fits_chain(r: int, itemsize: int) -> bool:
    """Whether two products of this rank run in one launch."""
    return r <= CHAIN_RANK[itemsize]


def fits_pair(r: int, itemsize: int) -> bool:
    """Whether q = g U, (g U) C and g_C run in one launch."""
    return r <= PAIR_RANK[itemsize]


def fits_decode(T: int, r: int, itemsize: int, core: bool) -> bool:
    """Whether a layer of T tokens runs in the decode path; a folded one (no core) may have any rank."""
    return T <= DECODE_TOKENS and (not core or r <= DECODE_RANK[itemsize])


def rank_block(r: int) -> int:
    """The power of two, at least 64, that holds a rank kept on chip."""
    return max(64, 1 << (r - 1).bit_length())


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


def dense(s: Shape) -> list[Launch]:
    """The uncompressed layer, to compare with."""
    return [_product("cuBLAS", s, s.T, s.m, s.n)]


def torch_launches(op: str, s: Shape) -> list[Launch]:
    """What the same operator costs as plain torch: one cuBLAS product a line."""
    T, m, n, r = s.T, s.m, s.n, s.r
    inner, core, outer = ((T, r, n), (T, r, r), (T, m, r))
    if op == "covariance_update":
        sums = [Launch("cuBLAS", 2.0 * T * n * n, 4 * (T * n + 2 * n * n), _blocks(n, n, Tile(128, 128, 64)))]
        if s.itemsize < 4:  # equal accuracy needs a float32 copy of X: read it, write it
            sums.insert(0, Launch("cast", 0.0, T * n * (s.itemsize + 4), 1 << 20))
        return sums
    products = {
        "core_linear": [inner, core, outer],
        "core_linear_train": [inner, core, outer],
        "core_linear_backward": [(T, r, m), (T, r, r), (T, n, r), (r, r, T)],
        "folded_linear": [inner, outer],
    }[op]
    return [_product("cuBLAS", s, *p) for p in products]


def triton_launches(op: str, s: Shape, family: str) -> list[Launch]:
    """The launches of `layers.py` and `covariance.py` for this shape."""
    T, m, n, r, size = s.T, s.m, s.n, s.r, s.itemsize

    def matmul(rows: int, cols: int, k: int) -> Launch:
        return _product("matmul", s, rows, cols, k, find_tile("matmul", family, size))

    if op == "covariance_update":
        return _covariance(s, family)
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
    if backward and fits_pair(r, size):
        rows = find_tile(f"pair {rank_block(r)}", family, size).rows
        traffic = size * (T * k + k * r + 2 * T * r + r * r)
        flops = 2.0 * T * r * (k + 2 * r)
        return [Launch("pair", flops, traffic, -(-T // rows)), Launch("sum", 0, 4 * r * r, 8), matmul(T, out, r)]
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
    if backward:
        gram = _product("gram", s, r, r, T)
        made += [Launch("gram", gram.flops, gram.bytes, 1 << 20), Launch("sum", 0, 4 * r * r, 8)]
    return made


def _product(kernel: str, s: Shape, rows: int, cols: int, k: int, tile: Tile | None = None) -> Launch:
    traffic = s.itemsize * (rows * k + k * cols + rows * cols)
    # cuBLAS picks its own tile and splits a long sum, so its blocks never run short
    return Launch(kernel, 2.0 * rows * cols * k, traffic, _blocks(rows, cols, tile) if tile else 1 << 20)


def _covariance(s: Shape, family: str) -> list[Launch]:
    T, n = s.T, s.n
    tile = find_tile("covariance", family, s.itemsize)
    side = -(-n // tile.cols)
    tiles = side * (side + 1) // 2
    parts = max(1, -(-T // tile.step) // 8)
    flops = 2.0 * T * tiles * tile.cols**2
    return [Launch("covariance", flops, s.itemsize * T * n + 4 * n * n, tiles * parts)]


def _blocks(rows: int, cols: int, tile: Tile) -> int:
    return -(-rows // tile.rows) * -(-cols // tile.cols)

"""Tile sizes of every kernel, by GPU family and element size: a fixed table, so a result never depends on a timing.

Every row is compiled ahead of time by `bench.kernels.static_lint`, which refuses one that spills registers, exceeds
the family's shared memory or misses the tensor cores. `blocks` is how many blocks the compiled row keeps resident on
one multiprocessor; persistent grids are sized by it.
"""

from dataclasses import dataclass

from .errors import JactusError


@dataclass(frozen=True)
class Tile:
    """One kernel configuration: output rows × columns, the step along the summed dimension, warps, pipeline stages."""

    rows: int
    cols: int
    step: int
    warps: int = 4
    stages: int = 3
    blocks: int = 1


# Shared memory a block may use, in bytes (vendor documentation; nothing enforces it before launch).
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

_TABLE: dict[tuple[str, str, int], Tile] = {
    ("covariance", "sm_80", 2): Tile(128, 128, 32, 8, 3),
    ("covariance", "sm_90", 2): Tile(128, 128, 64, 8, 3, 2),
    ("covariance", "sm_100", 2): Tile(128, 128, 64, 8, 3, 2),
    ("covariance", "gfx942", 2): Tile(128, 128, 32, 8, 2, 2),
    ("covariance", "sm_80", 4): Tile(64, 64, 32, 4, 3, 2),
    ("covariance", "sm_90", 4): Tile(128, 128, 32, 8, 3),
    ("covariance", "sm_100", 4): Tile(128, 128, 32, 8, 3),
    ("covariance", "gfx942", 4): Tile(128, 128, 16, 8, 2, 2),
    # Two consumer warp groups of 64 × 256. Not measured yet: `make gpu` times it beside the other.
    ("covariance wide", "sm_90", 2): Tile(128, 256, 64, 8, 4),
    ("matmul", "sm_80", 2): Tile(128, 128, 32, 8, 4),
    ("matmul", "sm_80", 4): Tile(64, 64, 32, 4, 3),
    ("matmul", "sm_90", 2): Tile(128, 128, 64, 8, 3),
    ("matmul", "sm_90", 4): Tile(128, 128, 32, 8, 3),
    ("matmul", "sm_100", 2): Tile(128, 128, 64, 8, 3),
    ("matmul", "sm_100", 4): Tile(128, 128, 32, 8, 3),
    ("matmul", "gfx942", 2): Tile(128, 128, 32, 8, 2),
    ("matmul", "gfx942", 4): Tile(128, 128, 16, 8, 2),
    ("narrow", "sm_80", 2): Tile(128, 128, 32, 8, 3),
    ("narrow", "sm_80", 4): Tile(64, 64, 32, 8, 3),
    ("narrow", "sm_90", 2): Tile(128, 128, 64, 8, 3),
    ("narrow", "sm_90", 4): Tile(128, 128, 32, 8, 3),
    ("narrow", "sm_100", 2): Tile(128, 128, 64, 8, 3),
    ("narrow", "sm_100", 4): Tile(128, 128, 32, 8, 3),
    ("narrow", "gfx942", 2): Tile(128, 128, 32, 8, 2),
    ("narrow", "gfx942", 4): Tile(128, 128, 16, 8, 2),
    ("widen", "sm_80", 2): Tile(128, 128, 32, 8, 3),
    ("widen", "sm_80", 4): Tile(64, 64, 32, 4, 3),
    ("widen", "sm_90", 2): Tile(128, 128, 64, 8, 3),
    ("widen", "sm_90", 4): Tile(128, 64, 32, 8, 3),
    ("widen", "sm_100", 2): Tile(128, 128, 64, 8, 3),
    ("widen", "sm_100", 4): Tile(128, 64, 32, 8, 3),
    ("widen", "gfx942", 2): Tile(128, 128, 32, 8, 2),
    ("widen", "gfx942", 4): Tile(128, 128, 16, 8, 2),
    ("chain 64", "sm_80", 2): Tile(64, 64, 64, 4, 3),
    ("chain 64", "sm_80", 4): Tile(32, 64, 32, 8, 3),
    ("chain 64", "sm_90", 2): Tile(64, 64, 64, 4, 3),
    ("chain 64", "sm_90", 4): Tile(64, 64, 32, 4, 3),
    ("chain 64", "sm_100", 2): Tile(64, 64, 64, 8, 3),
    ("chain 64", "sm_100", 4): Tile(64, 64, 32, 4, 3),
    ("chain 64", "gfx942", 2): Tile(64, 64, 32, 4, 2),
    ("chain 64", "gfx942", 4): Tile(64, 64, 16, 4, 2),
    ("chain 128", "sm_80", 2): Tile(64, 64, 64, 8, 3),
    ("chain 128", "sm_80", 4): Tile(16, 32, 32, 8, 3),
    ("chain 128", "sm_90", 2): Tile(64, 64, 64, 8, 3),
    ("chain 128", "sm_90", 4): Tile(64, 64, 32, 8, 3),
    ("chain 128", "sm_100", 2): Tile(64, 64, 64, 8, 3),
    ("chain 128", "sm_100", 4): Tile(64, 64, 32, 8, 3),
    ("chain 128", "gfx942", 2): Tile(64, 64, 32, 8, 2),
    ("chain 128", "gfx942", 4): Tile(64, 64, 16, 8, 2),
    ("chain 256", "sm_80", 2): Tile(64, 64, 64, 8, 3),
    ("chain 256", "sm_90", 2): Tile(64, 64, 64, 8, 3),
    ("chain 256", "sm_100", 2): Tile(64, 64, 64, 8, 3),
    ("chain 256", "gfx942", 2): Tile(64, 64, 32, 8, 2),
    ("gram", "sm_80", 2): Tile(64, 64, 64, 4, 3),
    ("gram", "sm_80", 4): Tile(64, 64, 32, 4, 3),
    ("gram", "sm_90", 2): Tile(64, 64, 64, 4, 3),
    ("gram", "sm_90", 4): Tile(64, 64, 32, 4, 3),
    ("gram", "sm_100", 2): Tile(64, 64, 64, 4, 3),
    ("gram", "sm_100", 4): Tile(64, 64, 32, 4, 3),
    ("gram", "gfx942", 2): Tile(64, 64, 32, 4, 2),
    ("gram", "gfx942", 4): Tile(64, 64, 16, 4, 2),
    ("pair 64", "sm_80", 2): Tile(64, 64, 64, 8, 3),
    ("pair 64", "sm_80", 4): Tile(16, 64, 32, 8, 3),
    ("pair 64", "sm_90", 2): Tile(64, 64, 64, 8, 3),
    ("pair 64", "sm_90", 4): Tile(32, 64, 32, 8, 3),
    ("pair 64", "sm_100", 2): Tile(64, 64, 64, 8, 3),
    ("pair 64", "sm_100", 4): Tile(32, 64, 32, 8, 3),
    ("pair 64", "gfx942", 2): Tile(64, 64, 32, 8, 2),
    ("pair 64", "gfx942", 4): Tile(32, 64, 16, 8, 2),
    ("pair 128", "sm_80", 2): Tile(32, 64, 32, 8, 3),
    ("pair 128", "sm_90", 2): Tile(64, 64, 64, 8, 3),
    ("pair 128", "sm_100", 2): Tile(64, 64, 64, 8, 3),
    ("pair 128", "gfx942", 2): Tile(64, 64, 32, 8, 2),
    ("decode inner", "sm_80", 2): Tile(16, 32, 128, 4, 4),
    ("decode inner", "sm_80", 4): Tile(16, 32, 64, 4, 4),
    ("decode core", "sm_80", 2): Tile(16, 32, 32, 4, 3),
    ("decode folded", "sm_80", 2): Tile(16, 32, 64, 4, 3),
    ("decode core", "sm_80", 4): Tile(16, 32, 32, 8, 3),
    ("decode folded", "sm_80", 4): Tile(16, 32, 32, 4, 3),
    ("decode inner", "sm_90", 2): Tile(16, 32, 128, 4, 4),
    ("decode inner", "sm_90", 4): Tile(16, 32, 64, 4, 4),
    ("decode core", "sm_90", 2): Tile(16, 32, 32, 4, 3),
    ("decode folded", "sm_90", 2): Tile(16, 32, 64, 4, 3),
    ("decode core", "sm_90", 4): Tile(16, 32, 32, 8, 3),
    ("decode folded", "sm_90", 4): Tile(16, 32, 32, 4, 3),
    ("decode inner", "sm_100", 2): Tile(16, 32, 128, 4, 4),
    ("decode inner", "sm_100", 4): Tile(16, 32, 64, 4, 4),
    ("decode core", "sm_100", 2): Tile(16, 32, 32, 4, 3),
    ("decode folded", "sm_100", 2): Tile(16, 32, 64, 4, 3),
    ("decode core", "sm_100", 4): Tile(16, 32, 32, 8, 3),
    ("decode folded", "sm_100", 4): Tile(16, 32, 32, 4, 3),
    ("decode inner", "gfx942", 2): Tile(16, 32, 64, 4, 2),
    ("decode inner", "gfx942", 4): Tile(16, 32, 32, 4, 2),
    ("decode core", "gfx942", 2): Tile(16, 32, 32, 4, 2),
    ("decode folded", "gfx942", 2): Tile(16, 32, 64, 4, 2),
    ("decode core", "gfx942", 4): Tile(16, 32, 32, 4, 2),
    ("decode folded", "gfx942", 4): Tile(16, 32, 32, 4, 2),
}


def has_tile(kernel: str, family: str, itemsize: int) -> bool:
    """Whether `kernel` has a configuration there."""
    return (kernel, family, itemsize) in _TABLE


def find_tile(kernel: str, family: str, itemsize: int) -> Tile:
    """The shipped configuration of `kernel` for a GPU `family` and inputs of `itemsize` bytes."""
    try:
        return _TABLE[kernel, family, itemsize]
    except KeyError:
        raise JactusError(
            f"{kernel}: no configuration for {family} with {itemsize}-byte elements; families are "
            f"{', '.join(SHARED_LIMIT)}, element sizes 2 and 4 (use JACTUS_BACKEND=torch elsewhere)"
        ) from None

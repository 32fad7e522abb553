"""The covariance kernel: values against float64, layouts, masks, splits, and that it writes nothing it should not."""

from dataclasses import replace

import pytest
import torch

from jactus_kernels.launches import triangle
from jactus_kernels.tiles import Tile, find_tile

from .conftest import relative

triton = pytest.importorskip("triton")
tl = triton.language
covariance = pytest.importorskip("jactus_kernels.covariance")
pytestmark = pytest.mark.kernel

# several tiles and parts at sizes a sanitiser can run: square ones, and two and four times as wide as high
SMALL = Tile(32, 32, 16, 4, 2, 1), Tile(16, 32, 16, 4, 2, 1), Tile(16, 64, 16, 4, 2, 1)


@pytest.fixture(params=SMALL, ids=lambda tile: f"{tile.rows}x{tile.cols}")
def small_tiles(monkeypatch, request):
    monkeypatch.setattr(covariance, "find_tile", lambda *_: request.param)


def check(X, mask=None, alpha=1.0, start=None):
    """The lower triangle errs at most twice as much as torch's own float32 sum."""
    n = X.shape[1]
    start = torch.zeros(n, n, device="cuda") if start is None else start
    S = start.clone()
    covariance.covariance_update_(S, X, mask, alpha)
    kept = X if mask is None else X[mask]
    exact = start.double() + alpha * kept.double().T @ kept.double()
    torchs = start.clone().addmm_(kept.float().T, kept.float(), alpha=alpha)
    # ε covers cases in which torch's sum happens to be exact
    assert relative(S.tril(), exact.tril()) <= 2 * relative(torchs.tril(), exact.tril()) + 2**-22
    return S


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shipped_tiles(randn, dtype):
    check(randn(150, 200, dtype=dtype), alpha=0.5, start=randn(200, 200))


def test_wide_shipped_tiles(randn, monkeypatch):
    wide = replace(find_tile("covariance wide", "sm_90", 2), stages=2)  # so that any family has the memory
    monkeypatch.setattr(covariance, "find_tile", lambda *_: wide)
    check(randn(150, 300, dtype=torch.bfloat16), alpha=0.5, start=randn(300, 300))


@pytest.mark.parametrize("T,n", [(1, 1), (33, 31), (16, 32), (70, 97), (5, 160)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_ragged(randn, small_tiles, T, n, dtype, masked):
    mask = (torch.arange(T, device="cuda") % 3 != 1) if masked else None
    check(randn(T, n, dtype=dtype), mask, alpha=-0.25, start=randn(n, n))


@pytest.mark.parametrize("masked", [False, True])
def test_split_over_tokens(randn, small_tiles, masked):
    X = randn(300, 40, dtype=torch.bfloat16)  # 19 steps: two parts, the last one ragged
    mask = torch.arange(300, device="cuda") % 5 != 0 if masked else None
    first = check(X, mask, alpha=2.0, start=randn(40, 40))
    again = torch.zeros_like(first), torch.zeros_like(first)
    for S in again:
        covariance.covariance_update_(S, X, mask)
    assert torch.equal(again[0].tril(), again[1].tril())


def test_more_tiles_than_resident_blocks(randn, small_tiles, monkeypatch):
    monkeypatch.setattr(covariance.device, "multiprocessors", lambda x: 4)
    check(randn(40, 180, dtype=torch.bfloat16), start=randn(180, 180))


def test_strided_input(randn, small_tiles):
    check(randn(60, 90, dtype=torch.bfloat16)[::2, ::3])
    check(randn(50, 70, dtype=torch.float32).T)
    check(randn(50, 72, dtype=torch.bfloat16)[:, 1:])  # base not 16-byte aligned: no descriptor can read it


@pytest.mark.parametrize("n", [64, 61])
def test_masked_rows_are_never_read(randn, small_tiles, n):
    X = randn(48, n, dtype=torch.bfloat16)
    mask = torch.arange(48, device="cuda") % 2 == 0
    X[1::2] = float("nan")
    check(X, mask)
    check(X, torch.zeros_like(mask), start=randn(n, n))


def test_empty(randn):
    S = randn(8, 8)
    before = S.clone()
    covariance.covariance_update_(S, randn(0, 8))
    assert torch.equal(S, before)
    covariance.covariance_update_(S[:0, :0].contiguous(), randn(5, 0))


@triton.jit
def number_kernel(p_row, p_col, tiles, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, col = covariance.lower_tile(o, WIDE)
    tl.store(p_row + o, row, mask=o < tiles)
    tl.store(p_col + o, col, mask=o < tiles)


@pytest.mark.parametrize("side", [1, 2, 4, 11, 200])
@pytest.mark.parametrize("wide", [1, 2, 4])
def test_tile_numbering_covers_the_triangle_once(side, wide):
    i, j = torch.tril_indices(side, side, device="cuda")
    expected = torch.stack([i, j // wide]).unique(dim=1)  # in their order along rows
    tiles = triangle(side * 16, Tile(16, 16 * wide, 16))
    assert tiles == expected.shape[1]
    rows, cols = torch.empty(2, tiles, dtype=torch.int32, device="cuda")
    number_kernel[(triton.cdiv(tiles, 64),)](rows, cols, tiles, WIDE=wide, BLOCK=64)
    assert torch.equal(torch.stack([rows, cols]).long(), expected)

"""Every kernel configuration the launchers can reach, as the static lint compiles it."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from jactus_kernels import chain, core_gradient, covariance, decode, matmul, scatter
from jactus_kernels.device import resolve_precision
from jactus_kernels.launches import CHAIN_RANK, DECODE_RANK, DECODE_TOKENS, PAIR_RANK
from jactus_kernels.tiles import SHARED_LIMIT, Tile, find_tile, has_tile

from .compiled import Variant

FAMILIES = tuple(SHARED_LIMIT)
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


def _types(kernel: Any, constants: dict, **given: str) -> dict[str, str]:
    """Integer arguments are i32 unless said otherwise."""
    return {name: given.get(name, "i32") for name in kernel.arg_names if name not in constants}


def _variant(name: str, kernel: Any, family: str, dtype: str, shape: Tile, constants: dict, **given: Any) -> Variant:
    extra = {key: given.pop(key) for key in ("unaligned", "matmul", "blocks") if key in given}
    types = _types(kernel, constants, **given)
    return Variant(name, kernel, family, dtype, types, constants, shape.warps, shape.stages, **extra)


def variants(family: str, dtype: str) -> Iterator[Variant]:
    """The configurations for one GPU family and input dtype."""
    precision = resolve_precision("auto", family) if dtype == "fp32" else "ieee"
    yield from _covariance(family, dtype, precision)
    yield from _matmul(family, dtype, precision)
    yield from _chain(family, dtype, precision)
    yield from _core_gradient(family, dtype, precision)
    yield from _decode(family, dtype, precision)
    yield from _scatter(family, dtype, precision)


def _covariance(family: str, dtype: str, precision: str) -> Iterator[Variant]:
    pointers = {"p_x": f"*{dtype}", "p_mask": "*i1", "alpha": "fp32", "x_stride_n": "=1"}
    reads = [("tma", True, False)] if family in ("sm_90", "sm_100") else []
    reads += [("pointer", False, False), ("masked", False, True)]
    rows = [row for row in ("covariance", "covariance wide") if has_tile(row, family, DTYPES[dtype])]
    for row, split in product(rows, (False, True)):
        shape = find_tile(row, family, DTYPES[dtype])
        for name, tma, masked in reads:
            constants: dict[str, Any] = {"MASKED": masked, "SPLIT": split, "TMA": tma, "PRECISION": precision}
            constants |= {"BM": shape.rows, "BN": shape.cols, "BT": shape.step}
            label = f"{row} {name}{' split' if split else ''}"
            given: dict[str, Any] = {**pointers, "p_out": "*fp32", "unaligned": ("tiles", "parts")}
            given["blocks"] = shape.blocks
            yield _variant(label, covariance.covariance_kernel, family, dtype, shape, constants, **given)
    given = {"p_parts": "*fp32", "p_s": "*fp32", "alpha": "fp32", "unaligned": ("tiles", "parts"), "matmul": False}
    shape, reduce = find_tile("covariance", family, DTYPES[dtype]), Tile(0, 0, 0, 4, 3)
    constants = {"BM": shape.rows, "BN": shape.cols, "BLOCK": 256, "AT_ONCE": 16}
    if dtype == "fp32":
        yield _variant("covariance reduce", covariance.covariance_reduce_kernel, family, dtype, reduce, constants,
                       **given)  # fmt: skip


def _pointers(kernel: Any, dtype: str) -> dict[str, Any]:
    return {name: f"*{dtype}" for name in kernel.arg_names if name.startswith("p_")}


def _matmul(family: str, dtype: str, precision: str) -> Iterator[Variant]:
    shape, kernel = find_tile("matmul", family, DTYPES[dtype]), matmul.matmul_kernel
    for tma in (False, True) if family in ("sm_90", "sm_100") else (False,):
        for k_major in (True, False):
            constants: dict[str, Any] = {"BIAS": k_major, "TMA": tma, "K_MAJOR": k_major, "PRECISION": precision}
            constants |= {"BM": shape.rows, "BN": shape.cols, "BK": shape.step, "GROUP": 8}
            unit = {"a_stride_k": "=1", "b_stride_k" if k_major else "b_stride_n": "=1"}
            label = f"matmul {'tma' if tma else 'pointer'} {'A Bt + bias' if k_major else 'A B'}"
            yield _variant(label, kernel, family, dtype, shape, constants, **_pointers(kernel, dtype), **unit)


def _chain(family: str, dtype: str, precision: str) -> Iterator[Variant]:
    kernel = chain.chain_kernel
    uses = {
        "z=(xV)Ct": (False, False, "b_stride_r", "k_stride_r"),
        "h, z": (False, True, "b_stride_r", "k_stride_r"),
        "q, p=(gU)C": (False, True, "b_stride_r", "k_stride_w"),
        "folded": (True, False, "b_stride_k", "k_stride_r"),
    }
    for R in (64, 128, 256):
        if CHAIN_RANK[DTYPES[dtype]] < R:
            continue
        shape = find_tile(f"chain {R}", family, DTYPES[dtype])
        for label, (bias, keep, unit_b, unit_k) in uses.items():
            constants: dict[str, Any] = {
                "BIAS": bias,
                "KEEP": keep,
                "PRECISION": precision,
                "BT": shape.rows,
                "BK": shape.step,
            }
            constants |= {"R": R, "BW": shape.cols}
            unit = {"a_stride_k": "=1", unit_b: "=1", unit_k: "=1"}
            pointers = _pointers(kernel, dtype)
            yield _variant(f"chain {R} {label}", kernel, family, dtype, shape, constants, **pointers, **unit)


def _core_gradient(family: str, dtype: str, precision: str) -> Iterator[Variant]:
    shape, kernel = find_tile("gram", family, DTYPES[dtype]), core_gradient.gram_kernel
    constants: dict[str, Any] = {"PRECISION": precision, "BR": shape.rows, "BT": shape.step}
    pointers = _pointers(kernel, dtype) | {"p_parts": "*fp32"}
    yield _variant("gram qth", kernel, family, dtype, shape, constants, **pointers)
    kernel = core_gradient.pair_kernel
    for R in (64, 128):
        if PAIR_RANK[DTYPES[dtype]] < R:
            continue
        shape = find_tile(f"pair {R}", family, DTYPES[dtype])
        constants = {"PRECISION": precision, "BT": shape.rows, "BK": shape.step, "R": R, "BW": shape.cols}
        given = _pointers(kernel, dtype) | {"p_parts": "*fp32", "g_stride_m": "=1", "u_stride_r": "=1"}
        yield _variant(f"pair {R} q, p, gC", kernel, family, dtype, shape, constants, **given)
    kernel, shape = core_gradient.sum_parts_kernel, Tile(0, 0, 0, 4, 3)
    given = {"p_parts": "*fp32", "p_out": f"*{dtype}", "unaligned": ("parts",), "matmul": False}
    yield _variant("sum of parts", kernel, family, dtype, shape, {"BLOCK": 256, "AT_ONCE": 16}, **given)


def _decode(family: str, dtype: str, precision: str) -> Iterator[Variant]:
    shape, kernel = find_tile("decode inner", family, DTYPES[dtype]), decode.decode_inner_kernel
    for label, unit in (("xV", "b_stride_r"), ("xRt", "b_stride_n")):
        constants = {"PRECISION": precision, "BT": DECODE_TOKENS, "BR": shape.cols, "BK": shape.step}
        given = _pointers(kernel, dtype) | {"p_parts": "*fp32", "x_stride_n": "=1", unit: "=1", "unaligned": ("T",)}
        yield _variant(f"decode inner {label}", kernel, family, dtype, shape, constants, **given)
    kernel = decode.decode_outer_kernel
    for R in (0, 64, 128, 256):
        if DECODE_RANK[DTYPES[dtype]] < R:
            continue
        shape = find_tile("decode core" if R else "decode folded", family, DTYPES[dtype])
        constants = {"CORE": R > 0, "BIAS": True, "PRECISION": precision, "BT": DECODE_TOKENS, "BM": shape.cols}
        constants |= {"BK": shape.step, "R": R or 16, "PARTS": decode.PARTS}
        given = _pointers(kernel, dtype) | {"p_parts": "*fp32", "l_stride_r": "=1", "unaligned": ("T", "parts")}
        label = f"decode outer core {R}" if R else "decode outer folded"
        yield _variant(label, kernel, family, dtype, shape, constants, **given)


def _scatter(family: str, dtype: str, precision: str) -> Iterator[Variant]:
    for name, kernel, cols in (("narrow", scatter.narrow_kernel, "BR"), ("widen", scatter.widen_kernel, "BW")):
        shape = find_tile(name, family, DTYPES[dtype])
        constants = {"PRECISION": precision, "BT": shape.rows, cols: shape.cols, "BK": shape.step}
        unit = "x_stride_n" if name == "narrow" else "z_stride_r"
        given = _pointers(kernel, dtype) | {"p_order": "*i64", unit: "=1", "b_stride_r": "=1", "unaligned": ("T", "w")}
        yield _variant(name, kernel, family, dtype, shape, constants, **given)

"""Every kernel configuration the launchers can reach, as the static lint compiles it."""

from collections.abc import Iterator
from typing import Any

from jactus_kernels import covariance
from jactus_kernels.device import resolve_precision
from jactus_kernels.tiles import SHARED_LIMIT, Tile, tile

from .compiled import Variant

FAMILIES = tuple(SHARED_LIMIT)
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


def _types(kernel: Any, constants: dict, **given: str) -> dict[str, str]:
    """Integer arguments are i32 unless said otherwise."""
    return {name: given.get(name, "i32") for name in kernel.arg_names if name not in constants}


def _variant(name: str, kernel: Any, family: str, dtype: str, shape: Tile, constants: dict, **given) -> Variant:
    extra = {key: given.pop(key) for key in ("unaligned", "matmul", "blocks") if key in given}
    types = _types(kernel, constants, **given)
    return Variant(name, kernel, family, dtype, types, constants, shape.warps, shape.stages, **extra)


def variants(family: str, dtype: str) -> Iterator[Variant]:
    """The configurations for one GPU family and input dtype."""
    precision = resolve_precision("auto", family) if dtype == "fp32" else "ieee"
    yield from _covariance(family, dtype, precision)


def _covariance(family: str, dtype: str, precision: str) -> Iterator[Variant]:
    shape = tile("covariance", family, DTYPES[dtype])
    pointers = {"p_x": f"*{dtype}", "p_mask": "*i1", "alpha": "fp32", "x_stride_n": "=1"}
    reads = [("tma", True, False)] if family in ("sm_90", "sm_100") else []
    reads += [("pointer", False, False), ("masked", False, True)]
    for split in (False, True):
        for name, tma, masked in reads:
            constants = {"MASKED": masked, "SPLIT": split, "TMA": tma, "PRECISION": precision}
            constants |= {"BN": shape.cols, "BT": shape.step}
            label = f"covariance {name}{' split' if split else ''}"
            given = {**pointers, "p_out": "*fp32", "unaligned": ("tiles", "parts")}
            given["blocks"] = shape.blocks
            yield _variant(label, covariance.covariance_kernel, family, dtype, shape, constants, **given)
    given = {"p_parts": "*fp32", "p_s": "*fp32", "alpha": "fp32", "unaligned": ("tiles", "parts"), "matmul": False}
    constants = {"BN": shape.cols, "BR": 16}
    reduce = Tile(0, 0, 0, 4, 3)
    if dtype == "fp32":
        yield _variant("covariance reduce", covariance.covariance_reduce_kernel, family, dtype, reduce, constants,
                       **given)  # fmt: skip

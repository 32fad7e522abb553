"""Compile every shipped configuration ahead of time and refuse what would be slow or would not launch.

    python -m bench.kernels.static_lint [--only NAME] [--family F] [--dtype D] [--out FILE.csv]

Refused: spilled registers, shared memory past the family's limit, a product without tensor-core instructions (float32
in "ieee" on AMD included, which has them), no 128-bit or bulk-tensor loads, fewer resident blocks than the tile table
claims. Nothing is run, and no time but the compiler's own is measured.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import triton

from jactus_kernels.tiles import SHARED_LIMIT

from ..rows import write
from .compiled import Facts, Variant, compile_variant, facts
from .shipped import DTYPES, FAMILIES, variants

COLUMNS = ("kernel", "family", "dtype", "warps", "stages", "registers", "spills", "shared", "blocks", "tensor_core",
           "wide_loads", "verdict")  # fmt: skip


def judge(v: Variant, found: Facts) -> list[str]:
    """What is wrong with a compiled variant; an empty list passes it."""
    wrong = []
    if found.spills:
        wrong.append(f"{found.spills} spills")
    if found.shared > SHARED_LIMIT[v.family]:
        wrong.append(f"shared memory {found.shared} > {SHARED_LIMIT[v.family]}")
    if v.matmul and not found.tensor_core:
        wrong.append("no tensor-core instruction")
    if not found.wide_loads:
        wrong.append("no 128-bit load")
    if found.blocks < max(1, v.blocks):
        wrong.append(f"{found.blocks} resident blocks, the table claims {v.blocks}")
    return wrong


def examine(group: tuple[str, str, str]) -> list[tuple]:
    """The table's rows for one family, dtype and part of a name."""
    family, dtype, only = group
    rows = []
    for v in variants(family, dtype):
        if only not in v.name:
            continue
        found, verdict = _facts(v)
        figures = (getattr(found, name) for name in COLUMNS[5:-1])
        rows.append((v.name, family, dtype, v.warps, v.stages, *figures, verdict))
    return rows


def _facts(v: Variant) -> tuple[Facts, str]:
    try:
        found = facts(v, compile_variant(v))
    except Exception as error:  # a compiler error is a verdict on this row, and the others still count
        return Facts(0, 0, 0, 0, 0, 0), f"does not compile: {str(error).strip().splitlines()[0][:80]}"
    return found, "; ".join(judge(v, found)) or "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--family", choices=FAMILIES, help="one GPU family")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="one input dtype")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--out", type=Path, help="also write the table as CSV")
    args = parser.parse_args()
    begun, rows = time.time(), []
    groups = product([args.family] if args.family else FAMILIES, [args.dtype] if args.dtype else DTYPES, [args.only])
    print(f"Triton {triton.__version__}, ahead of time, no GPU")
    print(_line(COLUMNS))
    with ProcessPoolExecutor(args.jobs) as pool:
        for found in pool.map(examine, groups):
            rows += found
            print("\n".join(map(_line, found)), flush=True)
    failed = sum(row[-1] != "ok" for row in rows)
    print(f"{len(rows)} configurations in {time.time() - begun:.0f} s, {failed} refused")
    if args.out:
        write(args.out, [("triton", *COLUMNS), *((triton.__version__, *row) for row in rows)])
    return 1 if failed else 0


def _line(row: tuple) -> str:
    return f"{row[0]:30} {row[1]:7} {row[2]:5} " + " ".join(f"{x!s:>11}" for x in row[3:-1]) + f"  {row[-1]}"


if __name__ == "__main__":
    sys.exit(main())

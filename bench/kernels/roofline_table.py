"""Print, per shape, the floor, the predicted times and the path the policy picks.

    python -m bench.kernels.roofline_table [--gpu A100] [--dtype float32] [--out FILE.csv]

Predictions only: data-sheet peaks and the shares assumed in `jactus_kernels.roofline`. What the policy makes of them and of
measurements, `jactus_kernels.explain` says.
"""

import argparse
import os
from pathlib import Path

import torch

import jactus_kernels as jk
from jactus_kernels.launches import FULL, Launch
from jactus_kernels.policy import OPERATORS
from jactus_kernels.roofline import GPUS, find_gpu, predict

from ..rows import write
from .cases import MODELS, RETAINED, TOKENS, rank

COLUMNS = ("gpu", "model", "op", "T", "m", "n", "r", "floor_us", "triton_us", "torch_us", "dense_us", "picks",
           "launches")  # fmt: skip


def rows(gpu_name: str, dtype: torch.dtype):
    """One row a layer, operator and number of tokens."""
    gpu = find_gpu(gpu_name)
    assert gpu is not None
    for model, layers in MODELS.items():
        for m, n in layers:
            for op in OPERATORS:
                for kept in (RETAINED[0],) if op == "covariance_update" else RETAINED:
                    r = 0 if op == "covariance_update" else rank(m, n, kept)
                    for T in TOKENS:
                        d = jk.explain(op, T=T, m=m, n=n, r=r, dtype=dtype, gpu=gpu_name)
                        launches = "+".join(launch.kernel for launch in d.launches)
                        dense = "" if op == "covariance_update" else f"{_dense(op, T, m, n, gpu, dtype):.1f}"
                        yield (gpu_name, model, op, T, m, n, r, f"{d.floor_us:.2f}", f"{d.triton_us:.1f}",
                               f"{d.torch_us:.1f}", dense, d.backend, launches)  # fmt: skip


def _dense(op: str, T: int, m: int, n: int, gpu, dtype: torch.dtype) -> float:
    """The uncompressed layer: one product forward, two backward."""
    size = dtype.itemsize
    product = Launch("cuBLAS", 2.0 * T * m * n, size * (T * n + m * n + T * m), FULL)
    times = 2 if op == "core_linear_backward" else 1
    return predict([product] * times, gpu, "half" if size == 2 else "fp32", "ieee")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="H100", choices=[gpu.name for gpu in GPUS], help="whose data sheet to use")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="input dtype")
    parser.add_argument("--out", type=Path, help="also write the table as CSV")
    args = parser.parse_args()
    os.environ["JACTUS_POLICY"] = "none"  # no corrections
    table = list(rows(args.gpu, getattr(torch, args.dtype)))
    widths = [max(len(str(row[i])) for row in [COLUMNS, *table]) for i in range(len(COLUMNS))]
    print(f"{args.gpu}, {args.dtype}: predictions of the roofline model, not measurements")
    for row in [COLUMNS, *table]:
        print("  ".join(str(value).rjust(width) for value, width in zip(row, widths)).rstrip())
    if args.out:
        write(args.out, [COLUMNS, *table])


if __name__ == "__main__":
    main()

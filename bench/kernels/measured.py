"""Turn a benchmark run into a table and into the file the policy reads: `python -m bench.kernels.measured RUN.json`.

Writes `bench/results/kernels-<device>.csv` (TFLOP/s, GB/s, share of the roofline floor) and
`jactus_kernels/measured/<device>.json`. A run on CPU is printed and nothing is written: its times say nothing of a GPU.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch

import jactus_kernels as jk
from jactus_kernels.plan import Launch, Shape, torch_launches
from jactus_kernels.policy import MEASURED, decide, slug
from jactus_kernels.roofline import find_gpu, floor

COLUMNS = ("device", "torch", "op", "model", "T", "m", "n", "r", "dtype", "mode", "provider", "us", "tflops", "gb_s",
           "of_roofline", "error")  # fmt: skip
# what a provider computes, as the plan's operators name it
WORK = {"forward": "core_linear", "covariance": "covariance_update"}
FOLDED = ("two products", "jactus folded")
BASELINES = {"core_linear": ("jactus", "three products"), "folded_linear": ("jactus folded", "two products"),
             "covariance_update": ("jactus", "mm out_dtype", "addmm_ of float32 copy")}  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """One dictionary a benchmark: its extra_info and the median microseconds of one call."""
    found = json.loads(path.read_text())["benchmarks"]
    return [b["extra_info"] | {"us": b["stats"]["median"] / b["extra_info"]["repeats"] * 1e6} for b in found]


def work(row: dict[str, Any]) -> list[Launch]:
    """The least work of what a row computed: its products, each operand moved once."""
    size = 4 if row["dtype"] == "float32" else 2
    shape = Shape(row["T"], row["m"], row["n"], row["r"], size)
    if row["op"] == "covariance":  # the symmetric half, whoever computes it
        n, T = row["n"], row["T"]
        return [Launch("covariance", 1.0 * T * n * (n + 1), size * T * n + 4 * n * n, 1)]
    if row["provider"] == "dense":
        m, n, T = row["m"], row["n"], row["T"]
        product = Launch("dense", 2.0 * T * m * n, size * (T * n + m * n + T * m), 1)
        return [product] * (3 if row["op"] == "training" else 1)
    if row["op"] == "training":
        return torch_launches("core_linear_train", shape) + torch_launches("core_linear_backward", shape)
    return torch_launches("folded_linear" if row["provider"] in FOLDED else "core_linear", shape)


def table(rows: list[dict[str, Any]]) -> list[tuple]:
    """The rows to print and keep; the roofline share is empty for a device without a data sheet."""
    made = []
    for row in rows:
        launches, gpu = work(row), find_gpu(row["device"])
        kind = "fp32" if row["dtype"] == "float32" else "half"
        share = f"{floor(launches, gpu, kind, 'tf32x3') / row['us']:.3f}" if gpu else ""
        teraflops = sum(x.flops for x in launches) / row["us"] / 1e6
        gigabytes = sum(x.bytes for x in launches) / row["us"] / 1e3
        figures = f"{row['us']:.2f}", f"{teraflops:.2f}", f"{gigabytes:.1f}", share, f"{row['error']:.2e}"
        made.append((*(row[key] for key in COLUMNS[:11]), *figures))
    return made


def policy_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernel against the fastest torch provider for every eager forward and covariance, beside their predictions."""
    by_case: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["mode"] == "eager" and row["op"] in WORK:
            key = (row["op"], row["dtype"], row["T"], row["m"], row["n"], row["r"], row["device"])
            by_case.setdefault(key, {})[row["provider"]] = row["us"]
    made = []
    for (op, dtype, T, m, n, r, device), times in by_case.items():
        size = 4 if dtype == "float32" else 2
        for name in (WORK[op], "folded_linear") if op == "forward" else (WORK[op],):
            ours, *others = BASELINES[name]
            theirs = [times[o] for o in others if o in times]
            with jk.use(backend="fused"):
                predicted = _prediction(name, Shape(T, m, n, r, size), dtype, device)
            if ours not in times or not theirs or predicted is None or predicted.triton_us is None:
                continue
            made.append({"op": name, "dtype": "fp32" if size == 4 else "half", "T": T, "m": m, "n": n, "r": r,
                         "triton_us": times[ours], "triton_predicted_us": predicted.triton_us,
                         "torch_us": min(theirs), "torch_predicted_us": predicted.torch_us})  # fmt: skip
    return made


def _prediction(op: str, shape: Shape, dtype: str, device: str):
    gpu = find_gpu(device)
    return decide(op, shape, getattr(torch, dtype), gpu.name, gpu.family, jk.settings.current()) if gpu else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the JSON of pytest --benchmark-json")
    args = parser.parse_args()
    rows = read(args.run)
    made = table(rows)
    for line in [COLUMNS, *made]:
        print("  ".join(map(str, line)))
    device = rows[0]["device"]
    if device == "CPU":
        print("a CPU run: nothing written")
        return
    with Path(f"bench/results/kernels-{slug(device)}.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *made])
    MEASURED.mkdir(exist_ok=True)
    content = {"device": device, "torch": rows[0]["torch"], "rows": policy_rows(rows)}
    (MEASURED / f"{slug(device)}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

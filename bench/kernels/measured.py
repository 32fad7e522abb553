"""Turn benchmark runs into a table and into the file the policy reads: `python -m bench.kernels.measured RUN.json …`.

Writes `bench/results/kernels-<device>.csv` (TFLOP/s, GB/s, share of the roofline floor) and
`jactus_kernels/measured/<device>.csv`. A run on CPU is printed and nothing is written: its times say nothing of a GPU.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from jactus_kernels.launches import Launch, Shape, torch_launches
from jactus_kernels.policy import COLUMNS as POLICY_COLUMNS
from jactus_kernels.policy import MEASURED, slug
from jactus_kernels.roofline import find_gpu, floor

from ..rows import write

COLUMNS = ("device", "torch", "op", "model", "T", "m", "n", "r", "dtype", "mode", "provider", "us", "tflops", "gb_s",
           "of_roofline", "error")  # fmt: skip
FOLDED = ("two products", "jactus folded")
# For the policy: what was timed, the operators it decides, our provider and the ones it is compared with.
DECIDED = (("forward", "core_linear", "jactus", ("three products",)),
           ("forward", "folded_linear", "jactus folded", ("two products",)),
           ("training", "training", "jactus", ("three products",)),
           ("covariance", "covariance_update", "jactus", ("mm out_dtype", "addmm_ of float32 copy")))  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """One dictionary a benchmark: its extra_info, the median microseconds of one call, and those of the fastest round."""

    def of_one_call(benchmark: dict[str, Any], which: str) -> float:
        return benchmark["stats"][which] / benchmark["extra_info"]["repeats"] * 1e6

    found = json.loads(path.read_text())["benchmarks"]
    return [b["extra_info"] | {"us": of_one_call(b, "median"), "least_us": of_one_call(b, "min")} for b in found]


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


def policy_rows(rows: list[dict[str, Any]]) -> list[tuple]:
    """Kernel against the fastest torch provider for every shape, eagerly and captured.

    The fastest round of each: what else the host did during a round is no reason to prefer the other.
    """
    times: dict[tuple, dict[str, float]] = {}
    for row in rows:
        dtype = "fp32" if row["dtype"] == "float32" else "half"
        key = (row["mode"], row["op"], dtype, *(row[size] for size in ("T", "m", "n", "r")))
        times.setdefault(key, {})[row["provider"]] = row["least_us"]
    made = []
    for timed, op, ours, theirs in DECIDED:
        for (mode, what, *shape), found in times.items():
            if what == timed and ours in found and (others := [found[name] for name in theirs if name in found]):
                made.append((op, *shape, round(found[ours], 2), round(min(others), 2), mode))
    return sorted(made, key=lambda row: row[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="JSON of pytest --benchmark-json, all of one device")
    args = parser.parse_args()
    rows = [row for run in args.runs for row in read(run)]
    made = table(rows)
    for line in [COLUMNS, *made]:
        print("  ".join(map(str, line)))
    device = rows[0]["device"]
    if device == "CPU":
        print("a CPU run: nothing written")
        return
    write(Path(f"bench/results/kernels-{slug(device)}.csv"), [COLUMNS, *made])
    write(MEASURED / f"{slug(device)}.csv", [POLICY_COLUMNS, *policy_rows(rows)])


if __name__ == "__main__":
    main()

"""What a GPU measured, as Markdown: `python -m bench.kernels.summary bench/results/kernels-<device>.csv`.

Ratios of the medians: how many times as fast as torch the kernels are, and as fast as the dense layer the low-rank ones. Over
layers of five models the geometric mean is given, with the extremes.
"""

import argparse
import csv
import math
from collections.abc import Iterable
from pathlib import Path

from ..report import table

Times = dict[tuple, dict[str, float]]  # by (op, dtype, mode, T, m, n, r): microseconds of every provider
LAYERS = (("three products", "jactus"), ("two products", "jactus folded"), ("dense", "three products"),
          ("dense", "two products"))  # fmt: skip
SUMS = ("mm out_dtype", "addmm_ of float32 copy")


def read(path: Path) -> tuple[str, Times]:
    """Device and torch, and the medians."""
    times: Times = {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        sizes = (int(row[size]) for size in ("T", "m", "n", "r"))
        times.setdefault((row["op"], row["dtype"], row["mode"], *sizes), {})[row["provider"]] = float(row["us"])
    return f"{rows[0]['device']}, torch {rows[0]['torch']}", times


def speedups(times: Times, key: tuple, theirs: str, ours: str) -> list[float]:
    """theirs / ours at every shape of (op, dtype, mode, T)."""
    return [t[theirs] / t[ours] for shape, t in times.items() if shape[:4] == key and theirs in t and ours in t]


def spread(ratios: Iterable[float]) -> str:
    """Geometric mean (least … most)."""
    found = list(ratios)
    if not found:
        return "–"
    mean = math.exp(sum(map(math.log, found)) / len(found))
    return f"{mean:.2f} ({min(found):.2f} … {max(found):.2f})"


def layers(times: Times, op: str) -> str:
    """Forward or training of the layers, bfloat16: a row a mode and number of tokens."""
    pairs = LAYERS if op == "forward" else (LAYERS[0], LAYERS[2])
    keys = sorted({key[:4] for key in times if key[:2] == (op, "bfloat16")}, key=lambda key: (key[2], key[3]))
    lines = [(key[2], str(key[3]), *(spread(speedups(times, key, *pair)) for pair in pairs)) for key in keys]
    return table(("mode", "T", *(f"{ours} against {theirs}" for theirs, ours in pairs)), lines)


def covariances(times: Times) -> str:
    """One update of a covariance: a row a dtype, mode and width, a column a number of tokens; against each way of torch's."""
    found = {key[1:4] + key[5:6]: t for key, t in times.items() if key[0] == "covariance"}
    tokens = sorted({T for _, _, T, _ in found})

    def cell(dtype: str, mode: str, T: int, n: int) -> str:
        t = found.get((dtype, mode, T, n), {})
        return " / ".join(f"{t[name] / t['jactus']:.2f}" for name in SUMS if name in t) or "–"

    kinds = sorted({(dtype, mode, n) for dtype, mode, _, n in found})
    lines = [(f"{dtype}, {mode}", str(n), *(cell(dtype, mode, T, n) for T in tokens)) for dtype, mode, n in kinds]
    return table(("dtype, mode", "n", *(f"T = {T}" for T in tokens)), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    device, times = read(parser.parse_args().results)
    print(device)
    for title, text in (("forward", layers(times, "forward")), ("training", layers(times, "training")),
                        (f"covariance update, against {' / '.join(SUMS)}", covariances(times))):  # fmt: skip
        print(f"\n### {title}\n\n{text}")


if __name__ == "__main__":
    main()

"""Run the lane: `python -m tests.families [--only REGEX] [--jobs 2] [--out table.md] [--json rows.json]`."""

import argparse
import csv
import json
import re
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from .check import Result
from .workers import run_all

STATUSES = ("exact", "refused", "FAIL", "not tried")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="of TASK:model_type or kind:name")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one architecture")
    parser.add_argument("--out", type=Path, help="write a Markdown table there")
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--write", action="store_true", help="keep the rows, for docs/limits.md")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    args = parser.parse_args()
    from .entries import names

    chosen = [name for name in names() if re.search(args.only, name)]
    if args.list:
        print("\n".join(chosen))
        return 0
    start = time.monotonic()
    results: list[Result] = []
    for result in run_all(chosen, args.jobs, args.limit):
        results.append(result)
        print(
            f"{result.status:9} {result.name:45} {result.kind:40} {result.seconds:5.1f}s {result.reason[:300]}",
            flush=True,
        )
    results.sort(key=lambda r: chosen.index(r.name))
    line = summary(results, time.monotonic() - start)
    print(line)
    if args.out:
        args.out.write_text(table(results, line), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")
    if args.write:
        keep(results, line)
    return 1 if any(r.status == "FAIL" for r in results) or not results else 0


def summary(results: list[Result], seconds: float) -> str:
    counts = Counter(r.status for r in results)
    types = {r.name.partition(":")[2] for r in results if r.status != "not tried" and not r.name.startswith("kind:")}
    parts = ", ".join(f"{counts[s]} {s}" for s in STATUSES)
    return f"{len(results)} entries of {len(types)} model types tried: {parts}; {seconds:.0f} s"


def keep(results: list[Result], line: str) -> None:
    """The rows that the documents count, and the whole table."""
    with Path("bench/results/families.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(("name", "kind", "result", "reason", "notes"))
        for r in sorted(results, key=lambda r: r.name):
            out.writerow((r.name, r.kind, r.status, " ".join(r.reason[:500].split()), "; ".join(r.notes)[:300]))
    Path("bench/results/families.md").write_text(table(results, line), encoding="utf-8")


def table(results: list[Result], line: str) -> str:
    rows = [f"{line}.", "", "| entry | class | result | reason | notes |", "|---|---|---|---|---|"]
    for r in sorted(results, key=lambda r: (("FAIL", "refused", "exact", "not tried").index(r.status), r.name)):
        cells = (r.name, r.kind, r.status, r.reason[:500], "; ".join(r.notes)[:300])
        rows.append("| " + " | ".join(str(c).replace("|", "/").replace("\n", " ") for c in cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())

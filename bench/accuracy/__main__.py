"""Measure the matrix, or show what was measured.

`python -m bench.accuracy run` goes on where the last run stopped, most decisive cells first, until all are done or it is
stopped; `list` names the cells it would begin with; `table` and `plot` read the rows and never run anything.
"""

import argparse
import re
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path

import torch

from .. import rows as files
from .. import runner
from ..report import show
from .cell import measure
from .choice import Entry, lacks_untrained, wanted
from .figures import plot, tables
from .matrix import STAGES
from .store import Cell, Row

RESULTS = Path("bench/results/accuracy.csv")


def main() -> None:
    parser = runner.parser(__doc__, ("run", "list", "table", "plot"), RESULTS, Path("docs/pictures/accuracy.png"))
    parser.add_argument(
        "--stage", choices=STAGES, action="append", help="only this part of the matrix; may be repeated"
    )
    parser.add_argument("--only", default="", help="regular expression; only cells 'task method budget' that it finds")
    parser.add_argument("--workers", type=int, default=1, help="cells measured at a time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each")
    parser.add_argument("--float32", action="store_true", help="train without bfloat16 autocast")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so long")
    args = parser.parse_args()
    if args.do == "run" and args.device != "cpu" and args.results == RESULTS:
        parser.error(f"--device {args.device}: name a --results file of its own; {RESULTS} is the CPU's")
    entries = [e for stage in args.stage or STAGES for e in STAGES[stage]()]
    entries = [e for e in entries if re.search(args.only, f"{e.task} {e.method} {e.budget}")]
    if args.do == "table":
        show(tables(files.read(Row, args.results)))
    elif args.do == "plot":
        plot(files.read(Row, args.results), args.out)
    elif args.do == "list":
        print(*wanted(entries, files.read(Row, args.results)), sep="\n")
    else:
        run(entries, args)


def run(entries: list[Entry], args: argparse.Namespace) -> None:
    """Keep `workers` cells going; which cell is next depends on what the finished ones said of the learning rates."""
    autocast = None if args.float32 else torch.bfloat16
    started, failed = time.monotonic(), set()
    running: dict[Future, Cell] = {}
    while True:
        rows = files.read(Row, args.results)
        cells = [c for c in wanted(entries, rows) if c not in failed and c not in running.values()]
        late = time.monotonic() - started >= 60 * args.minutes
        while cells and not late and len(running) < args.workers:
            cell = cells.pop(0)
            same_but_rate = any(replace(other, lr=cell.lr) == cell for other in running.values())
            untrained = lacks_untrained(cell, rows) and not same_but_rate
            running[runner.alone(measure, cell, args.threads, autocast, untrained, args.device)] = cell
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            cell = running.pop(future)
            if error := future.exception():
                failed.add(cell)
                print(f"FAILED {cell}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            runner.keep(args.results, future.result(), started)
    if failed:
        raise SystemExit(f"{len(failed)} cells failed; run again to retry them")


if __name__ == "__main__":
    main()

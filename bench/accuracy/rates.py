"""How near `jactus.learning_rate` comes to the rates that were best on validation rows: `python -m bench.accuracy.rates`.

Reads the rows of JACTUS that the runner has measured, plans each anew from the same calibration, and trains nothing.
"""

import argparse
import copy
import math
from pathlib import Path

import torch

import jactus

from .. import rows as files
from ..report import named, table, versions
from .choice import SEEDS, Entry, chosen_rate, tried_rates
from .matrix import STAGES
from .methods import CONFIG, needs_all
from .store import Row
from .tasks import TASKS, calibrated, prepared


def chosen(rows: list[Row], tasks: list[str]) -> dict[str, dict[Entry, float]]:
    """For each task on which JACTUS has tried a whole grid: its entries, one a budget, and the rates that were best."""
    found: dict[str, dict[Entry, float]] = {}
    entries = (e for stage in STAGES.values() for e in stage() if e.task in tasks and e.method == "jactus")
    entries = (e for e in entries if e.grid or len(e.parts) > 1)
    for e in {(e.task, e.method, e.budget): e for e in entries}.values():
        if (best := chosen_rate(e, rows)) is not None:
            found.setdefault(e.task, {})[e] = best
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("bench/results/accuracy.csv"))
    parser.add_argument("--task", choices=TASKS, action="append", help="only this one; may be repeated")
    parser.add_argument("--float32", action="store_true", help="calibrate without bfloat16 autocast")
    args = parser.parse_args()
    rows = files.read(Row, args.results)
    lines, quotients = [], []
    for name, entries in chosen(rows, args.task or list(TASKS)).items():
        task, seed = TASKS[name], SEEDS[0]
        case = prepared(task, "fitted", seed)
        autocast = None if args.float32 else torch.bfloat16
        statistics = calibrated(task, case, task.calibration, seed, "fitted", autocast, needs_all("jactus"))
        plan = jactus.plan(case.model, statistics, CONFIG, progress=False)
        for e, best in entries.items():
            rate = jactus.learning_rate(jactus.compress(copy.deepcopy(case.model), plan.at(e.budget)))
            tried = tried_rates(e, rows)
            nearest = min(tried, key=lambda lr: abs(math.log(lr / rate)))
            quotients.append(rate / best)
            scores = (f"{task.unit * tried[lr].validation:.1f}" for lr in (best, nearest))
            lines.append((name, named(e.method, e.budget), f"{rate:.2g}", f"{best:g}", f"{rate / best:.2f}", *scores))
    if not lines:
        raise SystemExit(f"no row of {args.results} is of a task whose whole grid was tried")
    columns = ("task", "JACTUS", "learning_rate", "best of those tried", "quotient", "best's score", "nearest's score")
    print(table(columns, lines))
    logs = [math.log(q) for q in quotients]
    print(
        f"\ngeometric mean of the quotients {math.exp(math.fsum(logs) / len(logs)):.2f}, from {min(quotients):.2f} to "
        f"{max(quotients):.2f}; scores are of validation rows with seed 0, perplexities for language"
    )
    print(f"\n{versions()}")


if __name__ == "__main__":
    main()

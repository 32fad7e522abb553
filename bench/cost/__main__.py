"""Measure what JACTUS costs, or show it: `python -m bench.cost run|table|plot`.

`run` measures each part anew, after a check of its results, and puts its rows in the place of older ones; nothing else should
run on the machine meanwhile. `table` and `plot` read the rows and never run anything.
"""

import argparse
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import rows as files
from . import calibration, figures, growth, inference, planning, steps, subjects
from . import files as disk
from .store import Growth, Memory, Row, Setting, described

RESULTS = Path("bench/results")
FILES: dict[type, str] = {Row: "cost.csv", Memory: "cost-memory.csv", Growth: "cost-growth.csv"}


def parts(
    device: str = "cpu", models: Sequence[str] = subjects.MODELS
) -> dict[str, tuple[type, Callable[[], Iterable[Any]]]]:
    """What there is to measure, by name: the kind of row, and what yields them. On a GPU, what has a device."""

    def on(
        measure: Callable[[tuple[Setting, ...]], Iterator[Any]],
        settings: Sequence[Setting],
        on_gpu: Sequence[Setting] = steps.ON_GPU,
    ) -> Callable:
        chosen = [replace(s, device=device) for s in (settings if device == "cpu" else on_gpu) if s.model in models]
        return functools.partial(measure, tuple(dict.fromkeys(chosen)))

    placed = {
        "training": (Row, on(steps.training, steps.SETTINGS)),
        "prefill": (Row, on(inference.prefill, inference.PREFILL)),
        "decode": (Row, on(inference.decode, inference.DECODE, inference.DECODE_ON_GPU)),
        "decode-timed": (Row, on(inference.decode_timed, inference.TIMED, inference.TIMED_ON_GPU)),
        "memory": (Memory, on(steps.memory_rows, steps.MEMORY_SETTINGS)),
        "calibration": (Row, on(calibration.calibration, calibration.SETTINGS, calibration.ON_GPU)),
    }
    if device != "cpu":
        return placed
    return placed | {
        "updates": (Row, calibration.updates),
        "planning": (Row, planning.planning),
        "reallocation": (Row, planning.reallocation),
        "imports": (Row, disk.imports),
        "files": (Row, disk.files),
        "growth": (Growth, growth.growth),
        "planning-7b": (Row, planning.planning_7b),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("run", "table", "plot"))
    parser.add_argument("--part", choices=parts(), action="append", help="only this part; may be repeated")
    parser.add_argument(
        "--model",
        choices=subjects.MODELS,
        action="append",
        help="of a training, prefill, decode, memory or calibration part",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the CSV files")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/cost.png"), help="of plot")
    args = parser.parse_args()
    if args.do == "run":
        logging.getLogger("jactus").setLevel(logging.ERROR)  # a few batches are enough to take the time
        if unknown := set(args.part or ()) - set(parts(args.device)):
            parser.error(f"on {args.device} there is no {', '.join(sorted(unknown))}")
        for name in args.part or parts(args.device):
            run(name, args.results, args.device, args.model or subjects.MODELS)
    else:
        rows, memory, grown = (files.read(kind, args.results / file) for kind, file in FILES.items())
        if args.do == "table":
            print(figures.tables(rows, memory, grown))
        else:
            figures.plot(rows, args.out)


def run(name: str, folder: Path, device: str, models: Sequence[str] = subjects.MODELS) -> None:
    """Measure a part and write its rows in the place of those it gave of these models on this device before."""
    kind, measure = parts(device, models)[name]
    started = time.monotonic()
    found = []
    for row in measure():
        found.append(row)
        print(f"{(time.monotonic() - started) / 60:6.1f} min  {described(row)}", flush=True)
    if not found:
        print(f"{name}: nothing to measure with {', '.join(models)} on {device}")
        return
    measured = {_subject(row) for row in found}
    kept = [row for row in files.read(kind, folder / FILES[kind]) if _subject(row) not in measured]
    files.replace(folder / FILES[kind], kept, found)
    print(f"{name}: {len(found)} rows in {time.monotonic() - started:.0f} s", flush=True)


def _subject(row: Row | Memory | Growth) -> tuple[str | None, ...]:
    """What a new row replaces an older one for."""
    return tuple(getattr(row, name, None) for name in ("measure", "model", "variable", "device"))


if __name__ == "__main__":
    main()

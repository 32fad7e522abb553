"""Measure what JACTUS costs, or show it: `python -m bench.cost run|table|plot`.

`run` measures each part anew, after a check of its results, and puts each row in the place of an older one; nothing else should
run on the machine meanwhile. `table` and `plot` read the rows and never run anything.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import rows, runner
from ..report import show
from . import calibration, figures, files, growth, inference, layers, planning, steps, subjects
from .store import Growth, Memory, Row, Setting

RESULTS = Path("bench/results")
KINDS = (Row, Memory, Growth)


DTYPES = ("float32", "bfloat16")


def parts(
    device: str = "cpu", models: Sequence[str] = subjects.MODELS, dtypes: Sequence[str] = DTYPES
) -> dict[str, Callable[[], Iterable[Any]]]:
    """What there is to measure, by name: what yields the rows. On a GPU, what has a device."""

    def on(
        measure: Callable[[tuple[Setting, ...]], Iterator[Any]],
        settings: Sequence[Setting],
        on_gpu: Sequence[Setting] = steps.ON_GPU,
    ) -> Callable:
        there = settings if device == "cpu" else on_gpu
        chosen = [replace(s, device=device) for s in there if s.model in models and s.dtype in dtypes]
        return functools.partial(measure, tuple(dict.fromkeys(chosen)))

    placed = {
        "training": on(steps.training, steps.SETTINGS),
        "prefill": on(inference.prefill, inference.PREFILL),
        "decode": on(inference.decode, inference.DECODE, inference.DECODE_ON_GPU),
        "decode-timed": on(inference.decode_timed, inference.TIMED, inference.TIMED_ON_GPU),
        "memory": on(steps.memory_rows, steps.MEMORY_SETTINGS),
        "calibration": on(calibration.calibration, calibration.SETTINGS, calibration.ON_GPU),
    }
    if device != "cpu":
        return placed
    return placed | {
        "layers": layers.layers,
        "updates": calibration.updates,
        "looks": calibration.looks,
        "planning": planning.planning,
        "reallocation": planning.reallocation,
        "imports": files.imports,
        "files": files.files,
        "growth": growth.growth,
        "planning-7b": planning.planning_7b,
    }


def main() -> None:
    parser = runner.parser(__doc__, ("run", "table", "plot"), RESULTS, Path("docs/pictures/cost.png"))
    parser.add_argument("--part", choices=parts(), action="append", help="only this part; may be repeated")
    parser.add_argument(
        "--model",
        choices=subjects.MODELS,
        action="append",
        help="of a training, prefill, decode, memory or calibration part",
    )
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="likewise")
    args = parser.parse_args()
    if args.do == "run":
        logging.getLogger("jactus").setLevel(logging.ERROR)  # a few batches are enough to take the time
        if unknown := set(args.part or ()) - set(parts(args.device)):
            parser.error(f"on {args.device} there is no {', '.join(sorted(unknown))}")
        for name in args.part or parts(args.device):
            run(name, args.results, args.device, args.model or subjects.MODELS, args.dtype or DTYPES)
        return
    compared, memory, grown = (rows.read(kind, args.results / kind.FILE) for kind in KINDS)
    if args.do == "table":
        show(figures.tables(compared, memory, grown))
    else:
        figures.plot(compared, args.out)


def run(
    name: str, folder: Path, device: str, models: Sequence[str] = subjects.MODELS, dtypes: Sequence[str] = DTYPES
) -> None:
    """Measure a part of these models on this device; each row is kept as soon as it is there."""
    started, found = time.monotonic(), []
    for row in parts(device, models, dtypes)[name]():
        runner.keep(folder / row.FILE, [row], started)
        found.append(row)
    nothing = (
        ""
        if found
        else f", since nothing of it is measured with {', '.join(models)} in {' or '.join(dtypes)} on {device}"
    )
    print(f"{name}: {len(found)} rows in {time.monotonic() - started:.0f} s{nothing}", flush=True)


if __name__ == "__main__":
    main()

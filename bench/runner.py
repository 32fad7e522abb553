"""What `python -m bench.accuracy` and `python -m bench.cost` share: their options, and processes that measure one thing each."""

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from . import rows as files


def parser(what: str | None, do: Sequence[str], results: Path, picture: Path) -> argparse.ArgumentParser:
    """What either command takes: `do`, --results, --device, --out."""
    found = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("do", choices=do)
    found.add_argument("--results", type=Path, default=results, help="where the rows are")
    found.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    found.add_argument("--out", type=Path, default=picture, help="of plot")
    return found


def alone(measure: Callable[..., Any], *args: Any) -> Future:
    """`measure(*args)` in a process of its own, which takes no other with it when it is killed, and whose peak of memory is
    nobody else's. `measure` is a module's function."""
    context = get_context("forkserver")  # forks of a clean process: imports are shared, thread pools are not
    context.set_forkserver_preload([measure.__module__])
    pool = ProcessPoolExecutor(1, context)
    future = pool.submit(measure, *args)
    pool.shutdown(wait=False)
    return future


def keep(file: Path, rows: Sequence[Any], started: float) -> None:
    """Write rows to the file, in the place of older ones of the same thing, and say so to who waits since `started`."""
    files.keep(file, rows)
    for row in rows:
        print(f"{(time.monotonic() - started) / 60:6.1f} min  {row}", flush=True)

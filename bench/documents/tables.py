"""The full tables that the bench commands write under bench/results, and their cells."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from jactus_kernels import JactusError

from .. import rows
from ..accuracy import figures as accuracy
from ..accuracy import store as accuracy_rows
from ..cost import figures as cost
from ..cost import store as cost_rows
from ..kernels import summary

RESULTS = Path("bench/results")
KERNELS = RESULTS / "kernels-nvidia-h100-80gb-hbm3.csv"

Line = dict[str, str]  # a table's row by column


def _accuracy(folder: Path) -> str:
    return accuracy.tables(rows.read(accuracy_rows.Row, folder / "accuracy.csv"))


def _cost(folder: Path) -> str:
    kinds = ((cost_rows.Row, "cost"), (cost_rows.Memory, "cost-memory"), (cost_rows.Growth, "cost-growth"))
    return cost.tables(*(rows.read(kind, folder / f"{name}.csv") for kind, name in kinds))  # type: ignore[arg-type]


def _kernels() -> str:
    device, times = summary.read(KERNELS)
    parts = [device, "### forward", summary.layers(times, "forward"), "### training", summary.layers(times, "training")]
    title = f"### covariance update, against {' / '.join(summary.SUMS)}"
    return "\n\n".join([*parts, title, summary.covariances(times)])


# What `python -m bench.accuracy table > …`, `bench.cost table`, `bench.kernels.summary` write.
FULL: dict[str, Callable[[], str]] = {
    "accuracy.md": functools.partial(_accuracy, RESULTS),
    "cost.md": functools.partial(_cost, RESULTS),
    "h100/cost.md": functools.partial(_cost, RESULTS / "h100"),
    "kernels-h100.md": _kernels,
}


@functools.cache
def full(name: str) -> str:
    """A full table's text: from the rows, or as its own command left it (`accuracy-rates.md` and the like)."""
    return FULL[name]() + "\n" if name in FULL else (RESULTS / name).read_text(encoding="utf-8")


@functools.cache
def tables(name: str) -> dict[str, list[Line]]:
    """The tables of a file of results by the heading above each."""
    found: dict[str, list[Line]] = {}
    heading, header = "", None
    for text in full(name).splitlines():
        if text.startswith("#"):
            heading = text.lstrip("# ")
        cells = [cell.strip() for cell in text.strip()[1:-1].split("|")] if text.startswith("|") else None
        if cells is None:
            header = None
        elif header is None:
            header = cells
        elif not set(text) <= set("|-:"):
            found.setdefault(heading, []).append(dict(zip(header, cells)))
    return found


def one_table(name: str, heading: str) -> list[Line]:
    """The table of a file whose heading has `heading` in it. Raises JactusError unless there is exactly one."""
    found = [lines for title, lines in tables(name).items() if heading in title]
    if len(found) != 1:
        raise JactusError(f"{name} has {len(found)} tables under headings with {heading!r}: {list(tables(name))}")
    return found[0]


def one_line(lines: Sequence[Line], row: str) -> Line:
    """The row whose first columns are `row`: 'lora', 'jactus@80%', or several columns 'vit-b/float32/2'.

    Raises JactusError unless there is exactly one.
    """
    wanted = row.replace("@", " ").split("/")
    found = [line for line in lines if list(line.values())[: len(wanted)] == wanted]
    if len(found) != 1:
        raise JactusError(f"{row!r} is {len(found)} rows of the table that begins with {list(lines[0].values())}")
    return found[0]


def cell(name: str, heading: str, row: str, column: str) -> str:
    """One cell of a file's table. Raises JactusError where there is no such one, or nothing was measured."""
    line = one_line(one_table(name, heading), row)
    if line.get(column, "–") == "–":
        raise JactusError(f"{name}, {heading!r}, {row!r}: nothing under {column!r}; there is {line}")
    return line[column]

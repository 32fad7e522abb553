"""Measurements as rows of a CSV file: one frozen data class a file, its fields the columns, `KEY` what a row is of."""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from jactus_kernels import JactusError

Row = TypeVar("Row")


def read(kind: type[Row], file: Path) -> list[Row]:
    """All rows, in the order they were measured; none when the file is not there.

    Raises JactusError for a file with other columns.
    """
    if not file.exists():
        return []
    kinds = {f.name: f.type.__name__ if isinstance(f.type, type) else str(f.type) for f in fields(kind)}  # type: ignore[arg-type]
    with file.open(newline="", encoding="utf-8") as lines:
        table = csv.DictReader(lines)
        if table.fieldnames != list(kinds):
            raise JactusError(
                f"{file} has columns {table.fieldnames}, not {list(kinds)}; it is of another version: move it away"
            )
        return [kind(**{name: _parse(kinds[name], text) for name, text in line.items()}) for line in table]


def keep(file: Path, rows: Sequence[Any]) -> None:
    """Add rows (one at least, all of a kind), each in the place of an older one of the same `KEY`, and see them on the disk.

    Where there is no older one the file is appended to, so that several runs may write to it; else it is replaced, whole or
    not at all.
    """
    old, new = read(type(rows[0]), file), {_key(row): row for row in rows}
    if new.keys().isdisjoint(map(_key, old)):
        append(file, rows)
        return
    merged = [new.pop(_key(row), row) for row in old]
    unfinished = file.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    append(unfinished, [*merged, *new.values()])
    unfinished.replace(file)


def append(file: Path, rows: Sequence[Any]) -> None:
    """Write rows (one at least) to the end of the file and see them on the disk, so that a killed run loses none."""
    fresh = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [f.name for f in fields(rows[0])], lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: _shown(value) for name, value in asdict(row).items()})
        out.flush()
        os.fsync(out.fileno())


def write(file: Path, lines: Iterable[Sequence[Any]]) -> None:
    """A table that one run makes whole, its header the first line, in the place of the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out, lineterminator="\n").writerows(lines)


def _key(row: Any) -> tuple[str, ...]:
    """What the row is of, as it is written: a float may have lost its last digits there."""
    return tuple(str(_shown(getattr(row, name))) for name in row.KEY)


def _shown(value: object) -> object:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def _parse(kind: str, text: str) -> object:
    if text == "" and "None" in kind:
        return None
    return {"int": int, "float": float, "str": str}[kind.split(" | ")[0]](text)

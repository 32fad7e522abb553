"""The rows of accuracy.csv: one per cell and phase, appended as cells end, so that a killed run loses none."""

import csv
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from jactus_kernels import JactusError


@dataclass(frozen=True)
class Cell:
    """One thing to measure. budget: deployed part of the targeted layers, 1 for the methods that keep them whole."""

    task: str
    method: str
    budget: float
    seed: int
    lr: float


@dataclass(frozen=True)
class Row:
    """One measurement. Parameters are the whole model's; `validation` is what the learning rate was chosen by."""

    task: str
    method: str
    budget: float
    seed: int
    phase: str
    metric: str
    value: float
    validation: float | None
    trainable: int
    stored: int
    folded: int
    optimizer_bytes: int
    versions: str
    lr: float | None = None
    loss: float | None = None
    peak_bytes: int | None = None
    train_seconds: float | None = None

    @property
    def cell(self) -> Cell:
        return Cell(self.task, self.method, self.budget, self.seed, self.lr or 0.0)


COLUMNS = [f.name for f in fields(Row)]
KINDS = {f.name: f.type.__name__ if isinstance(f.type, type) else str(f.type) for f in fields(Row)}


def read(file: Path) -> list[Row]:
    """All rows, in the order they were measured; none when the file is not there."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        table = csv.DictReader(lines)
        if table.fieldnames != COLUMNS:
            raise JactusError(
                f"{file} has columns {table.fieldnames}, not {COLUMNS}; it is of another version: move it away"
            )
        return [Row(**{name: _parse(KINDS[name], text) for name, text in line.items()}) for line in table]


def append(file: Path, rows: list[Row]) -> None:
    """Add rows and see them on the disk."""
    fresh = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: _shown(value) for name, value in asdict(row).items()})
        out.flush()
        os.fsync(out.fileno())


def _shown(value: object) -> object:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def _parse(kind: str, text: str) -> object:
    if text == "" and "None" in kind:
        return None
    return {"int": int, "float": float, "str": str}[kind.split(" | ")[0]](text)

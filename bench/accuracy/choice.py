"""Which learning rate was the best of those tried, and which cells are to be measured next."""

from dataclasses import dataclass

from .methods import is_compressed
from .store import Cell, Row
from .tasks import TASKS

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Entry:
    """A method at a budget on a task: its learning rates are tried with the first seed, the best goes on to the others.
    Without a grid it runs at the rate chosen for `like`, times each of `parts`: the best of those that were tried counts."""

    task: str
    method: str
    budget: float
    grid: tuple[float, ...]
    seeds: tuple[int, ...] = SEEDS
    like: "Entry | None" = None
    parts: tuple[float, ...] = (1.0,)


def tried_rates(entry: Entry, rows: list[Row]) -> dict[float, Row]:
    """The trained rows of the entry's first seed by learning rate."""
    mine = (entry.task, entry.method, entry.budget, entry.seeds[0], "trained")
    return {r.lr: r for r in rows if (r.task, r.method, r.budget, r.seed, r.phase) == mine and r.lr is not None}


def chosen_rate(entry: Entry, rows: list[Row]) -> float | None:
    """The learning rate that is best on validation rows with the first seed; None while some of the grid are still to be
    tried. Rates beyond the grid count where they were tried."""
    tried = tried_rates(entry, rows)
    if entry.like:
        rates = taken_rates(entry, rows)
        if len(rates) == 1:
            return rates[0]
        tried = {lr: tried[lr] for lr in rates if lr in tried}
    elif any(lr not in tried for lr in entry.grid):
        return None
    if not tried:
        return None
    merit = TASKS[entry.task].merit
    # Of equal ones the grid's, and of those the lowest. A run that diverged has no loss: whatever its score, not the best.
    ordered = sorted(tried, key=lambda lr: (lr not in entry.grid, lr))
    return max(ordered, key=lambda lr: (tried[lr].loss is not None, merit(tried[lr].validation)))


def taken_rates(entry: Entry, rows: list[Row]) -> tuple[float, ...]:
    """What an entry without a grid is to try: none while the rate that it takes is not chosen."""
    lr = chosen_rate(entry.like, rows) if entry.like else None
    return () if lr is None else tuple(lr * part for part in entry.parts)


def wanted(entries: list[Entry], rows: list[Row]) -> list[Cell]:
    """The cells not measured yet, most decisive first; those that wait for a learning rate are not among them.

    A grid whose end was the best is widened there, by factors of two, until the best lies inside; for all methods alike.
    """
    done = {row.cell for row in rows if row.phase == "trained"}
    cells: list[Cell] = []
    for e in entries:
        grid, lr = e.grid, chosen_rate(e, rows)
        if e.like:
            grid = taken_rates(e, rows)
        elif lr is not None:
            grid = (*grid, lr / 2, 2 * lr)  # the neighbours of the best: of a grid's inner rate they are in it
        first = [Cell(e.task, e.method, e.budget, e.seeds[0], rate) for rate in grid]
        cells += first
        if lr is not None and done.issuperset(first):
            cells += [Cell(e.task, e.method, e.budget, seed, lr) for seed in e.seeds[1:]]
    return [cell for cell in dict.fromkeys(cells) if cell not in done]


def lacks_untrained(cell: Cell, rows: list[Row]) -> bool:
    """Whether a compressed model's score before training is still to be measured: learning rates do not change it."""
    place = (cell.task, cell.method, cell.budget, cell.seed, "untrained")
    return is_compressed(cell.method) and place not in {(r.task, r.method, r.budget, r.seed, r.phase) for r in rows}

"""Which cells there are, in the order in which they decide something; and which to measure next."""

from collections.abc import Iterator
from dataclasses import dataclass

from .methods import is_compressed, rates
from .store import Cell, Row
from .tasks import LANGUAGES, TASKS, TEXT

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Entry:
    """A method at a budget on a task: its learning rates are tried with the first seed, the best goes on to the others."""

    task: str
    method: str
    budget: float
    grid: tuple[float, ...]
    seeds: tuple[int, ...] = SEEDS


def entry(task: str, method: str, budget: float, grid: tuple[float, ...] = (), seeds: tuple[int, ...] = SEEDS) -> Entry:
    rate = TASKS[task].rate
    return Entry(task, method, budget, tuple(rate * lr for lr in grid or rates(method)), seeds)


COMPRESSED = ("svd-llm+lora", "svd+lora", "asvd+lora", "fwsvd+lora", "cersa")
WIDER = "jactus[core_width=2.0]"  # with about as many parameters to train as LoRA on two factors has
# What full fine-tuning trains and adapters do not, at the rates that the comparison chose without it.
EMBEDDED = {
    ("jactus+embeddings", 0.8): {"sarcasm": 1e-3, "movies": 1e-3, "newsgroups": 2e-3},
    ("lora+embeddings", 1.0): {"sarcasm": 2e-3, "movies": 2e-3, "newsgroups": 1e-3},
}
WHOLE = ("full", "lora", "dora", "pissa", "corda", "eva", "eigentune")


def comparison() -> Iterator[Entry]:
    """JACTUS and its peers: first what the headline claims need, then the rest."""
    for method, budget in (("jactus", 0.8), ("lora", 1.0), ("full", 1.0), ("dora", 1.0), ("jactus", 0.5), (WIDER, 0.5)):
        for task in TEXT:
            yield entry(task, method, budget)
    for (method, budget), chosen in EMBEDDED.items():
        for task in TEXT:
            yield entry(task, method, budget, (chosen[task],))
    for method in ("jactus", *COMPRESSED[:1], WIDER, *COMPRESSED[1:]):
        for task in TEXT:
            yield entry(task, method, 0.35)
    for method in WHOLE[3:]:
        for task in TEXT:
            yield entry(task, method, 1.0)
    for budget in (0.8, 0.5):
        for method in COMPRESSED:
            for task in TEXT:
                yield entry(task, method, budget)


def language() -> Iterator[Entry]:
    """Perplexity: the pipelines that matter, at 80% and 50%."""
    for task in LANGUAGES:
        for budget in (0.8, 0.5):
            for method in ("jactus", "svd-llm+lora"):
                yield entry(task, method, budget)
        for method in ("lora", "full"):
            yield entry(task, method, 1.0)
        for budget in (0.8, 0.5):
            for method in COMPRESSED[1:]:
                yield entry(task, method, budget)


def images() -> Iterator[Entry]:
    """The small vision transformer."""
    for method, budget in (("jactus", 0.8), ("lora", 1.0), ("full", 1.0), ("jactus", 0.5), ("jactus", 0.35)):
        yield entry("digits", method, budget)
    for budget in (0.8, 0.5, 0.35):
        for method in COMPRESSED:
            yield entry("digits", method, budget)
    for method in WHOLE[2:]:
        yield entry("digits", method, 1.0)


CHANGES = (
    "step_scaling=0",
    "step_scaling=1",
    "union_share=0",
    "union_share=0.25",
    "union=weight+covariance",
    "union=weight+covariance+gradient",
    "allocation=uniform",
    "cores=uniform",  # global ranks with the trainable parameters of uniform ones, whatever they then store
    "rank_floor=0.0",
    "rank_floor=0.8",
    "coordinates=orthonormal",
    "coordinate_damping=0.1",
    "coordinate_damping=10",
    "metric=input",
    "metric=gradient",
    "metric=identity,union=weight,coordinates=orthonormal",
    "damping=0.001",
    "damping=0.1",
    "leave_dense=True",
    "accounting=three_factor",
    "calibration=64",
    "calibration=512",
    "head=random",
    "trainable_extras=head+bias",
    "trainable_extras=head+bias+LayerNorm",
    "trainable_rank=32",
    "core_width=2.0",
)
# Where compression hurts, what is kept decides more: the settings that shape the subspace and its ranks once more, there.
DECISIVE = (
    "metric=identity,union=weight,coordinates=orthonormal",
    "coordinates=orthonormal",
    "metric=input",
    "union_share=0",
    "union_share=0.25",
    "allocation=uniform",
    "step_scaling=0",
    "calibration=64",
)
# Budget, settings and tasks, at the rates that the comparison chose for JACTUS.
ABLATED: tuple[tuple[float, tuple[str, ...], dict[str, float]], ...] = (
    (0.8, CHANGES, {"newsgroups": 2e-3, "sarcasm": 2e-3}),
    (0.35, DECISIVE, {"newsgroups": 4e-3, "movies": 2e-3}),
)
OWN_RATE = "coordinates=orthonormal"  # steps of other coordinates are of another size: they choose from the whole grid


def ablations() -> Iterator[Entry]:
    """What decides the defaults: one setting changed at a time, the first seed of all before the others of any."""
    for seeds in ((0,), SEEDS):
        for budget, changes, tasks in ABLATED:
            for change in ("", *changes):
                for task, lr in tasks.items():
                    grid = () if OWN_RATE in change and budget < 0.8 else (lr,)
                    yield entry(task, f"jactus[{change}]" if change else "jactus", budget, grid, seeds)
    for lr in (1e-3, 4e-3, 8e-3):  # how wide the range of good learning rates is
        for method in ("jactus", f"jactus[{OWN_RATE}]"):
            yield entry("newsgroups", method, 0.8, (lr,), (0,))


STAGES = {"comparison": comparison, "ablations": ablations, "language": language, "images": images}


def chosen_rate(entry: Entry, rows: list[Row]) -> float | None:
    """The only learning rate, or the best on validation rows with the first seed; None while some of the grid are still to
    be tried. Rates beyond the grid count where they were tried."""
    if len(entry.grid) == 1:
        return entry.grid[0]
    mine = (entry.task, entry.method, entry.budget, entry.seeds[0], "trained")
    tried = {r.lr: r for r in rows if (r.task, r.method, r.budget, r.seed, r.phase) == mine}
    if any(lr not in tried for lr in entry.grid):
        return None
    merit = TASKS[entry.task].merit
    # Of equal ones the grid's, and of those the lowest. A run that diverged has no loss: whatever its score, not the best.
    ordered = sorted(tried, key=lambda lr: (lr not in entry.grid, lr))
    return max(ordered, key=lambda lr: (tried[lr].loss is not None, merit(tried[lr].validation)))


def wanted(entries: list[Entry], rows: list[Row]) -> list[Cell]:
    """The cells not measured yet, most decisive first; those that wait for a learning rate are not among them.

    A grid whose end was the best is widened there, by factors of two, until the best lies inside; for all methods alike.
    """
    done = {row.cell for row in rows if row.phase == "trained"}
    cells: list[Cell] = []
    for e in entries:
        grid, lr = e.grid, chosen_rate(e, rows)
        if lr is not None and len(grid) > 1:
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

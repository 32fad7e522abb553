"""Which cells there are, in the order in which they decide something; and which to measure next."""

from collections.abc import Iterator
from dataclasses import dataclass

from .methods import EMBEDDINGS, is_compressed, rates
from .store import Cell, Row
from .tasks import LANGUAGES, TASKS, TEXT

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Entry:
    """A method at a budget on a task: its learning rates are tried with the first seed, the best goes on to the others.
    Without a grid it runs at the rate chosen for `like`."""

    task: str
    method: str
    budget: float
    grid: tuple[float, ...]
    seeds: tuple[int, ...] = SEEDS
    like: "Entry | None" = None


def entry(task: str, method: str, budget: float, seeds: tuple[int, ...] = SEEDS) -> Entry:
    """With the method's own grid."""
    return Entry(task, method, budget, tuple(TASKS[task].rate * lr for lr in rates(method)), seeds)


def varied(base: Entry, method: str) -> Entry:
    """Another method in the place of `base`'s, at the learning rate chosen for that one."""
    return Entry(base.task, method, base.budget, (), base.seeds, base)


COMPRESSED = ("svd-llm+lora", "svd+lora", "asvd+lora", "fwsvd+lora", "cersa")
FULL_RANK = "jactus[full_rank=True]"
WIDER = "jactus[core_width=2.0]"  # with about as many parameters to train as LoRA on two factors has
WHOLE = ("full", "lora", "dora", "pissa", "corda", "eva", "eigentune")


def comparison() -> Iterator[Entry]:
    """JACTUS and its peers: first what the headline claims need, then the rest, the first seed of all before the others."""
    for method, budget in (
        ("jactus", 0.8),
        ("lora", 1.0),
        ("full", 1.0),
        ("dora", 1.0),
        (FULL_RANK, 0.8),
        ("jactus", 0.5),
    ):
        for task in TEXT:
            yield entry(task, method, budget)
    # with what full fine-tuning trains and adapters do not
    for method, budget in (("jactus", 0.8), ("lora", 1.0), (FULL_RANK, 0.8)):
        for task in TEXT:
            yield varied(entry(task, method, budget), method + EMBEDDINGS)
    for task in TEXT:  # where full fine-tuning's lead is from: what else it trains, or the rank
        yield varied(entry(task, "full", 1.0), "full[linears]")
    for method in ("jactus", *COMPRESSED[:2]):
        for task in TEXT:
            yield entry(task, method, 0.35)
    for seeds in (SEEDS[:1], SEEDS):
        for method, budget in (
            *((method, 0.35) for method in COMPRESSED[2:]),
            *((method, 1.0) for method in (*WHOLE[3:], FULL_RANK)),
            (FULL_RANK, 0.5),
            *((WIDER, budget) for budget in (0.35, 0.5)),
            *((method, budget) for method in COMPRESSED for budget in (0.8, 0.5)),
        ):
            for task in TEXT:
                yield entry(task, method, budget, seeds)


def language() -> Iterator[Entry]:
    """Perplexity at 80% and 50%, the first seed of all before the others."""
    for seeds in (SEEDS[:1], SEEDS):
        for task in LANGUAGES:
            for method, budget in (
                *((method, 0.8) for method in ("jactus", FULL_RANK, COMPRESSED[0])),
                *((method, 1.0) for method in ("lora", "full")),
                *((method, 0.5) for method in ("jactus", FULL_RANK, COMPRESSED[0])),
                *((method, budget) for method in COMPRESSED[1:] for budget in (0.8, 0.5)),
            ):
                yield entry(task, method, budget, seeds)


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
ABLATED = ((0.8, CHANGES, ("newsgroups", "sarcasm")), (0.35, DECISIVE, ("newsgroups", "movies")))
OWN_RATE = "coordinates=orthonormal"  # steps of other coordinates are of another size: they choose from the whole grid


def ablations() -> Iterator[Entry]:
    """What decides the defaults: one setting changed at a time, the first seed of all before the others of any."""
    for seeds in (SEEDS[:1], SEEDS):
        for budget, changes, tasks in ABLATED:
            defaults = [entry(task, "jactus", budget, seeds) for task in tasks]
            yield from defaults
            for change in changes:
                for base in defaults:
                    method = f"jactus[{change}]"
                    tuned = OWN_RATE in change
                    yield entry(base.task, method, budget, seeds) if tuned else varied(base, method)


STAGES = {"comparison": comparison, "ablations": ablations, "language": language, "images": images}


def tried_rates(entry: Entry, rows: list[Row]) -> dict[float, Row]:
    """The trained rows of the entry's first seed by learning rate."""
    mine = (entry.task, entry.method, entry.budget, entry.seeds[0], "trained")
    return {r.lr: r for r in rows if (r.task, r.method, r.budget, r.seed, r.phase) == mine and r.lr is not None}


def chosen_rate(entry: Entry, rows: list[Row]) -> float | None:
    """The learning rate that is best on validation rows with the first seed; None while some of the grid are still to be
    tried. Rates beyond the grid count where they were tried."""
    if entry.like:
        return chosen_rate(entry.like, rows)
    tried = tried_rates(entry, rows)
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
        if e.like:
            grid = () if lr is None else (lr,)
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

"""Which cells there are, in the order in which they decide something. Each row that is shown is of one of them."""

from collections.abc import Iterator
from dataclasses import replace

from .choice import SEEDS, Entry
from .methods import EMBEDDINGS, rates, variant
from .tasks import ASKED, LANGUAGES, LONG, OTHER, PICTURES, TASKS, TEXT, VISION

FIRST = SEEDS[:1]


def entry(task: str, method: str, budget: float, seeds: tuple[int, ...] = SEEDS) -> Entry:
    """With the method's own grid; JACTUS on text runs at the rates of 80%, and multiples of them where ranks are low, as
    jactus.learning_rate says."""
    if method == "jactus" and task in TEXT and budget < 0.8:
        found = varied(entry(task, method, 0.8, seeds), budget=budget)
        return replace(found, parts=(1.0, 2.0, 4.0)) if budget < 0.5 else found
    # JACTUS's are around what jactus.learning_rate says, alike on all three tasks of text
    scale = 1.0 if variant(method) and task in TEXT else TASKS[task].rate
    return Entry(task, method, budget, tuple(scale * lr for lr in rates(method)), seeds)


def varied(base: Entry, **changes: str | float) -> Entry:
    """`base` with another task, method or budget, at the learning rate chosen for `base`."""
    return replace(base, grid=(), like=base, parts=(1.0,), **changes)  # type: ignore[arg-type]


def each(
    *methods: tuple[str, float], tasks: tuple[str, ...] = TEXT, seeds: tuple[int, ...] = SEEDS, **changes: str | float
) -> Iterator[Entry]:
    """The methods at their budgets on every task; with `changes`, what differs from them so and runs at their rates."""
    for method, budget in methods:
        for task in tasks:
            found = entry(task, method, budget, seeds)
            yield varied(found, **changes) if changes else found


PIPELINES = ("svd-llm+lora", "svd+lora", "asvd+lora", "fwsvd+lora")  # the strongest first
COMPACT = "svd-llm-compact+lora"  # of the same deployed size, counted as JACTUS's is
CERSA = "cersa"  # its steps are of another size than adapters': it tries rates of its own
UNION = "union_share=0.1"
UNITED = f"jactus[{UNION}]"
GIVEN = "jactus[draws=0]"  # the labels of the data
WIDER = "jactus[core_width=2.0]"  # with about as many parameters to train as LoRA on two factors has
WHOLE = ("full", "lora", "dora", "pissa", "corda", "eva", "eigentune")


def comparison() -> Iterator[Entry]:
    """JACTUS and its peers: first what the headline claims need, then the rest, the first seed of all before the others."""
    yield from each(("jactus", 0.8), ("lora", 1.0), ("full", 1.0), ("dora", 1.0))
    yield from each(("jactus", 0.5))
    # with what full fine-tuning trains and adapters do not
    for method, budget in (("jactus", 0.8), ("lora", 1.0)):
        yield from each((method, budget), method=method + EMBEDDINGS)
    yield from each(("full", 1.0), method="full[linears]")  # where its lead is from: what else it trains, or the rank
    yield from each(*((method, 0.35) for method in ("jactus", *PIPELINES[:2])))
    yield from each((PIPELINES[0], 0.35), method=COMPACT)
    yield from each(("jactus", 0.35), method=WIDER)
    others = *((method, 0.35) for method in (*PIPELINES[2:], CERSA)), *((method, 1.0) for method in WHOLE[3:])
    for seeds in (FIRST, SEEDS):
        yield from each(*others, seeds=seeds)
    # What no claim rests on: one seed, at the rate chosen for the method's other budget.
    for budget in (0.8, 0.5):
        yield from each(*((method, 0.35) for method in PIPELINES), seeds=FIRST, budget=budget)
        yield from each((PIPELINES[0], 0.35), seeds=FIRST, budget=budget, method=COMPACT)
        yield from each((CERSA, budget), seeds=FIRST)  # at 80% the rate of 35% fails on sarcasm
    yield from each(("jactus", 0.8), seeds=FIRST, budget=1.0)


# Around what jactus.learning_rate says of SmolLM2, of DINOv2-small, and where the loss is on answers alone
OURS = {0.8: (2.5e-4, 5e-4, 1e-3), 0.5: (5e-4, 1e-3, 2e-3)}
SEEN = ANSWERED = (1e-4, 2e-4, 4e-4)


def spoken(task: str, method: str, budget: float, seeds: tuple[int, ...]) -> Entry:
    """Of a language: rates are chosen on Wikipedia, at 80% and JACTUS's at 50% too, and everything else takes them."""
    ours = variant(method) is not None
    base = entry(LANGUAGES[0], "jactus" if ours else method, budget if ours else max(budget, 0.8), seeds)
    if ours:
        base = replace(base, grid=OURS[budget])
    if (task, method, budget) == (base.task, base.method, base.budget):
        return base
    return varied(base, task=task, method=method, budget=budget)


def language() -> Iterator[Entry]:
    """Perplexity: the first seed of all, then the others of what is compared at full length."""

    def at_length(seeds: tuple[int, ...]) -> Iterator[Entry]:
        for task in LANGUAGES:
            for method in ("jactus", PIPELINES[0]):
                yield spoken(task, method, 0.8, seeds)
            for method in ("lora", "full"):
                yield spoken(task, method, 1.0, seeds)

    yield from at_length(FIRST)
    for task in LANGUAGES:
        yield spoken(task, "jactus", 0.5, SEEDS)
        yield spoken(task, PIPELINES[0], 0.5, FIRST)
        yield spoken(task, UNITED, 0.8, FIRST)
        for budget in (0.8, 0.5):
            yield spoken(task, GIVEN, budget, SEEDS)
        for method in (COMPACT, *PIPELINES[1:]):
            yield varied(spoken(task, PIPELINES[0], 0.8, FIRST), method=method)
    yield entry(LANGUAGES[0], CERSA, 0.8, FIRST)
    yield from at_length(SEEDS)
    for method, budget in (("jactus", 0.8), ("lora", 1.0), ("full", 1.0), (PIPELINES[0], 0.8)):
        yield replace(spoken(LONG, method, budget, FIRST), parts=(0.5, 1.0))  # nine times as many steps
    yield replace(spoken(LONG, GIVEN, 0.8, FIRST), parts=(0.5, 1.0, 2.0))


def images() -> Iterator[Entry]:
    """The small vision transformer. Rates are chosen at 80%."""
    ours, pipeline = ("jactus", 0.8), (PIPELINES[0], 0.8)

    def at_length(seeds: tuple[int, ...]) -> Iterator[Entry]:
        yield from each(ours, ("lora", 1.0), ("full", 1.0), pipeline, tasks=VISION, seeds=seeds)
        for budget in (0.5, 0.35):
            yield from each(ours, pipeline, tasks=VISION, seeds=seeds, budget=budget)

    yield from at_length(FIRST)
    for budget in (0.8, 0.35):
        for method in PIPELINES[1:]:
            yield from each(pipeline, tasks=VISION, seeds=FIRST, method=method, budget=budget)
    yield from each((CERSA, 0.8), tasks=VISION, seeds=FIRST)
    yield from each((CERSA, 0.8), tasks=VISION, seeds=FIRST, budget=0.35)
    yield from each(*((method, 1.0) for method in WHOLE[2:]), tasks=VISION, seeds=FIRST)
    yield from at_length(SEEDS)


def seen(task: str, method: str, budget: float, seeds: tuple[int, ...]) -> Entry:
    """Of DINOv2-small: rates are chosen on CIFAR-10, at 80% of what has budgets; everything else takes them."""
    ours = variant(method) is not None
    base = entry(PICTURES[0], "jactus" if ours else method, max(budget, 0.8), seeds)
    base = replace(base, grid=SEEN if ours else base.grid)
    if (task, method, budget) == (base.task, base.method, base.budget):
        return base
    return varied(base, task=task, method=method, budget=budget)


def pictures() -> Iterator[Entry]:
    """The pretrained vision transformer: the first seed of all sets before the others of any."""
    stages = (
        (("jactus", 0.8), ("lora", 1.0)),
        (("full", 1.0), ("dora", 1.0)),
        ((PIPELINES[0], 0.8), ("jactus", 0.5)),
    )
    for seeds in (FIRST, SEEDS):
        for stage in stages:
            for task in PICTURES:
                for method, budget in stage:
                    yield seen(task, method, budget, seeds)
    for task in PICTURES:
        yield seen(task, UNITED, 0.8, FIRST)


def asked() -> Iterator[Entry]:
    """Commonsense questions: rates are chosen on ARC-Easy alone, the smallest set but one, and go to the mixture of all, which tries
    their doubles too; JACTUS's at 80% to 50% as well."""
    pipeline = PIPELINES[0]
    for seeds in (FIRST, SEEDS):
        yield from _by_arc("jactus", 0.8, seeds)
        for chosen in _by_arc("jactus", 0.8, seeds):
            yield replace(chosen, grid=(), like=chosen, budget=0.5, parts=(1.0,))
        for method, budget in (("lora", 1.0), (pipeline, 0.5), ("dora", 1.0), ("full", 1.0), (pipeline, 0.8)):
            yield from _by_arc(method, budget, seeds)
    for method in ("rslora", "hira"):
        yield from _by_arc(method, 1.0, FIRST)
    for budget in (0.8, 0.5):
        for task in ("arc-easy", *ASKED):
            yield varied(entry("arc-easy", PIPELINES[0], budget, FIRST), task=task, method=COMPACT)


def _by_arc(method: str, budget: float, seeds: tuple[int, ...]) -> Iterator[Entry]:
    chosen = entry("arc-easy", method, budget, seeds)
    if method == "jactus":
        chosen = replace(chosen, grid=ANSWERED)
    yield chosen
    for task in ASKED:
        # twice as many steps, on eight kinds of questions: whose loss is still high may bear more
        yield replace(varied(chosen, task=task), parts=(1.0, 2.0))


def other() -> Iterator[Entry]:
    """An encoder of another family: the first seed of all before the others of any."""
    for seeds in (FIRST, SEEDS):
        yield from each(("jactus", 0.8), ("lora", 1.0), ("full", 1.0), ("dora", 1.0), tasks=(OTHER,), seeds=seeds)
        yield from each(("jactus", 0.8), tasks=(OTHER,), seeds=seeds, budget=0.5)


CHANGES = (
    "union_share=0.25",
    f"union=weight+covariance,{UNION}",
    f"union=weight+covariance+gradient,{UNION}",
    "allocation=uniform",
    "cores=uniform",  # global ranks with the trainable parameters of uniform ones, whatever they then store
    "rank_floor=0.0",
    "rank_floor=0.8",
    "metric=input",
    "metric=gradient",
    "metric=identity,union=weight",
    "damping=0.001",
    "damping=0.1",
    "accounting=folded",
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
    "metric=identity,union=weight",
    "metric=input",
    "union_share=0.25",
    "allocation=uniform",
)
OF_LANGUAGE = ("metric=input", "rank_floor=0.0", "calibration=64")
ABLATED = (
    (0.35, (UNION,), TEXT, SEEDS),  # whether the union pays: with seeds, low budgets and little calibration
    (0.8, (UNION,), TEXT, SEEDS),
    (0.5, (UNION,), TEXT, SEEDS),
    (0.35, ("core_width=2.0",), TEXT, SEEDS),
    (0.35, ("calibration=64", f"calibration=64,{UNION}"), TEXT, FIRST),
    (0.8, OF_LANGUAGE, LANGUAGES[:1], FIRST),
    (0.35, DECISIVE, ("newsgroups", "movies"), FIRST),
    (0.8, CHANGES, ("newsgroups",), FIRST),
)


def ablations() -> Iterator[Entry]:
    """What decides the defaults: one setting changed at a time, the first seed of all before the others of any."""
    for part in (FIRST, SEEDS):
        for budget, changes, tasks, most in ABLATED:
            seeds = most[: len(part)]
            defaults = [(spoken if task in LANGUAGES else entry)(task, "jactus", budget, seeds) for task in tasks]
            yield from defaults
            for change in changes:
                for base in defaults:
                    yield varied(base, method=f"jactus[{change}]")


STAGES = {
    "comparison": comparison,
    "ablations": ablations,
    "language": language,
    "images": images,
    "pictures": pictures,
    "commonsense": asked,
    "mpnet": other,
}

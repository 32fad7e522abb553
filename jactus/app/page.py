"""The page of a run: one HTML file that needs nothing else, without scripts, made from the run's record alone."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..checkpoints import storage
from ..planning.allocation import parameters as deployed
from ..report import places
from . import charts, words
from .record import Layer, Run, Score, Swept, Version

TOLERATED = 0.01  # nats a term of predicted loss: a perplexity 1% higher
SAME = 0.005  # nats a term: rounding of a folded model stays well below it, and so does little else
MOST_KINDS = 12
LORA_RANK = 16
LORA = f"LoRA of rank {LORA_RANK}, computed"
OF = {
    "dense": "the pretrained model",
    "compressed": "compressed",
    "trained": "trained",
    "reloaded": "saved and read back",
    "training": "while it trains",
    "deployed": "deployed",
}


@dataclass(frozen=True)
class Kind:
    """Layers of one kind, in order of depth, and their spectra drawn."""

    name: str
    layers: list[Layer]
    drawn: Markup

    @property
    def cuts(self) -> str:
        """'176 to 240 of 384': how many weight directions were kept."""
        cuts = [min(layer.m, layer.n) if layer.rank is None else layer.cut for layer in self.layers]
        full = sorted({min(layer.m, layer.n) for layer in self.layers})
        between = f"{min(cuts)} to {max(cuts)}" if min(cuts) < max(cuts) else f"{cuts[0]}"
        return f"{between} of {full[0]}" if len(full) == 1 else f"{between} of {full[0]} to {full[-1]}"


@dataclass(frozen=True)
class Grid:
    """The layers of repeated blocks by block and kind, the shorter list across; and the layers that are in no block."""

    across: list[str]
    down: list[str]
    of: dict[tuple[str, str], Layer]  # (down, across)
    alone: list[Layer]
    by_block: bool  # blocks go down


@dataclass(frozen=True)
class Advice:
    """What the sweep suggests; None: no budget of it stays within TOLERATED."""

    chosen: Swept | None
    smallest: bool  # no smaller one was looked at
    hidden: bool  # some of zero are not in the picture
    drawn: Markup


def write(run: Run, path: str | os.PathLike) -> None:
    """Write the page, whole or not at all. Raises JactusError where the disk refuses."""
    with storage.atomic(Path(path)) as part:
        part.write_text(html(run), encoding="utf-8")


def html(run: Run) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("jactus", "app"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        each.__name__: each for each in (words.short, words.whole, words.seconds, words.number, words.ms)
    }
    scores = {score.of: score for score in run.scores}
    sizes = {version.of: version for version in run.sizes}
    rows = [*run.sizes, *lora(run, sizes)]
    size, word = words.unit([version.parameters for version in rows])
    return environment.get_template("page.html").render(
        run=run,
        words=words,
        of=OF,
        scores=scores,
        sizes=sizes,
        rows=rows,
        lora_rank=LORA_RANK,
        unit=size,
        unit_word=word,
        verdicts=verdicts(run, scores),
        chance=chance(run),
        timed=any(version.milliseconds is not None for version in run.sizes),
        grid=grid(run.layers),
        kinds=kinds(run.layers),
        most_kinds=MOST_KINDS,
        advice=advice(run, sizes.get("deployed")),
        tolerated=TOLERATED,
        same=SAME,
        curves=curves(run, scores),
        held=held(run, scores),
        losses=words.aligned([score.loss for score in run.scores]),
        rises=words.aligned([swept.predicted for swept in run.sweep]),
        seen=words.aligned([point.loss for point in run.training]),
        total=sum(stage.seconds for stage in run.stages),
        longest=max((stage.seconds for stage in run.stages), default=0),
        deployed=lambda layer: layer.m * layer.n if layer.rank is None else int(deployed(layer.m, layer.n, layer.rank)),
        name=run.base.rstrip("/").rsplit("/", 1)[-1] or run.base,
    )


def verdicts(run: Run, scores: dict[str, Score]) -> list[tuple[bool, str]]:
    """Sentences on how it went, each with whether that is well."""
    found = []
    dense, compressed, trained, reloaded = (scores.get(of) for of in ("dense", "compressed", "trained", "reloaded"))
    if dense and compressed:
        beyond = held(run, scores) == "over"
        more = ", more than was predicted" if beyond else ""
        found.append((not beyond, f"Compression by itself: {_moved(run, dense, compressed)}{more}."))
    if compressed and trained:
        worse = words.better(run.metric, trained.metric, compressed.metric)
        found.append((not worse, f"Training: {_moved(run, compressed, trained)}."))
    if trained and reloaded:
        same = abs(reloaded.loss - trained.loss) <= SAME
        told = "the same model" if same else "not the model that was trained; find out why before you deploy it"
        before, after = words.aligned([trained.loss, reloaded.loss])
        loss = f"loss {after}" + (f", was {before}" if before != after else ", as before")
        found.append((same, f"Folded, saved and read back: {told} ({_moved(run, trained, reloaded)}; {loss})."))
    return found


def _moved(run: Run, before: Score, after: Score) -> str:
    start, end = words.metric(run.metric, before.metric), words.metric(run.metric, after.metric)
    if start == end:
        return f"{run.metric} {end}, as before"
    points = " points" if run.metric == "accuracy" else ""
    return f"{run.metric} {start} → {end} ({words.change(run.metric, before.metric, after.metric)}{points})"


def lora(run: Run, sizes: dict[str, Version]) -> list[Version]:
    """What LoRA on the same layers would deploy, the dense model, and train there, r(m+n) a layer: computed, not run. None
    where the record has no dense size or no layers, or a LoRA of its own."""
    if "dense" not in sizes or not run.layers or any("lora" in of.lower() for of in sizes):
        return []
    trains = sum(LORA_RANK * (layer.m + layer.n) for layer in run.layers)
    return [replace(sizes["dense"], of=LORA, trainable=trains, milliseconds=None)]


def held(run: Run, scores: dict[str, Score]) -> str | None:
    """Whether compressing added loss 'under' what was predicted, 'about' that (up to twice of it, and SAME) or 'over' it; None
    where it was not measured."""
    if "dense" not in scores or "compressed" not in scores:
        return None
    measured = scores["compressed"].loss - scores["dense"].loss
    return "under" if measured <= run.predicted else "about" if measured <= 2 * run.predicted + SAME else "over"


def chance(run: Run) -> tuple[int, float] | None:
    """Validation rows and the standard error of an accuracy on them, in points: √(p(1−p)/rows); None where unknown."""
    rows = run.data.get("rows")
    count = rows.get("validation") if isinstance(rows, dict) else None
    last = next((score.metric for score in reversed(run.scores) if 0 <= score.metric <= 1), None)
    if run.metric != "accuracy" or not isinstance(count, int) or count < 1 or last is None:
        return None
    return count, 100 * (last * (1 - last) / count) ** 0.5


def grid(layers: Sequence[Layer]) -> Grid:
    """The rank map as a table."""
    where = places(layer.name for layer in layers)
    placed = [(layer, *where[layer.name]) for layer in layers]
    inside = [each for each in placed if each[2] != "–"]
    names = list(dict.fromkeys(kind for _, kind, _ in inside))
    blocks = list(dict.fromkeys(block for _, _, block in inside))
    by_block = len(names) <= max(len(blocks), MOST_KINDS)
    of = {(block, kind) if by_block else (kind, block): layer for layer, kind, block in inside}
    across, down = (names, blocks) if by_block else (blocks, names)
    return Grid(across, down, of, [layer for layer, _, block in placed if block == "–"], by_block)


def kinds(layers: Sequence[Layer]) -> list[Kind]:
    """Kinds of layer with their spectra, those of most weights first where there are too many."""
    span = charts.spread(layers)
    if span is None:
        return []
    where = places(layer.name for layer in layers)
    grouped = defaultdict(list)
    for layer in layers:
        grouped[where[layer.name][0]].append(layer)
    largest = sorted(grouped, key=lambda kind: -sum(layer.m * layer.n for layer in grouped[kind]))[:MOST_KINDS]
    return [
        Kind(kind, found, Markup(charts.spectrum(found, span, f"s{i}", "Squared singular values by direction")))
        for i, (kind, found) in enumerate(grouped.items())
        if kind in largest
    ]


def advice(run: Run, deploy: Version | None) -> Advice | None:
    """The smallest budget whose predicted loss stays within TOLERATED; None where there is no sweep."""
    if not run.sweep:
        return None
    within = [swept for swept in run.sweep if swept.predicted <= TOLERATED]
    chosen = min(within, key=lambda swept: swept.parameters, default=None)
    smallest = chosen is not None and chosen.parameters == min(swept.parameters for swept in run.sweep)
    size, word = words.unit([swept.parameters for swept in run.sweep])
    swept = sorted(run.sweep, key=lambda each: each.parameters)
    label = "Predicted added loss by the size of the model"
    here = deploy.parameters if deploy else None
    hidden = charts.steep(swept) and any(each.predicted <= 0 for each in swept)
    return Advice(chosen, smallest, hidden, Markup(charts.sweep(swept, chosen, here, TOLERATED, size, word, label)))


def curves(run: Run, scores: dict[str, Score]) -> list[Markup]:
    """The loss, and the metric on validation rows, against the steps of training."""
    if not run.training:
        return []
    drawn = [
        charts.curve([(p.step, p.loss) for p in run.training], None, "loss", "training loss", "Training loss by step")
    ]
    percent = run.metric == "accuracy"
    seen = charts.validation(run.training, 100 if percent else 1)
    if seen:
        dense = scores["dense"].metric * (100 if percent else 1) if "dense" in scores else None
        what = f"{run.metric}, %" if percent else run.metric
        drawn.append(charts.curve(seen, dense, "metric", what, "The metric on validation rows by step"))
    return [Markup(each) for each in drawn]

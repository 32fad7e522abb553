"""Tables and the plot, from the rows alone. Spread is the standard deviation over seeds; differences are paired by seed."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from ..questions import SETS
from ..report import named, table
from .choice import SEEDS, Entry, chosen_rate
from .matrix import ablations, asked, comparison, images, language, pictures
from .methods import variant
from .store import Row
from .tasks import ASKED, LANGUAGES, LONG, PICTURES, TASKS, TEXT, VISION

Scores = dict[int, float]  # by seed
# What the plot shows, in the legend's order: label, marker and colour, the same in every panel.
PLOTTED = {
    "jactus": ("JACTUS", "o", "tab:blue"),
    "full": ("full fine-tuning", "s", "black"),
    "lora": ("LoRA", "D", "tab:orange"),
    "dora": ("DoRA", "v", "tab:red"),
    "svd-llm+lora": ("SVD-LLM, then LoRA", "^", "tab:green"),
    "cersa": ("CERSA", "X", "tab:purple"),
}


@dataclass(frozen=True)
class Summary:
    """A method at a budget: its scores by task and seed, before and after training, and a row of the first task for its
    sizes (they differ a little between tasks, by the head and the ranks)."""

    method: str
    budget: float
    untrained: dict[str, Scores]
    trained: dict[str, Scores]
    sizes: Row

    @property
    def name(self) -> str:
        return named(self.method, self.budget)

    def mean_by_seed(self, tasks: Sequence[str]) -> Scores:
        """Mean over the tasks for each seed that has them all; empty when none does, or of no tasks."""
        seeds = set.intersection(*(set(self.trained.get(task, ())) for task in tasks)) if tasks else set()
        return {s: statistics.fmean(self.trained[task][s] for task in tasks) for s in sorted(seeds)}


def summaries(rows: list[Row], entries, tasks: Sequence[str]) -> list[Summary]:
    """Each method and budget with a chosen learning rate on at least one task."""
    found = []
    for method, budget in dict.fromkeys((e.method, e.budget) for e in entries):
        mine = [r for r in rows if (r.method, r.budget) == (method, budget) and r.task in tasks]
        before, after = {}, {}
        for task in tasks:
            here = [r for r in mine if r.task == task]
            before[task] = {r.seed: r.value for r in here if r.phase == "untrained"}
            e = next((e for e in entries if (e.task, e.method, e.budget) == (task, method, budget)), None)
            lr = None if e is None else chosen_rate(e, rows)
            if lr is not None:
                after[task] = {
                    r.seed: r.value for r in here if r.phase == "trained" and r.lr == lr and r.loss is not None
                }
        if any(after.values()) or any(before.values()):
            found.append(Summary(method, budget, before, after, min(mine, key=lambda r: tasks.index(r.task))))
    return found


def tables(rows: list[Row]) -> str:
    """Everything that was measured, as Markdown."""
    parts = []
    shown = (("text", comparison, TEXT), ("images", images, VISION), ("DINOv2-small", pictures, PICTURES))
    for title, stage, tasks in shown:
        found = summaries(rows, list(stage()), tasks)
        if found:
            parts += [f"### Accuracy after training, %: {title}", _accuracy_table(found, tasks)]
        if leads := _lead_table(found, tasks):
            parts += [f"### Points that JACTUS is ahead, {title}: mean, paired by seed", leads]
    read = (*LANGUAGES, LONG)
    spoken = summaries(rows, list(language()), read)
    if spoken:
        parts += ["### Perplexity, untrained → trained", _language_table(spoken, read)]
    if learnt := summaries(rows, list(asked()), ("arc-easy",)):
        parts += ["### ARC-Easy alone, %, untrained → trained", _language_table(learnt, ("arc-easy",), 100)]
    if learnt := summaries(rows, _by_set(), (*ASKED, *OF_ASKED)):
        parts += ["### Commonsense, %: one model on a mixture of eight sets", _asked_table(learnt)]
    on_validation = [replace(r, value=r.validation) for r in rows if r.validation is not None]
    for budget, tasks in itertools.product(dict.fromkeys(e.budget for e in ablations()), (TEXT, LANGUAGES)):
        entries = [e for e in ablations() if e.budget == budget and e.task in tasks]
        changed, again = (summaries(r, entries, tasks) for r in (rows, on_validation))
        if len(changed) > 1:
            metric = TASKS[tasks[0]].metric
            parts += [
                f"### One setting changed at a time, {budget:.0%}: {metric}",
                _ablation_table(changed, again, tasks),
            ]
    parts += ["### Learning rates tried: validation score with the first seed", _learning_rates(rows)]
    return "\n\n".join([*parts, *sorted({r.versions for r in rows})])


def _accuracy_table(found: list[Summary], tasks: Sequence[str]) -> str:
    base = next((s for s in found if s.method == "lora"), None)
    lines = []
    for s in sorted(found, key=lambda s: (-s.budget, s.method != "full")):
        mean = s.mean_by_seed(tasks)
        against = _ahead(s, base, tasks) if base and s is not base else "–"
        untrained = [statistics.fmean(s.untrained[t].values()) for t in tasks if s.untrained[t]]
        before = f"{100 * statistics.fmean(untrained):.1f}" if len(untrained) == len(tasks) else "–"
        scores = [_spread(s.trained.get(task, {}), 100) for task in tasks]
        lines.append((s.name, *scores, _spread(mean, 100), against, before, *_sizes(s.sizes)))
    return table(("method", *tasks, "mean", "− LoRA, paired", "untrained", *SIZES), lines)


def _ahead(mine: Summary, theirs: Summary, tasks: Sequence[str]) -> str:
    """The mean difference, paired by seed, over the tasks that both have; it says how many where some are missing."""
    both = [t for t in tasks if set(mine.trained.get(t, ())) & set(theirs.trained.get(t, ()))]
    found = _paired(mine.mean_by_seed(both), theirs.mean_by_seed(both))
    return found if found == "–" or len(both) == len(tasks) else f"{found} ({len(both)} of {len(tasks)})"


def _lead_table(found: list[Summary], tasks: Sequence[str]) -> str:
    """JACTUS's means less the others', of the whole model or, of what has budgets too, at the same one; less its own
    defaults' in the first column. Nothing where JACTUS has no mean."""
    means = {(s.method, s.budget): mean for s in found if (mean := s.mean_by_seed(tasks))}
    others = ["jactus", *dict.fromkeys(method for method, _ in means if not variant(method))]
    lines = []
    for (method, budget), mine in means.items():
        if variant(method):
            against = [means.get((other, budget), means.get((other, 1.0), {})) for other in others]
            lines.append((named(method, budget), *("–" if a is mine else _paired(mine, a) for a in against)))
    return table(("", *others), lines) if lines else ""


OF_ASKED = tuple(f"{task}/{name}" for task in ASKED for name in SETS)


def _by_set() -> list[Entry]:
    """What is measured of a mixture, and the same of each set that it is of: at the rate of the whole."""
    whole = [e for e in asked() if e.task in ASKED]
    of_one = [replace(e, task=f"{e.task}/{name}", like=e, parts=(1.0,)) for e in whole for name in SETS]
    return [*whole, *of_one]


def _asked_table(found: list[Summary]) -> str:
    base = next((s for s in found if s.method == "lora"), None)
    (task,) = ASKED
    lines = []
    for s in sorted(found, key=lambda s: (-s.budget, s.method != "full")):
        scores = s.trained.get(task, {})
        against = _paired(scores, base.trained.get(task, {})) if base and s is not base else "–"
        of_sets = [_spread(s.trained.get(t, {}), 100) for t in OF_ASKED]
        lines.append(
            (s.name, *of_sets, _spread(scores, 100), against, _spread(s.untrained[task], 100), *_sizes(s.sizes))
        )
    return table(("method", *SETS, "mean", "− LoRA, paired", "untrained", *SIZES), lines)


def _language_table(found: list[Summary], tasks: Sequence[str], factor: float = 1.0) -> str:
    lines = []
    for s in sorted(found, key=lambda s: -s.budget):
        cells = [f"{_spread(s.untrained[t], factor)} → {_spread(s.trained.get(t, {}), factor)}" for t in tasks]
        lines.append((s.name, *cells, *_sizes(s.sizes)))
    return table(("method", *tasks, *SIZES), lines)


def _ablation_table(found: list[Summary], on_validation: list[Summary], tasks: Sequence[str]) -> str:
    """`on_validation`: the same of the validation rows, since what only the test rows show may be their draw."""
    base = next((s for s in found if s.method == "jactus"), None)
    unit = TASKS[tasks[0]].unit  # tasks shown together have one
    tasks = [t for t in tasks if any(s.trained.get(t) for s in found)]
    both = [{s.method: s.mean_by_seed(tasks) for s in summarised} for summarised in (found, on_validation)]
    lines = []
    for s in found:
        cells = []
        for task in tasks:
            now = s.trained.get(task, {})
            against = "" if base in (None, s) else f" ({_paired(now, base.trained.get(task, {}), unit)})"
            cells += [_spread(s.untrained[task], unit), _spread(now, unit) + against]
        for means in both:
            cells.append("–" if s is base else _paired(means.get(s.method, {}), means.get("jactus", {}), unit))
        lines.append((s.method, *cells, f"{s.sizes.trainable / 1e6:.2f}M"))
    phases = (f"{task}, {phase}" for task in tasks for phase in ("untrained", "trained"))
    return table(("setting", *phases, "mean difference", "on validation rows", "trainable"), lines)


def _learning_rates(rows: list[Row]) -> str:
    """For each method, budget and task the rates tried, the best one first."""
    tried: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        if r.phase == "trained" and r.seed == SEEDS[0] and r.task in TASKS:
            tried.setdefault((named(r.method, r.budget), r.task), []).append(r)
    lines = []
    for (name, task), found in tried.items():
        found.sort(key=lambda r: (r.loss is not None, TASKS[task].merit(r.validation or 0)), reverse=True)
        lines.append((name, task, ", ".join(f"{r.lr:g}: {_score(r)}" for r in found)))
    return table(("method", "task", "rate: score"), lines)


def _score(row: Row) -> str:
    if row.loss is None or row.validation is None:
        return "diverged"
    return f"{TASKS[row.task].unit * row.validation:.1f}"


SIZES = ("deployed", "in training", "trainable", "optimizer")


def _sizes(row: Row) -> tuple[str, ...]:
    counts = (row.folded, row.stored, row.trainable)
    return (*(f"{count / 1e6:.2f}M" for count in counts), f"{row.optimizer_bytes / 1e6:.1f} MB")


def _spread(scores: Scores, factor: float = 1.0) -> str:
    """Mean ± standard deviation (number of seeds where there are fewer than two)."""
    values = [factor * v for v in scores.values()]
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.2f} (1 seed)"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def _paired(mine: Scores, theirs: Scores, factor: float = 100.0) -> str:
    """Mean difference (of accuracies in points) and its standard error over the seeds both have."""
    differences = [factor * (mine[s] - theirs[s]) for s in mine if s in theirs]
    if not differences:
        return "–"
    error = f" ± {statistics.stdev(differences) / len(differences) ** 0.5:.2f}" if len(differences) > 1 else ""
    return f"{statistics.fmean(differences):+.2f}{error}"


def plot(rows: list[Row], file: Path) -> None:
    """Accuracy against deployed parameters: a panel per task, a line per method over its sizes, standard deviations as
    bars. Of the methods in `PLOTTED`; the tables have the others."""
    found = summaries(rows, list(comparison()), TEXT)
    shown = [method for method in PLOTTED if any(s.method == method for s in found)]
    figure, axes = pyplot.subplots(1, len(TEXT), figsize=(4.4 * len(TEXT), 4.4), layout="constrained")
    for axis, task in zip(axes, TEXT):
        for method in shown:
            points = sorted((s.sizes.folded / 1e6, list(s.trained[task].values())) for s in found
                            if s.method == method and s.trained.get(task))  # fmt: skip
            if not points:
                continue
            x = [size for size, _ in points]
            y = [100 * statistics.fmean(v) for _, v in points]
            bars = [100 * statistics.stdev(v) if len(v) > 1 else 0 for _, v in points]
            label, marker, colour = PLOTTED[method]
            of_ours = variant(method) is not None
            width, above = (2.2, 3) if of_ours else (1.2, 2)
            axis.errorbar(
                x, y, bars, marker=marker, color=colour, capsize=3, label=label, lw=width, ms=7, zorder=above, alpha=0.9
            )
        axis.set(title=task, xlabel="deployed parameters, millions", ylabel=f"{TASKS[task].metric}, %")
        axis.grid(alpha=0.3)
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)

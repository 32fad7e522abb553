"""Figures in prose: what a mark's name stands for."""

import functools
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence

from jactus_kernels import JactusError

from ..accuracy.tasks import TASKS, TEXT
from ..cost.figures import TARGETS
from . import families
from .tables import RESULTS, Line, cell, full, one_table, tables

# A table by a short name: `<!--=lead jactus@80% lora-->` is a cell of the second.
SHORT = {
    "text": ("accuracy.md", "training, %: text"),
    "lead": ("accuracy.md", "ahead, text"),
    "pictures": ("accuracy.md", "training, %: DINOv2-small"),
    "pictures-lead": ("accuracy.md", "ahead, DINOv2-small"),
    "perplexity": ("accuracy.md", "Perplexity"),
    "arc": ("accuracy.md", "ARC-Easy alone"),
    "questions": ("accuracy.md", "Commonsense, %"),
    "whitened": ("whitened/accuracy.md", "training, %: text"),
    "whitened-lead": ("whitened/accuracy.md", "ahead, text"),
    "whitened-pictures": ("whitened/accuracy.md", "training, %: DINOv2-small"),
    "whitened-pictures-lead": ("whitened/accuracy.md", "ahead, DINOv2-small"),
    "whitened-perplexity": ("whitened/accuracy.md", "Perplexity"),
    "whitened-questions": ("whitened/accuracy.md", "Commonsense, %"),
    "whitened-at-80%": ("whitened/accuracy.md", "at a time, 80%: accuracy"),
    "whitened-at-50%": ("whitened/accuracy.md", "at a time, 50%: accuracy"),
    "whitened-at-35%": ("whitened/accuracy.md", "at a time, 35%: accuracy"),
    "at-80%": ("pairs/accuracy.md", "at a time, 80%: accuracy"),
    "at-35%": ("pairs/accuracy.md", "at a time, 35%: accuracy"),
    "language-at-80%": ("pairs/accuracy.md", "at a time, 80%: perplexity"),
    "pairs": ("pairs/accuracy.md", "training, %: text"),
    "pairs-lead": ("pairs/accuracy.md", "ahead, text"),
    "pairs-images-lead": ("pairs/accuracy.md", "ahead, images"),
    "pairs-perplexity": ("pairs/accuracy.md", "Perplexity"),
    "h100-lead": ("h100/accuracy.md", "ahead, text"),
    "rates": ("accuracy-rates.md", ""),
    "heads": ("accuracy-heads.md", ""),
    "grouped": ("accuracy-grouped.md", ""),
    "memory": ("pairs/cost.md", "Memory"),
    "forward": ("kernels-h100.md", "forward"),
    "training": ("kernels-h100.md", "training"),
    "update": ("kernels-h100.md", "covariance"),
    "h100-training": ("h100/cost.md", "Training step"),
}
TIMED = "dtype", "threads", "batch", "budget", "against", "model"


def ratio(measure: str, *conditions: str, file: str = "cost.md") -> str:
    """The only ratio of a measure under conditions like 'model=vit-b'."""
    found = matching(file, measure, conditions)
    if len(found) != 1:
        raise JactusError(f"{measure}, {conditions}: {len(found)} rows")
    return found[0]["ratio"]


def span(measure: str, *conditions: str, column: str = "ratio", file: str = "cost.md") -> str:
    """Least–most of the ratios of a measure under conditions."""
    found = [float(line[column].split()[0]) for line in matching(file, measure, conditions) if line[column] != "–"]
    if not found:
        raise JactusError(f"{measure}, {conditions}: no rows")
    least, most = f"{min(found):.2f}", f"{max(found):.2f}"
    return least if least == most else f"{least}–{most}"


def matching(file: str, measure: str, conditions: Sequence[str]) -> list[Line]:
    wanted = dict(condition.split("=", 1) for condition in conditions)
    if unknown := set(wanted) - set(TIMED):
        raise JactusError(f"a cost row has no {sorted(unknown)}, but {TIMED}")
    lines = tables(file).get(measure, [])
    return [line for line in lines if all(line[name] == value for name, value in wanted.items())]


def peaks(budget: str, against: str) -> str:
    """Least–most of JACTUS's peak memory of a training step over another method's."""
    by_setting: dict[tuple[str, str], dict[str, float]] = {}
    for line in one_table("pairs/cost.md", "Memory"):
        by_setting.setdefault((line["model"], line["batch"]), {})[line["method"]] = float(line["peak"])
    found = [peak[f"jactus {budget}"] / peak[against] for peak in by_setting.values()]
    return f"{min(found):.2f}–{max(found):.2f}"


def quotients() -> str:
    """Least–most of jactus.learning_rate over the best rate of a grid."""
    found = [float(line["quotient"]) for line in one_table("accuracy-rates.md", "")]
    return f"{min(found):.2f}–{max(found):.2f}"


def updates(dtype: str, part: str, at_least: str) -> str:
    """Least–most times that the covariance kernel is as fast as torch's ways on an H100, eagerly, from a width on: over
    'best' of torch's, or the 'usual' way that upcasts."""
    found = []
    for line in one_table("kernels-h100.md", "covariance"):
        if line["dtype, mode"] == f"{dtype}, eager" and int(line["n"]) >= int(at_least):
            cells = [line[column].split(" / ") for column in line if column.startswith("T = ")]
            found += [float(cell[0 if part == "best" else -1]) for cell in cells]
    return f"{min(found):.1f}–{max(found):.1f}"


def lost() -> str:
    """The most validation points that the tried rate nearest to jactus.learning_rate lost to the best one."""
    lines = [line for line in one_table("accuracy-rates.md", "") if line["task"] in TEXT]
    most = max(float(line["best's score"]) - float(line["nearest's score"]) for line in lines)
    return f"{most:.1f}"


def times(kind: str, column: str, ours: str, theirs: str) -> str:
    """How many times one cell is another, of a table by its short name."""
    mine, other = (float(re.split("[^0-9.]", cell(*SHORT[kind], row, column))[0]) for row in (ours, theirs))
    return f"{mine / other:.1f}"


def target(measure: str, against: str, budget: str) -> str:
    """The ratio that was aimed at."""
    return f"{TARGETS[measure, against, float(budget.rstrip('%')) / 100]:.2f}"


def test_error(task: str, method: str) -> str:
    """One standard error, in points, of a method's accuracy from a text task's test rows alone."""
    share = float(cell(*SHORT["text"], method, task).split()[0]) / 100
    rows = TASKS[task].load.args[2][1]  # type: ignore[attr-defined]
    return f"{100 * math.sqrt(share * (1 - share) / rows):.1f}"


def versions(name: str) -> str:
    """The last line of a file of results: versions and machine."""
    return full(name).strip().splitlines()[-1]


def demo(name: str, method: str, what: str) -> str:
    """A score of a demo: 'untrained' or 'trained'."""
    found = [row for row in demo_of(name)["rows"] if row["method"] == method]
    if len(found) != 1:
        raise JactusError(f"{name}.json has {len(found)} rows of {method!r}")
    value = found[0][what]
    return f"{100 * value:.1f}" if value < 1 else f"{value:.1f}"


def environment(name: str) -> str:
    """Seed, versions and machine of a demo."""
    return ", ".join(f"{key} {value}" for key, value in demo_of(name)["environment"].items())


def demo_of(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


KINDS: dict[str, Callable[..., str]] = {
    **{kind: functools.partial(cell, *table) for kind, table in SHORT.items()},
    "ratio": ratio,
    "families": lambda *what: families.counted(" ".join(what)),
    "span": span,
    "floor": functools.partial(span, column="floor"),
    "pairs-ratio": functools.partial(ratio, file="pairs/cost.md"),
    "pairs-span": functools.partial(span, file="pairs/cost.md"),
    "h100-ratio": functools.partial(ratio, file="h100/cost.md"),
    "h100-span": functools.partial(span, file="h100/cost.md"),
    "peaks": peaks,
    "quotients": quotients,
    "updates": updates,
    "lost": lost,
    "times": times,
    "target": target,
    "test-error": test_error,
    "versions": versions,
    "demo": demo,
    "environment": environment,
}


def figure(name: str) -> str:
    """What a mark's name stands for. Its last words may say which part: 'before' or 'after' an arrow, 'change' in
    parentheses, 'bare' without spread, '.1' for so many decimals.

    Raises JactusError for a name that is not known or finds nothing.
    """
    kind, *words = shlex.split(name)
    modifiers = []
    while words and re.fullmatch(r"before|after|change|bare|\.\d", words[-1]):
        modifiers.append(words.pop())
    if kind not in KINDS:
        raise JactusError(f"a mark is of kind {kind!r}, not one of {sorted(KINDS)}")
    try:
        text = KINDS[kind](*words)
    except TypeError as e:
        raise JactusError(f"the mark {name!r} has words too many or too few: {e}") from e
    for modifier in reversed(modifiers):
        text = _modified(text, modifier, name)
    return text.replace("-", "−") if re.match(r"-\d", text) else text


def _modified(text: str, modifier: str, name: str) -> str:
    if modifier in ("before", "after"):
        parts = text.split(" → ")
        if len(parts) != 2:
            raise JactusError(f"the mark {name!r}: {text!r} has no arrow")
        return parts[modifier == "after"]
    if modifier == "change":
        changes = re.findall(r"\(([+-][^)]*)\)", text)
        if len(changes) != 1:
            raise JactusError(f"the mark {name!r}: {text!r} has no change in parentheses")
        return changes[0]
    if modifier == "bare":
        return re.split(r" [±(]", text)[0]
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):{modifier}f}", text)

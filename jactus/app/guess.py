"""What is to be learned, told from the columns of a table, and why that was thought."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jactus_kernels import JactusError

TASKS = ("classification", "pairs", "language", "instructions", "images")
TEXTS = (
    "text",
    "sentence",
    "content",
    "review",
    "headline",
    "title",
    "document",
    "comment",
    "tweet",
    "message",
    "body",
)
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "rating", "stars")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
    ("query", "document"),
    ("query", "passage"),
    ("question", "passage"),
    ("question", "sentence"),
    ("claim", "evidence"),
)
ANSWERS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("input", "output"),
)
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Guess:
    """A task and its columns: `text` is one column, two of a pair, or those that make up a prompt; `label` the class or the
    answer."""

    task: str
    text: tuple[str, ...]
    label: str | None
    why: str


def guess(columns: Columns, task: str | None = None, text: Sequence[str] = (), label: str | None = None) -> Guess:
    """The task of a table. What is given is taken; the rest goes by names of columns, then by what is in them.

    Raises JactusError where a named column is not there, where more than one reading is possible, and for a label that is
    a number to predict (regression).
    """
    for name in (*text, *((label,) if label else ())):
        if name not in columns:
            raise JactusError(f"there is no column {name!r}; the columns are {', '.join(columns)}")
    if task == "images":
        raise JactusError("task 'images' needs a folder of images, and the data is a table")
    found = _given(columns, task, tuple(text), label) if text or label else _named(columns, task)
    found = found or _by_content(columns, task)
    if task and found.task != task:
        raise JactusError(
            f"--task {task} does not go with the columns {', '.join(columns)}, which look like {found.task} ({found.why}); name "
            "them by --text and --label"
        )
    if found.task in ("classification", "pairs"):
        _refuse_numbers(columns, found)
    return found


def _given(columns: Columns, task: str | None, text: tuple[str, ...], label: str | None) -> Guess:
    if not text:
        rest = {name: values for name, values in columns.items() if name != label}
        texts = [name for name in rest if name.lower() in TEXTS] or [n for n in rest if _kind(rest[n]) == "text"]
        if len(texts) != (2 if task == "pairs" else 1):
            raise _unclear(columns, f"beside the label {label!r}, {len(texts)} columns look like text")
        text = tuple(texts)
    by = f"--text {' --text '.join(text)}" + (f" --label {label}" if label else "")
    if len(text) > 2 and task != "instructions":
        raise JactusError(f"{len(text)} columns of text were given ({', '.join(text)}); one, or two of a pair, can be")
    if label is None and task in (None, "language") and len(text) == 1:
        if task is None and (labels := _labels(columns, text)):
            raise _unclear(columns, f"{text[0]!r} is the text, and {labels[0]!r} may be its label")
        return Guess("language", text, None, by)
    if label is None:
        labels = _labels(columns, text)
        if len(labels) != 1:
            raise _unclear(columns, f"{by}, and {len(labels)} columns look like labels")
        label = labels[0]
    if task == "instructions" or (task is None and _kind(columns[label]) == "text"):
        return Guess("instructions", text, label, f"{by}: {label!r} holds texts")
    return Guess("pairs" if len(text) == 2 else "classification", text, label, by)


def _named(columns: Columns, task: str | None) -> Guess | None:
    lower = {name.lower(): name for name in columns}
    labels = [lower[name] for name in LABELS if name in lower]
    texts = [lower[name] for name in TEXTS if name in lower]
    if task in (None, "pairs") and labels:
        for pair in PAIRS:
            if set(pair) <= set(lower):
                two = tuple(lower[name] for name in pair)
                return Guess("pairs", two, labels[0], f"columns {two[0]!r}, {two[1]!r} and {labels[0]!r}")
    if task in (None, "instructions") and not (labels and texts):
        for asked, answer in ANSWERS:
            if asked in lower and answer in lower:
                more = (lower["input"],) if asked == "instruction" and "input" in lower else ()
                prompt = (lower[asked], *more)
                return Guess("instructions", prompt, lower[answer], f"columns {lower[asked]!r} and {lower[answer]!r}")
    if task in (None, "classification") and len(texts) == 1 and len(labels) == 1:
        return Guess("classification", (texts[0],), labels[0], f"columns {texts[0]!r} and {labels[0]!r}")
    if len(texts) == 1 and (task == "language" or (task is None and len(columns) == 1)):
        return Guess("language", (texts[0],), None, f"column {texts[0]!r}" + ("" if task else " alone"))
    return None


def _by_content(columns: Columns, task: str | None) -> Guess:
    lower = {name.lower(): name for name in columns}
    texts = [lower[name] for name in TEXTS if name in lower][:1] if task != "pairs" else []
    texts = texts or [name for name, values in columns.items() if _kind(values) == "text"]
    labels = [] if task == "language" else _labels(columns, texts)
    if len(texts) == 1 and not labels and task in (None, "language"):
        others = [name for name in columns if name not in texts]
        if others and task is None:
            raise _unclear(columns, f"{texts[0]!r} looks like text, and none of the others like a label")
        return Guess("language", (texts[0],), None, f"{texts[0]!r} holds texts")
    if len(labels) == 1 and len(texts) in (1, 2):
        few = f"{len({str(v) for v in columns[labels[0]]})} different values"
        shown = " and ".join(repr(name) for name in texts)
        why = f"{shown} hold{'s' * (len(texts) == 1)} texts and {labels[0]!r} {few}"
        return Guess("pairs" if len(texts) == 2 else "classification", tuple(texts), labels[0], why)
    raise _unclear(columns, f"{len(texts)} columns look like text and {len(labels)} like labels")


def _labels(columns: Columns, texts: Sequence[str]) -> list[str]:
    rest = [name for name in columns if name not in texts]
    return [name for name in rest if name.lower() in LABELS][:1] or [n for n in rest if _kind(columns[n]) == "class"]


def _unclear(columns: Columns, why: str) -> JactusError:
    return JactusError(
        f"what is to be learned from the columns {', '.join(columns)} cannot be told: {why}; name the text by --text COLUMN and, "
        "if there is one, the label or answer by --label COLUMN (and the task by --task)"
    )


def _kind(values: list[Any]) -> str:
    """'text', 'class' (few different values) or 'other' (numbers, identifiers)."""
    held = [v for v in values if v is not None and str(v).strip()]
    different = {str(v) for v in held}
    words = sum(len(str(v).split()) for v in held) / max(len(held), 1)
    if all(isinstance(v, str) for v in held) and words >= 3 and len(different) > len(held) / 5:
        return "text"
    numbers = [number for v in held if (number := as_number(v)) is not None]
    if 2 <= len(different) <= max(2, len(held) // 4) and not any(n != int(n) for n in numbers):
        return "class"
    return "other"


def as_number(value: Any) -> float | None:
    """A value as a finite number, or None where it is not one."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _refuse_numbers(columns: Columns, found: Guess) -> None:
    assert found.label is not None
    held = [v for v in columns[found.label] if v is not None and str(v).strip()]
    numbers = [n for v in held if (n := as_number(v)) is not None]
    different = len(set(numbers))
    if held and len(numbers) == len(held):
        broken = next((n for n in numbers if n != int(n)), None)
        if broken is not None or (different > 20 and different > len(numbers) / 2):
            seen = f"{broken:g} is in it" if broken is not None else f"it has {different} different values"
            raise JactusError(
                f"the label {found.label!r} is a number to predict ({seen}), and regression is not offered; make classes of it, or "
                "name another column by --label"
            )

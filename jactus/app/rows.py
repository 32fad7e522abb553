"""The rows to learn from: checked one by one, split, and digested."""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from jactus_kernels import JactusError

from . import tables
from .guess import Columns, Guess, as_number, guess
from .settings import Settings

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Row:
    """A row by its number in the data (from 1): texts, or the file of an image; the class or the answer it is to be given."""

    number: int
    inputs: tuple[str, ...]
    target: str | None


@dataclass(frozen=True)
class Data:
    """What was read, from where, and why it was taken so. `classes` are the labels in order; none of a language model."""

    found: Guess
    how: str
    train: list[Row]
    validation: list[Row]
    classes: list[str]
    digest: str

    @property
    def of_language(self) -> bool:
        """Whether a language model is to learn it."""
        return self.found.task in ("language", "instructions")

    def described(self, path: str) -> dict[str, Any]:
        """What a record says of the data."""
        columns = {"text": list(self.found.text), "label": self.found.label}
        rows = {"train": len(self.train), "validation": len(self.validation)}
        return {"path": path, "read as": self.how, "digest": self.digest, "columns": columns, "rows": rows} | (
            {"classes": self.classes} if self.classes else {}
        )


def load(settings: Settings) -> Data:
    """Read, check and split the data. Raises JactusError for what cannot be read or used, naming the row."""
    path = Path(settings.data)
    if path.is_dir():
        found, how, train, held_out = _images(path, settings)
    else:
        columns, held, how = tables.read(settings.data)
        found = guess(columns, settings.task, settings.text or (), settings.label)
        train = _checked(columns, found, settings.data)
        held_out = None if held is None else _checked(held, found, f"{settings.data}, validation")
    part = as_number(settings.validation)
    if part is None:
        file = Path(settings.validation)
        if path.is_dir() or not file.is_file():
            raise JactusError(f"--validation is {settings.validation!r}; it is a part such as 0.1, or a file of rows")
        columns = tables.from_file(file)
        for name in (*found.text, *((found.label,) if found.label else ())):
            if name not in columns:
                raise JactusError(f"{file} has no column {name!r}; its columns are {', '.join(columns)}")
        held_out = _checked(columns, found, str(file))
    elif not 0 < part < 1:
        raise JactusError(f"--validation is {settings.validation}; a part lies between 0 and 1")
    classes = [] if found.task in ("language", "instructions") else _classes(train)
    if held_out is None:
        assert part is not None
        train, held_out = _split(train, part, bool(classes), settings.seed, settings.data)
    elif classes:
        unknown = next((row for row in held_out if row.target not in classes), None)
        if unknown is not None:
            raise JactusError(
                f"validation row {unknown.number} has the label {unknown.target!r}, which no training row has; these have "
                f"{', '.join(classes)}"
            )
    return Data(found, how, train, held_out, classes, _digest(found, train, held_out))


def _checked(columns: Columns, found: Guess, where: str) -> list[Row]:
    rows, wrong = [], defaultdict(list)
    labels = columns[found.label] if found.label else [None] * len(columns[found.text[0]])
    prompt = found.task == "instructions"
    for number, (*texts, label) in enumerate(zip(*(columns[name] for name in found.text), labels), 1):
        for place, (name, text) in enumerate(zip(found.text, texts)):
            if text is None and prompt and place:
                continue  # an instruction may have no further input
            if not isinstance(text, str) or not (text.strip() or (prompt and place)):
                wrong[f"no text under {name!r}"].append(number)
        if found.label and (label is None or not str(label).strip()):
            wrong[f"no {'answer' if prompt else 'label'} under {found.label!r}"].append(number)
        elif found.label and (not isinstance(label, str) if prompt else isinstance(label, list | dict)):
            wrong[f"a {type(label).__name__} under {found.label!r}"].append(number)
        target = None if not found.label else str(label) if prompt else _class(label)
        rows.append(Row(number, tuple(str(t or "") for t in texts), target))
    if wrong:
        what, numbers = next(iter(wrong.items()))
        others = f" (and so have {_listed(numbers[1:])})" if len(numbers) > 1 else ""
        raise JactusError(f"{where}, row {numbers[0]} has {what}{others}; fill in or delete such rows")
    return rows


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"


def _class(label: Any) -> str:
    """The name of a class: 1, 1.0 and '1' are the same."""
    number = None if isinstance(label, str) and not label.strip().replace(".", "", 1).isdigit() else as_number(label)
    return str(int(number)) if number is not None and number == int(number) else str(label).strip()


def _classes(rows: list[Row]) -> list[str]:
    names = {str(row.target) for row in rows}
    if len(names) < 2:
        raise JactusError(f"every row has the label {names.pop()!r}; two classes at least are needed")
    return sorted(
        names, key=lambda name: ("", as_number(name), "") if as_number(name) is not None else (name, 0.0, name)
    )


def _split(rows: list[Row], part: float, stratified: bool, seed: int, where: str) -> tuple[list[Row], list[Row]]:
    """Training and validation rows, of each class the same part, in an order by the seed."""
    groups: dict[str | None, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.target if stratified else None].append(row)
    draw = random.Random(seed)
    train: list[Row] = []
    held_out: list[Row] = []
    for name in sorted(groups, key=str):
        group = groups[name]
        if len(group) < 2:
            of = f" of the label {name!r}" if stratified else ""
            raise JactusError(
                f"{where} has one row{of} (row {group[0].number}), and each needs one to train and one to validate on; add rows, or "
                "give --validation a file"
            )
        draw.shuffle(group)
        count = min(max(1, round(part * len(group))), len(group) - 1)
        held_out += group[:count]
        train += group[count:]
    draw.shuffle(train)
    draw.shuffle(held_out)
    return train, held_out


def _digest(found: Guess, *parts: list[Row]) -> str:
    hasher = xxhash.xxh3_128(found.task.encode())
    for part in parts:
        hasher.update(f"{len(part)} rows".encode())
        for row in part:
            inputs = (
                [xxhash.xxh3_128_hexdigest(Path(row.inputs[0]).read_bytes())] if found.task == "images" else row.inputs
            )
            hasher.update(json.dumps([*inputs, row.target]).encode())
    return hasher.hexdigest()


def _images(path: Path, settings: Settings) -> tuple[Guess, str, list[Row], list[Row] | None]:
    if settings.task not in (None, "images"):
        raise JactusError(f"{path} is a folder, which can hold images, and --task is {settings.task!r}")
    if settings.text or settings.label:
        raise JactusError(f"{path} is a folder of images, which has no columns for --text or --label")
    tables.needs("PIL", f"reading the images of {path}")
    root = path / "train" if (path / "train").is_dir() else path
    apart = next((path / name for name in tables.VALIDATION if (path / name).is_dir()), None) if root != path else None
    train, held_out = _image_rows(root), _image_rows(apart) if apart else None
    how = f"images of {len({row.target for row in train})} folders in {root.name}/" + (
        f", validated on {apart.name}/" if apart else ""
    )
    return Guess("images", ("image",), "folder", "it is a folder of folders of images"), how, train, held_out


def _image_rows(root: Path) -> list[Row]:
    from PIL import Image, UnidentifiedImageError

    files = sorted(f for f in root.glob("*/*") if f.suffix.lower() in IMAGES)
    if not files:
        raise JactusError(f"{root} holds no image; expected class/image in it, ending in {', '.join(IMAGES)}")
    for file in files:
        try:
            with Image.open(file) as image:
                image.verify()
        except (OSError, UnidentifiedImageError, SyntaxError) as e:
            raise JactusError(f"{file} is not an image that can be read ({e}); replace it or take it away") from e
    return [Row(number, (str(file),), file.parent.name) for number, file in enumerate(files, 1)]

"""Pictures in colour, as an image processor makes them of files: folders `split/class/picture.jpg`, zips of such, or a hub's.

None of these data sets is in a package index: they are where `$JACTUS_IMAGES` says, a folder that holds one folder or zip
for each. Splits are few-shot, and drawn by a seed; no picture is in two.
"""

import functools
import hashlib
import io
import itertools
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from jactus_kernels import JactusError

from .data import shuffled_parts
from .training import Images
from .vision import ImageTask

FOLDER = "JACTUS_IMAGES"
SPLITS = ("train", "test")
SIZES = (1000, 500, 2000)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
AT_ONCE = 256  # pictures that are held uncompressed, before they are of the model's size


@dataclass(frozen=True)
class Picture:
    """A picture that is not read yet: what to call it, how to read its file, and its label."""

    name: str
    read: Callable[[], bytes]
    label: int


def picture_task(
    name: str,
    processor: Any,
    source: str | Path | None = None,
    sizes: tuple[int, int, int] = SIZES,
    seed: int = 0,
) -> ImageTask:
    """An image classification task, its pictures resized by the model's own processor.

    Args:
        name: of the data set, and of its folder or zip in `$JACTUS_IMAGES`.
        processor: a transformers image processor; it gives pictures their size, normalisation is left to `Images`.
        source: a folder `{train,test}/class/picture.jpg`, a zip of one, or, where `datasets` is installed, a hub name.
        sizes: how many pictures train, validate (both of the training split) and test.
        seed: which ones.

    Raises:
        JactusError: there is no such data set, it has another form, or fewer different pictures than asked for.
    """
    where = source or _in_folder(name)
    path = Path(where)
    labels, (training, test) = _from_files(path) if path.exists() else _from_hub(str(where))
    tested = _unique(test)
    training = list(_unique(training, tested).values())
    parts = shuffled_parts(len(training), sizes[:2], seed, f"{name}, training")
    chosen = [[training[i] for i in part] for part in parts]
    (part,) = shuffled_parts(len(tested), sizes[2:], seed, f"{name}, test")
    chosen.append([list(tested.values())[i] for i in part])
    return ImageTask(name, labels, *(_processed(pictures, processor) for pictures in chosen))


def in_colour(task: ImageTask, processor: Any, sizes: tuple[int, int, int] = SIZES) -> ImageTask:
    """The first so many grey images of each split, their three channels alike, resized by the model's own processor."""
    splits = []
    for images, size in zip((task.train, task.validation, task.test), sizes):
        few = images[:size]
        pictures = (Image.fromarray(pixels.numpy()).convert("RGB") for pixels in few.pixels[:, 0])
        splits.append(_resized(pictures, few.labels, processor))
    return ImageTask(task.name, task.labels, *splits)


def _in_folder(name: str) -> Path:
    folder = os.environ.get(FOLDER)
    wanted = f"a folder that holds {name}/ or {name}.zip, with {'|'.join(SPLITS)}/class/picture.jpg in it"
    if not folder:
        raise JactusError(f"{name}: no package has these pictures; set {FOLDER} to {wanted}")
    found = [path for path in (Path(folder) / name, Path(folder) / f"{name}.zip") if path.exists()]
    if not found:
        raise JactusError(f"{name}: {FOLDER} is {folder}, which is not {wanted}")
    return found[0]


def _from_files(root: Path) -> tuple[list[str], list[list[Picture]]]:
    """Class names and the pictures of both splits, from a folder or a zip."""
    if root.is_dir():
        files = [p.relative_to(root).as_posix() for p in root.glob("*/*/*")]
        read = lambda name: (root / name).read_bytes()  # noqa: E731
    elif zipfile.is_zipfile(root):
        files = zipfile.ZipFile(root).namelist()
        read = zipfile.ZipFile(root).read
    else:
        raise JactusError(f"{root}: neither a folder nor a zip; expected {SPLITS} with class/picture.jpg in each")
    found = sorted(name.split("/") for name in files if name.lower().endswith(SUFFIXES) and name.count("/") == 2)
    labels = sorted({label for split, label, _ in found if split == SPLITS[0]})
    splits = []
    for wanted in SPLITS:
        of = [parts for parts in found if parts[0] == wanted]
        if not of or {label for _, label, _ in of} - set(labels):
            raise JactusError(
                f"{root}: {wanted} has {len(of)} pictures of {sorted({label for _, label, _ in of})}; expected "
                f"{wanted}/class/picture.jpg, of the classes in {SPLITS[0]}, {labels}"
            )
        names = [("/".join(parts), parts[1]) for parts in of]
        splits.append([Picture(n, functools.partial(read, n), labels.index(label)) for n, label in names])
    return labels, splits


def _from_hub(name: str) -> tuple[list[str], list[list[Picture]]]:
    """The same of a data set with one column of images and one of classes."""
    try:
        import datasets

        tables = [datasets.load_dataset(name, split=split) for split in SPLITS]
    except ImportError as e:
        raise JactusError(f"{name} is neither a folder nor a zip; check the path, or pip install datasets") from e
    except (OSError, ValueError) as e:
        raise JactusError(f"{name} is neither a path nor a data set with the splits {SPLITS}: {e}") from e
    features = tables[0].features
    images, classes = (
        [column for column, kind in features.items() if isinstance(kind, wanted)]
        for wanted in (datasets.Image, datasets.ClassLabel)
    )
    if (len(images), len(classes)) != (1, 1):
        raise JactusError(f"{name} has {features}; expected one column of images and one of class labels")
    raw = [table.cast_column(images[0], datasets.Image(decode=False)) for table in tables]

    def read(table: Any, row: int) -> bytes:
        picture = table[row][images[0]]
        return picture["bytes"] or Path(picture["path"]).read_bytes()

    return features[classes[0]].names, [
        [Picture(f"{name}, row {i}", functools.partial(read, t, i), y) for i, y in enumerate(t[classes[0]])]
        for t in raw
    ]


def _unique(pictures: Iterable[Picture], seen: Iterable[bytes] = ()) -> dict[bytes, Picture]:
    """Pictures by their files' digests, less those `seen`: of equal files the first."""
    known, first = set(seen), {}
    for picture in pictures:
        key = hashlib.sha256(picture.read()).digest()
        if key not in known:
            first.setdefault(key, picture)
    return first


def _processed(pictures: Sequence[Picture], processor: Any) -> Images:
    return _resized(map(_opened, pictures), [picture.label for picture in pictures], processor)


def _opened(picture: Picture) -> Image.Image:
    try:
        return Image.open(io.BytesIO(picture.read())).convert("RGB")
    except OSError as e:
        raise JactusError(f"{picture.name}: is no picture that Pillow reads ({e}); replace it or take it away") from e


def _resized(pictures: Iterable[Image.Image], labels: list[int], processor: Any) -> Images:
    # transformers makes its values of bytes; kept as bytes they need a quarter of the memory
    bytes_only = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    parts, left = [], iter(pictures)
    while part := list(itertools.islice(left, AT_ONCE)):
        parts.append(processor(part, **bytes_only)["pixel_values"].to(torch.uint8))
    return Images(torch.cat(parts), labels, tuple(processor.image_mean), tuple(processor.image_std))

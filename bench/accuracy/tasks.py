"""The tasks: a pretrained model, data in fixed splits, and what calibration saw of them, kept on disk between cells."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import jactus
from jactus.config import SOURCES

from .. import data, dinov2, images, models, questions, vision
from ..fetch import cache_folder, made_once
from ..training import Examples, accuracy, batches, encode, perplexity, token_blocks

TOKENS = 32  # of a newsgroup article: subject and first line, so that what must be learnt is in the words
BLOCK = 128  # tokens of a language-modelling example
HEAD_L2 = 1e-3  # of the heads that all methods start from; rows in results/head-1e-4 and results/h100 had 1e-4


@dataclass(frozen=True)
class Case:
    """A model as its makers left it, under a fresh head, and the splits; nothing random but the head."""

    model: nn.Module
    training: Examples
    validation: Examples
    test: Examples


@dataclass(frozen=True)
class Task:
    """How to load a task, score a model on it, and train on it.

    metric: 'accuracy' (higher is better) or 'perplexity' (lower is).
    calibration: how many training examples calibration sees; draws: how often a language model draws labels for them.
    rate: what the learning rates tried by every method are multiplied by.
    """

    name: str
    metric: str
    load: Callable[[], Case]
    epochs: int = 2
    batch_size: int = 32
    calibration: int = 2000
    draws: int = 1
    rate: float = 1.0

    def score(self, model: nn.Module, examples: Examples) -> float:
        """The mean over the sets that the examples are of, mostly one."""
        return fmean(self.scores(model, examples).values())

    def scores(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        """The score on each set by its name."""
        if isinstance(examples, questions.Asked):
            return questions.by_set(examples, questions.right(model, examples))
        if self.metric == "accuracy":
            return {self.name: accuracy(model, examples)}  # type: ignore[arg-type]
        return {self.name: perplexity(model, examples)}  # type: ignore[arg-type]

    @property
    def unit(self) -> float:
        """What scores are multiplied by to be shown: accuracies are in points of a hundred."""
        return 100.0 if self.metric == "accuracy" else 1.0

    def merit(self, score: float) -> float:
        """The score, its sign such that higher is better."""
        return score if self.metric == "accuracy" else -score


def _text(
    load: Callable[[], data.TextTask], length: int, rows: tuple[int, int], encoder: Callable = models.minilm
) -> Case:
    task = load()
    model, tokenizer = encoder(len(task.labels))
    training, test = (encode(tokenizer, s, length)[:n] for s, n in zip((task.train, task.test), rows))
    return Case(model, training, encode(tokenizer, task.validation, length), test)


def _language(lines: Callable[[], list[str]], training_blocks: int | None) -> Case:
    """The first 50 lines are the test's, the next 25 validation's; of the rest so many blocks train, or all."""
    model, tokenizer = models.smollm2()
    cuts = (lines()[:50], lines()[50:75], lines()[75:])
    test, validation, training = (token_blocks(tokenizer, part, BLOCK) for part in cuts)
    return Case(model, training[:training_blocks], validation, test)


def _digits() -> Case:
    task = vision.mnist_digits()
    return Case(vision.fashion_vit(10), task.train, task.validation, task.test)


def _pictures(load: Callable[[Any], vision.ImageTask]) -> Case:
    """`load` makes a task's images with the model's processor."""
    task = load(dinov2.processor())
    return Case(dinov2.classifier(len(task.labels)), task.train, task.validation, task.test)


def _photographs(name: str, rows: tuple[int, int, int]) -> Case:
    return _pictures(lambda processor: images.picture_task(name, processor, sizes=rows))


def _greys(load: Callable[[], vision.ImageTask]) -> Case:
    return _pictures(lambda processor: images.in_colour(load(), processor, FEW_SHOT))


def _questions(sets: tuple[str, ...], rows: tuple[int, int, int]) -> Case:
    """Of each set so many questions train, validate and are tested on; validation's are of the set's training part."""
    model, tokenizer = models.smollm2()
    training, validation, test = rows
    drawn = (
        questions.mixture(False, training, skip=validation, sets=sets),
        questions.mixture(False, validation, sets=sets),
        questions.mixture(True, test, sets=sets),
    )
    return Case(model, *(questions.ask(tokenizer, part) for part in drawn))


def _table(*tasks: Task) -> dict[str, Task]:
    return {task.name: task for task in tasks}


COMMONSENSE: dict[str, Any] = {
    "metric": "accuracy",
    "epochs": 1,
    "batch_size": 16,
    "calibration": 256,
    "draws": 0,
    "rate": 0.5,
}
FEW_SHOT = (1000, 500, 2000)  # what two cores bear of a model that sees 65 tokens a picture
PICTURED: dict[str, Any] = {"metric": "accuracy", "epochs": 4, "calibration": 1000, "rate": 0.5}
LANGUAGE: dict[str, Any] = {
    "metric": "perplexity",
    "epochs": 1,
    "batch_size": 8,
    "calibration": 128,
    "draws": 4,
    "rate": 0.25,
}
TASKS = _table(
    Task("sarcasm", "accuracy", functools.partial(_text, data.sarcasm, 64, (6000, 4500))),
    Task("movies", "accuracy", functools.partial(_text, data.movies, 64, (3000, 4000))),
    # Twenty classes of 150 rows each, seen twice: LoRA and JACTUS alike were best at the highest of the rates above.
    Task("newsgroups", "accuracy", functools.partial(_text, data.newsgroups, TOKENS, (3000, 4000)), rate=2.0),
    # The same rows for an encoder of another family and a width of 768.
    Task(
        "newsgroups-mpnet",
        "accuracy",
        functools.partial(_text, data.newsgroups, TOKENS, (3000, 4000), models.mpnet),
        rate=0.5,
    ),
    Task("digits", "accuracy", _digits, epochs=8, calibration=1000, rate=2.0),
    Task("cifar10", load=functools.partial(_photographs, "cifar10", FEW_SHOT), **PICTURED),
    Task("textures", load=functools.partial(_photographs, "dtd10", (480, 120, 600)), **PICTURED),
    Task("flowers", load=functools.partial(_photographs, "flowers5", (1000, 500, 736)), **PICTURED),
    Task("tinyimagenet", load=functools.partial(_photographs, "tinyimagenet25", (1000, 500, 1250)), **PICTURED),
    Task("mnist", load=functools.partial(_greys, vision.mnist_digits), **PICTURED),
    Task("fashion-mnist", load=functools.partial(_greys, vision.fashion_mnist), **PICTURED),
    Task("wikipedia", load=functools.partial(_language, data.wikipedia_lines, 128), **LANGUAGE),
    Task("openwebtext", load=functools.partial(_language, data.openwebtext_lines, 128), **LANGUAGE),
    Task(
        "wikipedia-long",
        load=functools.partial(_language, data.wikipedia_lines, None),
        **LANGUAGE | {"calibration": 1101, "draws": 1},
    ),
    # One model learns the eight sets together, on as many rows of each as two cores bear.
    Task("commonsense", load=functools.partial(_questions, tuple(questions.SETS), (500, 100, 400)), **COMMONSENSE),
    Task("arc-easy", load=functools.partial(_questions, ("arc-easy",), (2000, 251, 800)), **COMMONSENSE),
)
VISION = ("digits",)
PICTURES = ("cifar10", "textures", "flowers", "tinyimagenet", "mnist", "fashion-mnist")  # for DINOv2-small
TEXT = ("sarcasm", "movies", "newsgroups")
LANGUAGES = ("wikipedia", "openwebtext")
ASKED = ("commonsense",)
OTHER = "newsgroups-mpnet"  # neither BERT nor Llama
LONG = "wikipedia-long"  # trains on all there is: 1,101 blocks


def prepared(task: Task, head: str, seed: int, device: str = "cpu") -> Case:
    """The task with its model on `device`, its head 'fitted' to the frozen features (once; then read from the cache) or
    'random' by seed."""
    torch.manual_seed(seed if head == "random" else 0)
    case = task.load()
    case.model.to(device)
    if not _has_head(task, case) or head == "random":
        return case
    classifier = case.model.classifier

    def fit(file: Path) -> None:
        jactus.fit_head(case.model, batches(case.training, 64), l2=HEAD_L2, progress=False)
        save_file(classifier.state_dict(), file)

    classifier.load_state_dict(load_file(_once(f"head-{task.name}-{HEAD_L2:g}{_on(device)}", fit)))
    return case


def _has_head(task: Task, case: Case) -> bool:
    """Whether there is a head to fit: a language model has none."""
    return task.metric == "accuracy" and not isinstance(case.training, questions.Asked)


def calibrated(
    task: Task,
    case: Case,
    rows: int,
    seed: int,
    head: str,
    autocast: torch.dtype | None,
    whole: bool = True,
    draws: int | None = None,
) -> jactus.Statistics:
    """The sums over `rows` training examples drawn by `seed` (once; then read from the cache): all there are, so that whoever
    asks for a share finds its own, or, if not `whole`, those of each layer's smaller side. A language model draws its labels `draws` times (None: the
    task's number)."""
    draws = task.draws if draws is None else draws
    config = jactus.JactusConfig(union=SOURCES, union_share=0.1 if whole else 0.0, draws=draws)
    device = next(case.model.parameters()).device.type

    def calibrate(file: Path) -> None:
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            seen = calibration_batches(task, case, rows, seed)
            jactus.calibrate(case.model, seen, config, progress=False).save(file)

    how = "float32" if autocast is None else "autocast"
    if head == "fitted" and _has_head(task, case):
        head += f"-{HEAD_L2:g}"
    if not whole:
        head += "-smaller-sides"
    if config.drawn and not _has_head(task, case):
        head += f"-drawn-{draws}"
    return jactus.Statistics.load(_once(f"statistics-{task.name}-{rows}-{seed}-{head}-{how}{_on(device)}", calibrate))


def _on(device: str) -> str:
    """What a cached file's name says of the device that made it: nothing for the CPU."""
    return "" if device == "cpu" else f"-{device}"


def calibration_batches(task: Task, case: Case, rows: int, seed: int) -> list[dict]:
    """Training rows drawn by `seed`; of questions the loss is on all tokens, since the answers' are too few to calibrate on."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(case.training), generator=generator)[:rows].tolist()
    examples = case.training.texts() if isinstance(case.training, questions.Asked) else case.training
    return list(batches(examples.take(chosen), task.batch_size, seed=seed))


def _once(name: str, make: Callable[[Path], None]) -> Path:
    """The cache's file of that name, made by one process at a time, and whole or not there at all."""
    return made_once(cache_folder() / "accuracy" / f"{name}.safetensors", make)

"""What one run did, in one JSON file beside the model; the card and the page are made from it and from nothing else."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from jactus_kernels import JactusError

from ..checkpoints import storage

FILE = "jactus-run.json"
FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """A step of the run, by the name of its verb, and how long it took."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Score:
    """What the model made of the validation rows. `of`: 'dense' (its head fitted), 'compressed' (untrained), 'trained' or
    'reloaded' (folded, saved and read back). `metric` is in the run's unit; `loss` is the mean loss of a term, in nats."""

    of: str
    metric: float
    loss: float


@dataclass(frozen=True)
class Version:
    """A form of the model and what it takes: 'dense', 'training', 'deployed' or a peer such as 'LoRA'. `milliseconds` of a
    batch of validation rows, None where that was not measured."""

    of: str
    parameters: int
    trainable: int
    bytes: int
    milliseconds: float | None = None


@dataclass(frozen=True)
class Point:
    """A step of training: the mean loss since the last point and, where it was measured there, the metric on validation rows."""

    step: int
    epoch: float
    loss: float
    metric: float | None = None


@dataclass(frozen=True)
class Layer:
    """A compressed layer: where it is, its rank (None: as it was) and its spectrum in the metric, σ² of directions `at`, which
    are thinned out; `cut` weight directions were kept."""

    name: str
    m: int
    n: int
    rank: int | None
    cut: int
    at: list[int]
    energies: list[float]


@dataclass(frozen=True)
class Swept:
    """What a budget would deploy (parameters of the whole model) and the loss it is predicted to add, in nats a term."""

    budget: float
    parameters: int
    predicted: float


@dataclass(frozen=True)
class Run:
    """All of it. `metric` is 'accuracy' (parts of 1), 'perplexity' or 'loss'; `predicted` is the loss that compression was
    predicted to add, in nats a term, to be held against scores['compressed'] − scores['dense']; `data` says what was read:
    path, digest, columns, rows of each split; `checks` is what each check of the first batch found, a sentence each."""

    command: str
    base: str
    task: str
    metric: str
    data: dict[str, Any]
    config: dict[str, Any]
    recipe: dict[str, Any]
    seed: int
    created: str
    machine: str
    versions: dict[str, str]
    predicted: float
    stages: list[Stage] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    sizes: list[Version] = field(default_factory=list)
    training: list[Point] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    sweep: list[Swept] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)

    def save(self, folder: str | os.PathLike) -> None:
        """Write it into the folder, whole or not at all."""
        with storage.atomic(Path(folder) / FILE) as part:
            part.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: str | os.PathLike) -> "Run":
        """Read it back. Raises JactusError where there is none, or it is not one."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise JactusError(f"{path} is not there; `jactus fit` writes one beside its model")
        with storage.parsed(path, "record of a run"):
            read = json.loads(path.read_text(encoding="utf-8"))
            if read.pop("format") != FORMAT:
                raise ValueError(f"of another format than {FORMAT}")
            for name, kind in PARTS.items():
                read[name] = [storage.made(kind, each) for each in read[name]]
            return storage.made(Run, {f.name: read[f.name] for f in fields(Run)})


PARTS: dict[str, type] = {
    "stages": Stage,
    "scores": Score,
    "sizes": Version,
    "training": Point,
    "layers": Layer,
    "sweep": Swept,
}

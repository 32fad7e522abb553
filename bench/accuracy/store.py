"""The rows of accuracy.csv: one per cell and phase."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Cell:
    """One thing to measure. budget: deployed part of the targeted layers, 1 for the methods that keep them whole."""

    task: str
    method: str
    budget: float
    seed: int
    lr: float


@dataclass(frozen=True)
class Row:
    """One measurement, `task` or one of its sets, `task/set`. Parameters are the whole model's; `validation` is what the learning rate was chosen by."""

    KEY: ClassVar = ("task", "method", "budget", "seed", "phase", "lr")

    task: str
    method: str
    budget: float
    seed: int
    phase: str
    metric: str
    value: float
    validation: float | None
    trainable: int
    stored: int
    folded: int
    optimizer_bytes: int
    versions: str
    lr: float | None = None
    loss: float | None = None
    peak_bytes: int | None = None
    train_seconds: float | None = None

    @property
    def cell(self) -> Cell:
        return Cell(self.task, self.method, self.budget, self.seed, self.lr or 0.0)

    def __str__(self) -> str:
        """In a line, for who waits."""
        rate = "" if self.lr is None else f" lr {self.lr:g}"
        seconds = "" if self.train_seconds is None else f", {self.train_seconds:.0f} s"
        which = f"{self.task} {self.method} {self.budget:.0%} seed {self.seed}{rate} {self.phase}"
        validation = "" if self.validation is None else f" (validation {self.validation:.4f})"
        return f"{which}: {self.value:.4f}{validation}{seconds}"

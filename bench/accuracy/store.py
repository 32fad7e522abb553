"""The rows of accuracy.csv: one per cell and phase, appended as cells end, so that a killed run loses none."""

from dataclasses import dataclass


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
    """One measurement. Parameters are the whole model's; `validation` is what the learning rate was chosen by."""

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

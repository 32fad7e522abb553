"""The rows of cost.csv and its two companions."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .race import Ratio


@dataclass(frozen=True)
class Setting:
    """Under what a thing is measured. rows, length: examples in a batch and tokens in each (0: does not apply)."""

    model: str
    dtype: str = "float32"
    threads: int = 1
    rows: int = 0
    length: int = 0
    device: str = "cpu"

    def autocast(self) -> torch.autocast:
        """The context of a forward pass: bfloat16 if that is the dtype, else nothing."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")


@dataclass(frozen=True)
class Row:
    """One comparison. ratio: ours / theirs, in time or bytes: under 1 is better. floor: the same of the counted work, where
    there is a count. error: of the check of the result, relative; None where the result was not compared."""

    FILE: ClassVar = "cost.csv"
    KEY: ClassVar = ("measure", "model", "dtype", "threads", "batch", "length", "budget", "against", "device")

    measure: str
    model: str
    dtype: str
    threads: int
    batch: int
    length: int
    budget: float
    against: str
    ratio: float
    spread: float
    floor: float | None
    error: float | None
    device: str
    versions: str

    def __str__(self) -> str:
        """In a line, for who waits."""
        setting = f"{self.model} {self.dtype} {self.threads} threads {self.batch}×{self.length}"
        found = f"{self.ratio:.2f} ± {self.spread:.2f}" + ("" if self.floor is None else f", floor {self.floor:.2f}")
        return f"{self.measure}, {setting}, {self.budget:.0%} / {self.against}: {found}"


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step by category. peak: what the process grew by, weights included."""

    FILE: ClassVar = "cost-memory.csv"
    KEY: ClassVar = ("model", "dtype", "batch", "length", "method", "budget", "device")

    model: str
    dtype: str
    batch: int
    length: int
    method: str
    budget: float
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int | None
    device: str
    versions: str

    def __str__(self) -> str:
        """In a line, for who waits."""
        return f"{self.model}, {self.method} {self.budget:.0%}: {(self.peak or 0) / 1e6:.0f} MB"


@dataclass(frozen=True)
class Growth:
    """Seconds at each size of one variable, and the exponent fitted to them; the one predicted is of the counted work."""

    FILE: ClassVar = "cost-growth.csv"
    KEY: ClassVar = ("measure", "variable", "device")

    measure: str
    variable: str
    sizes: str
    relative: str
    exponent: float
    predicted: float
    device: str
    versions: str

    def __str__(self) -> str:
        """In a line, for who waits."""
        return f"{self.measure} in {self.variable}: exponent {self.exponent:.2f}"


def compared(
    measure: str,
    at: Setting,
    budget: float,
    against: str,
    found: Ratio,
    floor: float | None,
    error: float | None,
    versions: str,
) -> Row:
    """A row of what a race found."""
    return Row(
        measure, at.model, at.dtype, at.threads, at.rows, at.length, budget, against,
        found.median, found.spread, floor, error, at.device, versions,
    )  # fmt: skip

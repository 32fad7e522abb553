"""The options that belong to one stage: `Budget`, `Allocation` and `Core`; and how an option is declared and checked."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from jactus_kernels import JactusError


def option(default: Any, help: str) -> Any:
    """A field of the configuration with its default and what it means."""
    return field(default=default, metadata={"help": help})


def check(settings: Any, allowed: dict[str, bool], beside: str = "") -> None:
    """Raise JactusError for the first field that is not allowed (beside others)."""
    for name, ok in allowed.items():
        if not ok:
            help = next(f.metadata["help"] for f in fields(settings) if f.name == name)
            kind = type(settings).__name__
            raise JactusError(
                f"{kind}.{name} = {getattr(settings, name)!r} is not allowed{beside and f' beside {beside}'}. {help}"
            )


ACCOUNTINGS = ("compact", "folded", "three_factor")


@dataclass(frozen=True)
class Budget:
    """How much to keep, and of what."""

    fraction: float = option(0.8, "What to keep, as a part in (0, 1] of `unit` over `scope`.")
    unit: str = option(
        "parameters",
        "'parameters', 'bytes' (of the weights as they are, spent as stored), 'flops' (per calibration token) or 'latency': the time that one call of each "
        "layer, folded, takes for `latency_tokens`, measured while planning on the device of the weights and in their dtype "
        "(our choice; no layer gets a rank at which it is slower than dense). 'latency' needs accounting='compact'.",
    )
    accounting: str = option(
        "compact",
        "What a layer of rank r counts: 'compact' r(m+n−r), what `fold` deploys; 'folded' r(m+n), a pair of factors, as most "
        "published comparisons count; 'three_factor' r(m+n)+r², as the paper counts. A layer of full rank counts m·n, as dense. "
        "What is deployed is compact whichever is counted.",
    )
    scope: str = option(
        "targets", "'targets': the budget is of the targeted layers; 'model': of the whole model (in parameters only)."
    )
    latency_tokens: int = option(
        1, "Tokens of a call under unit='latency': 1 is decoding, batch × length a whole sequence."
    )

    def __post_init__(self) -> None:
        allowed = {
            "fraction": number(self.fraction) and 0 < self.fraction <= 1,
            "unit": self.unit in ("parameters", "bytes", "flops")
            or (self.unit == "latency" and self.accounting == "compact"),
            "accounting": self.accounting in ACCOUNTINGS,
            "scope": self.scope == "targets" or (self.scope == "model" and self.unit == "parameters"),
            "latency_tokens": whole(self.latency_tokens) and self.latency_tokens >= 1,
        }
        check(self, allowed)


@dataclass(frozen=True)
class Allocation:
    """How the budget is shared among the layers."""

    method: str = option("global", "'global' by marginal gain per unit of cost, or 'uniform'.")
    rank_floor: int = option(0, "The least rank of a layer under 'global'.")
    uniform_part: float = option(
        0.5,
        "The least rank of a layer under 'global' as a part in [0, 1] of its uniform rank; the greater of the two floors "
        "holds. A floor keeps core parameters to adapt with in layers that are easy to compress (measured).",
    )
    rank_multiple: int = option(
        16,
        "Ranks (but full ones) are multiples of this, so that rows stay aligned for tiles and vector loads. A layer whose shorter "
        "side is shorter than this stays as it is.",
    )

    def __post_init__(self) -> None:
        allowed = {
            "method": self.method in ("global", "uniform"),
            "rank_floor": whole(self.rank_floor) and self.rank_floor >= 0,
            "uniform_part": number(self.uniform_part) and 0 <= self.uniform_part <= 1,
            "rank_multiple": whole(self.rank_multiple) and self.rank_multiple >= 1,
        }
        check(self, allowed)


@dataclass(frozen=True)
class Core:
    """What trains in a layer: the core's shape and dtype."""

    width: float = option(
        1.0,
        "The longer side of a core as a multiple of the rank (our choice): so many directions, not the rank's, on the side of "
        "the layer with fewer rows, which give low ranks more to learn with. Folding multiplies them away: what is deployed is "
        "as large as ever, but what is stored and trains until then is larger, at high budgets than dense. Above 1 it needs "
        "another accounting than 'three_factor' and no trainable_rank.",
    )
    trainable_rank: int | None = option(
        None,
        "Train only this leading block of each core, task directions first; None: all of it. For cores too large for the "
        "optimizer.",
    )
    dtype: str | None = option(None, "Storage of the cores; None: the layer's dtype, at least float32.")

    def __post_init__(self) -> None:
        plain_dtype(self, "dtype")
        allowed = {
            "width": number(self.width) and self.width >= 1 and (self.width == 1 or self.trainable_rank is None),
            "trainable_rank": self.trainable_rank is None or (whole(self.trainable_rank) and self.trainable_rank >= 1),
            "dtype": self.dtype is None or is_floating(self.dtype),
        }
        check(self, allowed)


def refuse(settings: Any, name: str, beside: str) -> None:
    """Raise JactusError for a field beside others, with what it allows."""
    check(settings, {name: False}, f" beside {beside}")


def plain_dtype(settings: Any, name: str) -> None:
    """A torch.dtype by its name, so that the settings are JSON."""
    value = getattr(settings, name)
    if isinstance(value, torch.dtype):
        object.__setattr__(settings, name, str(value).removeprefix("torch."))


def number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(value: Any) -> bool:
    """Whether a value is an integer, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_floating(name: Any) -> bool:
    """Whether a value names a floating dtype of torch."""
    dtype = getattr(torch, str(name), None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point

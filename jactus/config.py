"""Everything that can be chosen, in one frozen data class; each field says what it means and who decided its default."""

import dataclasses
import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from jactus_kernels import JactusError

METRICS = ("identity", "input", "gradient", "fisher")
SOURCES = ("weight", "covariance", "gradient")


def option(default: Any, help: str) -> Any:
    """A field of the configuration with its default and what it means."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class JactusConfig:
    """The settings of the whole method. Hashable, JSON-serialisable, validated when made.

    Raises JactusError for a value out of range, naming the field, the value and what is allowed.
    """

    budget: float = option(0.8, "What to keep, as a fraction in (0, 1] of `budget_unit` over `scope`.")
    budget_unit: str = option(
        "parameters",
        "'parameters', 'bytes' (of the weights as they are, spent as stored), 'flops' (per calibration token) or 'latency': the time that one call of each "
        "layer, folded, takes for `latency_tokens`, measured while planning on the device of the weights and in their dtype "
        "(our choice; no layer gets a rank at which it is slower than dense). 'latency' needs accounting='folded'.",
    )
    accounting: str = option(
        "three_factor",
        "'three_factor' counts r(m+n)+r² a layer, what is stored while training; 'folded' counts r(m+n), what is "
        "deployed. '80%' is ambiguous without this word.",
    )
    latency_tokens: int = option(
        1, "Tokens of a call under budget_unit='latency': 1 is decoding, batch × length a whole sequence."
    )
    scope: str = option(
        "targets", "'targets': the budget is of the targeted layers; 'model': of the whole model (in parameters only)."
    )

    target_modules: str | tuple[str, ...] = option(
        "all-linear",
        "As in PEFT: 'all-linear' (every Linear or Conv1D of the base model; not the head, not the embeddings), a "
        "regular expression matched against the whole name, or a list of name endings.",
    )
    exclude_modules: str | tuple[str, ...] = option((), "Same forms as target_modules; taken away from the targets.")

    metric: str = option("fisher", "'identity' (plain SVD), 'input' (activation whitening), 'gradient' or 'fisher'.")
    damping: float = option(0.01, "λ in A + λ·mean(diag A)·I, likewise G; relative, so free of the loss's scale.")

    union: tuple[str, ...] = option(
        ("weight", "gradient"),
        "Where directions come from: 'weight' (SVD in the metric; always), 'covariance' (leading eigenvectors of G and "
        "A: the paper's), 'gradient' (leading singular vectors of the mean gradient: our addition).",
    )
    union_share: float | None = option(
        None,
        "The part of each rank given to the sources other than 'weight', in [0, 1). None: a tenth, and nothing in language "
        "models, whose loss is to be preserved (our choice; both measured).",
    )
    coordinates: str = option(
        "fisher",
        "Coordinates of the core: 'fisher' whitens the bases by the metric (by G and A under metric='fisher'), so that "
        "Adam on the core is preconditioned (our choice; the function computed is the same); 'orthonormal' does not.",
    )
    coordinate_damping: float = option(1.0, "Damping of the metric used for 'fisher' coordinates; at least `damping`.")

    step_scaling: float = option(
        0.5,
        "In 'fisher' coordinates a layer's steps are scaled by (s / geometric mean of s over the layers)**step_scaling with "
        "s = √(mean diag G · mean diag A): layers that the task's gradient reaches more strongly move faster (our choice, "
        "measured; the function computed is the same). 0 moves all alike.",
    )

    allocation: str = option("global", "'global' by marginal gain per unit of cost, or 'uniform'.")
    rank_floor: int | float = option(
        0.5,
        "The least rank of a layer under 'global': an int is a rank, a float in [0, 1] a part of the layer's uniform "
        "rank. A floor keeps core parameters to adapt with in layers that are easy to compress (measured).",
    )
    leave_dense: bool | None = option(
        None,
        "Whether a layer may stay dense where that preserves more per unit of cost than rank elsewhere; None: in language "
        "models, whose loss is to be preserved, and not where a task head trains, since a dense layer has no core to adapt "
        "with (both measured). (A budget of 1 is dense, or of full rank.)",
    )
    full_rank: bool = option(
        False,
        "Whether a layer may have its full rank where that preserves more per unit of cost than rank elsewhere (our choice, "
        "measured). It costs what the dense layer costs and folds to one, but until then it has a core as long as the layer's "
        "shorter side, and longer by the task's directions on the other, which trains: more to store and to optimize, for more "
        "to learn with and no frozen layer. In the place of leave_dense; needs accounting='folded' and no trainable_rank.",
    )
    rank_multiple: int = option(
        16, "Ranks (but full ones) are multiples of this, so that rows stay aligned for tiles and vector loads."
    )

    statistics_dtype: str = option("float32", "'float32' or 'float64': the dtype the covariances are summed in.")
    statistics_device: str | None = option(None, "Where sums are kept, e.g. 'cpu' to spare the GPU; None: the layer's.")
    memory_limit: int | None = option(
        None, "Bytes of sums held at a time. Above it, calibration takes several passes over the batches."
    )
    loss_scale: float = option(1.0, "The loss is multiplied by it before backward, and the gradients divided by it.")

    dtype: str | None = option(None, "Storage of U and V, not wider than the layer they replace; None: its dtype.")
    core_dtype: str | None = option(None, "Storage of the cores; None: the layer's dtype, at least float32.")
    trainable_extras: tuple[str, ...] = option(
        ("head",),
        "What trains beside the cores: 'head' (a task head; never the output embedding of a language model), 'bias' "
        "(of the compressed layers), or name endings of further modules (`parameter_groups` gives them rates of their own).",
    )
    core_width: float = option(
        1.0,
        "The longer side of a core as a multiple of the rank (our choice): so many directions, not the rank's, on the side of "
        "the layer with fewer rows, which give low ranks more to learn with. Folding multiplies them away: what is deployed is "
        "r(m+n) as ever, but what is stored and trains until then is larger, at high budgets than dense. Above 1 it needs "
        "accounting='folded' and no trainable_rank.",
    )
    trainable_rank: int | None = option(
        None,
        "Train only this leading block of each core, task directions first; None: all of it. For cores too large for the "
        "optimizer.",
    )

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "union", "trainable_extras"):
            value = getattr(self, name)
            if isinstance(value, str) and name in ("union", "trainable_extras"):
                object.__setattr__(self, name, (value,))  # elsewhere one string is a regular expression
            elif isinstance(value, list | set):
                object.__setattr__(self, name, tuple(value))
        for name in ("dtype", "core_dtype", "statistics_dtype", "statistics_device"):
            if isinstance(getattr(self, name), torch.dtype | torch.device):
                object.__setattr__(self, name, str(getattr(self, name)).removeprefix("torch."))
        allowed = {
            "budget": _number(self.budget) and 0 < self.budget <= 1,
            "budget_unit": self.budget_unit in ("parameters", "bytes", "flops")
            or (self.budget_unit == "latency" and self.accounting == "folded"),
            "latency_tokens": _whole(self.latency_tokens) and self.latency_tokens >= 1,
            "accounting": self.accounting in ("three_factor", "folded"),
            "scope": self.scope == "targets" or (self.scope == "model" and self.budget_unit == "parameters"),
            "target_modules": _names(self.target_modules),
            "exclude_modules": _names(self.exclude_modules),
            "metric": self.metric in METRICS,
            "damping": _number(self.damping) and self.damping > 0,
            "union": _names(self.union)
            and "weight" in self.union
            and set(self.union) <= set(SOURCES)
            and len(set(self.union)) == len(self.union),
            "union_share": self.union_share is None or (_number(self.union_share) and 0 <= self.union_share < 1),
            "coordinates": self.coordinates in ("fisher", "orthonormal"),
            "coordinate_damping": _number(self.coordinate_damping)
            and (not _number(self.damping) or self.coordinate_damping >= self.damping),
            "step_scaling": _number(self.step_scaling) and 0 <= self.step_scaling <= 1,
            "allocation": self.allocation in ("global", "uniform"),
            "rank_floor": _whole(self.rank_floor) or (_number(self.rank_floor) and self.rank_floor <= 1),
            "leave_dense": self.leave_dense is None or isinstance(self.leave_dense, bool),
            "full_rank": isinstance(self.full_rank, bool)
            and (
                not self.full_rank
                or (self.accounting == "folded" and not self.leave_dense and self.trainable_rank is None)
            ),
            "rank_multiple": _whole(self.rank_multiple) and self.rank_multiple >= 1,
            "statistics_dtype": self.statistics_dtype in ("float32", "float64"),
            "statistics_device": self.statistics_device is None or _is_device(self.statistics_device),
            "memory_limit": self.memory_limit is None or (_whole(self.memory_limit) and self.memory_limit > 0),
            "loss_scale": _number(self.loss_scale) and self.loss_scale > 0,
            "dtype": self.dtype is None or _is_floating(self.dtype),
            "core_dtype": self.core_dtype is None or _is_floating(self.core_dtype),
            "trainable_extras": _names(self.trainable_extras),
            "core_width": _number(self.core_width)
            and self.core_width >= 1
            and (self.core_width == 1 or (self.accounting == "folded" and self.trainable_rank is None)),
            "trainable_rank": self.trainable_rank is None or (_whole(self.trainable_rank) and self.trainable_rank >= 1),
        }
        for name, ok in allowed.items():
            if not ok or (name == "rank_floor" and self.rank_floor < 0):
                help = next(f.metadata["help"] for f in fields(self) if f.name == name)
                raise JactusError(f"JactusConfig.{name} = {getattr(self, name)!r} is not allowed. {help}")

    @property
    def needs_input(self) -> bool:
        """Whether calibration must sum Σ_x."""
        return self.metric in ("input", "fisher") or "covariance" in self.task_sources

    @property
    def needs_output(self) -> bool:
        """Whether calibration must sum Σ_g."""
        return self.metric in ("gradient", "fisher") or "covariance" in self.task_sources

    @property
    def needs_gradient(self) -> bool:
        """Whether calibration must sum the gradient of the weight itself."""
        return "gradient" in self.task_sources

    @property
    def share(self) -> float:
        """`union_share`; where None, that of a model which is not of language."""
        return 0.1 if self.union_share is None else self.union_share

    @property
    def task_sources(self) -> tuple[str, ...]:
        """The union's sources other than the weight; none when they get no share of the rank."""
        return tuple(s for s in self.union if s != "weight") if self.share > 0 else ()

    def with_share(self, of_language: bool) -> "JactusConfig":
        """The same with the share of the rank that `union_share=None` stands for."""
        return self.replace(union_share=0.0 if of_language and self.union_share is None else self.share)

    def basis_dtype(self, weight: torch.dtype) -> torch.dtype:
        """What U and V are stored in where a weight of that dtype stood."""
        return getattr(torch, self.dtype) if self.dtype else weight

    def replace(self, **changes: Any) -> "JactusConfig":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "JactusConfig":
        """The inverse of `to_dict`; raises JactusError for a field this version does not know."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise JactusError(f"JactusConfig has no field {sorted(unknown)}; the file is from a newer version: upgrade")
        return cls(**values)


JactusConfig.__doc__ = f"{JactusConfig.__doc__}\n" + "\n".join(
    f"    {f.name} (default {f.default!r}): {f.metadata['help']}" for f in fields(JactusConfig)
)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, tuple) and all(isinstance(v, str) and v for v in value))


def _is_floating(name: Any) -> bool:
    dtype = getattr(torch, str(name), None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _is_device(name: Any) -> bool:
    try:
        torch.device(name)
    except (RuntimeError, TypeError):
        return False
    return True

"""Everything that can be chosen, in one frozen data class; each field says what it means and who decided its default.

What belongs to one stage is in a class of its own, in `options.py`: `Budget` (how much to keep), `Allocation` (how it is shared
among the layers) and `Core` (what trains).
"""

import dataclasses
import functools
from dataclasses import dataclass, fields
from typing import Any

import torch

from jactus_kernels import JactusError

from .options import Allocation, Budget, Core, check, is_floating, number, option, plain_dtype, refuse

METRICS = ("identity", "input", "gradient", "fisher")
SOURCES = ("weight", "covariance", "gradient")


@dataclass(frozen=True)
class JactusConfig:
    """The settings of the method. Hashable, JSON-serialisable, validated when made.

    `budget=0.5` stands for Budget(0.5), `allocation="uniform"` for Allocation("uniform").
    Raises JactusError for a value out of range, naming the field, the value and what is allowed.
    """

    # `Any`: made with a number or a `Budget`, always read as a `Budget`; likewise the allocation.
    budget: Any = option(Budget(), "What to keep: a number, or a `Budget` with its unit, accounting and scope.")

    target_modules: str | tuple[str, ...] = option(
        "all-linear",
        "As in PEFT: 'all-linear' (every Linear or Conv1D of the base model; not the head, not the embeddings), a "
        "regular expression matched against the whole name, or a list of name endings.",
    )
    exclude_modules: str | tuple[str, ...] = option((), "Same forms as target_modules; taken away from the targets.")

    metric: str = option("fisher", "'identity' (plain SVD), 'input' (activation whitening), 'gradient' or 'fisher'.")
    draws: int = option(
        1,
        "How many labels a model draws, from what it predicts, for each token that it is calibrated on; 0: the labels of the data, as for "
        "every loss that is no mean cross-entropy of one label a token (found on the first batch), and where mean gradients are wanted.",
    )
    damping: float = option(0.01, "λ in A + λ·mean(diag A)·I, likewise G; relative, so free of the loss's scale.")

    union: tuple[str, ...] = option(
        ("weight", "gradient"),
        "Where directions come from: 'weight' (SVD in the metric; always), 'covariance' (leading eigenvectors of G and "
        "A: the paper's), 'gradient' (leading singular vectors of the mean gradient: our addition).",
    )
    union_share: float = option(
        0.0,
        "The part of each rank given to the sources other than 'weight', in [0, 1). 0: none, since what a share gave "
        "was within the noise, and calibration then needs less memory (our choice; the paper's union has one).",
    )
    allocation: Any = option(
        Allocation(), "How the budget is shared among layers: 'global', 'uniform', or an `Allocation` with its floors."
    )

    core: Core = option(Core(), "What trains in a layer: a `Core` with its width and dtype.")
    dtype: str | None = option(None, "Storage of U and V, not wider than the layer they replace; None: its dtype.")
    trainable_extras: tuple[str, ...] = option(
        ("head",),
        "What trains beside the cores: 'head' (a task head; never the output embedding of a language model), 'bias' "
        "(of the compressed layers), or name endings of further modules (`parameter_groups` gives them rates of their own).",
    )

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            object.__setattr__(self, "budget", Budget(self.budget))
        if isinstance(self.allocation, str):
            object.__setattr__(self, "allocation", Allocation(self.allocation))
        for name in ("target_modules", "exclude_modules", "union", "trainable_extras"):
            value = getattr(self, name)
            if isinstance(value, str) and name in ("union", "trainable_extras"):
                object.__setattr__(self, name, (value,))  # elsewhere one string is a regular expression
            elif isinstance(value, list | set):
                object.__setattr__(self, name, tuple(sorted(value) if isinstance(value, set) else value))
        plain_dtype(self, "dtype")
        grouped = isinstance(self.allocation, Allocation) and isinstance(self.core, Core)
        square = grouped and self.core.trainable_rank is None and self.budget.accounting != "three_factor"
        allowed = {
            "target_modules": _names(self.target_modules),
            "exclude_modules": _names(self.exclude_modules),
            "metric": self.metric in METRICS,
            "draws": isinstance(self.draws, int) and not isinstance(self.draws, bool) and self.draws >= 0,
            "damping": number(self.damping) and self.damping > 0,
            "union": _names(self.union)
            and "weight" in self.union
            and set(self.union) <= set(SOURCES)
            and len(set(self.union)) == len(self.union),
            "union_share": number(self.union_share) and 0 <= self.union_share < 1,
            "allocation": isinstance(self.allocation, Allocation),
            "core": isinstance(self.core, Core),
            "dtype": self.dtype is None or is_floating(self.dtype),
            "trainable_extras": _names(self.trainable_extras),
        }
        check(self, allowed)
        beside = f"accounting={self.budget.accounting!r} and trainable_rank={self.core.trainable_rank}"
        if self.core.width > 1 and not square:
            refuse(self.core, "width", beside)

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
    def drawn(self) -> int:
        """How often labels may be drawn for Σ_g: the mean gradient of labels drawn is none, so not where that is summed too."""
        return self.draws if self.needs_output and not self.needs_gradient else 0

    @property
    def smaller_sides(self) -> bool:
        """Whether sums of the smaller side of each layer are enough: where no task directions are wanted."""
        return not self.task_sources

    @property
    def task_sources(self) -> tuple[str, ...]:
        """The union's sources other than the weight; none when they get no share of the rank."""
        return tuple(s for s in self.union if s != "weight") if self.union_share > 0 else ()

    def basis_dtype(self, weight: torch.dtype) -> torch.dtype:
        """What U and V are stored in where a weight of that dtype stood."""
        return getattr(torch, self.dtype) if self.dtype else weight

    def replace(self, **changes: Any) -> "JactusConfig":
        """A copy with some fields changed, validated again.

        A number for the budget changes its fraction alone, a word for the allocation its method alone. One field of a group
        may be given by its flat name: budget_unit, accounting, scope, latency_tokens, rank_floor, uniform_part, rank_multiple,
        core_width, trainable_rank, core_dtype.
        """
        _refuse_gone(changes)
        inside: dict[str, dict[str, Any]] = {}
        for name in list(changes):
            group, key = FLAT.get(name, (name, ""))
            if key and not isinstance(changes[name], Budget | Allocation):
                inside.setdefault(group, {})[key] = changes.pop(name)
        for group, values in inside.items():
            changes[group] = dataclasses.replace(changes.get(group, getattr(self, group)), **values)
        unknown = set(changes) - {f.name for f in fields(self)}
        if unknown:
            raise JactusError(
                f"JactusConfig has no field {sorted(unknown)}; its fields: {[f.name for f in fields(self)]}"
            )
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the groups as dictionaries in it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "JactusConfig":
        """The inverse of `to_dict`, which also reads the flat options of version 0.1.0; raises JactusError for a field this
        version does not know."""
        values = {name: value for name, value in values.items() if name not in (*OF_A_RUN, *GONE)}
        if "rank_floor" in values:  # one name for two things: a rank, or a part of the uniform rank
            floor = values.pop("rank_floor")
            values |= (
                {"uniform_part": floor, "rank_floor": 0}
                if isinstance(floor, float)
                else {"uniform_part": 0.0, "rank_floor": floor}
            )
        groups = {}
        for name, kind in GROUPS.items():
            if isinstance(values.get(name), dict):
                held = {key: value for key, value in values.pop(name).items() if key not in GONE}
                _refuse_unknown(set(held) - {f.name for f in fields(kind)}, kind.__name__)
                groups[name] = kind(**held)
        _refuse_unknown(set(values) - {f.name for f in fields(cls)} - set(FLAT), "JactusConfig")
        return cls(**groups).replace(**values)


GROUPS: dict[str, type] = {"budget": Budget, "allocation": Allocation, "core": Core}
# One field of a group by a name of its own: what these were called in version 0.1.0, before there were groups.
FLAT = {
    "budget": ("budget", "fraction"),
    "budget_unit": ("budget", "unit"),
    "accounting": ("budget", "accounting"),
    "scope": ("budget", "scope"),
    "latency_tokens": ("budget", "latency_tokens"),
    "allocation": ("allocation", "method"),
    "rank_floor": ("allocation", "rank_floor"),
    "uniform_part": ("allocation", "uniform_part"),
    "rank_multiple": ("allocation", "rank_multiple"),
    "core_width": ("core", "width"),
    "trainable_rank": ("core", "trainable_rank"),
    "core_dtype": ("core", "dtype"),
}
_NO_RANK = (
    "every layer may have any rank up to its full one, at which it is deployed as large as it was dense, and its core trains; to keep "
    "a layer as it is, name it in exclude_modules"
)
_NO_COORDINATES = "bases are orthonormal; the function computed is the same"
GONE = dict.fromkeys(("leave_dense", "full_rank"), _NO_RANK) | dict.fromkeys(
    ("coordinates", "coordinate_damping", "step_scaling"), _NO_COORDINATES
)
OF_A_RUN = ("statistics_dtype", "statistics_device", "memory_limit", "loss_scale")  # arguments of `calibrate` since


def _refuse_gone(names: Any) -> None:
    if found := [name for name in names if name in GONE]:
        raise JactusError(f"there is no option {found[0]} any more: {GONE[found[0]]}")


def _refuse_unknown(names: set[str], kind: str) -> None:
    if names:
        raise JactusError(f"{kind} has no field {sorted(names)}; the file is from a newer version: upgrade")


def _with_advice(init: Any) -> Any:
    @functools.wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        moved = [name for name in options if name in FLAT and name not in ("budget", "allocation")]
        moved += [name for name in options if name in OF_A_RUN]
        if moved:
            name = moved[0]
            group, key = FLAT.get(name, ("", ""))
            now = f"JactusConfig({group}={GROUPS[group].__name__}({key}=…))" if group else f"calibrate(…, {name}=…)"
            raise JactusError(
                f"JactusConfig has no option {name} since 0.1.0: it is {now}, or replace({name}=…) of a config"
            )
        init(self, *args, **options)

    return checked


def _without_gone(init: Any) -> Any:
    @functools.wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        _refuse_gone(options)
        init(self, *args, **options)

    return checked


JactusConfig.__init__ = _with_advice(JactusConfig.__init__)  # type: ignore[method-assign]
for _kind in (JactusConfig, *GROUPS.values()):
    _kind.__init__ = _without_gone(_kind.__init__)  # type: ignore[misc]
    _kind.__doc__ = f"{_kind.__doc__}\n" + "\n".join(
        f"    {f.name} (default {f.default!r}): {f.metadata['help']}" for f in fields(_kind)
    )


def _names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, tuple) and all(isinstance(v, str) and v for v in value))

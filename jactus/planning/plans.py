"""A plan: every layer's spectrum, its directions, and the ranks that a budget gives; enough to compress with.

Made once per calibration. `plan.at(0.6)` re-allocates from the spectra alone, so sweeping budgets costs nothing.
"""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np
from torch import Tensor

from jactus_kernels import JactusError

from ..checkpoints import storage
from ..config import JactusConfig
from ..model.lowrank import core_shape
from .allocation import Offer, admissible_ranks, allocate, parameters
from .latency import Times
from .subspace import PARTS, Directions, Side, task_rank


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan. `times` are of the layer deployed, measured where the budget is of latency."""

    name: str
    m: int
    n: int
    fingerprint: str
    directions: Directions
    tokens: int
    sizes: tuple[int, int, int]  # bytes per element of the bases, of the core and of the dense weight
    times: Times | None = None

    @property
    def energies(self) -> Tensor:
        """σ² (min(m, n),), float64: the loss that dropping each weight direction costs, times two."""
        return self.directions.sigma.double().square()

    def offer(self, config: JactusConfig, of_language: bool = False) -> Offer:
        """The layer's admissible ranks with what they cost and gain under `config`. `of_language`: a layer whose plan has fewer
        directions than its full rank, as those of before it could have it, may stay as it is in the place of it."""
        m, n, accounting = self.m, self.n, config.budget.accounting
        ranks = admissible_ranks(m, n, config.allocation.rank_multiple, accounting)
        kept = self.directions.kept
        ranks = ranks[(ranks <= kept) | ((ranks == min(m, n)) & of_language)] if kept else ranks[-1:]
        gains = np.concatenate([[0.0], np.cumsum(self.energies.numpy())])
        gain = gains[[self.weight_rank(int(r), config) for r in ranks]]
        basis, core, whole = self.sizes
        if config.budget.unit == "latency":
            cost, dense = self._timed.at(ranks), self._timed.dense
        elif config.budget.unit == "bytes":
            cost = parameters(m, n, ranks, "folded" if accounting == "three_factor" else accounting) * basis
            cost += ranks * ranks * core if accounting == "three_factor" else 0
            dense = m * n * whole
        else:
            # FLOPs are 2 a parameter and token; layers differ in how many tokens reach them
            each = 2 * self.tokens if config.budget.unit == "flops" else 1
            cost, dense = parameters(m, n, ranks, accounting) * each, m * n * each
        cost = np.where(ranks == min(m, n), dense, cost)
        pays = (cost < dense) | (
            ranks == min(m, n)
        )  # in time or bytes a rank may cost more than the layer it would replace
        return Offer(self.name, ranks[pays], cost[pays].astype(float), gain[pays], float(dense))

    @property
    def _timed(self) -> Times:
        if self.times is None:
            raise JactusError(f"the plan has no times of {self.name}; plan again with Budget(unit='latency')")
        return self.times

    def width(self, rank: int, config: JactusConfig) -> int:
        """The longer side of the core at a rank."""
        return core_width(rank, self.m, self.n, config)

    def core_parameters(self, rank: int, config: JactusConfig) -> int:
        """What trains at a rank."""
        return rank * self.width(rank, config)

    def stored_parameters(self, rank: int, config: JactusConfig) -> int:
        """U, C and V at a rank: what is stored while training."""
        p, q = core_shape(self.m, self.n, rank, self.width(rank, config))
        return self.m * p + self.n * q + p * q

    def folded_parameters(self, rank: int) -> int:
        """What is deployed at a rank."""
        return int(parameters(self.m, self.n, rank))

    def seconds(self, rank: int | None) -> float:
        """What a call of the layer takes, folded, at a rank (None: dense). Raises JactusError where that was not measured."""
        dense = rank is None or self.is_full(rank)
        return self._timed.dense if dense else float(self._timed.at(np.array([rank]))[0])

    def is_full(self, rank: int) -> bool:
        """Whether that is the layer's full rank, at which it folds to a dense layer."""
        return rank == min(self.m, self.n)

    def weight_rank(self, rank: int, config: JactusConfig) -> int:
        """How many of `rank` directions a side are weight directions."""
        return rank - task_rank(rank, self.share(rank, config))

    def share(self, rank: int, config: JactusConfig) -> float:
        """The part of a rank that task directions take from weight directions: none where the layer has none of them, or
        its full rank."""
        return config.union_share if self.directions.task_core.numel() and not self.is_full(rank) else 0.0


REALLOCATES = ("budget", "allocation", "core", "trainable_extras")


def makes_spectra(config: JactusConfig) -> dict[str, Any]:
    """What of a configuration decides a plan's spectra and directions, and not only its ranks, in plain values."""
    timed = config.budget.latency_tokens if config.budget.unit == "latency" else None
    beside = {
        "rank_multiple": config.allocation.rank_multiple,
        "core_dtype": config.core.dtype,
        "latency_tokens": timed,
    }
    return {name: value for name, value in config.to_dict().items() if name not in REALLOCATES} | beside


def _setting(config: JactusConfig, name: str) -> Any:
    return attrgetter(name)(config)


def core_width(rank: int, m: int, n: int, config: JactusConfig) -> int:
    """The longer side of a core: config.core.width · rank, up to the next multiple; not more than the layer's shorter side."""
    wanted = min(config.core.width * rank - 1e-9, m, n)
    return max(rank, min(math.ceil(wanted / config.allocation.rank_multiple) * config.allocation.rank_multiple, m, n))


@dataclass(frozen=True)
class Plan:
    """Ranks for every target layer (None: stays as it is), and what they cost. `of_language`: the model is one of language;
    `outputs`: layers that compute what it returns."""

    layers: dict[str, PlannedLayer]
    config: JactusConfig
    ranks: dict[str, int | None]
    other_parameters: int
    of_language: bool = False
    outputs: tuple[str, ...] = ()

    def at(self, budget: float) -> "Plan":
        """The same spectra under another budget: instant, without model or data. Raises JactusError as JactusConfig."""
        return self.with_config(budget=budget)

    def with_config(self, **changes: Any) -> "Plan":
        """The same spectra allocated under other settings: of `budget`, `allocation`, `core` and `trainable_extras`, or a smaller
        `union_share`; changes as `JactusConfig.replace` takes them.

        Raises JactusError as JactusConfig, and for a setting that made the spectra: metric, damping, union, targets, dtypes.
        """
        before, config = self.config, self.config.replace(**changes)
        made = [f.name for f in fields(config) if f.name not in REALLOCATES]
        changed = [name for name in made if getattr(config, name) != getattr(before, name)]
        if "union_share" in changed and config.union_share < before.union_share:
            changed.remove("union_share")
        if config.core.dtype != before.core.dtype:
            changed.append("core.dtype")
        if changed:
            raise JactusError(
                f"Plan.with_config: the plan was made under {changed[0]}={_setting(before, changed[0])!r}, which decides its "
                f"spectra or sizes and not only ranks, so {_setting(config, changed[0])!r} needs a plan of its own: jactus.plan "
                "with that configuration"
            )
        return with_ranks(replace(self, config=config))

    @cached_property
    def dense_parameters(self) -> int:
        """Weights of the targeted layers before."""
        return sum(layer.m * layer.n for layer in self.layers.values())

    def _total(self, of: Callable[[PlannedLayer, int], int]) -> int:
        """The sum over the targeted layers of `of(layer, rank)`, those that stay in full."""
        pairs = [(layer, self.ranks[name]) for name, layer in self.layers.items()]
        return sum(layer.m * layer.n if rank is None else of(layer, rank) for layer, rank in pairs)

    @property
    def stored_parameters(self) -> int:
        """Weights of the targeted layers while they train: Σ r(m+n)+r² with square cores."""
        return self._total(lambda layer, rank: layer.stored_parameters(rank, self.config))

    @property
    def folded_parameters(self) -> int:
        """Weights of the targeted layers once folded: Σ r(m+n−r)."""
        return self._total(PlannedLayer.folded_parameters)

    @property
    def core_parameters(self) -> int:
        """Parameters of all cores: what trains."""
        ranks = self.ranks.items()
        return sum(self.layers[name].core_parameters(rank, self.config) for name, rank in ranks if rank is not None)

    @property
    def predicted_loss(self) -> float:
        """½ Σ of the squared singular values left out: the rise of the mean loss per term by the quadratic model.

        An upper bound within that model: what task directions happen to preserve is not counted.
        """
        lost = 0.0
        for name, layer in self.layers.items():
            rank = self.ranks[name]
            if rank is not None:
                lost += float(layer.energies[layer.weight_rank(rank, self.config) :].sum())
        return lost / 2

    @property
    def predicted_time(self) -> float:
        """What calls of all targeted layers take, folded, as a part of what they take dense; measured while planning.

        Raises JactusError where the plan was made for another unit than latency.
        """
        layers = self.layers.items()
        return sum(layer.seconds(self.ranks[name]) for name, layer in layers) / sum(
            layer.seconds(None) for _, layer in layers
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, atomically. Raises JactusError when the disk refuses."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            tensors |= {f"{key}/{name}": t for key, t in _tensors(layer.directions).items()}
        described = {
            name: {k: getattr(layer, k) for k in ("m", "n", "fingerprint", "tokens", "sizes")}
            | {"times": layer.times and asdict(layer.times)}
            for name, layer in self.layers.items()
        }
        meta = {
            "config": self.config.to_dict(),
            "layers": described,
            "other_parameters": self.other_parameters,
            "of_language": self.of_language,
            "outputs": list(self.outputs),
        }
        storage.write(path, "plan", tensors, meta)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Read what `save` wrote. Raises JactusError for a missing, truncated, corrupted or newer file."""
        tensors, meta = storage.read(path, "plan")
        with storage.parsed(path, "plan"):
            return cls._from_tensors(tensors, meta)

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> "Plan":
        layers = {}
        for name, kept in meta["layers"].items():
            of = {key.split("/", 1)[0]: t for key, t in tensors.items() if key.split("/", 1)[1] == name}
            left, right = (Side(*(of[f"{side}_{part}"] for part in PARTS)) for side in ("left", "right"))
            # plans of before bytes of the dense weight were told apart took them to be those of the bases
            kept |= {"sizes": (*kept["sizes"], kept["sizes"][0])[:3]}
            # 0.1.0: of the longer side at full rank, which has no task directions any more; and of whitened coordinates
            kept = {key: value for key, value in kept.items() if key not in ("beyond", "scales")}
            if times := kept.pop("times", None):  # plans of before there were any have none
                times = {key: tuple(value) if isinstance(value, list) else value for key, value in times.items()}
                kept["times"] = storage.made(Times, times)
            found = Directions(left, right, of["sigma"], of["task_core"])
            layers[name] = storage.made(PlannedLayer, {"name": name, "directions": found, **kept})
            _refuse_misshapen(layers[name])
        config = JactusConfig.from_dict(meta["config"])
        counts = {"other_parameters": meta["other_parameters"], "of_language": meta.get("of_language", False)}
        made = storage.made(
            cls, {**counts, "outputs": tuple(meta.get("outputs", ())), "layers": layers, "config": config, "ranks": {}}
        )
        return with_ranks(made)

    def __str__(self) -> str:
        return _table(self)


def _refuse_misshapen(layer: PlannedLayer) -> None:
    """Raise ValueError where tensors of a file are not of the layer's shape: nothing is to be made as large as it only says."""
    m, n, d = layer.m, layer.n, layer.directions
    wanted: dict[str, tuple[int, ...]] = {"sigma": (min(m, n),)}
    for side, rows in (("left", m), ("right", n)):
        weight, task = (getattr(d, side).weight.shape[-1:], getattr(d, side).task.shape[-1:])
        wanted |= {f"{side}_weight": (rows, *weight), f"{side}_task": (rows, *task)}
        wanted |= {f"{side}_cross": (*weight, *task), f"{side}_gram": (*task, *task)}
    wanted["task_core"] = (*d.left.task.shape[-1:], *d.right.task.shape[-1:])
    for name, tensor in _tensors(d).items():
        if not tensor.is_floating_point() or tensor.shape != wanted[name]:
            raise ValueError(f"{name} of {layer.name} ({m}×{n}) is {tuple(tensor.shape)} of {tensor.dtype}")


def _tensors(d: Directions) -> dict[str, Tensor]:
    sides = {f"{side}_{part}": getattr(getattr(d, side), part) for side in ("left", "right") for part in PARTS}
    return {**sides, "sigma": d.sigma, "task_core": d.task_core}


def with_ranks(plan: Plan) -> Plan:
    """The plan with ranks for its configured budget, from its spectra."""
    config = plan.config
    offers = [layer.offer(config, plan.of_language) for layer in plan.layers.values()]
    fraction = config.budget.fraction
    if config.budget.scope == "model":
        kept = config.budget.fraction * (plan.dense_parameters + plan.other_parameters) - plan.other_parameters
        fraction = kept / plan.dense_parameters
        if fraction <= 0:
            raise JactusError(
                f"budget={config.budget.fraction} of the whole model leaves nothing for the targeted layers: what is not targeted "
                f"(embeddings, norms, heads) is {plan.other_parameters} parameters already; raise it or use scope='targets'"
            )
        fraction = min(fraction, 1.0)
    budget = fraction * sum(o.dense_cost for o in offers)
    how = config.allocation
    if fraction < 1:
        chosen = allocate(offers, budget, fraction, how.method == "uniform", how.rank_floor, how.uniform_part)
        ranks = {o.name: int(o.ranks[c]) for o, c in zip(offers, chosen)}
    else:  # nothing to save, and nothing lost
        ranks = {name: min(layer.m, layer.n) for name, layer in plan.layers.items()}
    has = {name: layer.directions.kept for name, layer in plan.layers.items()}
    return replace(plan, ranks={name: rank if rank <= has[name] else None for name, rank in ranks.items()})


def _table(plan: Plan) -> str:
    """A plan as text: one line a layer, then what it all costs."""
    wide = max(map(len, plan.layers))
    lines = [f"{'layer':<{wide}}  {'shape':>12}  {'rank':>5}  kept"]
    for name, layer in plan.layers.items():
        rank = plan.ranks[name]
        energy = layer.energies
        weight_rank = len(energy) if rank is None else layer.weight_rank(rank, plan.config)
        kept = float(energy[:weight_rank].sum() / energy.sum()) if float(energy.sum()) else 1.0
        shape = f"{layer.m}×{layer.n}"
        lines.append(f"{name:<{wide}}  {shape:>12}  {'dense' if rank is None else rank:>5}  {kept:.4f}")
    dense = plan.dense_parameters
    lines.append(
        f"targeted weights {dense:,}; deployed {plan.folded_parameters:,} ({plan.folded_parameters / dense:.1%}), stored while "
        f"training {plan.stored_parameters:,} ({plan.stored_parameters / dense:.1%}), cores {plan.core_parameters:,}; predicted "
        f"rise of the loss before training {plan.predicted_loss:.4g}"
    )
    if plan.config.budget.unit == "latency":
        lines[-1] += f"; measured time of these layers {plan.predicted_time:.1%} of dense"
    return "\n".join(lines)

"""A plan: every layer's spectrum, its directions, and the ranks that a budget gives; enough to compress with.

Made once per calibration. `plan.at(0.6)` re-allocates from the spectra alone, so sweeping budgets costs nothing.
"""

import os
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from jactus_kernels import JactusError

from . import storage
from .allocation import Offer, admissible_ranks, allocate, parameters
from .config import JactusConfig
from .statistics import Statistics
from .subspace import Directions, Side, directions, metric_factor, task_rank
from .targets import Target, find_targets


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan. `scales` are the mean diagonals of G and A (0 where the metric is the identity)."""

    name: str
    m: int
    n: int
    fingerprint: str
    directions: Directions
    scales: tuple[float, float]
    tokens: int
    sizes: tuple[int, int]  # bytes per element of the bases and of the core

    @property
    def energies(self) -> Tensor:
        """σ² (min(m, n),), float64: the loss that dropping each weight direction costs, times two."""
        return self.directions.sigma.double().square()

    def offer(self, config: JactusConfig) -> Offer:
        """The layer's admissible ranks with what they cost and gain under `config`."""
        m, n = self.m, self.n
        folded = config.accounting == "folded"
        ranks = admissible_ranks(m, n, config.rank_multiple, folded)
        kept = np.concatenate([[0.0], np.cumsum(self.energies.numpy())])
        weight_ranks = ranks - np.array([task_rank(int(r), self.share(config)) for r in ranks], dtype=int)
        gain = kept[np.minimum(weight_ranks, len(kept) - 1)]
        basis, core = self.sizes
        if config.budget_unit == "bytes":
            cost = parameters(m, n, ranks, True) * basis + (0 if folded else ranks * ranks * core)
            dense = m * n * basis
        else:
            # FLOPs are 2 a parameter and token; layers differ in how many tokens reach them
            each = 2 * self.tokens if config.budget_unit == "flops" else 1
            cost, dense = parameters(m, n, ranks, folded) * each, m * n * each
        ends_dense = config.leave_dense or not len(ranks)
        if ends_dense:
            ranks, cost, gain = np.append(ranks, min(m, n)), np.append(cost, dense), np.append(gain, kept[-1])
        return Offer(self.name, ranks, cost.astype(float), gain, ends_dense, float(dense))

    def share(self, config: JactusConfig) -> float:
        """The part of the rank that goes to task directions: none where the layer has none."""
        return config.union_share if self.directions.task_core.numel() else 0.0


@dataclass(frozen=True)
class Plan:
    """Ranks for every target layer (None: stays dense), and what they cost."""

    layers: dict[str, PlannedLayer]
    config: JactusConfig
    ranks: dict[str, int | None]
    other_parameters: int

    def at(self, budget: float) -> "Plan":
        """The same spectra under another budget: instant, without model or data. Raises JactusError as JactusConfig."""
        return _with_ranks(replace(self, config=self.config.replace(budget=budget)))

    @cached_property
    def dense_parameters(self) -> int:
        """Weights of the targeted layers before."""
        return sum(layer.m * layer.n for layer in self.layers.values())

    def _count(self, folded: bool) -> int:
        total = 0
        for name, layer in self.layers.items():
            rank = self.ranks[name]
            total += layer.m * layer.n if rank is None else int(parameters(layer.m, layer.n, rank, folded))
        return total

    @property
    def stored_parameters(self) -> int:
        """Weights of the targeted layers with their cores: Σ r(m+n)+r², dense layers in full."""
        return self._count(folded=False)

    @property
    def folded_parameters(self) -> int:
        """Weights of the targeted layers once folded: Σ r(m+n), dense layers in full."""
        return self._count(folded=True)

    @property
    def core_parameters(self) -> int:
        """Parameters of all cores: what trains."""
        return sum(r * r for r in self.ranks.values() if r is not None)

    @property
    def predicted_loss(self) -> float:
        """½ Σ of the squared singular values left out: the rise of the mean loss per term by the quadratic model.

        An upper bound within that model: what task directions happen to preserve is not counted.
        """
        lost = 0.0
        for name, layer in self.layers.items():
            rank = self.ranks[name]
            if rank is not None:
                lost += float(layer.energies[rank - task_rank(rank, layer.share(self.config)) :].sum())
        return lost / 2

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, atomically. Raises JactusError when the disk refuses."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            tensors |= {f"{key}/{name}": t for key, t in _tensors(layer.directions).items()}
        described = {
            name: {k: getattr(layer, k) for k in ("m", "n", "fingerprint", "scales", "tokens", "sizes")}
            for name, layer in self.layers.items()
        }
        meta = {"config": self.config.to_dict(), "layers": described, "other_parameters": self.other_parameters}
        storage.write(path, "plan", tensors, meta)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Read what `save` wrote. Raises JactusError for a missing, truncated, corrupted or newer file."""
        tensors, meta = storage.read(path, "plan")
        layers = {}
        for name, kept in meta["layers"].items():
            of = {key.split("/", 1)[0]: t for key, t in tensors.items() if key.split("/", 1)[1] == name}
            left, right = (Side(*(of[f"{side}_{part}"] for part in _PARTS)) for side in ("left", "right"))
            kept |= {key: tuple(kept[key]) for key in ("scales", "sizes")}
            layers[name] = PlannedLayer(name, directions=Directions(left, right, of["sigma"], of["task_core"]), **kept)
        return _with_ranks(cls(layers, JactusConfig.from_dict(meta["config"]), {}, meta["other_parameters"]))

    def __str__(self) -> str:
        from .report import plan_table

        return plan_table(self)


_PARTS = ("weight", "task", "cross", "gram")


def _tensors(d: Directions) -> dict[str, Tensor]:
    sides = {f"{side}_{part}": getattr(getattr(d, side), part) for side in ("left", "right") for part in _PARTS}
    return {**sides, "sigma": d.sigma, "task_core": d.task_core}


def plan(
    model: nn.Module, statistics: Statistics | None, config: JactusConfig | None = None, *, progress: bool = True
) -> Plan:
    """Spectra and directions of every target layer in the configured metric, and ranks for the configured budget.

    statistics: from `calibrate` on this very model; None is enough for metric='identity', union=('weight',).

    Raises JactusError when the statistics are of another model or configuration, or weights are not finite.
    """
    config = config or JactusConfig()
    targets = find_targets(model, config)
    needs_any = config.needs_input or config.needs_output or config.needs_gradient
    if statistics is None and needs_any:
        raise JactusError("plan needs statistics for this configuration; call jactus.calibrate first")
    if statistics is not None:
        _check_statistics(targets, statistics, config)
    roots = _RootCache(statistics, config)
    layers = {}
    for name, target in tqdm(targets.items(), "planning", unit="layer", disable=not progress):
        layers[name] = _plan_layer(target, statistics if needs_any else None, config, roots)
    counted = sum(t.m * t.n for t in targets.values())
    others = sum(p.numel() for p in model.parameters()) - counted
    return _with_ranks(Plan(layers, config, {}, others))


def _check_statistics(targets: dict[str, Target], statistics: Statistics, config: JactusConfig) -> None:
    for name, target in targets.items():
        known = statistics.layers.get(name)
        if known is None:
            raise JactusError(f"{target} is not in the statistics; calibrate with the same target_modules")
        if known.fingerprint != target.fingerprint:
            raise JactusError(
                f"{target}: the statistics are of a model with other weights here; calibrate this model (and plan before "
                "training it, not after)"
            )
        missing = (
            (config.needs_input and statistics.input_covariance(name) is None, "input covariances"),
            (config.needs_output and statistics.output_covariance(name) is None, "output-gradient covariances"),
            (config.needs_gradient and statistics.mean_gradient(name) is None, "mean gradients"),
        )
        for absent, what in missing:
            if absent:
                raise JactusError(f"the statistics hold no {what}, which this configuration needs; calibrate with it")


class _RootCache:
    """The factor of A and A itself, kept while consecutive layers share one input."""

    def __init__(self, statistics: Statistics | None, config: JactusConfig) -> None:
        self.statistics, self.config = statistics, config
        self.key: str | None = None
        self.value: tuple[Tensor | None, Tensor | None] = (None, None)

    def input(self, target: Target) -> tuple[Tensor | None, Tensor | None]:
        """A and its damped Cholesky factor (None for the identity metric), on the weight's device."""
        if self.statistics is None or not self.config.needs_input:
            return None, None
        key = self.statistics.layers[target.name].inputs
        if key != self.key:
            A = self.statistics.input_covariance(target.name)
            used = A if self.config.metric in ("input", "fisher") else None
            self.key, self.value = key, (A, _factor(target, used, target.n, self.config))
        return self.value


def _factor(target: Target, covariance: Tensor | None, size: int, config: JactusConfig) -> Tensor | None:
    try:
        return metric_factor(covariance, config.damping, size, target.weight.device)
    except (JactusError, torch.linalg.LinAlgError) as e:
        raise JactusError(f"{target}: {e}") from e


def _plan_layer(target: Target, statistics: Statistics | None, config: JactusConfig, roots: _RootCache) -> PlannedLayer:
    weight = target.weight
    if not torch.isfinite(weight).all():
        raise JactusError(f"{target} has weights that are not finite; the checkpoint is broken")
    A, L_A = roots.input(target)
    G = statistics.output_covariance(target.name) if statistics is not None and config.needs_output else None
    L_G = _factor(target, G if config.metric in ("gradient", "fisher") else None, target.m, config)
    ranks = admissible_ranks(target.m, target.n, config.rank_multiple, config.accounting == "folded")
    most = int(ranks[-1]) if len(ranks) else 0
    by_covariance = "covariance" in config.task_sources
    found = directions(
        weight,
        L_G,
        L_A,
        keep=most,
        tasks=task_rank(most, config.union_share) if config.task_sources else 0,
        output_covariance=G if by_covariance else None,
        input_covariance=A if by_covariance else None,
        gradient=statistics.mean_gradient(target.name) if statistics is not None and config.needs_gradient else None,
    )
    basis = getattr(torch, config.dtype) if config.dtype else weight.dtype
    return PlannedLayer(
        target.name,
        target.m,
        target.n,
        target.fingerprint,
        _stored(found),
        (_scale(G) if L_G is not None else 0.0, _scale(A) if L_A is not None else 0.0),
        statistics.layer_tokens(target.name) if statistics is not None else 1,
        (basis.itemsize, core_dtype(config, basis).itemsize),
    )


def core_dtype(config: JactusConfig, basis: torch.dtype) -> torch.dtype:
    """The dtype a core is stored in beside bases of dtype `basis`: at least float32 unless configured."""
    if config.core_dtype:
        return getattr(torch, config.core_dtype)
    return torch.promote_types(basis, torch.float32)


def _scale(S: Tensor | None) -> float:
    return 0.0 if S is None else float(S.diagonal().double().mean())


def _stored(d: Directions) -> Directions:
    """On the CPU, directions in float32, the small matrices in float64: a plan is as large as the weights it replaces."""

    def small(side: Side) -> Side:
        return Side(side.weight.float().cpu(), side.task.float().cpu(), side.cross.cpu(), side.gram.cpu())

    return Directions(small(d.left), small(d.right), d.sigma.cpu(), d.task_core.cpu())


def _with_ranks(plan: Plan) -> Plan:
    config = plan.config
    offers = [layer.offer(config) for layer in plan.layers.values()]
    fraction = config.budget
    if config.scope == "model":
        kept = config.budget * (plan.dense_parameters + plan.other_parameters) - plan.other_parameters
        fraction = kept / plan.dense_parameters
        if fraction <= 0:
            raise JactusError(
                f"budget={config.budget} of the whole model leaves nothing for the targeted layers: what is not targeted "
                f"(embeddings, norms, heads) is {plan.other_parameters} parameters already; raise it or use scope='targets'"
            )
        fraction = min(fraction, 1.0)
    budget = fraction * sum(o.dense_cost for o in offers)
    if fraction >= 1:  # nothing to save, and dense is exact
        return replace(plan, ranks=dict.fromkeys(plan.layers))
    chosen = allocate(offers, budget, fraction, config.allocation == "uniform", config.rank_floor)
    ranks = {o.name: None if o.is_dense(c) else int(o.ranks[c]) for o, c in zip(offers, chosen)}
    return replace(plan, ranks=ranks)

"""Spectra and directions of every target layer, from its weight and what calibration saw: the work behind a plan."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jactus_kernels import JactusError

from ..calibration.distributed import Group, agree, first_of, meet
from ..calibration.statistics import Statistics
from ..config import JactusConfig
from ..model.families import output_embedding
from ..model.targets import Target, find_targets, fingerprint, refuse_absent
from .latency import Times, measured
from .memory import plan_bytes, working_bytes
from .plans import Plan, PlannedLayer, with_ranks
from .sharing import gathered, shares
from .subspace import Directions, Seen, Side, directions, metric, seen, task_rank

logger = logging.getLogger("jactus")


def plan(
    model: nn.Module,
    statistics: Statistics | None,
    config: JactusConfig | None = None,
    *,
    progress: bool = True,
    group: Group = None,
) -> Plan:
    """Spectra and directions of every target layer in the configured metric, and ranks for the configured budget.

    statistics: from `calibrate` on this very model; None is enough for metric='identity', union=('weight',).
    config: None is the one that the statistics were calibrated under.
    group: a process group of torch.distributed, whose ranks, all with the same statistics, plan some of the layers each; all get
        the same plan. None: this process plans them all.

    Raises JactusError when the statistics are of another model or configuration, or weights are not finite.
    """
    return planned(model, statistics, config, progress, group=group)


def planned(
    model: nn.Module,
    statistics: Statistics | None,
    config: JactusConfig | None = None,
    progress: bool = True,
    forget: bool = False,
    group: Group = None,
) -> Plan:
    """`plan`; with `forget` the sums of a layer are dropped once it is planned, so that they make room for its directions."""
    if not isinstance(model, nn.Module) or not isinstance(statistics, Statistics | None):
        raise JactusError(
            f"plan takes (model, statistics, config), got ({type(model).__name__}, {type(statistics).__name__}, …)"
        )
    config = config or (statistics.config if statistics is not None else None) or JactusConfig()
    targets = find_targets(model, config)
    refuse_absent(targets)
    of_language = output_embedding(model) is not None
    if statistics is None and _needs_any(config):
        raise JactusError("plan needs statistics for this configuration; call jactus.calibrate first")
    logger.info(
        "planning %d layers: a plan of %.1f MB, and up to %.1f MB for one at a time", len(targets),
        sum(plan_bytes(t.m, t.n) for t in targets.values()) / 1e6,
        max(working_bytes(t.m, t.n, config.smaller_sides, "covariance" in config.task_sources) for t in targets.values()) / 1e6,
    )  # fmt: skip
    if group is not None:
        sums = [] if statistics is None else [fingerprint(t) for t in statistics._sums()]
        agree(group, "plan", model, **config.to_dict(), statistics=sums)  # those of one shard are not those of all
    times = times_of(targets, config, group)
    layers = {}
    bar = tqdm(total=len(targets), desc="planning", unit="layer", disable=not (progress and first_of(group)))
    for name, layer in plan_layers(targets, statistics, config, bar, forget, group):
        layers[name] = replace(layer, times=times.get(name))
    return assembled(model, layers, config, of_language, statistics.outputs if statistics is not None else ())


def times_of(targets: dict[str, Target], config: JactusConfig, group: Group = None) -> dict[str, Times]:
    """Measured times of the layers where the budget is of time: the first rank's, since no two measurements are alike."""
    times = measured(targets, config) if config.budget.unit == "latency" and first_of(group) else {}
    return times if group is None else meet(group, "plan", times)[0]


def plan_layers(
    targets: dict[str, Target],
    statistics: Statistics | None,
    config: JactusConfig,
    bar: tqdm,
    forget: bool = False,
    group: Group = None,
) -> Iterator[tuple[str, PlannedLayer]]:
    """The layers one after the other, without their times; of a group's ranks each plans some, and all get all.

    config: with its share. bar: moved on by a layer at a time. forget: as of `planned`. Raises JactusError as `plan`.
    """
    if statistics is not None:
        _check_statistics(targets, statistics, config)
    used = statistics if _needs_any(config) else None
    inputs = _InputCache(used, config)

    def own(names: Iterable[str]) -> Iterator[tuple[str, PlannedLayer]]:
        for name in names:
            layer = _plan_layer(targets[name], used, config, inputs)
            if forget and statistics is not None:
                statistics.forget(name)
            bar.update()
            yield name, layer

    with bar:
        if group is None:
            yield from own(targets)
            return
        owners = {} if statistics is None else {name: layer.inputs for name, layer in statistics.layers.items()}
        parts = shares(targets, owners, group.size())
        mine = parts[group.rank()]
        if forget and statistics is not None:
            for name in set(targets).difference(mine):
                statistics.forget(name)
        everyones = gathered(group, parts, dict(own(mine)))
        yield from ((name, everyones[name]) for name in targets)


def assembled(
    model: nn.Module,
    layers: dict[str, PlannedLayer],
    config: JactusConfig,
    of_language: bool,
    outputs: tuple[str, ...],
) -> Plan:
    """The plan of these layers of a model, which is dense, with ranks."""
    others = sum(p.numel() for p in model.parameters()) - sum(x.m * x.n for x in layers.values())
    return with_ranks(Plan(layers, config, {}, others, of_language, outputs))


def _needs_any(config: JactusConfig) -> bool:
    return config.needs_input or config.needs_output or config.needs_gradient


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
        whole_x, whole_g = known.inputs in statistics.input_sums, known.output_sum is not None
        seen_x, seen_g = known.seen_input_sum is not None, known.seen_output_sum is not None
        missing = (
            (config.needs_gradient and known.gradient_sum is None, "mean gradients"),
            (config.needs_input and not (whole_x or seen_x), "input covariances"),
            (config.needs_output and not (whole_g or seen_g), "output-gradient covariances"),
        )
        for absent, what in missing:
            if absent:
                raise JactusError(f"the statistics hold no {what}, which this configuration needs; calibrate with it")
        if config.smaller_sides:
            continue
        for wanted, has, what, kept in (
            (config.needs_input, whole_x, f"input covariance ({target.n}×{target.n})", "W A Wᵀ"),
            (config.needs_output, whole_g, f"output-gradient covariance ({target.m}×{target.m})", "Wᵀ G W"),
        ):
            if wanted and not has:
                raise JactusError(
                    f"{target}: the statistics hold its {what} only as its weight sees it, {kept}, and the task directions of "
                    f"union={config.union}, union_share={config.union_share} need all of it; calibrate with this configuration"
                )


Covariance = Tensor | None
Metric = Tensor | Seen | None


class _InputCache:
    """A and the metric it defines, kept while consecutive layers share one input."""

    def __init__(self, statistics: Statistics | None, config: JactusConfig) -> None:
        self.statistics, self.config = statistics, config
        self.key: str | None = None
        self.value: tuple[Covariance, Metric] = (None, None)

    def of(self, target: Target) -> tuple[Covariance, Metric]:
        """A, and damped in float64 on the weight's device (None for the identity metric)."""
        if self.statistics is None or not self.config.needs_input:
            return None, None
        if (S := self.statistics.seen_input(target.name)) is not None:
            return None, _seen(target, S, self.statistics.input_scale(target.name), self.config)
        key = self.statistics.layers[target.name].inputs
        if key != self.key:
            A = self.statistics.input_covariance(target.name)
            used = A if self.config.metric in ("input", "fisher") else None
            self.key, self.value = key, (A, _metric(target, used, self.config))
        return self.value


def _metric(target: Target, covariance: Tensor | None, config: JactusConfig) -> Tensor | None:
    try:
        return metric(covariance, config.damping, target.device)
    except JactusError as e:
        raise JactusError(f"{target}: {e}") from e


def _seen(target: Target, covariance: Tensor, scale: float, config: JactusConfig) -> Seen:
    try:
        return seen(covariance, scale, config.damping, target.device)
    except JactusError as e:
        raise JactusError(f"{target}: {e}") from e


def _outputs(target: Target, statistics: Statistics | None, config: JactusConfig) -> tuple[Covariance, Metric]:
    """G, and damped in float64 on the weight's device (None for the identity metric)."""
    if statistics is None or not config.needs_output:
        return None, None
    if (S := statistics.seen_output(target.name)) is not None:
        return None, _seen(target, S, statistics.output_scale(target.name), config)
    G = statistics.output_covariance(target.name)
    return G, _metric(target, G if config.metric in ("gradient", "fisher") else None, config)


def _plan_layer(
    target: Target, statistics: Statistics | None, config: JactusConfig, inputs: _InputCache
) -> PlannedLayer:
    weight = target.weight
    if not torch.isfinite(weight).all():
        raise JactusError(f"{target} has weights that are not finite; the checkpoint is broken")
    A, metric_A = inputs.of(target)
    G, metric_G = _outputs(target, statistics, config)
    most = min(target.m, target.n)
    if most < config.allocation.rank_multiple:  # it stays as it is
        most = 0
    by_covariance = "covariance" in config.task_sources
    try:
        found = directions(
            weight,
            metric_G,
            metric_A,
            keep=most,
            tasks=task_rank(most, config.union_share) if config.task_sources else 0,
            output_covariance=G if by_covariance else None,
            input_covariance=A if by_covariance else None,
            gradient=statistics.mean_gradient(target.name) if statistics and config.needs_gradient else None,
        )
    except torch.linalg.LinAlgError as e:
        raise JactusError(f"{target}: {e}") from e
    basis = config.basis_dtype(weight.dtype)
    if basis.itemsize > weight.itemsize:
        raise JactusError(
            f"{target} is stored in {weight.dtype}, and JactusConfig.dtype = {config.dtype!r} would store its factors wider, for "
            "nothing: layers compute in their input's dtype; leave dtype=None, or choose Core(dtype=…)"
        )
    return PlannedLayer(
        target.name,
        target.m,
        target.n,
        target.fingerprint,
        _stored(found),
        statistics.layer_tokens(target.name) if statistics is not None else 1,
        (basis.itemsize, core_dtype(config, basis).itemsize, weight.itemsize),
    )


def core_dtype(config: JactusConfig, basis: torch.dtype) -> torch.dtype:
    """The dtype a core is stored in beside bases of dtype `basis`: at least float32 unless configured."""
    if config.core.dtype:
        return getattr(torch, config.core.dtype)
    return torch.promote_types(basis, torch.float32)


def _stored(d: Directions) -> Directions:
    """On the CPU, directions in float32, the small matrices in float64: a plan is about twice as large as the weights it
    replaces, since every layer may have its full rank."""

    def small(side: Side) -> Side:
        return Side(side.weight.float().cpu(), side.task.float().cpu(), side.cross.cpu(), side.gram.cpu())

    return Directions(small(d.left), small(d.right), d.sigma.cpu(), d.task_core.cpu())

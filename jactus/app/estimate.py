"""What a model will take before it is loaded: memory by stage, ranks at a budget and the work of calibration, from its config alone.

The model is made without memory for its weights. Activations are not counted: they are what the batch makes them.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from jactus_kernels import JactusError

from ..calibration.passes import partition
from ..calibration.sides import Sides, sides
from ..calibration.summing import Summing
from ..calibration.tracing import trace
from ..config import JactusConfig
from ..model.families import head_parameters, is_encoder_decoder
from ..model.lowrank import core_shape
from ..model.targets import Target, find_targets
from ..planning.allocation import Offer, admissible_ranks, allocate, parameters
from ..planning.memory import factor_bytes, plan_bytes, working_bytes
from ..planning.planner import core_dtype
from ..planning.plans import core_width
from ..planning.subspace import task_rank


@dataclass(frozen=True)
class Kind:
    """Layers of one name and shape: how many, the bytes of their sums in all, their rank under a uniform allocation (full: the layer
    is deployed dense), and the parameters deployed in all."""

    name: str
    count: int
    m: int
    n: int
    sums: int
    rank: int
    deployed: int


@dataclass(frozen=True)
class Estimate:
    """Bytes by stage, without activations. `shared`: whether it was seen which layers share an input; if not, sums are an upper bound.

    weights: of the whole model in `dtype`; sums: of calibration, float32, of which `at_a_time` are held in one of `passes`; plan: of all
    directions, of which the largest layer has `directions`, and factors: of all layers, with cores; working, making: of the layer that
    planning and compressing take most for;
    training: weights, cores, their gradients and AdamW's moments; deployed: folded. flops: of calibrating `tokens` tokens once,
    in the targeted layers and the sums.
    """

    model: str
    parameters: int
    targeted: int
    dtype: str
    budget: float
    weights: int
    sums: int
    at_a_time: int
    passes: int
    plan: int
    directions: int
    working: int
    factors: int
    making: int
    training: int
    trainable: int
    deployed: int
    tokens: int
    flops: float
    shared: bool
    kinds: tuple[Kind, ...]

    @property
    def calibrating(self) -> int:
        """Weights and sums."""
        return self.weights + self.sums

    @property
    def planning(self) -> int:
        """The peak of `plan`: weights, sums, the plan and the layer in work. (`adapt` drops a layer's sums once it is planned.)"""
        return self.weights + self.sums + self.plan + self.working

    @property
    def by_part(self) -> int:
        """The peak of `adapt` under a memory_limit: weights, the sums of a part, the layer in work and the directions of the one before,
        which were written last; or a layer whose factors are made."""
        return self.weights + max(self.at_a_time + self.working + self.directions, self.making)

    @property
    def on_disk(self) -> int:
        """What `adapt` keeps on the disk meanwhile: the plan and the factors."""
        return self.plan + self.factors


def estimate(
    source: nn.Module | PretrainedConfig | Mapping[str, Any] | str | os.PathLike,
    config: JactusConfig | None = None,
    *,
    tokens: int | None = None,
    dtype: torch.dtype | None = None,
    memory_limit: int | None = None,
) -> Estimate:
    """What the method will take for a model, given as itself, its config, or a folder with or path of a config.json.

    tokens: of calibration; None: the 4n advised for the widest layer. dtype: of the weights; None: as the config says, else float32.
    memory_limit: as `adapt` takes it; None: all sums at a time.

    Raises JactusError for a config that cannot be read or whose class transformers lacks, and as `find_targets`.
    """
    config = config or JactusConfig()
    model = source if isinstance(source, nn.Module) else _on_meta(_config(source))
    targets = find_targets(model, config)
    own = next(model.parameters()).dtype if isinstance(source, nn.Module) else getattr(model.config, "dtype", None)
    dtype = dtype or own or torch.float32
    seen = _owners(model, targets)
    kept, sums, owners = _sums(targets, seen or {}, config)
    parts = [{t.name: t for t in part} for part in partition(targets, config, Summing(memory_limit=memory_limit))]
    of_part = [_sums(part, seen or {}, config)[:2] for part in parts]
    ranks = _uniform_ranks(targets, config)
    whole = sum(p.numel() for p in model.parameters())
    targeted = sum(t.m * t.n for t in targets.values())
    others = whole - targeted
    deployed = {name: int(parameters(t.m, t.n, ranks[name])) for name, t in targets.items()}
    cores, bases, making = 0, 0, 0
    for name, t in targets.items():
        p, q = core_shape(t.m, t.n, ranks[name], core_width(ranks[name], t.m, t.n, config))
        cores, bases = cores + p * q, bases + t.m * p + t.n * q
        making = max(making, factor_bytes(t.m, t.n, p, q))
    core = core_dtype(config, config.basis_dtype(dtype)).itemsize
    head = sum(p.numel() for p in head_parameters(model).values()) if "head" in config.trainable_extras else 0
    tokens = 4 * max(t.n for t in targets.values()) if tokens is None else tokens
    tasks = {
        name: task_rank(min(t.m, t.n), config.union_share) if config.task_sources else 0 for name, t in targets.items()
    }
    directions = {name: plan_bytes(t.m, t.n, tasks[name]) for name, t in targets.items()}
    return Estimate(
        type(model).__name__,
        whole,
        targeted,
        str(dtype).removeprefix("torch."),
        config.budget.fraction,
        whole * dtype.itemsize,
        sum(sums.values()),
        max(sum(own.values()) for _, own in of_part),
        len(parts),
        sum(directions.values()),
        max(directions.values()),
        max(
            _working(part[name], side, config)
            for part, (found, _) in zip(parts, of_part)
            for name, side in found.items()
        ),
        bases * config.basis_dtype(dtype).itemsize + cores * core,
        making,
        (others + bases + 3 * head) * dtype.itemsize + 4 * cores * core,
        cores + head,
        (others + sum(deployed.values())) * dtype.itemsize,
        tokens,
        tokens * sum(_flops(t, kept[name], owners[name] == name, dtype) for name, t in targets.items()),
        seen is not None,
        _kinds(targets, sums, ranks, deployed),
    )


def _sums(
    targets: Mapping[str, Target], owners: Mapping[str, str], config: JactusConfig
) -> tuple[dict[str, Sides], dict[str, int], dict[str, str]]:
    """What each of these layers sums, in how many bytes, and the first of them that is given its input."""
    firsts: dict[str, str] = {}
    own = {name: firsts.setdefault(owners.get(name, name), name) for name in targets}
    kept = sides(targets, own, config)
    return kept, {name: 4 * kept[name].numel(t, own[name] == name) for name, t in targets.items()}, own


def _working(target: Target, side: Sides, config: JactusConfig) -> int:
    seen = side.Wx if target.m <= target.n else side.Wtg
    return working_bytes(target.m, target.n, seen, "covariance" in config.task_sources)


def table(estimate: Estimate) -> str:
    """An estimate as text: a line a stage, then a line a kind of layer."""
    e = estimate
    bound = "" if e.shared else ", at most"
    stages = (
        ("load", e.weights, "weights"),
        ("calibrate", e.calibrating, f"and sums {_gb(e.sums)}{bound}"),
        ("plan", e.planning, f"and a plan of {_gb(e.plan)}, and {_gb(e.working)} for one layer at a time"),
        (
            f"{e.passes} part{'s' * (e.passes > 1)}",
            e.by_part,
            f"in place of both, {_gb(e.at_a_time)} of sums at a time; {_gb(e.on_disk)} on the disk",
        ),
        ("train", e.training, f"{e.trainable / 1e6:,.1f}M parameters train, with gradients and AdamW"),
        ("deploy", e.deployed, f"{e.deployed / e.weights:.0%} of the model, folded"),
    )
    lines = [
        f"{e.model}, {e.parameters / 1e6:,.0f}M parameters in {e.dtype}, of which {e.targeted / 1e6:,.0f}M in layers to compress to "
        f"{e.budget:.0%}",
        f"calibration on {e.tokens:,} tokens: {e.flops / 1e12:,.1f} TFLOPs",
        "",
        f"{'stage':<10}{'memory':>10}  without activations",
        *(f"{name:<10}{_gb(size):>10}  {what}" for name, size, what in stages),
        "",
    ]
    wide = max(len(k.name) for k in e.kinds)
    lines.append(f"{'layers':<{wide}}{'':>6}{'shape':>14}{'sums':>10}{'rank':>7}{'kept':>6}")
    for k in e.kinds:
        rank = "full" if k.rank == min(k.m, k.n) else str(k.rank)
        kept = k.deployed / (k.count * k.m * k.n)
        lines.append(f"{k.name:<{wide}}{f'×{k.count}':>6}{f'{k.m}×{k.n}':>14}{_gb(k.sums):>10}{rank:>7}{kept:>6.0%}")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size < 10e9 else f"{size / 1e9:,.1f} GB"


def _config(source: Any) -> PretrainedConfig:
    if isinstance(source, PretrainedConfig):
        return source
    try:
        if isinstance(source, Mapping):
            values = dict(source)
        else:
            path = Path(source)
            values = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
        return AutoConfig.for_model(**values)
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise JactusError(
            f"{source if not isinstance(source, Mapping) else 'the config given'} is no config.json of a transformers model "
            f"({e!r}); pass a folder or file that has one"
        ) from e


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model that a config names, its weights without memory."""
    name = next(iter(config.architectures or []), None)
    kind = getattr(transformers, str(name), None)
    if kind is None:
        raise JactusError(
            f"the config names the class {name}, which transformers {transformers.__version__} has not; pass the model itself, made "
            'with torch.device("meta")'
        )
    with torch.device("meta"):
        return kind(config).eval()


def _owners(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, str] | None:
    """Which layers share an input, seen in a forward that computes nothing; None where the model does not run so."""
    own = getattr(model, "config", None)
    if next(model.parameters()).device.type != "meta" or own is None:
        return None
    name = getattr(model, "main_input_name", "input_ids")
    given: dict[str, Any] = {name: torch.ones(1, 8, dtype=torch.long, device="meta")}
    if name == "pixel_values":
        side = getattr(own, "image_size", 224)
        shape = side if isinstance(side, list | tuple) else (side, side)
        given[name] = torch.ones(1, getattr(own, "num_channels", 3), *shape, device="meta")
    if is_encoder_decoder(model):
        given["decoder_input_ids"] = torch.ones(1, 8, dtype=torch.long, device="meta")
    with suppress(Exception):  # whatever a model asks of values that are not there
        return trace(model, dict(targets), lambda: model(**given)).owners
    return None


def _uniform_ranks(targets: Mapping[str, Target], config: JactusConfig) -> dict[str, int]:
    offers = []
    for t in targets.values():
        ranks = admissible_ranks(t.m, t.n, config.allocation.rank_multiple, config.budget.accounting)
        cost = parameters(t.m, t.n, ranks, config.budget.accounting).astype(float)
        offers.append(Offer(t.name, ranks, cost, np.zeros(len(ranks)), float(t.m * t.n)))
    fraction = config.budget.fraction
    chosen = allocate(offers, fraction * sum(o.dense_cost for o in offers), fraction, uniform=True)
    return {o.name: int(o.ranks[c]) for o, c in zip(offers, chosen)}


def _flops(t: Target, kept: Sides, owner: bool, dtype: torch.dtype) -> float:
    """Of a token: forward, gradient of the input, and the sums, of which the lower triangle is made."""
    products = 1 + (kept.g or kept.Wtg or kept.gradient) + kept.Wtg + kept.gradient + (kept.Wx and dtype.itemsize < 4)
    squares = (kept.x and owner) * t.n**2 + kept.Wx * t.m**2 + kept.g * t.m**2 + kept.Wtg * t.n**2
    return 2.0 * products * t.m * t.n + squares


def _kinds(
    targets: Mapping[str, Target], sums: Mapping[str, int], ranks: Mapping[str, int], deployed: Mapping[str, int]
) -> tuple[Kind, ...]:
    groups: dict[tuple[str, int, int, int], list[str]] = {}
    for name, t in targets.items():
        groups.setdefault((name.rpartition(".")[2], t.m, t.n, ranks[name]), []).append(name)
    return tuple(
        Kind(kind, len(names), m, n, sum(sums[x] for x in names), rank, sum(deployed[x] for x in names))
        for (kind, m, n, rank), names in groups.items()
    )

"""Planning shared among processes: each rank plans some of the layers and hands them on, so that all have the same plan."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..calibration.distributed import meet, spread_
from ..model.targets import Target
from .plans import PlannedLayer
from .subspace import PARTS, Directions, Side


def shares(targets: Mapping[str, Target], owners: Mapping[str, str], ranks: int) -> list[list[str]]:
    """Which rank plans which layers: about m·n·min(m, n) of work each, and layers of one input, which share a factorisation,
    with one rank. The heaviest first, each to who has least."""
    groups: dict[str, list[str]] = {}
    for name in targets:
        groups.setdefault(owners.get(name, name), []).append(name)
    work = {key: sum(t.m * t.n * min(t.m, t.n) for t in map(targets.__getitem__, its)) for key, its in groups.items()}
    of = [set[str]() for _ in range(ranks)]
    loads = [0] * ranks
    for key in sorted(work, key=work.__getitem__, reverse=True):
        least = loads.index(min(loads))
        loads[least] += work[key]
        of[least].update(groups[key])
    return [[name for name in targets if name in its] for its in of]


def gathered(group: Any, parts: list[list[str]], own: dict[str, PlannedLayer]) -> dict[str, PlannedLayer]:
    """The layers of all ranks, of which rank i has planned `parts[i]`: bit for bit as they were planned.

    Raises JactusError when a rank does not come within the group's timeout.
    """
    said = meet(group, "plan", {name: _described(layer) for name, layer in own.items()})
    layers: dict[str, PlannedLayer] = {}
    for source, names in enumerate(parts):
        for name in names:
            bare, shapes = said[source][name]
            if name in own:  # laid out as they will be with the others, whose products then round alike
                tensors = [t.contiguous() for t in _tensors(own[name].directions)]
            else:
                tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
            for t in tensors:
                spread_(group, "plan", t, source)
            layers[name] = replace(bare, directions=_directions(tensors))
    return layers


def _described(layer: PlannedLayer) -> tuple[PlannedLayer, list[tuple[torch.Size, torch.dtype]]]:
    """The layer without its tensors, and their shapes."""
    return replace(layer, directions=None), [(t.shape, t.dtype) for t in _tensors(layer.directions)]  # type: ignore[arg-type]


def _tensors(d: Directions) -> list[torch.Tensor]:
    return [*(getattr(side, part) for side in (d.left, d.right) for part in PARTS), d.sigma, d.task_core]


def _directions(tensors: list[torch.Tensor]) -> Directions:
    k = len(PARTS)
    return Directions(Side(*tensors[:k]), Side(*tensors[k : 2 * k]), tensors[-2], tensors[-1])

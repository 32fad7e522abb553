"""Several processes, one run: each rank sums over its own shard of the batches, and one reduction at the end makes the whole.

torch.distributed does the work. Before anything is reduced, ranks tell one another over gloo what they hold (a group of another
backend is given a twin for it), so that a rank that is missing, or has another model, is an error with its number on all others.
"""

import logging
import os
import weakref
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..checkpoints import storage
from ..config import JactusConfig
from ..model.lowrank import compressed_layers
from .snapshots import fingerprints
from .statistics import TRIANGLES, LayerStatistics, Statistics

logger = logging.getLogger("jactus")
# None: this process alone. A string, since not every build of torch has the class.
Group: TypeAlias = "dist.ProcessGroup | None"
_TWINS: MutableMapping[Any, Any] = weakref.WeakKeyDictionary()


def meet(group: "dist.ProcessGroup", step: str, word: Any) -> list[Any]:
    """What every rank of the group says, in their order.

    Raises JactusError on all that came when one does not within the group's timeout, or is gone.
    """
    try:
        if dist.get_backend(group) != dist.Backend.GLOO:
            if group not in _TWINS:  # kept: a second one of the same ranks would find the addresses of the first
                ranks = dist.get_process_group_ranks(group)
                _TWINS[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
            return _met(_TWINS[group], word)
        return _met(group, word)
    except RuntimeError as e:
        raise _alone(group, step, e) from e


def _met(group: "dist.ProcessGroup", word: Any) -> list[Any]:
    # of dist's own this has the default timeout, and not the group's
    group.monitored_barrier(wait_all_ranks=True)  # type: ignore[attr-defined]
    said: list[Any] = [None] * group.size()
    dist.all_gather_object(said, word, group=group)
    return said


def _alone(group: "dist.ProcessGroup", step: str, e: Exception) -> JactusError:
    return JactusError(
        f"{step}: rank {dist.get_rank()} of {group.size()} waited for the others in vain: one of them raised, died, or took longer "
        f"than the timeout of the process group (init_process_group(timeout=…)); its own output says why. What torch knows: {e}"
    )


def agree(group: "dist.ProcessGroup", step: str, model: nn.Module, **settings: Any) -> None:
    """Raise JactusError on all ranks where one has another model than the first, or other settings."""
    said = meet(group, step, (fingerprints(model), settings))
    ranks = dist.get_process_group_ranks(group)
    for rank, other in zip(ranks, said):
        for what, a, b in zip(("model", "configuration"), said[0], other):
            differ = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
            if differ:
                raise JactusError(
                    f"{step}: rank {rank} has another {what} than rank {ranks[0]}, in {differ[0]} and {len(differ) - 1} more; every "
                    "rank is to have the same model and configuration, and batches of its own (a fresh head: seed before it is "
                    "made, or load it from a file)"
                )


def own_file(path: str | os.PathLike | None) -> Path | None:
    """A path of this rank's own where several processes run: 'run.snapshot' is 'run.rank1of4.snapshot' on the second of four."""
    if path is None or not _many():
        return None if path is None else Path(path)
    path = Path(path)
    return path.with_name(f"{path.stem}.rank{dist.get_rank()}of{dist.get_world_size()}{path.suffix}")


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_of(group: Group) -> bool:
    """Whether this is the process that speaks for all: the group's first, or the only one."""
    return group is None or group.rank() == 0


def refuse_unready(step: str, group: Group) -> None:
    """Raise JactusError for a launcher's process that has no process group yet, and would silently run alone."""
    launched = dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized()
    if group is None and launched and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise JactusError(
            f"{step} is called in one of {os.environ['WORLD_SIZE']} processes of torchrun and has no process group, so each would "
            "go by its own batches; call torch.distributed.init_process_group() first and pass group=torch.distributed.group.WORLD"
        )


def warn_apart(step: str, group: Group) -> None:
    """Say so where several processes run and each goes by its own batches."""
    if group is None and _many():
        logger.warning(
            "%s is called in one of %d processes without group=, so each that calls it compresses by its own batches, and they end "
            "with different models; pass group=torch.distributed.group.WORLD for one model by all batches", step, dist.get_world_size(),
        )  # fmt: skip


def sum_(group: "dist.ProcessGroup", step: str, tensors: list[Tensor]) -> None:
    """Sum each tensor over the ranks, in place, on a device that the group reduces on."""
    try:
        for t in tensors:
            moved = t.to(_device(group, t.device))
            dist.all_reduce(moved, group=group)
            if moved is not t:
                t.copy_(moved)
    except RuntimeError as e:
        raise _alone(group, step, e) from e


def spread_(group: "dist.ProcessGroup", step: str, tensor: Tensor, source: int) -> None:
    """Copy a tensor of rank `source` (counted in the group) to all ranks, in place."""
    if not tensor.numel():
        return
    try:
        moved = tensor.to(_device(group, tensor.device)).contiguous()
        dist.broadcast(moved, dist.get_process_group_ranks(group)[source], group=group)
        if moved is not tensor:
            tensor.copy_(moved)
    except RuntimeError as e:
        raise _alone(group, step, e) from e


def make_same_(group: "dist.ProcessGroup", step: str, model: nn.Module) -> None:
    """Give all ranks the first one's low-rank layers: products round otherwise on another processor, or with other threads."""
    for layer in compressed_layers(model).values():
        for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            spread_(group, step, t.detach(), 0)


def _device(group: "dist.ProcessGroup", wanted: torch.device) -> torch.device:
    """Where the group takes a tensor that is on `wanted`: there, or, as of NCCL and sums on the CPU, on this process's GPU."""
    kinds = [part.split(":")[0] for part in str(dist.get_backend_config(group)).split(",")]
    return wanted if wanted.type in kinds else torch.device(kinds[0])


def all_reduce_(statistics: Statistics, group: Group) -> None:
    """`Statistics.all_reduce_`. Covariances go as triangles; until all have come, the upper one keeps the rank's own sums."""
    step = "all_reduce_"
    if group is None and dist.is_available():
        group = dist.group.WORLD
    refuse_unready(step, group)
    if group is None:
        return  # one process has the whole
    said = meet(group, step, _structure(statistics))
    ranks = dist.get_process_group_ranks(group)
    holders = [i for i, its in enumerate(said) if its["layers"]]
    if not holders:
        raise JactusError(
            f"{step}: none of the {len(ranks)} ranks has any sums: no batch came out of `batches` on any of them"
        )
    whole = said[holders[0]]
    for i in holders:
        _check_alike(whole, said[i], f"{step}: ranks {ranks[holders[0]]} and {ranks[i]}")
    if not statistics.layers:
        _take_shape(statistics, whole)
    sums = list(statistics.input_sums.values())
    plain: list[Tensor] = []
    for layer in statistics.layers.values():
        for kind, total in layer.sums().items():
            (sums if kind in TRIANGLES else plain).append(total)
    diagonals = [S.diagonal().clone() for S in sums]
    totals = [t.clone() for t in plain]
    counts = torch.tensor([statistics.terms, *statistics.tokens.values()], dtype=torch.int64)
    try:
        for S in sums:
            packed = storage.pack(S)
            sum_(group, step, [packed])
            storage.put_(S, packed)
        sum_(group, step, [*totals, counts])
    except BaseException:
        for S, diagonal in zip(sums, diagonals):
            _restore(S, diagonal)
        raise
    for mine, total in zip(plain, totals):
        mine.copy_(total)
    statistics.terms = int(counts[0])
    statistics.tokens = dict(zip(statistics.tokens, counts[1:].tolist()))
    statistics.symmetrize_()


def _restore(S: Tensor, diagonal: Tensor) -> None:
    """The lower triangle from the upper one and the diagonal."""
    for i in range(len(S)):
        S[i, :i] = S[:i, i]
    S.diagonal().copy_(diagonal)


def _structure(statistics: Statistics) -> dict[str, Any]:
    """What must be alike on ranks whose sums are added."""
    return {
        "layers": {
            name: (
                layer.m,
                layer.n,
                layer.fingerprint,
                layer.inputs,
                {k: (t.shape, t.dtype) for k, t in layer.sums().items()},
            )
            for name, layer in statistics.layers.items()
        },
        "inputs": {name: (S.shape, S.dtype) for name, S in statistics.input_sums.items()},
        "tokens": list(statistics.tokens),
        "outputs": statistics.outputs,
        "drawn": statistics.drawn,
        "config": None if statistics.config is None else statistics.config.to_dict(),
    }


def _check_alike(a: dict[str, Any], b: dict[str, Any], who: str) -> None:
    for name in dict.fromkeys([*a["layers"], *b["layers"]]):
        one, other = a["layers"].get(name), b["layers"].get(name)
        if one is None or other is None or one[2] != other[2]:
            raise JactusError(f"{who} calibrated other models: {name} is missing, or has other weights, on one of them")
        if one != other:
            raise JactusError(
                f"{who} calibrated {name} with another configuration, or found its input shared otherwise"
            )
    for what in ("inputs", "tokens", "config", "drawn"):
        if a[what] != b[what]:
            raise JactusError(f"{who} calibrated with another configuration ({what}: {a[what]} and {b[what]})")


def _take_shape(statistics: Statistics, whole: dict[str, Any]) -> None:
    """Sums of no batch at all: zeros, shaped as the other ranks' are, on the CPU."""
    for name, (m, n, fingerprint, inputs, kinds) in whole["layers"].items():
        zeros = {kind: torch.zeros(shape, dtype=dtype) for kind, (shape, dtype) in kinds.items()}
        statistics.layers[name] = LayerStatistics(m, n, fingerprint, inputs, **zeros)
    statistics.input_sums = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in whole["inputs"].items()}
    statistics.tokens = dict.fromkeys(whole["tokens"], 0)
    statistics.outputs, statistics.drawn = whole["outputs"], whole["drawn"]
    if statistics.config is None and whole["config"] is not None:
        statistics.config = JactusConfig.from_dict(whole["config"])

"""Step 1, calibrate: one forward and backward over a few examples, summing covariances at every target layer."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from jactus_kernels import JactusError

from ..config import JactusConfig
from ..model.targets import Target, find_targets, refuse_absent
from .distributed import Group, agree, all_reduce_, first_of, meet, own_file, refuse_unready
from .losses import Loss, LossSum
from .modes import refuse_inference
from .sides import sides
from .snapshots import Snapshots
from .statistics import Statistics
from .summing import SUMMING, Summing
from .sweep import Sweep

logger = logging.getLogger("jactus")


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    config: JactusConfig | None = None,
    *,
    loss: Loss | None = None,
    memory_limit: int | None = None,
    statistics_dtype: torch.dtype | str = "float32",
    statistics_device: torch.device | str | None = None,
    loss_scale: float = 1.0,
    resume: str | os.PathLike | None = None,
    resume_every: float = 60.0,
    save: str | os.PathLike | None = None,
    verify: bool = True,
    progress: bool = True,
    group: Group = None,
) -> Statistics:
    """Sum input covariances, output-gradient covariances and mean gradients over `batches`.

    model: any torch module; it is put in eval mode for the run and left as it was, hooks removed, even on an error.
    batches: dicts of keyword arguments with labels for a transformers model; anything that `loss` takes otherwise.
        Rows of padding enter no sum of inputs. The result does not depend on the batch size.
    loss: `loss(model, batch)`, see `losses.LossSum`; None takes the model's own.
    memory_limit: bytes of sums held at a time; above it, calibration takes several passes over the batches.
    statistics_dtype: float32 or float64, what the covariances are summed in.
    statistics_device: where sums are kept, e.g. "cpu" to spare the GPU; None: each on its layer's.
    loss_scale: the loss is multiplied by it before backward, and the gradients divided by it.
    resume: a file for snapshots, written every `resume_every` seconds and removed at the end, with a file beside it for each
        finished pass. If it exists, the run continues from it to the same result; batches must come in the same order (they are
        checked). One run at a time.
    save: a file to write the result to, before the snapshot goes: then no kill and no full disk costs more than `resume_every`.
    verify: look into the first batch (and the first with padding), at the price of a few examples' time: what the loss sums or
        averages, which rows are tokens, that layers are used by their forward. False goes by names and shapes.
    group: a process group of torch.distributed (`torch.distributed.group.WORLD`), each rank of which is given its own shard of the
        batches, maybe none, and the same model: all get the sums of the whole. None: this process alone. Where several processes
        run, each writes its own snapshot, 'run.rank1of4.snapshot' for resume='run.snapshot'.

    Raises JactusError for what cannot be calibrated: no target, no loss, values that are not finite (with the layer and
    the batch), a layer that was never called, a snapshot of another run; with `group`, when ranks have other models or
    configurations, or one does not come within the group's timeout (with `resume` the others' sums are kept to go on with).
    """
    statistics = Statistics(config=config or JactusConfig())
    parts = by_part(
        model, batches, config, Summing.checked(statistics_dtype, statistics_device, loss_scale, memory_limit),
        loss=loss, resume=resume, resume_every=resume_every, verify=verify, progress=progress, group=group,
    )  # fmt: skip
    for part, number, count in parts:
        _append(statistics, part, to_cpu=count > 1)
        if save is not None and number + 1 == count:
            if first_of(group):
                statistics.save(save)
            if group is not None:
                meet(group, "calibrate", "saved")
    return statistics


def by_part(
    model: nn.Module,
    batches: Iterable[Any],
    config: JactusConfig | None,
    sums: Summing,
    *,
    loss: Loss | None = None,
    resume: str | os.PathLike | None = None,
    resume_every: float = 60.0,
    verify: bool = True,
    progress: bool = True,
    group: Group = None,
    snapshots: Snapshots | None = None,
) -> Iterator[tuple[Statistics, int, int]]:
    """The sums of a part of the layers after the other, complete, as many layers as fit in the limit; its number, and how many there are.

    snapshots: of a caller who plans each part before he asks for the next; its sums are then let go, and the snapshot is his to
    clear. A part that is planned already comes without sums, all of it `forgotten`. Raises JactusError as `calibrate`.
    """
    config = config or JactusConfig()
    targets = find_targets(model, config)
    refuse_inference("calibrate", model)
    refuse_absent(targets)
    for target in targets.values():
        if not torch.isfinite(target.weight).all():
            raise JactusError(f"{target} has weights that are not finite; the checkpoint is broken")
    refuse_unready("calibrate", group)
    if group is not None:
        agree(group, "calibrate", model, **config.to_dict(), **sums.decisive())
        progress = progress and first_of(group)
    passes = partition(targets, config, sums)
    if len(passes) > 1 and iter(batches) is batches:
        raise JactusError(
            f"memory_limit={sums.memory_limit} needs {len(passes)} passes over the batches, but they come from an "
            "iterator that runs only once; pass a list or a DataLoader"
        )
    bytes_needed = max(sum(sum_bytes(t, config, sums) for t in part) for part in passes)
    logger.info("calibrating %d layers, sums of at most %.1f MB at a time", len(targets), bytes_needed / 1e6)
    planning = snapshots is not None
    losses = LossSum(model, loss, verify, config.drawn if loss is None else 0)
    terms: int | None = None
    short: dict[str, int] = {}
    own = nullcontext(snapshots) if snapshots else Snapshots(own_file(resume), resume_every, config, sums, model)
    with own as kept:
        for number, part in enumerate(passes):
            done = kept.finished(number)
            if done is None:
                sweep = Sweep(model, {t.name: t for t in part}, config, sums, losses, kept, number)
                done = sweep.run(batches, progress, may_be_empty=group is not None)
                del sweep
                if done.layers and (planning or number + 1 < len(passes) or group is not None):
                    kept.finish(done, number)
            done.symmetrize_()
            if group is not None:
                all_reduce_(done, group)
            if terms not in (None, done.terms):
                raise JactusError(
                    f"pass {number + 1} over the batches had {done.terms} loss terms and the passes before it {terms}: "
                    "they were other batches; give the same in every pass (no shuffling), or a greater memory_limit"
                )
            terms = done.terms
            short |= {name: done.layer_tokens(name) for name in done.short_of_tokens()}
            yield done, number, len(passes)
            if planning:
                kept.planned(number)
        if not planning:
            kept.clear()
    if short and (config.needs_input or config.needs_output):
        logger.warning(
            "%d of %d layers saw fewer tokens than the 4n advised (pass more batches), e.g. %s: %d of %d",
            len(short), len(targets), (first := next(iter(short))), short[first], 4 * targets[first].n,
        )  # fmt: skip


def sum_bytes(target: Target, config: JactusConfig, sums: Summing = SUMMING) -> int:
    """Bytes of the sums kept for one layer, before any sharing of inputs."""
    return sides({target.name: target}, {}, config)[target.name].numel(target) * sums.dtype.itemsize


def partition(targets: dict[str, Target], config: JactusConfig, sums: Summing = SUMMING) -> list[list[Target]]:
    """Targets, in order, cut into parts whose sums fit in `memory_limit` each; one part without a limit."""
    limit = sums.memory_limit
    parts: list[list[Target]] = [[]]
    used = 0
    for target in targets.values():
        size = sum_bytes(target, config, sums)
        if limit is not None and size > limit:
            raise JactusError(f"memory_limit={limit} bytes is too small for {target}, whose sums take {size} bytes")
        if limit is not None and used + size > limit:
            parts.append([])
            used = 0
        parts[-1].append(target)
        used += size
    return parts


def _append(whole: Statistics, part: Statistics, to_cpu: bool) -> None:
    if to_cpu:
        part.input_sums = {k: S.cpu() for k, S in part.input_sums.items()}
        for layer in part.layers.values():
            for kind, total in layer.sums().items():
                setattr(layer, kind, total.cpu())
    whole.layers |= part.layers
    whole.input_sums |= part.input_sums
    whole.tokens |= part.tokens
    whole.terms = part.terms
    whole.outputs += part.outputs
    whole.drawn = part.drawn

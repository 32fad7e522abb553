"""The one line: fit the head if asked, calibrate, plan, compress."""

import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from tqdm import tqdm

from jactus_kernels import JactusError

from .calibration.distributed import Group, first_of, make_same_, own_file, warn_apart
from .calibration.head import fit_head as fit
from .calibration.losses import Loss
from .calibration.passes import by_part, calibrate
from .calibration.snapshots import Snapshots
from .calibration.statistics import Statistics
from .calibration.summing import Summing
from .compression.surgery import compress, compressed
from .compression.trainable import refuse_extras
from .config import JactusConfig
from .model.families import output_embedding
from .model.targets import find_targets, refuse_absent
from .planning.planner import assembled, plan_layers, planned, times_of
from .planning.plans import Plan, makes_spectra
from .planning.shelf import Shelf


def adapt(
    model: nn.Module,
    batches: Iterable[Any],
    budget: float | None = None,
    config: JactusConfig | None = None,
    *,
    fit_head: bool = False,
    loss: Loss | None = None,
    resume: str | os.PathLike | None = None,
    verify: bool = True,
    progress: bool = True,
    group: Group = None,
    **options: Any,
) -> nn.Module:
    """Compress `model` for the task of `batches`, in place, ready to be trained by any loop; returns it.

    budget: what to keep, in (0, 1]; overrides the fraction of config.budget. fit_head: first fit a fresh task head to frozen features.
    group: a process group of torch.distributed, each rank of which is given the same model and its own shard of the batches, maybe
    none: all end with the same compressed model. The other arguments, and options, are those of `calibrate`. For several budgets
    calibrate and plan once, and use `plan.at`.

    With a memory_limit a part of the layers at a time is calibrated and planned, and its sums go before the next; directions and
    factors wait on the disk: beside `resume`, else where Python puts temporary files (TMPDIR). What a run finished there,
    another continues from. The result is that of no limit, to the rounding of sums that are made in another order.

    Raises JactusError as `fit_head`, `calibrate`, `plan` and `compress` do.
    """
    if isinstance(budget, JactusConfig):
        raise JactusError("adapt's third argument is the budget; pass the JactusConfig as config=")
    config = config or JactusConfig()
    if budget is not None:
        config = config.replace(budget=budget)
    warn_apart("adapt", group)
    unknown = set(options) - set(inspect.signature(calibrate).parameters)
    if unknown:
        raise JactusError(f"adapt: neither adapt nor calibrate has an argument {sorted(unknown)}")
    limited = options.get("memory_limit") is not None
    if limited and group is not None and resume is not None:
        raise JactusError(
            "adapt: with group= and a memory_limit, what the ranks have planned cannot be gone on with; leave resume out, or give it "
            "and the limit to calibrate, then plan and compress"
        )
    if limited and options.pop("save", None) is not None:
        raise JactusError(
            "adapt: under a memory_limit the sums of all layers are never there together, so none can be saved; leave save out, or "
            "calibrate with both, then plan and compress"
        )
    refuse_extras(model, config.trainable_extras)  # before the work
    if fit_head:
        if iter(batches) is batches:
            raise JactusError("fit_head reads the batches twice, but they come from an iterator; pass a list or loader")
        fit(model, batches, loss=loss, verify=verify, progress=progress, group=group)
    if limited:
        sums = Summing.checked(**{name: options.pop(name) for name in SUMS if name in options})
        how = {"loss": loss, "verify": verify, "progress": progress, **options}
        with planned_by_part(model, batches, config, sums, resume, group, **how) as (plan, shelf):
            compressed(model, plan, shelf)
    else:
        statistics = calibrate(
            model, batches, config, loss=loss, resume=resume, verify=verify, progress=progress, group=group, **options
        )
        compress(model, planned(model, statistics, config, progress, forget=True, group=group))
    if group is not None:
        make_same_(group, "adapt", model)
    return model


SUMS = tuple(inspect.signature(Summing.checked).parameters)  # those of `calibrate` that steer the sums


@contextmanager
def planned_by_part(
    model: nn.Module,
    batches: Iterable[Any],
    config: JactusConfig,
    sums: Summing,
    resume: str | os.PathLike | None,
    group: Group = None,
    *,
    resume_every: float = 60.0,
    progress: bool = True,
    **options: Any,
) -> Iterator[tuple[Plan, Shelf]]:
    """`calibrate` and `plan` with no more in memory than the model, the sums of a part of its layers, and one layer's directions:
    the plan, and the shelf that its directions are on. Both are there inside the block only, and what `resume` keeps until it
    ends well.

    options: those of `calibrate`. Raises JactusError as `calibrate` and `plan` do.
    """
    refuse_absent(find_targets(model, config))
    with ExitStack() as stack:
        snapshots = stack.enter_context(
            Snapshots(own_file(resume), resume_every, config, sums, model, makes_spectra(config))
        )
        folder = snapshots.folder or stack.enter_context(TemporaryDirectory(prefix="jactus-"))
        shelf = Shelf(folder)
        parts = by_part(model, batches, config, sums, progress=progress, group=group, snapshots=snapshots, **options)
        yield _planned(model, parts, config, shelf, resume, progress, group), shelf
        snapshots.clear()


def _planned(
    model: nn.Module,
    parts: Iterable[tuple[Statistics, int, int]],
    config: JactusConfig,
    shelf: Shelf,
    resume: str | os.PathLike | None,
    progress: bool,
    group: Group,
) -> Plan:
    """The plan of a model whose layers come part by part, each on the shelf before the next comes."""
    targets = find_targets(model, config)
    times = times_of(targets, config, group)
    outputs: tuple[str, ...] = ()
    for part, *_ in parts:
        outputs += part.outputs
        left = {name: targets[name] for name in part.layers if not shelf.has(name)}
        for name in part.forgotten.intersection(left):
            raise JactusError(
                f"{resume} says that {name} is planned, and its directions are not in {shelf.folder}; delete {resume} to start again"
            )
        bar = tqdm(total=len(left), desc="planning", unit="layer", disable=not (progress and first_of(group)))
        for name, layer in plan_layers(left, part, config, bar, forget=True, group=group):
            shelf.put(replace(layer, times=times.get(name)))
    of_language = output_embedding(model) is not None
    return assembled(model, {name: shelf.get(name) for name in targets}, config, of_language, outputs)

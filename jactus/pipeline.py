"""The one line: fit the head if asked, calibrate, plan, compress."""

import inspect
import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from jactus_kernels import JactusError

from .calibration.distributed import Group, make_same_, warn_apart
from .calibration.head import fit_head as fit
from .calibration.losses import Loss
from .calibration.passes import calibrate
from .compression.surgery import compress
from .compression.trainable import extra_parameters
from .config import JactusConfig
from .planning.planner import planned


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
    for extra in config.trainable_extras:
        extra_parameters(model, extra)  # refuses one that names nothing, before the work
    if fit_head:
        if iter(batches) is batches:
            raise JactusError("fit_head reads the batches twice, but they come from an iterator; pass a list or loader")
        fit(model, batches, loss=loss, verify=verify, progress=progress, group=group)
    statistics = calibrate(
        model, batches, config, loss=loss, resume=resume, verify=verify, progress=progress, group=group, **options
    )
    compress(model, planned(model, statistics, config, progress, forget=True, group=group))
    if group is not None:
        make_same_(group, "adapt", model)
    return model

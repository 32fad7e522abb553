"""Measure one cell, in a process of its own: load, build, score, train, score."""

import sys
from dataclasses import replace
from statistics import fmean

import torch

from jactus_kernels import JactusError

from .. import memory, training
from ..report import versions
from .methods import build, is_compressed, needs_all, own_rates, variant
from .peers import Context, sizes
from .store import Cell, Row
from .tasks import TASKS, calibrated, calibration_batches, prepared

FEW = 256  # examples that peers look at themselves: PEFT's collectors take a quarter of a second for each


def measure(cell: Cell, threads: int, autocast: torch.dtype | None, untrained: bool, device: str = "cpu") -> list[Row]:
    """The cell's rows: before training if `untrained`, and after it (with no loss where training diverged)."""
    torch.set_num_threads(threads)
    task, chosen = TASKS[cell.task], variant(cell.method)
    before = memory.used(device)
    seen, head = (chosen.calibration, chosen.head) if chosen else (None, "fitted")
    seen = seen or task.calibration
    case = prepared(task, head, cell.seed, device)
    statistics = None
    if is_compressed(cell.method):
        draws = chosen.changes.get("draws") if chosen else 0
        statistics = calibrated(task, case, seen, cell.seed, head, autocast, needs_all(cell.method), draws)
    context = Context(statistics, calibration_batches(task, case, min(seen, FEW), cell.seed), cell.seed)
    model = build(cell.method, case.model, context, cell.budget)
    del statistics, context
    size = sizes(model)

    def scored(phase: str, **measured) -> list[Row]:
        """The row of the whole, and one of each set that it is the mean of."""
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            parts, validation = task.scores(model, case.test), task.score(model, case.validation)
        whole = Row(
            cell.task, cell.method, cell.budget, cell.seed, phase, task.metric, fmean(parts.values()), validation,
            trainable=size.trainable, stored=size.stored, folded=size.folded, optimizer_bytes=size.optimizer_bytes,
            versions=versions(*_how(autocast, device)), **measured,
        )  # fmt: skip
        of_sets = [replace(whole, task=f"{cell.task}/{name}", value=v, validation=None) for name, v in parts.items()]
        return [whole, *(of_sets if len(parts) > 1 else ())]

    rows = scored("untrained") if untrained else []
    memory.forget_peak(device)
    try:
        rates = own_rates(cell.method, model, cell.lr)
        done = training.train(
            model, case.training, cell.lr, task.epochs, task.batch_size, cell.seed, autocast, False, rates
        )
    except JactusError as e:
        print(f"{cell}: {e}", file=sys.stderr)
        return [*rows, *scored("trained", lr=cell.lr, loss=None)]
    peak = memory.peak(device)
    taken = None if peak is None or before is None else peak - before
    return [*rows, *scored("trained", lr=cell.lr, loss=done.loss, peak_bytes=taken, train_seconds=done.seconds)]


def _how(autocast: torch.dtype | None, device: str) -> list[str]:
    precision = "float32" if autocast is None else f"{str(autocast).removeprefix('torch.')} autocast"
    return [precision] if device == "cpu" else [precision, f"on {device}"]

"""Measure one cell, in a process of its own: load, build, score, train, score."""

import contextlib
import ctypes
import gc
import re
import sys
from pathlib import Path

import torch

from jactus_kernels import JactusError

from .. import training
from ..report import environment
from .methods import build, variant
from .peers import Context, sizes
from .store import Cell, Row
from .tasks import TASKS, calibrated, calibration_batches, prepared

FEW = 256  # examples that peers look at themselves: PEFT's collectors take a quarter of a second for each


def measure(cell: Cell, threads: int, autocast: torch.dtype | None, untrained: bool) -> list[Row]:
    """The cell's rows: before training if `untrained`, and after it (with no loss where training diverged)."""
    torch.set_num_threads(threads)
    task, chosen, before = TASKS[cell.task], variant(cell.method), _memory("VmRSS")
    seen, head = (chosen.calibration, chosen.head) if chosen else (None, "fitted")
    seen = seen or task.calibration
    case = prepared(task, head, cell.seed)
    statistics = calibrated(task, case, seen, cell.seed, head, autocast)
    context = Context(statistics, calibration_batches(task, case, min(seen, FEW), cell.seed), cell.seed)
    model = build(cell.method, case.model, context, cell.budget)
    del statistics, context
    size = sizes(model)

    def row(phase: str, **measured) -> Row:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            value, validation = task.score(model, case.test), task.score(model, case.validation)
        return Row(
            cell.task, cell.method, cell.budget, cell.seed, phase, task.metric, value, validation,
            trainable=size.trainable, stored=size.stored, folded=size.folded, optimizer_bytes=size.optimizer_bytes,
            versions=_versions(autocast), **measured,
        )  # fmt: skip

    rows = [row("untrained")] if untrained else []
    _forget_peak()
    try:
        done = training.train(model, case.training, cell.lr, task.epochs, task.batch_size, cell.seed, autocast, False)
    except JactusError as e:
        print(f"{cell}: {e}", file=sys.stderr)
        return [*rows, row("trained", lr=cell.lr, loss=None)]
    peak = _memory("VmHWM")
    used = None if peak is None or before is None else peak - before
    return [*rows, row("trained", lr=cell.lr, loss=done.loss, peak_bytes=used, train_seconds=done.seconds)]


def _versions(autocast: torch.dtype | None) -> str:
    precision = "float32" if autocast is None else f"{str(autocast).removeprefix('torch.')} autocast"
    facts = {k: v for k, v in environment(0).items() if k != "seed"}
    return "; ".join([*(f"{k} {v}" for k, v in facts.items()), precision])


def _memory(kind: str) -> int | None:
    """Bytes resident now (VmRSS) or at most (VmHWM); None where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(rf"{kind}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def _forget_peak() -> None:
    """Let VmHWM start again from what is resident now."""
    gc.collect()
    # On another system, or where it is not allowed, the peak includes calibration.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

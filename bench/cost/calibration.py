"""Calibration against the same passes without it and against the usual way; and the covariance update alone."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import jactus
from jactus.model.targets import Target, find_targets
from jactus_kernels import covariance_update_, symmetrize_

from ..accuracy.tasks import TASKS, calibration_batches, prepared
from ..report import versions
from . import checks, subjects
from .race import race, ratio
from .store import Row, Setting, compared

SETTINGS = tuple(
    Setting(model, dtype, threads, rows, length)
    for model, rows, length in (("minilm", 16, 64), ("vit-b", 4, 197))
    for dtype, threads in (("float32", 1), ("float32", 2), ("bfloat16", 2))
)
ON_GPU = (
    Setting("vit-b", "bfloat16", 1, 64, 197),
    Setting("vit-b", "float32", 1, 64, 197),
    Setting("llama-7b", "bfloat16", 1, 4, 2048),
    Setting("minilm", "bfloat16", 1, 16, 64),
)
BATCHES = 2
# whole, and of the data's labels, as the usual way has them
COVARIANCES = jactus.JactusConfig(union=("weight", "covariance"), union_share=0.1, draws=0)
WITH_GRADIENT = jactus.JactusConfig(union_share=0.1)
UPDATE_SIZES = (384, 768, 1536, 3072, 4096)
UPDATE_TOKENS = 2048
# In bfloat16 the two runs round their gradients at different scales of the loss.
ALLOWED = {"float32": 1e-3, "bfloat16": 3e-2}


def calibration(settings: tuple[Setting, ...] = SETTINGS) -> Iterator[Row]:
    """Both covariances, and with the mean gradient too."""
    for at in settings:
        yield from _calibration(at)


def _calibration(at: Setting) -> Iterator[Row]:
    torch.set_num_threads(at.threads)
    model = subjects.dense(at.model).to(at.device)
    batches = [subjects.batch(at.model, at.rows, at.length, at.device)] * BATCHES

    def ours(config: jactus.JactusConfig) -> jactus.Statistics:
        with at.autocast():
            return jactus.calibrate(model, batches, config, verify=False, progress=False)  # the sums alone

    error = checks.within("calibration", _difference(ours(COVARIANCES), usual(model, batches, at)), ALLOWED[at.dtype])
    contenders: dict[str, Callable[[], Any]] = {
        "covariances": lambda: ours(COVARIANCES),
        "with gradient": lambda: ours(WITH_GRADIENT),
        "bare": lambda: bare(model, batches, at),
        "usual covariances": lambda: usual(model, batches, at),
        "usual with gradient": lambda: usual(model, batches, at, gradient=True),
    }
    times = race(contenders, seconds=10, device=at.device)
    work = counted(model, ours(WITH_GRADIENT))
    for name in ("covariances", "with gradient"):
        for against, theirs in (("bare", "bare"), ("usual", f"usual {name}")):
            found, floor = ratio(times[name], times[theirs]), work[name] / work[theirs]
            checked = error if name == "covariances" else None
            yield compared(f"calibration, {name}", at, 1.0, against, found, floor, checked, versions())


def looks() -> Iterator[Row]:
    """The demo's calibration with its checks of the first batch, against the same without."""
    task = TASKS["sarcasm"]
    case = prepared(task, "fitted", 0)
    batches = calibration_batches(task, case, task.calibration, 0)
    at = Setting("minilm", threads=torch.get_num_threads(), rows=task.batch_size)

    def ours(verify: bool) -> jactus.Statistics:
        return jactus.calibrate(case.model, batches, verify=verify, progress=False)

    error = checks.within("calibration with checks", _apart(ours(True), ours(False)), ALLOWED["float32"])
    times = race({"with": lambda: ours(True), "without": lambda: ours(False)}, rounds=(3, 3), warmup=0)
    found = ratio(times["with"], times["without"])
    yield compared("calibration, checks", at, 1.0, "without", found, None, error, versions())


def _apart(a: jactus.Statistics, b: jactus.Statistics) -> float:
    """The largest relative difference of two runs' sums."""
    pairs = zip(a._sums(), b._sums())
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def counted(model: nn.Module, statistics: jactus.Statistics) -> dict[str, float]:
    """Multiply-adds a token of the targeted layers: forward and input gradients, and the sums that each way makes."""
    layers = find_targets(model, COVARIANCES)
    passes = sum(2.0 * t.m * t.n for t in layers.values())
    ours = sum(t.m**2 / 2 for t in layers.values()) + sum(layers[name].n ** 2 / 2 for name in statistics.input_sums)
    usually = sum(t.m**2 + t.n**2 for t in layers.values())
    gradient = sum(t.m * t.n for t in layers.values())
    return {
        "covariances": passes + ours,
        "with gradient": passes + ours + gradient,
        "bare": passes,
        "usual covariances": passes + usually,
        "usual with gradient": passes + usually + gradient,
    }


@contextmanager
def _frozen(model: nn.Module, layers: dict[str, Target]) -> Iterator[None]:
    """Weights frozen; the graph begins at the inputs of the first layers, as in calibrate."""
    wanted = {p: p.requires_grad for p in model.parameters()}

    def start(module: nn.Module, args: tuple) -> tuple | None:
        return None if args[0].requires_grad else (args[0].detach().requires_grad_(True), *args[1:])

    with ExitStack() as handles:
        for target in layers.values():
            handles.callback(target.module.register_forward_pre_hook(start).remove)
        model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, flag in wanted.items():
                parameter.requires_grad_(flag)


def bare(model: nn.Module, batches: list[dict], at: Setting) -> None:
    """The same forward and backward, nothing summed."""
    with _frozen(model, find_targets(model, COVARIANCES)):
        for batch in batches:
            with at.autocast():
                loss = model(**batch).loss
            loss.backward()


def usual(
    model: nn.Module, batches: list[dict], at: Setting, gradient: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """What published code does: a hook on each layer, inputs and gradients upcast, the full product, nothing shared."""
    layers = find_targets(model, COVARIANCES)
    sums = {
        name: (torch.zeros(t.n, t.n, device=t.weight.device), torch.zeros(t.m, t.m, device=t.weight.device))
        for name, t in layers.items()
    }
    means = {name: torch.zeros(t.m, t.n, device=t.weight.device) for name, t in layers.items()} if gradient else {}

    def upcast(rows: Tensor) -> Tensor:
        return rows.detach().reshape(-1, rows.shape[-1]).float()

    def add(name: str, x: Tensor, g: Tensor) -> None:
        inputs, outputs = sums[name]
        x, g = upcast(x), upcast(g)
        inputs += x.T @ x
        outputs += g.T @ g
        if gradient:
            means[name] += g.T @ x

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: tuple, output: Tensor) -> None:
            output.register_hook(lambda g: add(name, args[0], g))

        return after

    with ExitStack() as handles:
        for name, target in layers.items():
            handles.callback(target.module.register_forward_hook(hook(name)).remove)
        bare(model, batches, at)
    return sums


def _difference(statistics: jactus.Statistics, sums: dict[str, tuple[Tensor, Tensor]]) -> float:
    """The largest of all layers, each sum scaled to unit trace: the usual way has the mean loss, calibrate the summed."""
    found = []
    for name, (inputs, outputs) in sums.items():
        for mine, theirs in (
            (statistics.input_covariance(name), inputs),
            (statistics.output_covariance(name), outputs),
        ):
            assert mine is not None
            found.append(checks.relative(mine / mine.trace(), theirs / theirs.trace()))
    return max(found)


def updates() -> Iterator[Row]:
    """S += XᵀX: the lower triangle against the whole, and bfloat16 inputs against float32 ones."""
    for threads in (1, 2):
        for n in UPDATE_SIZES:
            yield from _update(threads, n)


def _update(threads: int, n: int) -> Iterator[Row]:
    torch.set_num_threads(threads)
    half = torch.randn(UPDATE_TOKENS, n, generator=torch.Generator().manual_seed(0)).bfloat16()
    full = half.float()  # the same values: exact in both dtypes
    S, right = torch.zeros(n, n), full.double().T @ full.double()
    error = 0.0
    for X in (full, half):
        mine = symmetrize_(covariance_update_(torch.zeros(n, n), X))
        error = max(error, checks.within(f"the update of {X.dtype}", checks.relative(mine, right), 1e-5))
    contenders: dict[str, Callable[[], Any]] = {
        "float32": lambda: covariance_update_(S, full),
        "bfloat16": lambda: covariance_update_(S, half),
        "addmm_": lambda: S.addmm_(full.T, full),
        "upcast": lambda: S.addmm_(half.float().T, half.float()),
    }
    times = race(contenders, seconds=5)
    for mine, theirs, floor in (
        ("float32", "addmm_", 0.5),
        ("bfloat16", "upcast", None),
        ("bfloat16", "float32", None),
    ):
        at = Setting(f"n = {n}", mine, threads, UPDATE_TOKENS, 1)
        against = f"{theirs} update" if theirs == "float32" else theirs
        found = ratio(times[mine], times[theirs])
        yield compared("covariance update", at, 1.0, against, found, floor, error, versions())

"""How cost grows with tokens, width, rank, layers and calibration examples: times at five sizes and the exponent fitted."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

import jactus
from jactus.planning.subspace import directions, metric
from jactus_kernels import core_linear, covariance_update_

from ..report import versions
from . import subjects
from .race import race
from .store import Growth

T, N, R = 2048, 1024, 256


def growth() -> Iterator[Growth]:
    """One variable at a time, the others at T = 2048, m = n = 1024, r = 256."""
    torch.set_num_threads(2)
    yield _fitted("covariance update", "T", (512, 1024, 2048, 4096, 8192), lambda T: _covariance(T, N), 1.0)
    yield _fitted("covariance update", "n", (768, 1152, 1536, 2304, 3072), lambda n: _covariance(T, n), 2.0)
    yield _fitted("three-factor layer, forward and backward", "T", (512, 1024, 2048, 4096, 8192), _layer(), 1.0)
    yield _fitted(
        "three-factor layer, forward and backward", "n", (512, 1024, 2048, 4096), lambda n: _layer(n=n)(T), 1.0
    )
    yield _fitted("three-factor layer, forward and backward", "r", (64, 128, 256, 512), lambda r: _layer(r=r)(T), 1.0)
    yield _fitted("planning a layer", "n", (256, 384, 512, 768, 1024), _planning, 3.0)
    yield _fitted("calibration", "examples", (16, 32, 64, 128), _calibration(), 1.0)
    yield _fitted("plan.at", "layers", (6, 12, 24, 48), _reallocation(), 1.0)


def _fitted(
    measure: str, variable: str, sizes: Sequence[int], make: Callable[[int], Callable[[], Any]], predicted: float
) -> Growth:
    times = race({str(size): make(size) for size in sizes}, seconds=10)
    middle = [float(np.median(times[str(size)])) for size in sizes]
    exponent = float(np.polyfit(np.log(sizes), np.log(middle), 1)[0])
    shown = " ".join(f"{seconds / middle[0]:.3g}" for seconds in middle)
    return Growth(measure, variable, " ".join(map(str, sizes)), shown, exponent, predicted, "cpu", versions())


def _covariance(tokens: int, n: int) -> Callable[[], Any]:
    X, S = torch.randn(tokens, n), torch.zeros(n, n)
    return lambda: covariance_update_(S, X)


def _layer(n: int = N, r: int = R) -> Callable[[int], Callable[[], Any]]:
    U, V = (torch.randn(n, r) / n**0.5 for _ in range(2))
    C = torch.eye(r, requires_grad=True)

    def at(tokens: int) -> Callable[[], Any]:
        x = torch.randn(tokens, n, requires_grad=True)
        g = torch.randn(tokens, n)
        return lambda: torch.autograd.grad(core_linear(x, U, C, V), (x, C), g)

    return at


def _planning(n: int) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    W, D, X, Y = (torch.randn(rows, n, generator=generator) for rows in (n, n, 4 * n, 4 * n))
    A, G = X.T @ X / len(X), Y.T @ Y / len(Y)
    cpu = torch.device("cpu")
    return lambda: directions(W, metric(G, 0.01, cpu), metric(A, 0.01, cpu), n * 2 // 5, n // 25, gradient=D)


def _calibration() -> Callable[[int], Callable[[], Any]]:
    model = subjects.dense("minilm")

    def at(examples: int) -> Callable[[], Any]:
        batches = [subjects.batch("minilm", 16, 64)] * (examples // 16)
        return lambda: jactus.calibrate(model, batches, progress=False)

    return at


def _reallocation() -> Callable[[int], Callable[[], Any]]:
    plan = subjects.random_plan(subjects.dense("vit-b"))
    (kept, *_), config = plan.layers.values(), plan.config.replace(allocation="global")

    def at(layers: int) -> Callable[[], Any]:
        many = jactus.Plan({str(i): kept for i in range(layers)}, config, {}, 0)
        return lambda: many.at(0.6)

    return at

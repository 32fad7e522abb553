"""Timing as ratios: contenders run in turns, so that what the machine does meanwhile happens to all of them."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Ratio:
    """Median over the rounds of ours / theirs, and half the distance between the quartiles (0 of one round)."""

    median: float
    spread: float


def race(
    contenders: dict[str, Callable[[], Any]],
    seconds: float = 20.0,
    rounds: tuple[int, int] = (5, 41),
    warmup: int = 1,
    device: str = "cpu",
) -> Times:
    """Seconds of each call, round by round; in each round every contender runs once, in an order that rotates.

    seconds: no round is started after so long, once there are `rounds[0]`; there are at most `rounds[1]`.
    """
    names = list(contenders)
    times: Times = {name: [] for name in names}
    for _ in range(warmup):
        for run in contenders.values():
            run()
    collected = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        for k in range(rounds[1]):
            if k >= rounds[0] and time.perf_counter() - started > seconds:
                break
            for name in names[k % len(names) :] + names[: k % len(names)]:
                times[name].append(_timed(contenders[name], device))
            gc.collect()
    finally:
        if collected:
            gc.enable()
    return times


def ratio(ours: list[float], theirs: list[float]) -> Ratio:
    """Of the times of two contenders of one race."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], 0.0)
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(middle, (high - low) / 2)


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """`run` as one CUDA graph, its replay as a function; run once before, so that what it makes at first is there."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _timed(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started

"""Deployed: the folded model against the dense one, on whole sequences and token by token."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

import jactus

from ..report import named, versions
from . import checks, flops, subjects
from .race import race, ratio
from .steps import BASIC, BUDGETS
from .store import Row, Setting, compared

PREFILL = (
    *(replace(s, threads=2) for s in BASIC),
    *(replace(s, threads=2, dtype="bfloat16") for s in BASIC),
    *(replace(s, threads=1) for s in BASIC),
    *(replace(BASIC[0], threads=2, rows=rows, length=length) for rows, length in ((1, 32), (8, 128), (32, 128))),
)
DECODE = tuple(Setting(m, dtype, threads, 1, 128) for m in ("smollm2", "llama-7b")
               for dtype in ("float32", "bfloat16") for threads in (1, 2))  # fmt: skip
DECODE_ON_GPU = tuple(Setting("llama-7b", dtype, 1, rows, 128) for dtype in ("bfloat16", "float32") for rows in (1, 16))
TIMED_ON_GPU = (Setting("smollm2", "bfloat16", 1, 1, 128),)
TIMED = tuple(s for s in DECODE if s.model == "smollm2")


def prefill(settings: tuple[Setting, ...] = PREFILL) -> Iterator[Row]:
    """A forward pass over whole sequences; bfloat16 is autocast, the weights float32."""
    for at in settings:
        torch.set_num_threads(at.threads)
        batch = subjects.unlabelled(subjects.batch(at.model, at.rows, at.length, at.device))
        models, errors = _models(at, batch, _by_default(at), BUDGETS, at.autocast, torch.float32)
        work = {name: flops.forward(model, batch) for name, model in models.items()}
        times = race({name: forward(model, batch, at) for name, model in models.items()}, device=at.device)
        for budget, name in zip(BUDGETS, errors):
            found = ratio(times[name], times["dense"])
            yield compared("prefill", at, budget, "dense", found, work[name] / work["dense"], errors[name], versions())


def decode(settings: tuple[Setting, ...] = DECODE) -> Iterator[Row]:
    """One token after `length` others. Weights are stored in the dtype: reading them is what takes the time."""
    return _decoding("decode", settings, _by_default, BUDGETS)


def decode_timed(settings: tuple[Setting, ...] = TIMED) -> Iterator[Row]:
    """The same where the budget is of the time that the layers were measured to take for one token."""
    # Half the time is not to be had: the least rank of SmolLM2's small layers takes more.
    return _decoding("decode, budget of time", settings, _by_time, (0.9, 0.8))


Made = Callable[[float], nn.Module]  # the model compressed to a budget


def _by_default(at: Setting) -> Made:
    return lambda budget: subjects.ready(at.model, "jactus", budget)


def _by_time(at: Setting) -> Made:
    plan = subjects.timed(at.model, at.dtype, at.device)
    return lambda budget: jactus.compress(subjects.dense(at.model), plan.at(budget))


def _decoding(
    measure: str, settings: tuple[Setting, ...], making: Callable[[Setting], Made], budgets: tuple[float, ...]
) -> Iterator[Row]:
    for at in settings:
        torch.set_num_threads(at.threads)
        batch = subjects.unlabelled(subjects.batch(at.model, at.rows, at.length, at.device))
        models, errors = _models(at, batch, making(at), budgets, nullcontext, getattr(torch, at.dtype))
        stored = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        times = race({name: next_token(model, batch) for name, model in models.items()}, device=at.device)
        for budget, name in zip(budgets, errors):
            found = ratio(times[name], times["dense"])
            floor = stored[name] / stored["dense"]
            yield compared(measure, at, budget, "dense", found, floor, errors[name], versions())


def _models(
    at: Setting,
    batch: dict,
    made: Made,
    budgets: tuple[float, ...],
    context: Callable[[], AbstractContextManager],
    stored: torch.dtype,
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """The dense model and the folded ones, with weights of dtype `stored`, and the errors of these against themselves
    before folding: in float32, and where they will run in bfloat16, computed as they will be."""
    models, errors = {"dense": subjects.dense(at.model).to(at.device, stored)}, {}
    for budget in budgets:
        name = named("jactus", budget)
        three = made(budget).to(at.device).eval()
        folded = subjects.folded(three)
        errors[name] = checks.same_logits(three, folded, batch)
        models[name] = folded.to(stored)
        if at.dtype != "float32":
            with context():
                errors[name] = checks.rounded_logits(three, folded, batch)
    return models, errors


def forward(model: nn.Module, batch: dict, at: Setting) -> Callable[[], Any]:
    """One forward pass, as a function."""

    @torch.no_grad()
    def run() -> None:
        with at.autocast():
            model(**batch)

    return run


def next_token(model: nn.Module, batch: dict) -> Callable[[], Any]:
    """One step of generation from a cache that is cut back afterwards, as a function."""
    cache = DynamicCache(config=model.config)
    ids = batch["input_ids"]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids[:, -1:], past_key_values=cache)
        cache.crop(-1)

    return run

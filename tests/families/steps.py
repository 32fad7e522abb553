"""What a case goes through once it has statistics: full rank, a training step, save and reload, generate, fold and merge."""

import copy
import functools
import tempfile
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import jactus
from jactus import CoreLinear, JactusConfig, JactusError

from .inputs import Data
from .oracle import Double

TOLERANCE = 1e-9  # of sums and outputs in float64: some 1e-13 of rounding, amplified by a few layers
# a plan keeps its directions in float32: each weight is right to 2⁻²⁴, and there are some layers
FULL_RANK = 256 * 2**-24
RELOADED = 1e-11  # the same numbers, in files' alignment


class Wrong(AssertionError):
    """A wrong value: what kind, and the figures."""


def brief(e: BaseException) -> str:
    """Type, message and the last places of an exception, in one line."""
    frames = traceback.extract_tb(e.__traceback__)
    places = [
        f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno}" for f in frames if "torch" not in f.filename.split("/")
    ][-3:]
    return f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''} [{' < '.join(reversed(places))}]"


def note(notes: list[str], text: str) -> None:
    if text not in notes:
        notes.append(text)


def values(case: Data, model: nn.Module, batch: Any) -> list[Tensor]:
    """All floating tensors of the model's output."""
    torch.manual_seed(0)
    with torch.no_grad(), Double():
        return list(_tensors(case.outputs(model, batch)))


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "past_key_values":
                yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def relative(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative difference; infinite where shapes differ."""
    if [a.shape for a in got] != [b.shape for b in want]:
        return float("inf")
    keep = [torch.isfinite(b) for b in want]
    errors = [float((a - b)[k].norm() / b[k].norm().clamp_min(1e-290)) for a, b, k in zip(got, want, keep)]
    return max((float("inf") if e != e else e for e in errors), default=0.0)


def same(got: list[Tensor], want: list[Tensor], what: str, tolerance: float = TOLERANCE) -> None:
    error = relative(got, want)
    if error > tolerance:
        raise Wrong(f"{what}: outputs are off by {error:.1e}")


def full_rank(case: Data, dense: nn.Module, statistics: jactus.Statistics, chosen: dict[str, JactusConfig]) -> None:
    """At full rank the model computes what it did, in eval and in training mode, and folded and merged too."""
    model = copy.deepcopy(dense).eval()
    plan = jactus.plan(model, statistics, chosen["full"], progress=False)
    short = [n for n, r in plan.ranks.items() if r != min(plan.layers[n].m, plan.layers[n].n)]
    if short:
        raise Wrong(f"full rank: {short[0]} gets rank {plan.ranks[short[0]]} at a budget of 1")
    jactus.compress(model, plan)
    batch = case.together[-1]
    want = values(case, dense.eval(), batch)
    same(values(case, model, batch), want, "full rank, eval", FULL_RANK)
    training = values(case, copy.deepcopy(model).train(), batch)
    same(training, values(case, copy.deepcopy(dense).train(), batch), "full rank, train", FULL_RANK)
    want = values(case, model, batch)
    jactus.fold(model)
    same(values(case, model, batch), want, "full rank, folded")


def low_rank(
    case: Data, dense: nn.Module, statistics: jactus.Statistics, chosen: dict, notes: list[str], refusals: list[str]
) -> None:
    """At low rank: a training step, save and reload, generate, fold, reload, merge."""
    model = copy.deepcopy(dense)
    jactus.compress(model, jactus.plan(model, statistics, chosen["low"], progress=False))
    cores = {n: m for n, m in model.named_modules() if isinstance(m, CoreLinear)}
    step(case, model, statistics, cores)
    batch = case.together[-1]
    model.eval()
    want = values(case, model, batch)
    reload(case, dense, model, want, "reloaded", notes, refusals)
    jactus.fold(model)
    same(values(case, model, batch), want, "folded")
    reload(case, dense, model, want, "folded, reloaded", notes, refusals)
    jactus.merge(model)
    same(values(case, model, batch), want, "merged")


def step(case: Data, model: nn.Module, statistics: jactus.Statistics, cores: dict[str, CoreLinear]) -> None:
    """One step of SGD: a gradient reaches every core whose layer had one, and the loss falls."""
    model.train()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    count = case.terms_together[-1]
    torch.manual_seed(0)
    with Double():
        before = case.total(model, case.together[-1], count)
    before.backward()
    for name, core in cores.items():
        if core.core.grad is None:
            raise Wrong(f"step: no gradient reaches the core of {name}")
        if not core.core.grad.any() and statistics.layers[name].gradient_sum.norm() > 1e-12:
            raise Wrong(f"step: the gradient of the core of {name} is zero")
    trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    size = sum(float(p.grad.square().sum()) for p in trained)
    kept = [p.detach().clone() for p in trained]
    for part in (1e-4, 1e-7):  # a router may choose another expert after the longer step
        rate = part * max(abs(before.item()), 1e-3) / max(size, 1e-30)
        for p, old in zip(trained, kept):
            p.data.copy_(old)
        torch.optim.SGD(trained, lr=rate).step()
        for n, b in model.named_buffers():
            b.copy_(buffers[n])
        torch.manual_seed(0)
        with torch.no_grad(), Double():
            after = case.total(model, case.together[-1], count)
        if after < before:
            break
    else:
        raise Wrong(f"step: the loss goes from {before.item():.9g} to {after.item():.9g}")
    for n, b in model.named_buffers():
        b.copy_(buffers[n])
    model.zero_grad(set_to_none=True)


def reload(
    case: Data, dense: nn.Module, model: nn.Module, want: list, how: str, notes: list[str], refusals: list[str]
) -> None:
    """Save and reload by the class itself: same outputs, and same tokens where it generates."""
    if not hasattr(model, "save_pretrained"):
        return
    batch = case.together[-1]
    try:
        # constants rounded in the dtype that a model is made in, layers kept in float32: not jactus's doing
        own = relative(values(case, _again(dense, dense.save_pretrained), batch), values(case, dense, batch))
    except Exception as e:
        note(notes, f"its own reload fails: {brief(e)[:150]}")
        return
    try:
        again = _again(model, functools.partial(jactus.save_pretrained, model))
    except JactusError as e:
        refusals.append(f"{how}: {e}")
        return
    same(values(case, again, batch), want, how, max(RELOADED, 10 * own))
    if not model.can_generate():
        return
    try:
        _generated(case, dense)
    except Exception as e:
        note(notes, f"its own generate fails: {type(e).__name__}")
        return
    a, b = _generated(case, model), _generated(case, again)
    if not torch.equal(a, b):
        raise Wrong(f"{how}: generates {b.tolist()}, not {a.tolist()}")


def _again(model: nn.Module, save: Callable[[str], None]) -> nn.Module:
    with tempfile.TemporaryDirectory() as directory:
        save(directory)
        return type(model).from_pretrained(directory, dtype=torch.float64, experts_implementation="eager").eval()


def _generated(case: Data, model: nn.Module) -> Tensor:
    batch = case.alone[-1]
    inputs = {k: v for k, v in batch.items() if "label" not in k and not k.startswith("decoder")}
    torch.manual_seed(0)
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)

"""The steps of the lane for one case: statistics, full rank, a training step, save and reload, generate, fold and merge."""

import copy
import functools
import re
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import jactus
from jactus import CoreLinear, JactusConfig, JactusError

from .inputs import Data
from .oracle import Double, Sums, Truth, difference, truth

TOLERANCE = 1e-9  # of sums and outputs in float64: some 1e-13 of rounding, amplified by a few layers
FULL_RANK = (
    64 * 2**-24
)  # a plan keeps its directions in float32: each weight is right to 2⁻²⁴, and there are some layers
RELOADED = 1e-11  # the same numbers, in files' alignment
ADDITIVE = 1e-7  # a model whose own padded and lone gradients differ by more is not the same function of both


class Wrong(AssertionError):
    """A wrong value: what kind, and the figures."""


@dataclass
class Result:
    """What became of one case: exact, refused, FAIL or not tried."""

    name: str
    kind: str
    status: str = ""
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def configs(exclude: tuple[str, ...] = ()) -> dict[str, JactusConfig]:
    """All configurations of the lane: of the statistics, of full rank, and of low ranks with something to fold."""
    common = JactusConfig(
        union=("weight", "covariance", "gradient"),
        union_share=0.25,
        statistics_dtype="float64",
        rank_multiple=1,
        exclude_modules=exclude,
    )
    return {
        "statistics": common,
        "full": common.replace(accounting="folded", full_rank=True, budget=1.0),
        "low": common.replace(budget=0.6, leave_dense=False, allocation="uniform"),
    }


def check(name: str, model: nn.Module, data: Iterable[Data | Callable[[], Data]]) -> Result:
    """Run every step on the first of `data` that the bare model takes and that is a sum over its examples.

    The advice of refusals that name a layer to exclude is followed, so that the rest is judged too.
    """
    result = Result(name, type(model).__name__)
    usable = _usable(model, data, result)
    case, own = next(usable, (None, None))
    if case is None or own is None:
        result.status = "not tried"
        return result
    exclude: tuple[str, ...] = ()
    refusals: list[str] = []
    for _ in range(8):
        try:
            judge(case, copy.deepcopy(model), own, exclude, result, refusals)
            break
        except JactusError as e:
            refusals.append(str(e))
            named = _named(model, str(e))
            if "attention mask" in str(e) and not case.unmasked:
                case, own = next(((c, o) for c, o in usable if c.unmasked), (case, own))
                if case.unmasked:
                    _note(result, "the rest without a mask")
                    continue
            if named is None or named in exclude:
                break
            exclude += (named,)
        except Wrong as e:
            result.status, result.reason = "FAIL", str(e)
            break
        except Exception as e:
            result.status, result.reason = "FAIL", f"raised {brief(e)}"
            break
    if refusals:
        result.reason = " | ".join(filter(None, [result.reason, *refusals]))
    if result.status != "FAIL":
        result.status = "refused" if refusals else "exact"
        if exclude:
            _note(result, f"without {', '.join(exclude)}")
    return result


def _usable(
    model: nn.Module, data: Iterable[Data | Callable[[], Data]], result: Result
) -> Iterator[tuple[Data, "Own"]]:
    """Data that the bare model takes: first those that are sums over their examples, then, if none is, the others."""
    failure, others = "", []
    found = False
    for made in data:
        try:
            case = made() if callable(made) else made
            own = bare(case, model)
        except Exception as e:
            failure = failure or brief(e)
            continue
        if own.additive:
            found = True
            yield case, own
        else:
            others.append((case, own))
            if case.ragged and not found:
                _note(result, "its own padded and lone losses differ")
    if not found:
        # equal lengths before ragged ones: without a true sum the batch is compared as it is
        yield from sorted(others, key=lambda pair: pair[0].ragged)
    if not found and not others:
        result.reason = f"its own forward or backward: {failure}"


def brief(e: BaseException) -> str:
    """Type, message and the last places of an exception, in one line."""
    frames = traceback.extract_tb(e.__traceback__)
    places = [
        f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno}" for f in frames if "torch" not in f.filename.split("/")
    ][-3:]
    return f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''} [{' < '.join(reversed(places))}]"


def _named(model: nn.Module, message: str) -> str | None:
    """The module that a refusal speaks of, as a name ending to exclude with its like in other layers."""
    names = {n for n, m in model.named_modules() if n and next(m.parameters(recurse=False), None) is not None}
    for word in re.findall(r"[\w.]+", message):
        if word in names:
            return word
    return None


def _pattern(exclude: tuple[str, ...]) -> str | tuple[str, ...]:
    """One regular expression for the named modules and their like in other layers."""
    return "|".join(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in exclude) if exclude else ()


def linear_names(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    plain = (nn.Linear.forward, Conv1D.forward)  # a router derived from Linear may give a tuple
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n and type(m).forward in plain]


@dataclass
class Own:
    """What the bare model says of itself: whether padded batches equal lone examples."""

    additive: bool
    together: bool  # batches of four are also to be tried
    tolerance: float


def bare(case: Data, model: nn.Module) -> Own:
    """The model's own forward and backward, its determinism, and how far its padded batches are from lone examples."""
    names = linear_names(model)
    model = copy.deepcopy(model)
    first = truth(model, case.alone, case.terms, names, case.total)
    again = truth(model, case.alone[:1], case.terms[:1], names, case.total)
    once = truth(model, case.alone[:1], case.terms[:1], names, case.total)
    if not torch.isfinite(torch.tensor(first.loss)):
        raise ValueError(f"the loss is {first.loss}")
    if difference(again, once)[0] > 1e-12:
        raise ValueError("random in eval mode")
    if case.together is case.alone:
        return Own(True, False, TOLERANCE)
    both = truth(model, case.together, case.terms_together, names, case.total)
    off = max(_off(both, first), abs(both.loss - first.loss) / max(abs(first.loss), 1e-3))
    return Own(off < ADDITIVE, True, max(TOLERANCE, 10 * off) if off < ADDITIVE else TOLERANCE)


def _off(a: Truth, b: Truth) -> float:
    """The largest relative difference of the weights' gradients alone: rows and inputs differ by padding."""
    total = max(float(s.gradient.norm()) for s in b.layers.values())
    return max(float((a.layers[n].gradient - s.gradient).norm()) for n, s in b.layers.items()) / max(total, 1e-290)


def judge(case: Data, model: nn.Module, own: Own, names: tuple, result: Result, refusals: list[str]) -> None:
    """All steps, on a copy of the model; raises Wrong, or JactusError for a refusal."""
    if not case.ragged and len(case.together) < len(case.alone):
        _note(result, "equal lengths")
    chosen = configs(_pattern(names))
    if own.additive:
        found = []
        size = len(case.alone) // len(case.together)
        hows = {"alone": case.alone}
        if own.together:
            hows[f"in {'padded ' if case.ragged else ''}batches of {size}"] = case.together
        for how, batches in hows.items():
            try:
                statistics = _calibrate(case, model, batches, chosen)
            except JactusError as e:
                if how == list(hows)[-1] and not found:
                    raise
                refusals.append(f"{how}: {e}")
                continue
            _compare(
                statistics, truth(model, case.alone, case.terms, list(statistics.layers), case.total), own, case, how
            )
            found.append(statistics)
        if len({s.terms for s in found}) > 1:
            raise Wrong(f"terms are {found[1].terms} in a batch and {found[0].terms} alone")
        statistics = found[0]
    else:
        _note(result, "not a sum over examples: compared batch by batch")
        statistics = _calibrate(case, model, case.together, chosen)
        want = truth(model, case.together, case.terms_together, list(statistics.layers), case.total)
        _compare(statistics, want, own, case, "as it is")
    full_rank(case, model, statistics, chosen)
    low_rank(case, model, statistics, chosen, result, refusals)
    _note(result, "all steps")


def _note(result: Result, note: str) -> None:
    if note not in result.notes:
        result.notes.append(note)


def _calibrate(case: Data, model: nn.Module, batches: list[Any], chosen: dict[str, JactusConfig]) -> jactus.Statistics:
    with Double():
        return jactus.calibrate(model, batches, chosen["statistics"], loss=case.loss, progress=False)


def _compare(statistics: jactus.Statistics, want: Truth, own: Own, case: Data, how: str) -> None:
    got = Truth(terms=statistics.terms)
    for name, layer in statistics.layers.items():
        rows = statistics.tokens[layer.inputs]
        got.layers[name] = Sums(rows, statistics.input_sums[layer.inputs], layer.output_sum, layer.gradient_sum)
    wrong = []
    if case.judge_terms and got.terms != want.terms:
        wrong.append(f"{got.terms} terms, not {want.terms}")
    error, where = difference(got, want)
    if error > own.tolerance:
        wrong.append(where)
    if wrong:
        raise Wrong(f"statistics {how}: {'; '.join(wrong)}")


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
    case: Data, dense: nn.Module, statistics: jactus.Statistics, chosen: dict, result: Result, refusals: list[str]
) -> None:
    """At low rank: a training step, save and reload, generate, fold, reload, merge."""
    model = copy.deepcopy(dense)
    jactus.compress(model, jactus.plan(model, statistics, chosen["low"], progress=False))
    cores = {n: m for n, m in model.named_modules() if isinstance(m, CoreLinear)}
    step(case, model, statistics, cores)
    batch = case.together[-1]
    model.eval()
    want = values(case, model, batch)
    reload(case, dense, model, want, "reloaded", result, refusals)
    jactus.fold(model)
    same(values(case, model, batch), want, "folded")
    reload(case, dense, model, want, "folded, reloaded", result, refusals)
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
    case: Data, dense: nn.Module, model: nn.Module, want: list, how: str, result: Result, refusals: list[str]
) -> None:
    """Save and reload by the class itself: same outputs, and same tokens where it generates."""
    if not hasattr(model, "save_pretrained"):
        return
    batch = case.together[-1]
    try:
        # constants rounded in the dtype that a model is made in, layers kept in float32: not jactus's doing
        own = relative(values(case, _again(dense, dense.save_pretrained), batch), values(case, dense, batch))
    except Exception as e:
        _note(result, f"its own reload fails: {brief(e)[:150]}")
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
        _note(result, f"its own generate fails: {type(e).__name__}")
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

"""One case from its first forward to its result: the bare model, its statistics against the truth, then all other steps."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import jactus
from jactus import Allocation, JactusConfig, JactusError
from jactus.calibration.examples import size as examples

from .inputs import Data
from .oracle import Double, Sums, Truth, difference, truth
from .steps import TOLERANCE, Wrong, brief, full_rank, low_rank, note, values

ADDITIVE = 1e-7  # a model whose own padded and lone gradients differ by more is not the same function of both


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
        allocation=Allocation(rank_multiple=1),
        exclude_modules=exclude,
    )
    return {
        "statistics": common,
        "drawn": common.replace(union_share=0.0),
        "full": common.replace(budget=1.0),
        "low": common.replace(budget=0.6, rank_floor=2, uniform_part=0.0),
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
    for _ in range(24):
        try:
            judge(case, copy.deepcopy(model), own, exclude, result, refusals)
            break
        except JactusError as e:
            refusals.append(str(e))
            named = _named(model, str(e))
            if "attention mask" in str(e) and not case.unmasked:
                case, own = next(((c, o) for c, o in usable if c.unmasked), (case, own))
                if case.unmasked:
                    note(result.notes, "the rest without a mask")
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
            note(result.notes, f"without {', '.join(exclude)}")
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
                note(result.notes, "its own padded and lone losses differ")
    if not found:
        # equal lengths before ragged ones: without a true sum the batch is compared as it is
        yield from sorted(others, key=lambda pair: pair[0].ragged)
    if not found and not others:
        result.reason = f"its own forward or backward: {failure}"


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
        note(result.notes, "equal lengths")
    chosen = configs(_pattern(names))
    if own.additive:
        found = []
        size = len(case.alone) // len(case.together)
        hows = {"alone": case.alone}
        if own.together:
            hows[f"in {'padded ' if case.ragged else ''}batches of {size}"] = case.together
        for how, batches in hows.items():
            try:
                statistics = _calibrate(case, model, batches, chosen["statistics"])
            except JactusError as e:
                if how == list(hows)[-1] and not found:
                    del refusals[len(refusals) - len(hows) + 1 :]  # once is enough
                    raise
                refusals.append(f"{how}: {e}")
                continue
            _compare(
                statistics, truth(model, case.alone, case.terms, list(statistics.layers), case.total), own, case, how
            )
            found.append(statistics)
        if len({s.terms for s in found}) > 1:
            raise Wrong(f"terms are {found[1].terms} in a batch and {found[0].terms} alone")
        if case.loss is None and len(found) == len(hows):
            _draw(case, model, list(hows.values()), own, chosen)
        statistics = found[0]
    else:
        note(result.notes, "not a sum over examples: compared batch by batch")
        statistics = _calibrate(case, model, case.together, chosen["statistics"])
        want = truth(model, case.together, case.terms_together, list(statistics.layers), case.total)
        _compare(statistics, want, own, case, "as it is")
    values(
        case, model, case.together[-1]
    )  # what a model keeps of its last forward is then no part of a graph, and copies
    full_rank(case, model, statistics, chosen)
    low_rank(case, model, statistics, chosen, result.notes, refusals)
    note(result.notes, "all steps")


def _calibrate(case: Data, model: nn.Module, batches: list[Any], config: JactusConfig) -> jactus.Statistics:
    with Double():
        return jactus.calibrate(model, batches, config, loss=case.loss, statistics_dtype="float64", progress=False)


def _draw(case: Data, model: nn.Module, ways: list[list[Any]], own: Own, chosen: dict) -> None:
    """Labels that the model draws are alike alone and in a batch, and so are the sums where those of the labels given are."""
    found = [_calibrate(case, model, batches, chosen["drawn"]) for batches in ways]
    if len({s.drawn for s in found}) > 1:
        raise Wrong(f"labels are drawn {', '.join(str(s.drawn) for s in found)} (alone, in a batch)")
    if not found[0].drawn:
        return
    if len({sum(examples(batch) or 0 for batch in batches) for batches in ways}) > 1:
        return  # rows that hold several examples (packed) are other rows, and draw as such
    given = [_calibrate(case, model, batches, chosen["drawn"].replace(draws=0)) for batches in ways]
    if any(_apart(given, name) > own.tolerance for name in given[0].layers):
        return
    for name in found[0].layers:
        if (off := _apart(found, name)) > 10 * own.tolerance:
            raise Wrong(f"sums of labels drawn of {name} differ alone and in a batch by {off:.1g}")


def _apart(found: list[jactus.Statistics], name: str) -> float:
    """How far the sums of one layer are apart, as a part of the first."""
    first, *others = ([*s.layers[name].sums().values()] for s in found)
    offs = [float((b - a).norm()) / max(float(a.norm()), 1e-290) for other in others for a, b in zip(first, other)]
    return max(offs, default=0.0)


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

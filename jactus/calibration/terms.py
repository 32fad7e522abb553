"""How many terms a batch's loss sums or averages: found out on a few examples, not guessed from names.

With S(B) the sum of the terms of a batch's loss, S(B₁ ∪ B₂) = S(B₁) + S(B₂). A loss that is one number L(B) is a sum already, or
a mean over something: rows, labels, labels that are predicted one place before, elements, places of a mask. Of these rules the one
is taken under which S = L · (number of terms) adds up over parts of a batch. Labels that are ignored need not be −100.
"""

import itertools
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..model.families import config_values, shifts_labels
from .examples import Where, size, tensors
from .probes import IGNORED, Probe, Probes, Rule
from .rounding import FULL, is_half, rounding

logger = logging.getLogger("jactus")
AGAIN = frozenset(4**k for k in range(1, 16))  # batches on which the rule is tried once more
INPUTS = re.compile(r"input|mask|token_type|position|index|pixel")


def rules(model: nn.Module, batch: Any) -> list[Rule]:
    """What may be, the likeliest first: what transformers does with such labels."""
    labels = [(path, t) for path, t in tensors(batch) if path and _is_label(path[-1])]
    if not labels:  # called otherwise: any tensor of integers may be labels
        whole = [(path, t) for path, t in tensors(batch) if not t.is_floating_point() and t.dtype != torch.bool]
        labels = [(path, t) for path, t in whole if not (path and INPUTS.search(path[-1]))]
    found = []
    for path, t in labels:
        if t.is_floating_point() or not t.dim():
            found.append(Rule("elements", path))
            continue
        kinds = ["labels", "shifted labels"] if t.dim() > 1 else ["labels"]
        if shifts_labels(model):
            kinds.reverse()
        ignored = [(IGNORED,), *((IGNORED, v) for v in _candidates_to_ignore(model))]
        found += [Rule(kind, path, some) for some in ignored for kind in kinds]
    if any(path and _is_label(path[-1]) for path, _ in labels):
        found.append(Rule("rows"))
    else:
        found.insert(0, Rule("rows"))
    found += [Rule("elements", path) for path, t in labels if not t.is_floating_point() and t.dim() > 1]
    for path, t in tensors(batch):
        if t.dim() > 1 and ((path[-1:] and "mask" in path[-1]) or t.dtype == torch.bool):
            found += [Rule("mask", path), Rule("shifted mask", path)]
    found.append(Rule("sum"))
    return list(dict.fromkeys(found))


def _is_label(name: str) -> bool:
    return name in ("label", "label_ids") or name.endswith("labels")


def _candidates_to_ignore(model: nn.Module) -> list[int]:
    named = ("semantic_loss_ignore_index", "ignore_index", "pad_token_id")
    found = [v for name in named for v in config_values(model, name) if isinstance(v, int)]
    return [v for v in dict.fromkeys([*found, 255, -1]) if v != IGNORED]


class Terms:
    """The rule of a model's loss: found on the first batch, and again on a batch that tells apart what earlier ones did not."""

    def __init__(self, model: nn.Module, value: Callable[[Any], Tensor], verify: bool, own: bool) -> None:
        self.model, self.value, self.verify = model, value, verify
        # On a GPU a label that the loss does not know ends the process: unasked only a model's own loss is given one there, and
        # only −100. None: any value may be tried.
        on_cpu = all(p.device.type == "cpu" for p in model.parameters())
        safe = {IGNORED} if own and not config_values(model, "semantic_loss_ignore_index") else set()
        self.takes: set[int] | None = None if on_cpu else safe
        self.left: list[Rule] = []
        self.first: tuple[int, ...] = ()
        self.seen = 0

    def undecided(self, batch: Any) -> bool:
        """Whether the rule is not found yet, this batch tells apart what earlier ones did not, or it is time to look again."""
        self.seen += 1
        return not self.left or self._apart(batch) or self._is_time()

    def _is_time(self) -> bool:
        """After four times as many batches as the last time: weights of classes, say, may show late."""
        return self.verify and self.seen in AGAIN

    def check_sum(self, batch: Any, index: int, told: bool) -> None:
        """Raise JactusError where unreduced terms, or a sum that its user vouches for (`told`: a warning then), do not add up."""
        for probe in Probes(self.model, batch, [Rule("sum")]):
            whole, *parts = (float(self.value(b)) for b in (probe.whole, *probe.parts))
            if abs(whole - sum(parts)) > rounding(self.model, whole)[0] * max(sum(map(abs, parts)), 1e-30):
                what = (
                    f"{whole:.6g} of {size(probe.whole)} examples, {' + '.join(f'{v:.6g}' for v in parts)} of its parts"
                )
                if not told:
                    raise JactusError(
                        f"batch {index}: the terms of the loss do not add up ({what}): return one term for each example, label or "
                        "element, unreduced and not divided by their number, or (sum, number of terms)"
                    )
                logger.warning(
                    "the sum that loss= returns does not add up over parts of a batch (%s); taken at its word", what
                )

    def decide(self, batch: Any, index: int) -> None:
        """Find the rule, by the losses of a few examples. Nothing is decided where these are not finite."""
        if not self.left:
            candidates = [r for r in rules(self.model, batch) if r.count(batch) > 0]
            self._choose(candidates if self.verify else _convention(candidates, batch, index), batch, index)
        elif self._apart(batch):
            self._choose(self.left, batch, index)
            if self._apart(batch):
                self._settle(batch, index)
        elif self._is_time():
            self._tried(self.left, batch, index, again=True)

    def state(self) -> dict[str, Any]:
        """What was found, as plain values."""
        return {"left": [[r.kind, list(r.path), list(r.ignored)] for r in self.left], "first": list(self.first)}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.left = [Rule(kind, tuple(path), tuple(ignored)) for kind, path, ignored in state["left"]]
        self.first = tuple(state["first"])

    def of(self, batch: Any) -> tuple[int, int]:
        """What to multiply a batch's loss by, and how many terms it has; 0 of each where that was not decided."""
        if self.left:
            return self.left[0].factor(batch), self.left[0].count(batch)
        likeliest = rules(self.model, batch)[0]
        return 0, 0 if likeliest.count(batch) == 0 else 1

    def _apart(self, batch: Any) -> bool:
        """Whether the rules that are left, alike on the batch they were chosen on, are not alike on this one."""
        counts = [rule.factor(batch) for rule in self.left]
        return any(a * self.first[0] != b * counts[0] for a, b in zip(counts, self.first))

    def _choose(self, candidates: list[Rule], batch: Any, index: int) -> None:
        before, found = self.first, self._tried(candidates, batch, index) if self.verify else candidates
        if not found:
            return
        self.left = found
        if not before or len(self.left) < len(candidates):
            self.first = tuple(rule.factor(batch) for rule in self.left)

    def _settle(self, batch: Any, index: int) -> None:
        """Two rules fit all that was seen, and count this batch differently: of labels, or a mask, which is the unlikelier."""
        kept = [(r, first) for r, first in zip(self.left, self.first) if not r.kind.endswith("mask")]
        if kept:
            self.left, self.first = [r for r, _ in kept], tuple(first for _, first in kept)
        if not self._apart(batch):
            return
        told = " or ".join(map(str, self.left[:2]))
        if not is_half(self.model):
            raise JactusError(
                f"batch {index}: whether the loss of {type(self.model).__name__} is {told} cannot be told from its values; pass "
                "loss= that returns (sum, number of terms), or verify=False to go by transformers' conventions"
            )
        logger.warning("half precision does not tell whether the loss is %s: it is taken for the first", told)
        self.left = self.left[:1]

    def _tried(self, candidates: list[Rule], batch: Any, index: int, again: bool = False) -> list[Rule]:
        """Those of the candidates that add up over parts of this batch; `again`: by its examples alone, once more."""
        name = type(self.model).__name__
        probes = list(itertools.islice(Probes(self.model, batch, candidates, self.takes), 1 if again else None))
        if not probes:
            shapes = {".".join(path): tuple(t.shape) for path, t in tensors(batch)}
            raise JactusError(
                f"batch {index}: the loss of {name} is one number, and the batch cannot be cut into examples (its tensors have "
                f"different first dimensions: {shapes}) to see what it averages; pass loss= that returns (sum, number of terms), "
                "or verify=False to go by transformers' conventions"
            )
        left = candidates
        refused: set[Where] = set()
        taken: set[Where] = set()
        for number, probe in enumerate(probes):
            try:
                values = [self.value(b) for b in (probe.whole, *probe.parts)]
                second = values[0] if number or again else self.value(probe.whole)
            except Exception:
                if number:  # an example with labels taken away, which this loss does not take
                    refused |= probe.without
                    continue
                raise
            wide = values[0].element_size() >= 4
            whole, *parts = map(float, values)
            tolerances = FULL if probe.same_inputs and wide else rounding(self.model, whole)
            values_say = all(map(math.isfinite, (whole, *parts))) and any((whole, *parts))
            if number == 0 and not values_say:
                return []
            if abs(float(second) - whole) > tolerances[0] * abs(whole):
                raise JactusError(
                    f"batch {index}: the loss of {name} is another at a second call with the same examples "
                    f"({whole:.6g}, then {float(second):.6g}), in eval mode: what it sums cannot be told; make it "
                    "deterministic, or pass loss= that returns (sum, number of terms)"
                )
            told = _that_add_up(left, probe, [whole, *parts], tolerances)
            if not told and probe.of_masks:
                continue
            if not told and probe.same_inputs:  # labels are no terms of their own (a sequence's likelihood)
                told = [rule for rule in left if not rule.kind.endswith("labels")]
            if not told and not (number and any(v != v for v in (whole, *parts))):
                raise JactusError(
                    f"batch {index}: the loss of {name} is no sum and no mean over rows, labels, elements or a mask that adds "
                    f"up over parts of the batch ({whole:.6g} of {size(probe.whole)} examples, "
                    f"{', '.join(f'{v:.6g}' for v in parts)} of its parts); an example's loss depends on the others "
                    "(contrastive?), it is weighted, or it is a sum of several means: pass loss= that returns (sum, number of "
                    "terms)"
                )
            left = told or left
            taken |= probe.without
        # what does not take an ignored value holds no labels, but ids
        inputs = refused - taken
        return [rule for rule in left if rule.path not in inputs] or left


def _convention(candidates: list[Rule], batch: Any, index: int) -> list[Rule]:
    known = [rule for rule in candidates if rule.path]
    if not known and not any(path and path[-1] == "start_positions" for path, _ in tensors(batch)):
        raise JactusError(
            f"batch {index}: the loss is one number and the batch has no labels to count its terms by; return the unreduced "
            "terms, or (sum, terms)"
        )
    return [(known or [Rule("rows")])[0]]


def _that_add_up(
    candidates: list[Rule], probe: Probe, values: list[float], tolerances: tuple[float, float]
) -> list[Rule]:
    tolerance, apart = tolerances
    missed = {}
    for rule in candidates:
        counts = [rule.factor(b) for b in (probe.whole, *probe.parts)]
        if min(counts) < 1 or any(v != v for v in values):
            continue
        sums = [v * c for v, c in zip(values, counts)]
        scale = sum(abs(s) for s in sums[1:]) or 1.0
        missed[rule] = abs(sums[0] - sum(sums[1:])) / scale
    least = min(missed.values(), default=float("inf"))
    return [rule for rule, miss in missed.items() if miss <= tolerance and miss <= max(8 * least, apart)]

"""Two examples of a batch with padding, together and each alone without it: what every call was given, and so where a mask lies."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..model.families import inner_models
from ..model.targets import Target
from .examples import Where, size, take
from .padding import Masks, by_example, cut, shortened
from .tracing import Call, Trace, trace

SAME = 0.1  # rows that differ by less of their length are the same: rounding moves half precision by some 0.01, other rows by 1
SIMILAR = 0.7  # of a model that does not mask its padding, the same rows differ by less than this
Lies = tuple[Where, str] | None  # which mask, and how it lies in the rows; None: all rows are tokens


class Untold(Exception):
    """Under no mask are the rows of examples together those of each alone: why."""


class Evidence:
    """Two examples of a batch with padding, together and each alone without its padding: what every call was given."""

    def __init__(
        self, model: nn.Module, targets: dict[str, Target], value: Callable[[Any], float], batch: Any, masks: Masks
    ) -> None:
        self.model = model
        rows = size(batch) or 1
        most = [int(sum((~by_example(m, rows)[i]).sum() for m in masks.values())) for i in range(rows)]
        first = max(range(rows), key=lambda i: (_told_apart(masks, rows, i), most[i]))
        other = min((i for i in range(rows) if i != first), key=most.__getitem__, default=first)
        two = take(batch, [first, other])
        self.pair = trace(model, targets, lambda: value(two), values=True)
        self.pair_masks = {path: _of_rows(m, rows, (first, other)) for path, m in masks.items()}
        self.failed = ""
        self.unsure: set[tuple[Where, Where]] = set()
        self.cuts: list[Trace] = []
        self.cut_masks: list[Masks] = []
        self.less: Trace | None = None
        try:
            if not shortened(batch, masks):
                raise JactusError("no tensor of the batch goes with a mask by its name and place")
            for row in (first, other):
                alone = cut(batch, masks, row, model)
                self.cuts.append(trace(model, targets, lambda alone=alone: value(alone), values=True))  # type: ignore[misc]
                self.cut_masks.append({path: _cut_mask(m, rows, row) for path, m in masks.items()})
            shorter = cut(batch, masks, other, model, drop=1)
            self.less = trace(model, targets, lambda: value(shorter), values=True)
        except Exception as e:  # the model's own refusal of such an example
            self.failed = f"the model does not run on an example without its padding ({type(e).__name__}: {e})"

    def rule(self, call: Call) -> tuple[Lies, float]:
        """The mask under which the rows of both examples are those of each alone, and by how much they differ. Raises Untold."""
        shape = self.pair.shapes[call]
        if self.failed and len(self.cuts) < 2:
            fitting = [path for path, m in self.pair_masks.items() if shape[:-1] == m.shape]
            if len(fitting) == 1:
                return (fitting[0], "batch first"), 0.0
            raise Untold(self.failed)
        if any(call not in t.inputs for t in self.cuts):
            raise Untold("an example without its padding made no such call")
        counts, whole = [t.rows(call) for t in self.cuts], self.pair.rows(call)
        if counts == [1, 1] and whole == 2:
            return None, 0.0  # one row an example, e.g. a pooled vector
        if whole == sum(counts) and self._untouched(call):
            return None, 0.0  # another tower's rows
        found = sorted(self._fitting(call))
        if found:
            best, lies = found[0]
            error = best[-1]
            # padding before tokens moves absolute positions, so values differ where the places are clear all the same
            clear = lies[1] == "batch first" and len({other[0] for _, other in found}) == 1
            if error <= SIMILAR or clear:
                same = {other[0] for key, other in found if key[:3] == best[:3] and not key[0]} - {lies[0]}
                self.unsure |= {(lies[0], path) for path in same}
                return lies, error
        if whole == sum(counts):
            return None, 0.0
        raise Untold(
            f"two examples gave it {whole} rows together, and {counts[0]} and {counts[1]} alone without their padding"
        )

    def _fitting(self, call: Call) -> Iterator[tuple[tuple[bool, int, int, float], tuple[Where, str]]]:
        """The ways in which a mask selects as many rows together as alone, the best first: of two under which the rows agree, that
        which leaves out less, since both may be parts of a third's."""
        x, alone = self.pair.inputs[call], [t.inputs[call] for t in self.cuts]
        for path, mask in self.pair_masks.items():
            for order, way in enumerate(WAYS):
                laid = lay(mask, way, x.shape[:-1], self.model)
                parts = [lay(m[path], way, a.shape[:-1], self.model) for m, a in zip(self.cut_masks, alone)]
                if laid is None or any(part is None for part in parts):
                    continue
                error = _difference(x, laid, alone, parts, mask, way)  # type: ignore[arg-type]
                if error is not None:
                    yield (error > SAME, -int(laid.sum()), order, error), (path, way)

    def _untouched(self, call: Call) -> bool:
        """Whether the last token of the example leaves the call's rows as they are: they are not of this text."""
        if self.less is None or (shorter := self.less.inputs.get(call)) is None:
            return False
        return shorter.shape == self.cuts[1].inputs[call].shape and torch.equal(shorter, self.cuts[1].inputs[call])


def alike(masks: Masks, a: Where, b: Where) -> bool:
    """Whether two masks leave out the same places, or are not both given."""
    ours, theirs = masks.get(a), masks.get(b)
    return ours is None or theirs is None or (ours.shape == theirs.shape and torch.equal(ours, theirs))


def _told_apart(masks: Masks, rows: int, row: int) -> int:
    """In how many pairs of masks of one shape an example's places differ."""
    own = [by_example(m, rows)[row] for m in masks.values()]
    return sum(a.shape == b.shape and not torch.equal(a, b) for i, a in enumerate(own) for b in own[:i])


def _of_rows(mask: Tensor, rows: int, chosen: tuple[int, ...]) -> Tensor:
    return by_example(mask, rows)[list(chosen)].flatten(0, 1)


def _cut_mask(mask: Tensor, rows: int, row: int) -> Tensor:
    own = by_example(mask, rows)[row]
    return own[:, own.any(0)]


WAYS = ("batch first", "sequence first", "after more", "its first", "its last", "in frames")


def lay(mask: Tensor, way: str, lead: torch.Size, model: nn.Module) -> Tensor | None:
    """The mask (B, T) as it lies in rows of the leading shape `lead`, flat; None where it does not fit in this way."""
    B, T = mask.shape
    rows = lead.numel()
    if way == "batch first" and lead[:2] == mask.shape and len(lead) > 2:
        return mask.reshape(B, T, *[1] * (len(lead) - 2)).expand(lead).reshape(-1)
    if way == "batch first" and rows == B * T:
        return mask.reshape(-1)
    if way == "sequence first" and rows == B * T and lead[0] == T:
        return mask.T.reshape(-1)
    if len(lead) != 2 or lead[0] != B:
        return None
    more = lead[1] - T
    if way == "after more" and more > 0:  # rows of its own in front
        return torch.cat([mask.new_ones(B, more), mask], 1).reshape(-1)
    if way == "its first" and more < 0:
        return mask[:, : lead[1]].reshape(-1)
    if way == "its last" and more < 0:
        return mask[:, -more:].reshape(-1)
    if way == "in frames" and more < 0:
        return _frames(mask, lead[1], model)
    return None


def _frames(mask: Tensor, length: int, model: nn.Module) -> Tensor | None:
    """The mask of what a convolution in front of the model makes of the samples, as the model itself counts it."""
    for own in inner_models(model).values():
        for part in (own, own.base_model):
            if (reduce := getattr(part, "_get_feature_vector_attention_mask", None)) is not None:
                return reduce(length, mask.long()).bool().reshape(-1)
    return None


def _difference(
    x: Tensor, laid: Tensor, alone: list[Tensor], parts: list[Tensor], mask: Tensor, way: str
) -> float | None:
    """By how much the selected rows of two examples together differ from those of each alone; None where they are not as many."""
    flat, B, laid = x.flatten(0, -2), mask.shape[0], laid.to(x.device)
    example = torch.arange(2, device=flat.device).repeat_interleave(laid.numel() // 2)
    if way == "sequence first":
        example = torch.arange(B, device=flat.device).repeat(laid.numel() // B) * 2 // B
    worst = 0.0
    for number, (a, part) in enumerate(zip(alone, parts)):
        ours, theirs = flat[laid & (example == number)], a.flatten(0, -2)[part.to(a.device)]
        if ours.shape != theirs.shape:
            return None
        scale = float(theirs.double().norm()) or 1.0
        worst = max(worst, float((ours.double() - theirs.double()).norm()) / scale)
    return worst

"""Ways to count a loss's terms, and small batches with parts that make them up, on which they are tried."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..model.families import inner_models, is_encoder_decoder
from .examples import Where, mapped, size, take, tensors

IGNORED = -100  # by torch's cross-entropy and all of transformers
FEW = 4  # examples that a rule is tried on


@dataclass(frozen=True)
class Rule:
    """One way to count. kind: 'sum', 'rows', 'labels', 'shifted labels', 'elements', 'mask' or 'shifted mask'; of the tensor at
    `path`, without the values that are `ignored`."""

    kind: str
    path: tuple[str, ...] = ()
    ignored: tuple[int, ...] = ()

    def count(self, batch: Any) -> int:
        """The terms of a batch's loss."""
        if self.kind in ("sum", "rows"):
            return size(batch) or 1
        at = dict(tensors(batch)).get(self.path)
        if at is None:
            raise JactusError(
                f"a batch has no {'.'.join(self.path)}, by which the terms of the loss were counted before"
            )
        at = at if at.is_floating_point() else at.long()  # −100 is no value of bytes
        if self.kind == "elements":
            return at.numel()
        if self.kind.startswith("shifted"):
            at = at[..., 1:]
        return int(self.counts(at).sum())

    def counts(self, at: Tensor) -> Tensor:
        """Which of the values do."""
        counted = at != 0 if self.kind.endswith("mask") else torch.ones_like(at, dtype=torch.bool)
        for value in self.ignored:
            counted = counted & (at != value)
        return counted

    def factor(self, batch: Any) -> int:
        """What turns the loss into the sum of its terms."""
        return 1 if self.kind == "sum" else self.count(batch)

    def __str__(self) -> str:
        if self.kind == "sum":
            return "a sum already; its terms are counted as examples"
        where = f" of {'.'.join(self.path)}" if self.path else ""
        without = [v for v in self.ignored if v != IGNORED]
        return f"a mean over {self.kind}{where}{f' but those of {without}' if without else ''}"


@dataclass(frozen=True)
class Probe:
    """A small batch and parts that make it up. same_inputs: they differ in labels alone, so that no rounding of the model's
    makes their losses differ; without: the tensors in which labels were taken away;
    of_masks: a place of a mask was taken away, and so perhaps a label that counts."""

    whole: Any
    parts: list[Any]
    same_inputs: bool = False
    of_masks: bool = False
    without: frozenset[Where] = frozenset()


class Probes:
    """What rules are tried on: a few examples, cut in two; then the same with most labels of the first taken away, so that
    examples with as many labels as each other do not hide what is averaged; then their labels alone, cut in two; then with one
    more that is ignored.

    Labels are taken away by values that may be ignored; on a GPU by those alone that the batch has.
    """

    def __init__(self, model: nn.Module, batch: Any, candidates: list[Rule], takes: set[int] | None = None) -> None:
        self.model, self.batch, self.candidates, self.takes = model, batch, candidates, takes
        self.labels = {r.path for r in candidates if r.kind.endswith("labels")}
        self.present = [t for path, t in tensors(batch) if path in self.labels]
        self.ignored = sorted({v for rule in candidates for v in rule.ignored})

    def __iter__(self) -> Iterator[Probe]:
        rows = size(self.batch)
        if rows is None:
            yield from self._of_labels(self.batch)
            return
        few = take(self.batch, self._telling(rows))
        yield self._cut(few)
        yield self._halves(rows)
        for value in filter(self._may_put, self.ignored):
            for path in sorted(self.labels):
                fewer = self._with(few, _fewer, value, path)
                if fewer is not None:
                    yield self._cut(fewer, frozenset((path,)))
        for path in {r.path for r in self.candidates if r.kind.endswith("mask")}:
            shorter = mapped(few, lambda p, leaf, path=path: _shorter(leaf) if p == path else leaf)  # type: ignore[misc]
            yield replace(self._cut(shorter), of_masks=True)
        yield from self._of_labels(few)
        yield from self._padded(few)

    def _padded(self, few: Any) -> Iterator[Probe]:
        """The same with one more label an example, which is ignored: a mean over all places changes, and its sum does not."""
        if not self._may_put(IGNORED):
            return
        for path in sorted(self.labels):
            longer = self._with(few, lambda t, v: nn.functional.pad(t, (0, 1), value=v), IGNORED, path)
            if longer is not None:
                yield Probe(few, [longer], same_inputs=True)

    def _telling(self, rows: int) -> list[int]:
        """Two to a few of the examples: those with most labels, and first of all some that the rules count differently. One
        without labels says nothing of what is averaged."""
        labels = {i: self._labels_of(i, rows) for i in range(rows)}
        able = [i for i in sorted(labels, key=lambda i: -labels[i]) if labels[i] or not any(labels.values())]
        alone = {i: take(self.batch, [i]) for i in able}
        counts = {i: [rule.factor(one) for rule in self.candidates] for i, one in alone.items()}
        first = able[0]
        apart = [
            i for i in able if any(a * counts[first][0] != b * counts[i][0] for a, b in zip(counts[i], counts[first]))
        ]
        kinds = {
            tuple(t[i].item() for _, t in tensors(self.batch) if t.dim() == 1 and len(t) == rows): i
            for i in reversed(able)
        }
        others = [i for i in kinds.values() if i != first]  # of other classes or weights than the first
        chosen = list(dict.fromkeys([first, *apart[:1], *others[: FEW - 2], *apart, *able]))[:FEW]
        return chosen if len(chosen) > 1 else [first, first]

    def _may_put(self, value: int) -> bool:
        return self.takes is None or value in self.takes or any(bool((t == value).any()) for t in self.present)

    def _halves(self, rows: int) -> Probe:
        """The whole batch: what a few examples have in common, others may not have."""
        middle = max(rows // 2, 1)
        whole = self.batch if rows > 1 else take(self.batch, [0, 0])
        return Probe(whole, [take(whole, range(middle)), take(whole, range(middle, size(whole) or 0))])

    @staticmethod
    def _cut(few: Any, without: frozenset[Where] = frozenset()) -> Probe:
        return Probe(few, [take(few, [0]), take(few, range(1, size(few) or 0))], without=without)

    def _of_labels(self, batch: Any) -> Iterator[Probe]:
        fixed = _with_decoder_inputs(self.model, batch)
        if fixed is None or not self._may_put(IGNORED):
            return
        for path in sorted(self.labels):
            parts = [self._with(fixed, _only, part, path) for part in (0, 1)]
            if all(part is not None for part in parts):
                yield Probe(fixed, parts, same_inputs=True, without=frozenset((path,)))

    def _labels_of(self, row: int, rows: int) -> int:
        """How many labels of an example may count: an example without any says nothing of what is averaged."""
        labels = (t for path, t in tensors(self.batch) if path in self.labels and t.dim() > 1 and t.shape[0] == rows)
        return sum(int((t[row] != IGNORED).sum()) for t in labels)

    def _with(self, batch: Any, change: Callable[[Tensor, int], Tensor], value: int, of: Where) -> Any:
        """The batch with the sequences of labels at `of` changed; None where there is nothing to change."""
        changes = 0

        def changed(path: Where, leaf: Any) -> Any:
            nonlocal changes
            if path != of or leaf.dim() < 2:
                return leaf
            new = change(leaf, value)
            changes += new.shape != leaf.shape or not torch.equal(new, leaf)
            return new

        made = mapped(batch, changed)
        return made if changes else None


def _with_decoder_inputs(model: nn.Module, batch: Any) -> Any:
    """The batch with what its decoder reads made of its labels once and for all; None where labels are read unseen."""
    given = {path[-1] for path, _ in tensors(batch) if path}
    if not is_encoder_decoder(model) or given & {"decoder_input_ids", "decoder_inputs_embeds"}:
        return batch
    for own in inner_models(model).values():
        make = getattr(own, "prepare_decoder_input_ids_from_labels", None) or getattr(own, "_shift_right", None)
        if make is not None and isinstance(batch, dict) and isinstance(batch.get("labels"), Tensor):
            return {**batch, "decoder_input_ids": make(batch["labels"])}
    return None


def _only(labels: Tensor, part: int) -> Tensor:
    """The first third of the labels that count, or the others."""
    labels = labels.clone()
    flat = labels.view(-1)
    counted = (flat != IGNORED).nonzero()[:, 0]
    third = len(counted) // 3
    flat[counted[third:] if part == 0 else counted[:third]] = IGNORED
    return labels


def _fewer(labels: Tensor, value: int) -> Tensor:
    """The first example with its last third of labels only, the others set to `value`."""
    counted = ((labels[0].reshape(-1) != IGNORED) & (labels[0].reshape(-1) != value)).nonzero()[:, 0]
    if len(counted) < 3 or labels.shape[0] < 2:
        return labels
    labels = labels.clone()
    labels[0].view(-1)[counted[: -max(len(counted) // 3, 1)]] = value
    return labels


def _shorter(mask: Tensor) -> Tensor:
    """The mask without the last place of its first example."""
    places = mask[0].reshape(-1).nonzero()[:, 0]
    if len(places) < 2:
        return mask
    mask = mask.clone()
    mask[0].view(-1)[places[-1]] = 0
    return mask

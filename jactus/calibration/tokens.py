"""Which rows of a layer's input are tokens, and not padding: of each call of each layer, seen on a few examples.

An example alone, without its padding, gives a layer the rows that are tokens. Where a batch has padding, the rows of the same
call that a mask selects must be those very rows: of the masks, and of the ways in which their places can lie in the layer's rows,
the one is taken under which they are. What a layer is given does not depend on the number of examples when it is no row of
theirs (a table of positions): the examples are then run one at a time.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..model.families import inner_models
from ..model.targets import Target
from .examples import size, take
from .padding import Masks, Path, cut, masks_of, shortened, suspects
from .tracing import Call, Trace, trace

logger = logging.getLogger("jactus")
SAME = 0.1  # rows that differ by less of their length are the same: rounding moves half precision by some 0.01, other rows by 1
SIMILAR = 0.7  # of a model that does not mask its padding, the same rows differ by less than this
Rule = tuple[Path, str] | None  # which mask, and how it lies in the rows; None: all rows are tokens


class Tokens:
    """The rows of every call that are tokens; and of the first batch, what it showed.

    alone: examples must be run one at a time. owners, outputs: see `Trace`.
    """

    def __init__(
        self, model: nn.Module, targets: dict[str, Target], value: Callable[[Any], float], verify: bool
    ) -> None:
        self.model, self.targets, self.value, self.verify = model, targets, value, verify
        self.rules: dict[Call, Rule] = {}
        self.known: set[Path] = set()
        self.unnamed: dict[Path, bool] = {}  # masks that are called otherwise, and whether True is padding
        self.considered: set[Path] = set()
        self.first: Trace | None = None
        self.tables: set[Call] = set()
        self.unsure: set[tuple[Path, Path]] = set()  # masks that were alike where they were looked at
        self.masks: Masks = {}
        self.laid: dict[Any, Tensor] = {}
        self.index = -1

    @property
    def alone(self) -> bool:
        """Whether some layer reads rows that are no example's, so that examples cannot be told apart in a batch."""
        return bool(self.tables)

    def begin(self, batch: Any, index: int) -> None:
        """Take note of a batch: the first, and the first with padding under a mask, are looked into."""
        self.index = index
        if self.first is None:
            self._see_first(batch, index)
        self.masks = self._masks(batch)
        differ = any(not _alike(self.masks, a, b) for a, b in self.unsure)
        if set(self.masks) - self.known or differ:
            self._see_padding(batch, index)
        self.laid = {}

    def one_of(self, batch: Any) -> None:
        """Take note of one example of the batch, which is run alone."""
        self.masks, self.laid = self._masks(batch), {}

    def of(self, name: str, call: int, shape: torch.Size) -> Tensor | None:
        """The (T,) bool mask for the input of shape (…, n), flattened to (T, n), of a layer's call; None keeps all rows.

        Raises JactusError when padding cannot be told from tokens.
        """
        if not self.masks:
            return None
        rule = self.rules.get((name, call), "unseen")
        if rule == "unseen":
            if not self.verify:
                return self._by_shape(name, shape)
            raise self._untold(name, shape, "the first batch with padding made no such call")
        if rule is None or rule[0] not in self.masks:
            return None
        key = (rule, shape[:-1])
        if key not in self.laid:
            laid = lay(self.masks[rule[0]], rule[1], shape[:-1], self.model)
            if laid is None:
                raise self._untold(
                    name, shape, f"as in earlier batches its mask {'.'.join(rule[0])} would lie {rule[1]}"
                )
            self.laid[key] = laid
        return self.laid[key]

    def _masks(self, batch: Any) -> Masks:
        found = masks_of(self.model, batch, self.index)
        if self.verify:
            for path, negated, mask in suspects(batch, found):
                if path not in self.considered:
                    self._consider(batch, path)
                if self.unnamed.get(path) is negated:
                    found[path] = mask
        return found

    def _consider(self, batch: Any, path: Path) -> None:
        """Is a tensor of zeros and ones a mask, whatever it is called? Then taking away what it leaves out changes no loss."""
        self.considered.add(path)
        half = any(p.element_size() < 4 for p in self.model.parameters() if p.is_floating_point())
        rows = size(batch)
        if half or rows is None:
            return  # a loss in half precision does not tell
        for where, negated, mask in suspects(batch, {}):
            if where != path:
                continue
            row = int((~mask).sum(-1).view(rows, -1).sum(-1).argmax())
            with contextlib.suppress(Exception):  # the model's own refusal of such an example
                padded, bare = self.value(take(batch, [row])), self.value(cut(batch, {path: mask}, row, self.model))
                if abs(padded - bare) <= 1e-5 * abs(padded):
                    self.unnamed[path] = negated
                    logger.info("%s was found to be a mask of padding", ".".join(path))
                    return

    def _see_first(self, batch: Any, index: int) -> None:
        rows = size(batch)
        if rows is None or not self.verify:
            few = batch if rows is None else take(batch, [0])
            self.first = trace(self.model, self.targets, lambda: self.value(few))
            return
        self.first = trace(self.model, self.targets, lambda: self.value(take(batch, [0])))
        two = trace(self.model, self.targets, lambda: self.value(take(batch, [0, min(1, rows - 1)])))
        self.tables = {call for call in two.inputs if two.rows(call) == self.first.rows(call)}
        for name, number in sorted(self.tables):
            shape = tuple(self.first.inputs[name, number].shape)
            logger.info(
                "%s is given %s whatever the number of examples (a table that they share): they are run one at a time",
                self.targets[name], shape,
            )  # fmt: skip
        self.first.inputs.clear()  # one example's activations, needed no more

    def _see_padding(self, batch: Any, index: int) -> None:
        if not self.verify:
            self.known |= set(self.masks)
            return
        rows = size(batch)
        if rows is None:
            logger.warning(
                "batch %d cannot be cut into examples, so which rows are tokens goes by the shapes of masks", index
            )
            self.verify = False
            return
        seen = Evidence(self.model, self.targets, self.value, batch, self.masks)
        self.unsure.clear()
        for name, call in seen.pair.inputs:
            where = (name, call)
            if where in self.tables:
                self.rules[where] = None
                continue
            rule, error = seen.rule(where)
            if rule == "none":
                raise self._untold(name, seen.pair.inputs[where].shape, seen.told(where))
            self.rules[where] = rule  # type: ignore[assignment]
            if error > SAME:
                logger.warning(
                    "%s: padding changes what the model computes for real tokens (by %.0f%% here), so results depend on it",
                    self.targets[name], 100 * error,
                )  # fmt: skip
        self.known |= set(self.masks)
        self.unsure |= seen.unsure
        used = {".".join(rule[0]) for rule in self.rules.values() if rule is not None}
        logger.info(
            "tokens are told from padding by %s, checked on batch %d", ", ".join(sorted(used)) or "nothing", index
        )

    def _by_shape(self, name: str, shape: torch.Size) -> Tensor | None:
        fitting = [m for m in self.masks.values() if shape[:-1] in (m.shape, (m.numel(),))]
        if len(fitting) == 1:
            return fitting[0].reshape(-1)
        if not fitting and shape[:-1] == next(iter(self.masks.values())).shape[:1]:
            return None  # one row an example, e.g. a pooled vector
        raise self._untold(name, shape, f"{len(fitting)} of the masks have its shape")

    def _untold(self, name: str, shape: torch.Size, why: str) -> JactusError:
        masks = ", ".join(f"{'.'.join(path)} {tuple(mask.shape)}" for path, mask in self.masks.items())
        return JactusError(
            f"{name} got an input of shape {tuple(shape)} in batch {self.index}, of which tokens cannot be told from padding by "
            f"the masks ({masks}): {why}. Exclude the layer, or pass batches without padding (examples of one length together)"
        )


class Evidence:
    """Two examples of a batch with padding, together and each alone without its padding: what every call was given."""

    def __init__(
        self, model: nn.Module, targets: dict[str, Target], value: Callable[[Any], float], batch: Any, masks: Masks
    ) -> None:
        self.model, self.masks = model, masks
        rows = size(batch) or 1
        most = [int(sum((~m.view(rows, -1)[i]).sum() for m in masks.values())) for i in range(rows)]
        first = max(range(rows), key=lambda i: (_told_apart(masks, rows, i), most[i]))
        other = min((i for i in range(rows) if i != first), key=most.__getitem__, default=first)
        two = take(batch, [first, other])
        self.pair = trace(model, targets, lambda: value(two))
        self.pair_masks = {path: _of_rows(m, rows, (first, other)) for path, m in masks.items()}
        self.failed = ""
        self.unsure: set[tuple[Path, Path]] = set()
        self.cuts: list[Trace] = []
        self.cut_masks: list[Masks] = []
        self.less: Trace | None = None
        try:
            if not shortened(batch, masks):
                raise JactusError("no tensor of the batch goes with a mask by its name and place")
            for row in (first, other):
                alone = cut(batch, masks, row, model)
                self.cuts.append(trace(model, targets, lambda alone=alone: value(alone)))  # type: ignore[misc]
                self.cut_masks.append({path: _cut_mask(m, rows, row) for path, m in masks.items()})
            shorter = cut(batch, masks, other, model, drop=1)
            self.less = trace(model, targets, lambda: value(shorter))
        except Exception as e:  # the model's own refusal of such an example
            self.failed = f"the model does not run on an example without its padding ({type(e).__name__}: {e})"

    def rule(self, call: Call) -> tuple[Rule | str, float]:
        """The rule under which the rows of both examples are those of each alone, and by how much they differ; "none" where
        there is no such rule."""
        x = self.pair.inputs[call]
        if self.failed and len(self.cuts) < 2:
            fitting = [path for path, m in self.pair_masks.items() if x.shape[:-1] == m.shape]
            return ((fitting[0], "batch first"), 0.0) if len(fitting) == 1 else ("none", 1.0)
        alone = [t.inputs.get(call) for t in self.cuts]
        if any(a is None for a in alone):
            return "none", 1.0
        counts = [t.rows(call) for t in self.cuts]
        whole = self.pair.rows(call)
        if counts == [1, 1] and whole == 2:
            return None, 0.0  # one row an example, e.g. a pooled vector
        if whole == sum(counts) and self._untouched(call):
            return None, 0.0  # another tower's rows
        found: list[tuple[tuple[bool, int, int, float], tuple[Path, str]]] = []
        for path, mask in self.pair_masks.items():
            for order, way in enumerate(WAYS):
                laid = lay(mask, way, x.shape[:-1], self.model)
                parts = [lay(m[path], way, a.shape[:-1], self.model) for m, a in zip(self.cut_masks, alone)]  # type: ignore[union-attr]
                if laid is None or any(part is None for part in parts):
                    continue
                error = _difference(x, laid, alone, parts, mask, way)  # type: ignore[arg-type]
                if error is not None:
                    # of two ways under which the rows agree, that which leaves out less: both may be parts of a third's
                    found.append(((error > SAME, -int(laid.sum()), order, error), (path, way)))
        if found:
            best, rule = min(found)
            error = best[-1]
            if error <= SIMILAR:
                alike = {other[0] for key, other in found if key[:3] == best[:3] and not key[0]} - {rule[0]}
                self.unsure |= {(rule[0], path) for path in alike}
                return rule, error
        return (None, 0.0) if whole == sum(counts) else ("none", 1.0)

    def _untouched(self, call: Call) -> bool:
        """Whether the last token of the example leaves the call's rows as they are: they are not of this text."""
        if self.less is None or (shorter := self.less.inputs.get(call)) is None:
            return False
        return shorter.shape == self.cuts[1].inputs[call].shape and torch.equal(shorter, self.cuts[1].inputs[call])

    def told(self, call: Call) -> str:
        if self.failed:
            return self.failed
        alone = [t.rows(call) for t in self.cuts]
        return f"two examples gave it {self.pair.rows(call)} rows together, and {alone[0]} and {alone[1]} alone without their padding"


def _alike(masks: Masks, a: Path, b: Path) -> bool:
    ours, theirs = masks.get(a), masks.get(b)
    return ours is None or theirs is None or (ours.shape == theirs.shape and torch.equal(ours, theirs))


def _told_apart(masks: Masks, rows: int, row: int) -> int:
    """In how many pairs of masks of one shape an example's places differ."""
    own = [m.view(rows, -1, m.shape[-1])[row] for m in masks.values()]
    return sum(a.shape == b.shape and not torch.equal(a, b) for i, a in enumerate(own) for b in own[:i])


def _of_rows(mask: Tensor, rows: int, chosen: tuple[int, ...]) -> Tensor:
    return mask.view(rows, -1, mask.shape[-1])[list(chosen)].flatten(0, 1)


def _cut_mask(mask: Tensor, rows: int, row: int) -> Tensor:
    own = mask.view(rows, -1, mask.shape[-1])[row]
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
    flat, B = x.flatten(0, -2), mask.shape[0]
    example = torch.arange(2, device=flat.device).repeat_interleave(laid.numel() // 2)
    if way == "sequence first":
        example = torch.arange(B, device=flat.device).repeat(laid.numel() // B) * 2 // B
    worst = 0.0
    for number, (a, part) in enumerate(zip(alone, parts)):
        ours, theirs = flat[laid.to(flat.device) & (example == number)], a.flatten(0, -2)[part.to(a.device)]
        if ours.shape != theirs.shape:
            return None
        scale = float(theirs.double().norm()) or 1.0
        worst = max(worst, float((ours.double() - theirs.double()).norm()) / scale)
    return worst

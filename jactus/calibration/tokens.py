"""Which rows of a layer's input are tokens, and not padding: of each call of each layer, seen on a few examples.

An example alone, without its padding, gives a layer the rows that are tokens. Where a batch has padding, the rows of the same
call that a mask selects must be those very rows: of the masks, and of the ways in which their places can lie in the layer's rows,
the one is taken under which they are. What a layer is given does not depend on the number of examples when it is no row of
theirs (a table of positions): the examples are then run one at a time.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..model.targets import Target
from .evidence import SAME, Evidence, Lies, Untold, alike, lay
from .examples import Where, few, size, take
from .padding import Masks, Suspect, cut, masks_of, suspects
from .rounding import is_half, rounding
from .tracing import Call, Trace, trace

logger = logging.getLogger("jactus")
EXACT = 1e-5  # relative: what taking padding away may change in float32
TRIES = 3  # examples that a suspect is judged by


class Tokens:
    """The rows of every call that are tokens; and of the first batch, what it showed.

    alone: examples must be run one at a time. owners, outputs: see `Trace`.
    """

    def __init__(
        self, model: nn.Module, targets: dict[str, Target], value: Callable[[Any], float], verify: bool
    ) -> None:
        self.model, self.targets, self.value, self.verify = model, targets, value, verify
        self.rules: dict[Call, Lies] = {}
        self.known: set[Where] = set()
        self.judged: dict[Suspect, bool] = {}
        self.first: Trace | None = None
        self.tables: set[Call] = set()
        self.unsure: set[tuple[Where, Where]] = set()  # masks that were alike where they were looked at
        self.masks: Masks = {}
        self.laid: dict[Any, Tensor] = {}  # of the batch: the rows that a mask keeps
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
        differ = any(not alike(self.masks, a, b) for a, b in self.unsure)
        if set(self.masks) - self.known or differ:
            self._see_padding(batch, index)
        self.laid = {}

    def one_of(self, batch: Any) -> None:
        """Take note of one example of the batch, which is run alone."""
        self.masks, self.laid = self._masks(batch), {}

    def of(self, name: str, call: int, shape: torch.Size) -> tuple[Tensor | None, int]:
        """Which rows of a layer's call are tokens, of its input of shape (…, n) flattened to (T, n): their places (None: all T), and
        how many they are.

        Raises JactusError when padding cannot be told from tokens.
        """
        everything = None, shape[:-1].numel()
        if not self.masks:
            return everything
        rule = self.rules.get((name, call), "unseen")
        if rule == "unseen":
            if not self.verify:
                if shape not in self.laid:
                    mask = self._by_shape(name, shape)
                    if mask is None:
                        return everything
                    self.laid[shape] = mask.nonzero()[:, 0]
                return self.laid[shape], len(self.laid[shape])
            raise self._untold(name, shape, "the first batch with padding made no such call")
        if rule is None or rule[0] not in self.masks:
            return everything
        key = (rule, shape[:-1])
        if key not in self.laid:
            laid = lay(self.masks[rule[0]], rule[1], shape[:-1], self.model)
            if laid is None:
                raise self._untold(
                    name, shape, f"as in earlier batches its mask {'.'.join(rule[0])} would lie {rule[1]}"
                )
            self.laid[key] = laid.nonzero()[:, 0]  # once for all layers: asking makes a GPU wait
        return self.laid[key], len(self.laid[key])

    def _masks(self, batch: Any) -> Masks:
        found = masks_of(self.model, batch, self.index)
        if not self.verify:
            return found
        own: Masks = {}
        for suspect in sorted(suspects(batch, found), key=lambda s: s.kind in ("pads", "labels")):
            if own and suspect.kind in ("pads", "labels"):
                break  # a mask speaks for itself
            if suspect not in self.judged:
                self._judge(batch, suspect)
            if self.judged.get(suspect) and (mask := suspect.mask(batch)) is not None and not bool(mask.all()):
                own[suspect.key] = mask
        return found | own

    def _judge(self, batch: Any, suspect: Suspect) -> None:
        """Does it say what is padding? Then taking away what it leaves out changes no loss. Not judged where no loss tells."""
        mask, rows = suspect.mask(batch), size(batch)
        if mask is None or rows is None or bool(mask.all()) or not bool(mask.view(rows, -1).any(1).all()):
            return
        masks: Masks = {suspect.key: mask}
        half = is_half(self.model)
        most = (~mask).sum(-1).view(rows, -1).sum(-1).argsort(descending=True)
        for row in most[:TRIES].tolist():
            with contextlib.suppress(Exception):  # the model's own refusal of such an example
                padded, bare = self.value(take(batch, [row])), self.value(cut(batch, masks, row, self.model))
                if not padded or padded != padded:
                    continue  # no label of its own: another example may tell
                same = abs(padded - bare) <= (rounding(self.model, padded)[0] if half else EXACT) * abs(padded)
                # nor may the rows of what is left change: a token may matter little to a loss
                self.judged[suspect] = same and self._rows_agree(batch, masks, SAME / 2 if half else 3 * EXACT)
                if self.judged[suspect]:
                    level = logging.WARNING if half else logging.INFO
                    logger.log(level, "padding is told by %s (%s)", ".".join(suspect.where), suspect.kind)
                return
        self.judged[suspect] = False

    def _rows_agree(self, batch: Any, masks: Masks, tolerance: float) -> bool:
        """Whether every call's rows are those of the examples cut by the mask."""
        seen = Evidence(self.model, self.targets, self.value, batch, masks)
        return not seen.failed and all(seen.rule(call)[1] <= tolerance for call in seen.pair.shapes)

    def _see_first(self, batch: Any, index: int) -> None:
        rows = size(batch)
        self.first = trace(self.model, self.targets, lambda: self.value(few(batch, 1)))
        if rows is None or not self.verify:
            return
        two = trace(self.model, self.targets, lambda: self.value(take(batch, [0, min(1, rows - 1)])))
        alike = {call for call in two.shapes if two.rows(call) == self.first.rows(call)}
        if (
            alike and rows > 1
        ):  # a table has the same values with every example; an expert may have as many rows by chance
            one, other = (
                trace(self.model, self.targets, functools.partial(self.value, take(batch, [i])), values=True)
                for i in (0, 1)
            )
            alike = {c for c in alike if c in other.inputs and torch.equal(one.inputs[c], other.inputs[c])}
        self.tables = alike
        for name, number in sorted(self.tables):
            shape = tuple(self.first.shapes[name, number])
            logger.info(
                "%s is given %s whatever the number of examples (a table that they share): they are run one at a time",
                self.targets[name], shape,
            )  # fmt: skip

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
        for name, call in seen.pair.shapes:
            where = (name, call)
            if where in self.tables:
                self.rules[where] = None
                continue
            try:
                rule, error = seen.rule(where)
            except Untold as e:
                raise self._untold(name, seen.pair.shapes[where], str(e)) from e
            self.rules[where] = rule
            if error > SAME:
                logger.warning(
                    "%s: padding changes what the model computes for real tokens (by %.0f%% here), so results depend on it",
                    self.targets[name], 100 * error,
                )  # fmt: skip
        self.known |= set(self.masks)
        self.unsure |= seen.unsure
        used = {".".join(rule[0]) for rule in self.rules.values() if rule is not None}
        told = ", ".join(sorted(used)) or "nothing"
        if seen.failed:
            logger.warning("tokens are told from padding by %s, by its shape alone, unverified: %s", told, seen.failed)
        else:
            logger.info("tokens are told from padding by %s, checked on batch %d", told, index)

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

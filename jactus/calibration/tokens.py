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

from ..model.targets import Target
from .evidence import SAME, Evidence, Lies, Untold, alike, lay
from .examples import Where, few, size, take
from .padding import Masks, cut, masks_of, suspects
from .rounding import HALF, is_half
from .tracing import Call, Trace, trace

logger = logging.getLogger("jactus")


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
        self.unnamed: dict[Where, bool] = {}  # masks that are called otherwise, and whether True is padding
        self.considered: set[Where] = set()
        self.first: Trace | None = None
        self.tables: set[Call] = set()
        self.unsure: set[tuple[Where, Where]] = set()  # masks that were alike where they were looked at
        self.masks: Masks = {}
        self.laid: dict[Any, tuple[Tensor, int]] = {}
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
        """The (T,) bool mask for the input of shape (…, n), flattened to (T, n), of a layer's call (None keeps all rows), and how
        many rows it keeps.

        Raises JactusError when padding cannot be told from tokens.
        """
        everything = None, shape[:-1].numel()
        if not self.masks:
            return everything
        rule = self.rules.get((name, call), "unseen")
        if rule == "unseen":
            if not self.verify:
                mask = self._by_shape(name, shape)
                return everything if mask is None else (mask, int(mask.sum()))
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
            self.laid[key] = laid, int(laid.sum())  # once for all layers: asking makes a GPU wait
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

    def _consider(self, batch: Any, path: Where) -> None:
        """Is a tensor of zeros and ones a mask, whatever it is called? Then taking away what it leaves out changes no loss."""
        self.considered.add(path)
        rows = size(batch)
        if rows is None:
            return
        half = is_half(self.model)
        for where, negated, mask in suspects(batch, {}):
            if where != path:
                continue
            row = int((~mask).sum(-1).view(rows, -1).sum(-1).argmax())
            with contextlib.suppress(Exception):  # the model's own refusal of such an example
                padded, bare = self.value(take(batch, [row])), self.value(cut(batch, {path: mask}, row, self.model))
                if not padded or abs(padded - bare) > (HALF[0] if half else 1e-5) * abs(padded):
                    continue
                if half and not self._rows_agree(batch, {path: mask}):  # a loss in half precision does not tell alone
                    continue
                self.unnamed[path] = negated
                logger.log(
                    logging.WARNING if half else logging.INFO, "%s was found to be a mask of padding", ".".join(path)
                )
                return

    def _rows_agree(self, batch: Any, masks: Masks) -> bool:
        """Whether every call's rows are those of the examples cut by the mask."""
        seen = Evidence(self.model, self.targets, self.value, batch, masks)
        return not seen.failed and all(seen.rule(call)[1] <= SAME / 2 for call in seen.pair.shapes)

    def _see_first(self, batch: Any, index: int) -> None:
        rows = size(batch)
        self.first = trace(self.model, self.targets, lambda: self.value(few(batch, 1)))
        if rows is None or not self.verify:
            return
        two = trace(self.model, self.targets, lambda: self.value(take(batch, [0, min(1, rows - 1)])))
        self.tables = {call for call in two.shapes if two.rows(call) == self.first.rows(call)}
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

"""From a batch to the *sum* of its loss terms.

Sums are what make statistics independent of the batch size: a mean loss is multiplied by its number of terms.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

from .drawing import Drawing
from .examples import copied, few, mapped, size, tensors
from .probes import IGNORED
from .rounding import widened
from .terms import Terms
from .undo import unchanged

Loss = Callable[[nn.Module, Any], Any]
# What Trainer divides a loss by in the place of its own number of terms; here the model counts for itself.
NORMALISER = "num_items_in_batch"


class LossSum:
    """The sum of a batch's loss terms and their number, by the model's own loss or the user's.

    `loss(model, batch)` may return the terms unreduced (any shape), a pair (sum, number), or one number, whose rule of counting
    is found on the first batch (`terms.py`); None takes the model's own, with labels that it draws itself, `draws`
    times, if it can (`drawing.py`).
    """

    def __init__(self, model: nn.Module, loss: Loss | None, verify: bool = True, draws: int = 0) -> None:
        self.model, self.loss, self.verify = model, loss, verify
        self.drawing = Drawing(model, draws)
        self.terms = Terms(model, self.scalar, verify, own=loss is None)
        self.is_number: bool | None = None  # known once the loss was seen

    def of(
        self, batch: Any, index: int, blame: Callable[[int], None] | None = None, draw: int = 0
    ) -> tuple[Tensor, int]:
        """The sum (a scalar with its graph) and the number of terms of batch number `index`, its labels drawn for the `draw`th time.

        Raises JactusError for a batch without a loss, or one not finite, unless `blame(index)` raises it first, naming the layer
        where it began.
        """
        result, output = self._run(batch, index)
        if isinstance(result, tuple):
            total, terms = result
        elif result.dim() > 0:
            total, terms = widened(result).sum(), _unreduced_terms(result, batch)
        else:
            factor, terms = self.terms.of(batch)
            total = widened(result) * (factor or 1)
            if not factor and terms and torch.isfinite(result) and result != 0:  # of nothing there is nothing to sum
                raise JactusError(
                    f"batch {index}: the loss is {float(result):.6g}, and of its examples alone it is not finite, so what it sums "
                    "cannot be told; pass loss= that returns (sum, number of terms)"
                )
            if factor and output is not None and torch.isfinite(result):
                logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
                drawn = self.drawing.of(logits, result, self.terms.left[0], batch, index, draw)
                if drawn is not None:
                    del (
                        output,
                        result,
                        total,
                        logits,
                    )  # and with them the graph of the loss, which is as large as this one's
                    total = nn.functional.cross_entropy(widened(drawn[0]), drawn[1], reduction="sum")
        if terms < 1:
            raise JactusError(f"batch {index} has no loss term (all its labels are -100); drop it or check the labels")
        if not torch.isfinite(total):
            if blame is not None:
                blame(index)
            raise JactusError(f"batch {index}: the loss is {total.item()}; check its inputs and labels, or use float32")
        return total, terms

    def prepare(self, batch: Any, index: int) -> None:
        """Find the rule of a loss that is one number, where it is not known yet: before the batch is recorded, since the model
        is run on a few of its examples; does nothing for other losses."""
        if self.is_number is None:
            result = self._of_few(batch, index)
            self.is_number = isinstance(result, Tensor) and result.dim() == 0
            if not self.is_number and self.verify:
                self.terms.check_sum(batch, index, told=isinstance(result, tuple))
        if self.is_number and self.terms.undecided(batch):
            self.terms.decide(batch, index)

    def _of_few(self, batch: Any, index: int) -> Any:
        """The loss of a few examples. Raises JactusError where the model takes the batch, and not a part of it."""
        with torch.no_grad(), unchanged(self.model):
            try:
                return self._result(copied(few(batch)), index)
            except JactusError:
                raise
            except Exception as e:
                self._result(copied(batch), index)
                rows = size(batch)
                cut = [".".join(path) for path, t in tensors(batch) if t.dim() and t.shape[0] == rows]
                raise JactusError(
                    f"batch {index}: {type(self.model).__name__} and its loss take the batch, and not its first examples alone "
                    f"(cut along the first dimension, {rows}: {cut}): {type(e).__name__}: {e}. If one of these is no example's "
                    "(weights of classes), give it to the loss otherwise; or pass verify=False"
                ) from e

    def is_empty(self, batch: Any) -> bool:
        """Whether the loss has no term in this batch."""
        return bool(self.is_number and self.terms.left and self.terms.left[0].count(batch) == 0)

    def state(self) -> dict[str, Any]:
        """What was found, as plain values: a run that goes on must count, and draw, as it did before."""
        return {**self.terms.state(), "drawn": self.drawing.found, "draws": self.drawing.draws}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; a run of before labels were drawn goes on with those given. Raises JactusError where the run draws
        otherwise."""
        self.terms.restore(state)
        if state.get("draws", self.drawing.draws) != self.drawing.draws:
            raise JactusError(
                f"the snapshot is of a run with draws={state['draws']}, and this one has draws={self.drawing.draws}: another "
                "configuration; resume with the same, or delete the file to start again"
            )
        self.drawing.found, self.drawing.why = state.get("drawn", False), "those of the run that this one goes on from"

    def found(self) -> str:
        """What the loss was found to be, in words."""
        return str(self.terms.left[0]) if self.terms.left else "sums of its own terms"

    def value(self, batch: Any) -> float:
        """The loss of a batch as one number, without a graph; of unreduced terms or a pair their sum."""
        return float(self.scalar(batch))

    def scalar(self, batch: Any) -> Tensor:
        """The same as a tensor, in the dtype that the loss has."""
        with torch.no_grad(), unchanged(self.model):
            result = self._result(copied(batch), -1)
        result = result[0] if isinstance(result, tuple) else result
        return result if result.dim() == 0 else widened(result).sum()

    def _result(self, batch: Any, index: int) -> Any:
        return self._run(batch, index)[0]

    def _run(self, batch: Any, index: int) -> tuple[Any, Any]:
        """What the loss is, and what the model returned where it is the model's own."""
        batch = mapped(batch, lambda path, leaf: leaf)  # the loss may take it apart
        if self.loss is None:
            output = own_output(self.model, batch, index)
            return loss_in(output, batch, index), output
        result = self.loss(self.model, batch)
        if isinstance(result, tuple) and len(result) == 2:
            return _pair(result, index), None
        if not isinstance(result, Tensor):
            raise JactusError(f"batch {index}: the loss is a {type(result).__name__}; return a tensor or (sum, terms)")
        one = result.numel() == 1 and result.dim() > 0 and (size(batch) or 1) > 1
        return result.reshape(()) if one else result, None


def _pair(result: tuple, index: int) -> tuple[Tensor, int]:
    """The sum and the number of terms that a loss says it has."""
    total, terms = result
    number = terms.item() if isinstance(terms, Tensor) and terms.numel() == 1 else terms
    if not isinstance(total, Tensor) or total.numel() != 1 or not isinstance(number, int | float):
        shown = ", ".join(f"{type(x).__name__} {tuple(getattr(x, 'shape', ()))}" for x in result)
        raise JactusError(
            f"batch {index}: the loss is a pair ({shown}); return (sum, number of terms), or a tensor alone"
        )
    if number != int(number):
        raise JactusError(
            f"batch {index}: the loss has {number} terms; a number of terms is whole (weights are no terms)"
        )
    return total.reshape(()), int(number)


def _unreduced_terms(terms: Tensor, batch: Any) -> int:
    """Unreduced terms count one each, except those that are zero because their label is -100."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        for wanted in (labels, labels[..., 1:] if labels.dim() > 1 else labels):
            if wanted.numel() == terms.numel():
                return int((wanted != IGNORED).sum())
    return terms.numel()


def own_output(model: nn.Module, batch: Any, index: int) -> Any:
    """What the model returns for a batch. Raises JactusError for a batch that is no dict."""
    if not isinstance(batch, Mapping):
        raise JactusError(
            f"batch {index} is a {type(batch).__name__}: pass a list or loader of dicts with labels (one dict alone: [batch]), or "
            "loss=lambda model, batch: … returning the unreduced loss terms"
        )
    return model(**{key: value for key, value in batch.items() if key != NORMALISER})


def loss_in(output: Any, batch: Any, index: int) -> Tensor:
    """The model's own loss in what it returned: a scalar. Raises JactusError where it gives none."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        # a model that returns tuples, or its loss alone: the loss is the one number in it
        parts = output if isinstance(output, tuple) else (output,)
        numbers = [t for t in parts if isinstance(t, Tensor) and t.dim() == 0 and t.is_floating_point()]
        loss = numbers[0] if len(numbers) == 1 else None
    if loss is None:
        raise JactusError(
            f"batch {index} with keys {sorted(map(str, batch))} gives no loss; add labels to it, or pass "
            "loss=lambda model, batch: … returning the unreduced loss terms"
        )
    return loss if loss.dim() == 0 else loss.squeeze() if loss.numel() == 1 else loss

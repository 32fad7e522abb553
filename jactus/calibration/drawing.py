"""Labels that a model draws from what it predicts. With them Σ_g is the Fisher matrix: how far predictions move with a layer's output.

With the labels of the data it is the empirical Fisher matrix, which is another one (Kunstner et al. 2019, arXiv 1905.12558): what
surprises the model weighs most.
"""

from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..checkpoints import storage
from .examples import tensors
from .probes import Rule
from .rounding import FULL, HALF, widened

PIECE = 1024  # terms looked at at a time: all their probabilities are not to be held beside the logits
NEGLIGIBLE = 1e-6  # nats a term: what a cross-entropy near zero is known to


class Drawing:
    """Draws labels, where the model's loss is found to be a cross-entropy of its logits with a label a token.

    draws: how many for each; 0: none. `found` is True or False once a batch was seen, and `why` says why not.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        self.name, self.draws = type(model).__name__, draws
        self.found: bool | None = None if draws else False
        self.why = ""

    @property
    def more(self) -> range:
        """The draws after the first."""
        return range(1, self.draws if self.found else 1)

    @torch.no_grad()
    def of(
        self, logits: Any, loss: Tensor, rule: Rule, batch: Any, index: int, draw: int
    ) -> tuple[Tensor, Tensor] | None:
        """The logits (terms, classes), with their graph, of all places with a label, and labels drawn for them (terms,); None: not
        to be drawn.

        logits: what the model returned as such for batch number `index`; loss (): its loss, which `rule` says how to count. What is
        drawn for an example depends on its own tensors and on which `draw` it is, not on the examples or the padding beside it.
        Raises JactusError where this batch's loss is no cross-entropy, and an earlier one's was.
        """
        if self.found is False:
            return None
        why, labels, counted = self._places(logits, loss, rule, batch)
        if not why:
            with torch.enable_grad():
                shifted = logits[..., :-1, :] if rule.kind.startswith("shifted") else logits
                logits = shifted[counted]
            why = self._differs(
                logits, labels[counted], float(loss.detach()) * rule.factor(batch), loss.element_size() < 4
            )
        if why:
            if self.found:
                raise JactusError(
                    f"batch {index}: labels were drawn for the batches before, and cannot be for this one: {why}; draws=0 takes those "
                    "of the data"
                )
            self.found, self.why = False, why
            return None
        self.found = True
        drawn: list[Tensor] = []
        for i, ours in enumerate(logits.split(counted.flatten(1).sum(1).tolist())):
            if len(ours):
                seed = _seed(batch, i, rule.path, labels[i][counted[i]], draw)
                drawn += _drawn(ours, torch.Generator(logits.device).manual_seed(seed))
        return logits, torch.cat(drawn)

    def _places(self, logits: Any, loss: Tensor, rule: Rule, batch: Any) -> tuple[str, Tensor, Tensor]:
        """Why the logits are not of a label a token each, the labels where logits predict them, and which of them count."""
        none = torch.empty(0)
        if not rule.kind.endswith("labels"):
            return f"the loss of {self.name} is {rule}", none, none
        labels = dict(tensors(batch))[rule.path]
        if labels.dim() < 2:
            return "there is one an example, and not one a token", none, none
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() != labels.dim() + 1:
            shown = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            return f"{self.name} returns logits {shown} for labels {tuple(labels.shape)}", none, none
        if loss.requires_grad and not logits.requires_grad:
            return f"{self.name} returns logits without a graph", none, none
        places = list(logits.shape[:-1])
        if rule.kind.startswith("shifted"):
            labels, places[-1] = labels[..., 1:], places[-1] - 1
        if places != list(labels.shape):
            return f"{self.name} returns logits of other places ({places}) than labels", none, none
        labels = labels.to(logits.device).long()
        counted = rule.counts(labels)
        if bool((counted & ((labels < 0) | (labels >= logits.shape[-1]))).any()):
            return f"labels of {self.name} are no classes of its logits {tuple(logits.shape)}", none, none
        return "", labels, counted

    def _differs(self, logits: Tensor, labels: Tensor, loss: float, half: bool) -> str:
        """Why the loss, a sum, is no cross-entropy of these logits (terms, classes) with the labels (terms,)."""
        pieces = zip(logits.split(PIECE), labels.split(PIECE))
        ours = -sum(float(_log(x).gather(-1, y[:, None]).sum(dtype=torch.float64)) for x, y in pieces)
        tolerance = HALF[0] if half else FULL[0]
        if abs(ours - loss) <= tolerance * abs(loss) + NEGLIGIBLE * len(labels):
            return ""
        return f"the loss of {self.name} sums to {loss:.6g}, and the cross-entropy of its logits with the labels to {ours:.6g}"


def _log(logits: Tensor) -> Tensor:
    return widened(logits).log_softmax(-1)


def _drawn(logits: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """A label for each row of the logits (terms, classes), piece by piece."""
    for piece in logits.split(PIECE):
        yield torch.multinomial(_log(piece).exp(), 1, generator=generator)[:, 0]


def _seed(batch: Any, row: int, path: tuple[str, ...], labels: Tensor, draw: int) -> int:
    """Of an example: its labels that count and what else is its own, without what masks leave out and zeros, which may be padding."""
    hasher = xxhash.xxh3_64(str(draw).encode())
    storage.update(hasher, labels)
    held = list(tensors(batch))
    rows = len(dict(held)[path])
    masks = [t for where, t in held if "mask" in where[-1]]
    for where, t in held:
        if where != path and t.dim() and len(t) == rows:
            value = t[row]
            for mask in masks:
                value = value[mask[row] != 0] if mask.shape == t.shape == (rows, *value.shape) else value
            storage.update(hasher, value[value != 0])
    return hasher.intdigest() >> 1  # a generator takes 63 bits

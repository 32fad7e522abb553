"""Labels that the model draws from what it predicts. With them Σ_g is the Fisher matrix: how far predictions move with a layer's output.

With the labels of the data it is the empirical Fisher matrix, which is another one (Kunstner et al. 2019, arXiv 1905.12558): what
surprises the model weighs most.
"""

from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..checkpoints import storage
from .examples import tensors
from .probes import Rule
from .rounding import FULL, HALF

PIECE = 1024  # terms drawn at a time
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

    def of(self, output: Any, loss: Tensor, rule: Rule, batch: Any, index: int, draw: int) -> Tensor | None:
        """The sum of −log p (a scalar with its graph) over drawn labels, one wherever the batch has one; None: not to be drawn.

        output: what the model returned for batch number `index`; loss (): the number in it, which `rule` says how to count. What
        is drawn for an example depends on its labels and on which `draw` it is, and not on the examples or the padding beside it.
        Raises JactusError where this batch's loss is no cross-entropy, and an earlier one's was.
        """
        if self.found is False:
            return None
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        why, terms = self._differs(logits, loss, rule, batch)
        if terms is None:
            if self.found:
                raise JactusError(
                    f"batch {index}: labels were drawn for the batches before, and cannot be for this one: {why}; draws=0 takes those "
                    "of the data"
                )
            self.found, self.why = False, why
            return None
        self.found = True
        logp, labels, rows = terms
        drawn = [
            _drawn(ours.detach(), _seed(its, draw))
            for ours, its in zip(logp.split(rows), labels.split(rows))
            if len(its)
        ]
        return -logp.gather(-1, torch.cat(drawn)).sum()

    def _differs(
        self, logits: Any, loss: Tensor, rule: Rule, batch: Any
    ) -> tuple[str, tuple[Tensor, Tensor, list[int]] | None]:
        """Why the loss is no cross-entropy of logits with labels; else log p of what is predicted (terms, classes), the labels (terms,),
        and how many terms each example has."""
        if not rule.kind.endswith("labels"):
            return f"the loss of {self.name} is {rule}", None
        labels = dict(tensors(batch))[rule.path]
        if labels.dim() < 2:
            return "there is one an example, and not one a token", None
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() != labels.dim() + 1:
            shown = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            return f"{self.name} returns logits {shown} for labels {tuple(labels.shape)}", None
        if rule.kind.startswith("shifted"):
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        if logits.shape[:-1] != labels.shape:
            return f"{self.name} returns logits of other places ({tuple(logits.shape[:-1])}) than labels", None
        labels = labels.long()
        counted = torch.ones_like(labels, dtype=torch.bool)
        for value in rule.ignored:
            counted &= labels != value
        rows = counted.flatten(1).sum(1).tolist()
        logits, labels = logits[counted], labels[counted].to(logits.device)
        if bool(((labels < 0) | (labels >= logits.shape[-1])).any()):
            return f"labels of {self.name} are no classes of its logits {tuple(logits.shape)}", None
        logp = (logits.float() if logits.element_size() < 4 else logits).log_softmax(-1)
        ours, theirs = (
            -float(logp.detach().gather(-1, labels[:, None]).sum()),
            float(loss.detach()) * rule.factor(batch),
        )
        tolerance = FULL[0] if loss.element_size() >= 4 else HALF[0]
        if not abs(ours - theirs) <= tolerance * abs(theirs) + NEGLIGIBLE * len(labels):
            return (
                f"the loss of {self.name} sums to {theirs:.6g}, and the cross-entropy of its logits with the labels to {ours:.6g}",
                None,
            )
        return "", (logp, labels, rows)


def _drawn(logp: Tensor, seed: int) -> Tensor:
    """A label for each row of log p (terms, classes): (terms, 1)."""
    generator = torch.Generator(logp.device).manual_seed(seed)
    # probabilities of a whole vocabulary are not to be held for all of them
    return torch.cat([torch.multinomial(piece.exp(), 1, generator=generator) for piece in logp.split(PIECE)])


def _seed(labels: Tensor, draw: int) -> int:
    hasher = xxhash.xxh3_64(str(draw).encode())
    storage.update(hasher, labels)
    return hasher.intdigest() >> 1  # a generator takes 63 bits

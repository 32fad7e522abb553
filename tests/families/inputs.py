"""Examples of each task, one at a time and unpadded, and how to put several into a batch; the number of loss terms is known.

Labels are drawn here, so the number of terms of each example is known without asking the model or jactus.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .oracle import Double

CLASSES = 3
RAGGED = (11, 6, 9, 8)  # none equal to a tiny model's number of patches, heads or layers
EQUAL = (9, 9, 9, 9)
TEXT = [
    "CAUSAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "MASKED_LM",
    "MULTIPLE_CHOICE",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "NEXT_SENTENCE_PREDICTION",
]

Batch = dict[str, Any]


@dataclass
class Data:
    """Examples alone and together, the number of loss terms of each, and whether their lengths differ.

    loss: what jactus is given (None: the model's own); summed: the true sum of a batch's loss terms, given their number.
    judge_terms: whether the number of terms is certain, and not only their sum.
    """

    alone: list[Any]
    terms: list[int]
    together: list[Any] = field(default_factory=list)
    ragged: bool = False
    loss: Callable | None = None
    summed: Callable[[nn.Module, Any, int], Tensor] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    judge_terms: bool = True

    def __post_init__(self) -> None:
        if not self.together:
            self.together = [collate(self.alone)]

    def total(self, model: nn.Module, batch: Any, terms: int) -> Tensor:
        if self.summed is not None:
            return self.summed(model, batch, terms)
        return model(**batch).loss * terms

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        return self.forward(model, batch) if self.forward is not None else model(**batch)

    @property
    def unmasked(self) -> bool:
        """Whether no batch has a mask of padding."""
        return not any("attention_mask" in batch for batch in self.alone)

    @property
    def terms_together(self) -> list[int]:
        size = len(self.terms) // len(self.together)
        return [sum(self.terms[i : i + size]) for i in range(0, len(self.terms), size)]


def collate(examples: list[Batch]) -> Batch:
    """Examples of batch size 1 as one batch, padded on the right: ids and values with 0, labels with -100, masks with 0."""
    batch: Batch = {}
    for key in examples[0]:
        parts = [e[key] for e in examples]
        if not isinstance(parts[0], Tensor):
            batch[key] = parts[0]
            continue
        fill = -100 if key == "labels" and not parts[0].is_floating_point() else 0
        size = [max(p.shape[d] for p in parts) for d in range(1, parts[0].dim())]
        rows = []
        for p in parts:
            wide = p.new_full((p.shape[0], *size), fill)
            wide[tuple(slice(0, s) for s in p.shape)] = p
            rows.append(wide)
        batch[key] = torch.cat(rows)
    return batch


def ids(g: torch.Generator, length: int, low: int = 5, high: int = 80) -> Tensor:
    return torch.randint(low, high, (1, length), generator=g)


def text(task: str, model: nn.Module, lengths: tuple[int, ...], mask: bool = True) -> Data:
    """Examples of a task on text."""
    g = torch.Generator().manual_seed(1)
    examples, terms = [], []
    shifted = 1 if task == "CAUSAL_LM" else 0
    for length in lengths:
        x = ids(g, length)
        e: Batch = {"input_ids": x, "attention_mask": torch.ones_like(x)}
        count = 1
        if task == "SEQUENCE_CLASSIFICATION":
            x[:, -1] = 2  # the end of the text, where encoder–decoders classify
            e["labels"] = torch.randint(0, CLASSES, (1,), generator=g)
        elif task == "NEXT_SENTENCE_PREDICTION":
            e["labels"] = torch.randint(0, 2, (1,), generator=g)
        elif task == "TOKEN_CLASSIFICATION":
            e["labels"] = torch.randint(0, CLASSES, (1, length), generator=g)
            e["labels"][:, 0] = -100
            count = length - 1
        elif task == "QUESTION_ANSWERING":
            e["start_positions"] = torch.randint(1, 3, (1,), generator=g)
            e["end_positions"] = torch.randint(3, 5, (1,), generator=g)
        elif task == "MASKED_LM":
            e["labels"] = x.masked_fill(torch.arange(length) % 3 != 1, -100)
            e["labels"][:, -1] = x[
                :, -1
            ]  # what a decoder is given after its last label reaches no loss, and is no token
            count = int((e["labels"] != -100).sum())
        elif task == "CAUSAL_LM":
            e["labels"] = x.clone()
            e["labels"][:, 3] = -100
            count = length - 1 - shifted
        elif task == "MULTIPLE_CHOICE":
            x = torch.cat([ids(g, length) for _ in range(CLASSES)])[None]
            e = {"input_ids": x, "attention_mask": torch.ones_like(x)}
            e["labels"] = torch.randint(0, CLASSES, (1,), generator=g)
        else:
            e["labels"] = ids(g, length - 4)
            count = length - 4
        if not mask:
            del e["attention_mask"]
        examples.append(e)
        terms.append(count)
    if task == "CAUSAL_LM":
        terms = causal_terms(model, examples)
    return Data(examples, terms, ragged=len(set(lengths)) > 1)


def causal_terms(model: nn.Module, examples: list[Batch]) -> list[int]:
    """The labels that the model's own loss counts: whether it shifts them is told from its logits.

    Where its loss is neither cross entropy, labels that only one of them counts are taken away.
    """
    e = examples[0]
    with torch.no_grad(), Double():
        output = model(**e)
        logits, labels = output.logits[0, -e["labels"].shape[1] :], e["labels"][0]
        if logits.dim() == 2 and len(logits) == len(labels):
            for shift in (1, 0):
                loss = F.cross_entropy(logits[: len(labels) - shift], labels[shift:])
                if torch.allclose(loss, output.loss, rtol=1e-6):
                    return [int((x["labels"][:, shift:] != -100).sum()) for x in examples]
    for x in examples:
        x["labels"][:, :2] = -100
    return [int((x["labels"] != -100).sum()) for x in examples]

"""What the penalty of `jactus.fit_head` does: `python -m bench.accuracy.heads`, a table of the text tasks' linear probes.

Features of the frozen encoder are computed once; every head is fitted to those of the training rows by `fit_head` itself.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import jactus

from ..report import table, versions
from ..training import Examples, batches, share_right
from .tasks import HEAD_L2, TASKS, TEXT

PENALTIES = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


class Probe(nn.Module):
    """A linear head on features that are given."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.base_model = nn.Identity()
        self.classifier = nn.Linear(width, classes)

    def forward(self, features: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        logits = self.classifier(self.base_model(features))
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


@torch.no_grad()
def features(model: nn.Module, examples: Examples) -> dict[str, Tensor]:
    """Those of all examples, (rows, n), and their labels."""
    found, labels = [], []
    for batch in batches(examples, 64):
        labels.append(batch.pop("labels"))
        found.append(model.features(**batch))  # type: ignore[operator]
    return {"features": torch.cat(found), "labels": torch.cat(labels)}


@torch.no_grad()
def accuracy(probe: Probe, rows: dict[str, Tensor]) -> float:
    return share_right(probe(**rows).logits, rows["labels"])


def main() -> None:
    lines = []
    for name in TEXT:
        case = TASKS[name].load()
        splits = [features(case.model, rows) for rows in (case.training, case.validation, case.test)]
        for l2 in PENALTIES:
            torch.manual_seed(0)
            probe = Probe(splits[0]["features"].shape[1], case.model.num_labels)  # type: ignore[arg-type]
            loss = jactus.fit_head(probe, splits[:1], l2=l2, progress=False)
            shown = f"{l2:g}" + (" (the runner's)" if l2 == HEAD_L2 else "")
            lines.append((name, shown, f"{loss:.3f}", *(f"{100 * accuracy(probe, rows):.1f}" for rows in splits)))
    print(table(("task", "l2", "training loss", "training", "validation", "test"), lines))
    print(f"\n{versions()}")


if __name__ == "__main__":
    main()

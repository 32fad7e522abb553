"""Small models without a config, batches for them, and losses of the user's own."""

import torch
from torch import nn
from torch.nn import functional as F


class Plain(nn.Module):
    """Two layers over sequences, and a head for each position."""

    def __init__(self, classes=5):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def plain(classes=5, seed=0):
    torch.manual_seed(seed)
    return Plain(classes).double()


def sequences(rows=5, length=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, 6, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 5, (rows, length), generator=g)
    for row in range(rows):
        labels[row, : row % 4] = -100
    return x, labels


def unreduced(model, batch):
    x, labels = batch
    return F.cross_entropy(model(x).transpose(1, 2), labels, reduction="none", ignore_index=-100)


LOSSES = {
    "mean over labels": lambda m, b: F.cross_entropy(m(b[0]).transpose(1, 2), b[1]),
    "sum": lambda m, b: F.cross_entropy(m(b[0]).transpose(1, 2), b[1], reduction="sum"),
    "mean over elements": lambda m, b: unreduced(m, b).mean(),
    "mean over rows of sums": lambda m, b: unreduced(m, b).sum(1).mean(),
}


class Masked(nn.Module):
    """Attends to what its mask lets it, whatever the mask is called, and in whichever order of dimensions."""

    def __init__(self, name, sequence_first):
        super().__init__()
        self.name, self.sequence_first = name, sequence_first
        self.embed = nn.Embedding(30, 8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, input_ids, labels=None, **masks):
        x = self.embed(input_ids)
        keep = masks[self.name].bool()
        keep = ~keep if "padding" in self.name else keep
        y = x.transpose(0, 1).contiguous() if self.sequence_first else x
        q, k, v = (layer(y) for layer in (self.q, self.k, self.v))
        if self.sequence_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        scores = (q @ k.transpose(1, 2)).masked_fill(~keep[:, None], float("-inf")).softmax(-1) @ v
        pooled = (self.out(scores) * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
        return F.cross_entropy(pooled, labels) if labels is not None else pooled

"""Plain loops: encode, batch, train, evaluate, time. Nothing here knows which method made the model."""

import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from jactus import JactusError, parameter_groups

from .data import Split

Batch = dict[str, Tensor]
WARMUP = 0.06
CLIP = 1.0
POOLED_BATCHES = 16
UNSEEN_STEPS = 16  # whose losses may still be on the device: asking for each would make a GPU wait for the host


@dataclass(frozen=True)
class Encoded:
    """Token ids of examples, not yet padded; `labels` is None for language modelling."""

    rows: list[list[int]]
    labels: list[int] | None
    pad_id: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> "Encoded":
        return Encoded(self.rows[rows], None if self.labels is None else self.labels[rows], self.pad_id)

    def take(self, chosen: Sequence[int]) -> "Encoded":
        """The chosen rows, in that order."""
        labels = None if self.labels is None else [self.labels[i] for i in chosen]
        return Encoded([self.rows[i] for i in chosen], labels, self.pad_id)

    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(row) for row in self.rows]

    def batch(self, chosen: Sequence[int]) -> Batch:
        """Pad the chosen rows on the right: input_ids and attention_mask (B, T), labels (B,) or (B, T)."""
        rows = [self.rows[i] for i in chosen]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        labels = (
            ids.masked_fill(mask == 0, -100) if self.labels is None else torch.tensor([self.labels[i] for i in chosen])
        )
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True, eq=False)  # tensors have no == that is true or false
class Images:
    """Images of one size, (N, channels, height, width) of bytes, their integer labels, and the mean and standard deviation
    by channel that the model's values, from 0…1, are normalised by (ViT's image processors have a half)."""

    pixels: Tensor
    labels: list[int]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: slice) -> "Images":
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows])

    def take(self, chosen: Sequence[int]) -> "Images":
        """The chosen examples, in that order."""
        return replace(self, pixels=self.pixels[list(chosen)], labels=[self.labels[i] for i in chosen])

    def lengths(self) -> list[int]:
        """The same for every example: no batch of images is padded."""
        return [1] * len(self)

    def batch(self, chosen: Sequence[int]) -> Batch:
        """pixel_values (B, channels, height, width), float32, normalised; and labels (B,)."""
        mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (self.mean, self.std))
        pixels = self.pixels[list(chosen)].float() / (255 * std) - mean / std
        return {"pixel_values": pixels, "labels": torch.tensor([self.labels[i] for i in chosen])}


class Examples(Protocol):
    """What is trained on: rows that know their lengths, and how to make a batch of some of them."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice) -> "Examples": ...
    def take(self, chosen: Sequence[int]) -> "Examples": ...
    def lengths(self) -> list[int]: ...
    def batch(self, chosen: Sequence[int]) -> Batch: ...


def encode(tokenizer: PreTrainedTokenizerBase, split: Split, max_length: int = 64) -> Encoded:
    """Tokenise a split, special tokens included, cut to `max_length` tokens."""
    ids = tokenizer(split.texts, truncation=True, max_length=max_length, padding=False)["input_ids"]
    return Encoded(ids, list(split.labels), tokenizer.pad_token_id or 0)


def token_blocks(tokenizer: PreTrainedTokenizerBase, lines: Sequence[str], length: int = 256) -> Encoded:
    """Join lines, with the end-of-text token after each, and cut them into blocks of exactly `length` tokens."""
    ids = tokenizer(list(lines), add_special_tokens=False)["input_ids"]
    stream = list(chain.from_iterable([*row, tokenizer.eos_token_id] for row in ids))
    rows = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    if not rows:
        raise JactusError(f"token_blocks: {len(stream)} tokens do not fill one block of {length}; give more lines")
    return Encoded(rows, None, tokenizer.pad_token_id or 0)


@dataclass(frozen=True)
class Batches:
    """Batches of `encoded`, in the same order each time they are iterated; `order` holds each batch's row numbers."""

    encoded: Examples
    order: list[list[int]]

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        return (self.encoded.batch(chosen) for chosen in self.order)


def batches(encoded: Examples, batch_size: int = 32, seed: int | None = None) -> Batches:
    """Cut examples into batches of like length.

    Args:
        encoded: the examples.
        batch_size: rows per batch; the last may be smaller.
        seed: None sorts all rows by length, the fastest for evaluation. A number shuffles: rows are sorted only within
            pools of 16 batches, and the batches are shuffled again, which halves the padding of short texts and
            keeps training random.
    """
    rows = list(range(len(encoded)))
    lengths = encoded.lengths()
    if seed is None:
        rows.sort(key=lengths.__getitem__)
        return Batches(encoded, _cut(rows, batch_size))
    generator = random.Random(seed)
    generator.shuffle(rows)
    pools = _cut(rows, POOLED_BATCHES * batch_size)
    order = [part for pool in pools for part in _cut(sorted(pool, key=lengths.__getitem__), batch_size)]
    generator.shuffle(order)
    return Batches(encoded, order)


@dataclass(frozen=True)
class Trained:
    """What a training run took: wall-clock seconds, optimizer steps, mean loss of its last tenth."""

    seconds: float
    steps: int
    loss: float


def train(
    model: nn.Module,
    encoded: Examples,
    lr: float,
    epochs: int = 2,
    batch_size: int = 32,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    progress: bool = True,
    rates: Mapping[str, float] | None = None,
) -> Trained:
    """Train what requires gradients with AdamW (no weight decay), 6% linear warm-up, linear decay, gradient clip 1.

    Args:
        model: returns `.loss` for a batch; left in evaluation mode.
        encoded: training examples; each epoch has its own order, fixed by `seed`, as is dropout.
        lr: peak learning rate.
        autocast: dtype of the forward pass on the model's device; None computes in the parameters' own.
        rates: other peak rates for modules whose names end so, as `jactus.parameter_groups` takes them.

    Raises:
        JactusError: a gradient is not finite, or nothing requires gradients.
    """
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise JactusError("train: no parameter of the model requires gradients; choose what to train first")
    steps = epochs * math.ceil(len(encoded) / batch_size)
    groups = parameter_groups(model, lr, rates or {})
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    losses: list[float] = []
    unseen: list[Tensor] = []

    def see() -> None:
        for loss, norm in torch.stack(unseen).tolist() if unseen else ():
            losses.append(loss)
            if not math.isfinite(norm):  # clipping by it has silently turned every gradient into zero, or worse
                raise JactusError(
                    f"train: the gradient norm is {norm} at step {len(losses)} of {steps}; "
                    f"lower lr (now {lr:g}) or check the model's weights for huge or non-finite values"
                )
        unseen.clear()

    started = time.perf_counter()
    model.train()
    with tqdm(total=steps, desc="train", disable=not progress) as bar:
        for epoch in range(epochs):
            for batch in batches(encoded, batch_size, seed=seed * 1009 + epoch):
                with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                    loss = model(**_to(batch, device)).loss
                loss.backward()
                norm = nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                unseen.append(torch.stack((loss.detach().float(), norm.detach().float())))
                if len(unseen) == UNSEEN_STEPS:
                    see()
                    bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
                bar.update()
    see()
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return Trained(time.perf_counter() - started, steps, sum(tail) / len(tail))


def faster_dtype() -> torch.dtype | None:
    """bfloat16 where this processor multiplies it faster than float32 (a matter of its instructions), else None."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(1024, 1024).to(dtype)
        times = []
        for _ in range(6):
            t = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - t)
        return min(times[1:])

    return torch.bfloat16 if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else None


@torch.no_grad()
def logits(model: nn.Module, encoded: Examples, batch_size: int = 64) -> Tensor:
    """Logits of every example, (rows, classes), float32 on CPU, in the order of `encoded`."""
    device = next(model.parameters()).device
    model.eval()
    cut = batches(encoded, batch_size)
    found = torch.cat([model(**_to(batch, device)).logits.float() for batch in cut]).cpu()
    return torch.empty_like(found).index_copy_(0, torch.tensor(list(chain.from_iterable(cut.order))), found)


def accuracy(model: nn.Module, encoded: Encoded | Images, batch_size: int = 64) -> float:
    """Share of examples whose largest logit is their label, 0…1."""
    return share_right(logits(model, encoded, batch_size), torch.tensor(encoded.labels))


def share_right(found: Tensor, labels: Tensor) -> float:
    """Share of the rows of logits (rows, classes) that are largest at their label (rows,), 0…1."""
    return (found.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Encoded, batch_size: int = 4) -> float:
    """exp of the mean loss over all predicted tokens (all of a block but its first)."""
    device = next(model.parameters()).device
    model.eval()
    total, terms = 0.0, 0
    for batch in batches(blocks, batch_size):
        predicted = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**_to(batch, device)).loss.item() * predicted
        terms += predicted
    return math.exp(total / terms)


@torch.no_grad()
def latency(model: nn.Module, batch: Batch, repeats: int = 20, warmup: int = 3) -> float:
    """Median seconds of one forward pass of `batch`, labels left out."""
    device = next(model.parameters()).device
    model.eval()
    inputs = _to({name: tensor for name, tensor in batch.items() if name != "labels"}, device)
    times = []
    for _ in range(warmup + repeats):
        started = time.perf_counter()
        model(**inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[warmup:])


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]

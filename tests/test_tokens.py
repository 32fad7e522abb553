"""Which rows are tokens is found on the first batches, whatever says so."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.models import LLAMA, T5
from tests.plain import Masked
from tests.test_statistics import assert_same_sums, calibrated


@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("name", ["attention_mask", "mask", "valid", "key_padding_mask"])
def test_padding_is_found_whatever_its_mask_is_called(name, sequence_first):
    torch.manual_seed(0)
    model = Masked(name, sequence_first).double()
    ids, labels = torch.randint(0, 30, (4, 4)), torch.tensor([0, 1, 2, 3])
    lengths = [2, 4, 1, 3]
    keep = torch.arange(4) < torch.tensor(lengths)[:, None]
    mask = ~keep if "padding" in name else keep.long()
    found = calibrated(model, [{"input_ids": ids, "labels": labels, name: mask}])
    alone = [
        {"input_ids": ids[i : i + 1, :n], "labels": labels[i : i + 1], name: mask[i : i + 1, :n]}
        for i, n in enumerate(lengths)
    ]
    assert_same_sums(found, calibrated(model, alone))
    assert found.layer_tokens("q") == sum(lengths)


def test_masks_that_were_alike_are_told_apart_when_they_differ():
    """Encoder and decoder of one length, and padded alike in the first batch."""
    model = T5.model(dtype=torch.float64)
    first, second = T5.batch(rows=4, length=5), T5.batch(rows=4, length=5, seed=1)
    first["labels"] = torch.randint(3, 60, (4, 5)).masked_fill(first["attention_mask"] == 0, -100)
    second["labels"] = second["labels"].masked_fill(torch.arange(5) > 2, -100)
    found = calibrated(model, [first, second])
    for name in found.layers:
        cross = name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        of_decoder = name.startswith("decoder") and not cross
        expected = sum(
            int((b["labels"] != -100).sum()) if of_decoder else int(b["attention_mask"].sum()) for b in (first, second)
        )
        assert found.layer_tokens(name) == expected, name


def test_a_table_that_examples_share_is_run_with_each(caplog):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.table = nn.Linear(6, 6), nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return (torch.tanh(self.project(x)) @ self.project(self.table).T).sum((1, 2))

    torch.manual_seed(0)
    model, x = Table().double(), torch.randn(5, 3, 6, dtype=torch.float64)

    def loss(model, batch):
        return model(batch).square()

    assert_same_sums(
        calibrated(model, [x], loss=loss), calibrated(model, [x[i : i + 1] for i in range(5)], loss=loss), rtol=1e-9
    )


def test_padding_told_by_lengths_is_found():
    class Lengths(Masked):
        def forward(self, input_ids, labels=None, lengths=None):
            keep = torch.arange(input_ids.shape[1]) < lengths[:, None]
            return super().forward(input_ids, labels, mask=keep)

    torch.manual_seed(0)
    model = Lengths("mask", False).double()
    ids, lengths = torch.randint(0, 30, (4, 5)), torch.tensor([2, 5, 1, 3])
    found = calibrated(model, [{"input_ids": ids, "labels": torch.tensor([0, 1, 2, 3]), "lengths": lengths}])
    assert found.layer_tokens("q") == int(lengths.sum())


def test_a_mask_of_the_loss_is_no_mask_of_padding():
    model = LLAMA.model(dtype=torch.float64)
    ids = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "completion_mask": (torch.arange(7) > 2).long().expand(4, 7).contiguous()}

    def loss(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        terms = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        return (terms * batch["completion_mask"][:, 1:]).sum() / batch["completion_mask"][:, 1:].sum()

    found = calibrated(model, [batch], loss=loss)
    assert found.layer_tokens("model.layers.0.self_attn.q_proj") == 28
    assert found.terms == 16


def test_rows_that_a_model_puts_before_the_text_are_tokens_too():
    class Prefixed(Masked):
        def __init__(self):
            super().__init__("attention_mask", False)
            self.prefix = nn.Parameter(torch.randn(3, 8))

        def forward(self, input_ids, labels=None, attention_mask=None):
            x = torch.cat([self.prefix.expand(len(input_ids), 3, 8), self.embed(input_ids)], 1)
            keep = torch.cat([attention_mask.new_ones(len(x), 3), attention_mask], 1).bool()
            scores = (self.q(x) @ self.k(x).transpose(1, 2)).masked_fill(~keep[:, None], float("-inf"))
            pooled = (self.out(scores.softmax(-1) @ self.v(x)) * keep[..., None]).sum(1)
            return F.cross_entropy(pooled, labels) if labels is not None else pooled

    torch.manual_seed(0)
    model, lengths = Prefixed().double(), torch.tensor([2, 5, 1, 3])
    batch = {
        "input_ids": torch.randint(0, 30, (4, 5)),
        "attention_mask": (torch.arange(5) < lengths[:, None]).long(),
        "labels": torch.tensor([0, 1, 2, 3]),
    }
    assert calibrated(model, [batch]).layer_tokens("q") == 4 * 3 + int(lengths.sum())

"""What a loss sums or averages is found on the first batches, against the definitions; or it is refused."""

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jactus import JactusError
from jactus.calibration.examples import mapped, size, take
from jactus.calibration.losses import LossSum
from tests.models import BERT, LLAMA
from tests.plain import LOSSES, plain, sequences, unreduced
from tests.test_statistics import assert_same_sums, calibrated
from tests.unchanged import assert_same, state


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", LOSSES)
def test_whatever_a_loss_averages_its_gradient_is_that_of_the_sum(name, rows):
    model, (x, labels) = plain(), sequences()
    batches = [(x[i : i + rows], labels[i : i + rows]) for i in range(0, 5, rows)]
    found = calibrated(model, batches, loss=LOSSES[name])
    want = torch.autograd.grad(unreduced(model, (x, labels)).sum(), model.first.weight)[0]
    # elements and rows of seven elements are alike: the sum is then one of rows' means
    terms = {"mean over labels": int((labels != -100).sum())}.get(name, 5)
    assert found.terms == terms
    assert torch.allclose(found.layers["first"].gradient_sum, want / (7 if "elements" in name else 1), rtol=1e-9)


def test_labels_ignored_by_another_value_do_not_count():
    model, (x, labels) = plain(), sequences()
    labels[labels == -100] = 255

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], ignore_index=255)

    found = calibrated(model, [(x, labels)], loss=loss)
    assert found.terms == int((labels != 255).sum())


def test_what_the_first_batch_leaves_open_a_later_one_decides():
    """Four rows of seven labels: rows, labels, and labels but one are all alike until a batch has ragged ones."""
    model, (x, labels) = plain(), sequences(8)
    first, second = (
        (x[:4], torch.randint(0, 5, (4, 7), generator=torch.Generator().manual_seed(3))),
        (x[4:], labels[4:]),
    )
    second[1][:2, 3:] = -100
    found = calibrated(model, [first, second], loss=lambda m, b: unreduced(m, b).sum(1).mean())
    assert found.terms == 8
    found = calibrated(model, [first, second], loss=LOSSES["mean over labels"])
    assert found.terms == 28 + int((second[1] != -100).sum())


def contrastive(model, batch):
    pooled = model(batch[0]).mean(1)
    return F.cross_entropy(pooled @ pooled.T, torch.arange(len(pooled)))


def weighted(model, batch):
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], weight=torch.arange(1.0, 6).double())


def random_loss(model, batch):
    return unreduced(model, batch).mean() + torch.rand(())


@pytest.mark.parametrize(
    "loss, message",
    [
        (contrastive, r"the loss of Plain is no sum and no mean .*pass loss= that returns \(sum, number of terms\)"),
        (weighted, "the loss of Plain is no sum and no mean"),
        (random_loss, "is another at a second call"),
        (lambda m, b: unreduced(m, b).mean().detach(), "depends on none of the 3 target layers"),
    ],
)
def test_a_loss_that_does_not_add_up_is_refused_by_name(loss, message):
    model = plain()
    before = state(model)
    with pytest.raises(JactusError, match=message):
        calibrated(model, [sequences()], loss=loss)
    assert_same(before, state(model))


def test_a_pair_is_taken_at_its_word():
    found = calibrated(plain(), [sequences()], loss=lambda m, b: (contrastive(m, b) * 5, 5))
    assert found.terms == 5


def test_without_verification_conventions_count():
    batch = BERT.batch()
    assert_same_sums(
        calibrated(BERT.model(dtype=torch.float64), [batch], verify=False),
        calibrated(BERT.model(dtype=torch.float64), [batch]),
    )
    assert (
        calibrated(LLAMA.model(), LLAMA.batches(), verify=False).terms
        == calibrated(LLAMA.model(), LLAMA.batches()).terms
    )


Pair = namedtuple("Pair", "x extra")


def test_a_batch_is_cut_whatever_it_is_made_of():
    batch = {"a": torch.arange(6).view(3, 2), "n": {"b": [torch.ones(3)], "c": Pair(torch.zeros(3, 1), "text")}, "k": 2}
    assert size(batch) == 3
    one = take(batch, [1])
    assert one["a"].tolist() == [[2, 3]]
    assert one["n"]["c"] == Pair(torch.zeros(1, 1), "text")
    assert mapped(batch, lambda path, leaf: path)["n"]["c"].x == ("n", "c", "x")
    assert size({"input_ids": torch.ones(1, 4), "pixel_values": torch.ones(16, 3)}) is None
    assert size({"input_ids": torch.ones(4, 4), "position_ids": torch.ones(1, 4)}) == 4


def weighted_by_class(model, batch):
    return F.cross_entropy(model(batch[0]).mean(1), batch[1], weight=torch.tensor([1.0, 1, 1, 1, 9]).double())


@pytest.mark.parametrize("late", [0, 4, 20])
def test_weights_of_classes_are_found_wherever_the_class_is(late):
    """The heavy class comes in the first four rows, later in the first batch, or in a later batch."""
    model, x = plain(), sequences(32)[0]
    y = torch.arange(32) % 4
    y[late:] = torch.where(torch.arange(32 - late) % 3 == 0, 4, y[late:])
    with pytest.raises(JactusError, match="it is weighted"):
        calibrated(model, [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)], loss=weighted_by_class)


@pytest.mark.parametrize("name", ["targets", "tags", "y"])
def test_labels_by_any_name_are_told_by_what_is_ignored(name):
    model, (x, labels) = plain(), sequences(8)
    labels[:4][labels[:4] == -100] = 2  # the first batch ignores nothing
    labels[labels == -100] = -1
    batch = {"x": x, name: labels}

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]).transpose(1, 2), batch[name], ignore_index=-1)

    found = calibrated(model, [take(batch, range(4)), take(batch, range(4, 8))], loss=loss)
    assert found.terms == int((labels != -1).sum())


def test_ids_in_a_tuple_are_no_labels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batches = [(torch.randint(0, 30, (4, length)), torch.tensor([0, 1, 2, 0])) for length in (3, 11)]

    def terms(model, batch):
        return F.cross_entropy(model(batch[0]).mean(1), batch[1], reduction="none")

    assert_same_sums(
        calibrated(model, batches, loss=lambda m, b: terms(m, b).mean()), calibrated(model, batches, loss=terms), 1e-9
    )


def test_terms_that_do_not_add_up_are_refused_and_a_pair_is_warned_of(caplog):
    with pytest.raises(JactusError, match="terms of the loss do not add up"):
        calibrated(
            plain(), [sequences()], loss=lambda m, b: torch.stack([unreduced(m, b).mean(), unreduced(m, b).max()])
        )
    calibrated(plain(), [sequences()], loss=lambda m, b: (unreduced(m, b).mean(), 5))
    assert "does not add up over parts of a batch" in caplog.text
    with pytest.raises(JactusError, match=r"the loss is a pair \(Tensor \(\), Tensor \(2, 7, 5\)\)"):
        calibrated(plain(), [sequences()], loss=lambda m, b: (unreduced(m, b).mean(), m(b[0])))


def test_one_number_in_a_dimension_is_one_number():
    whole = calibrated(plain(), [sequences()], loss=LOSSES["mean over labels"])
    shaped = calibrated(plain(), [sequences()], loss=lambda m, b: LOSSES["mean over labels"](m, b)[None])
    assert_same_sums(whole, shaped)


def test_what_cannot_be_cut_says_what_was_cut():
    model, (x, labels) = plain(), sequences(5)
    batch = {"x": x, "labels": labels.clamp(min=0), "weights": torch.ones(5, dtype=torch.float64)}

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["labels"], weight=batch["weights"])

    with pytest.raises(
        JactusError, match=r"take the batch, and not its first examples alone .*'weights'.*verify=False"
    ):
        calibrated(model, [batch], loss=loss)


def test_where_a_label_may_end_the_process_only_known_ones_are_tried():
    """As on a GPU, where torch stops at a label that the loss does not know."""
    model, (x, labels) = plain(), sequences()
    labels = labels.clamp(min=0)
    seen = set()

    def loss(model, batch):
        seen.update(batch[1].unique().tolist())
        return LOSSES["mean over labels"](model, batch)

    losses = LossSum(model, loss)
    losses.terms.takes = set()
    losses.prepare((x, labels), 0)
    assert seen <= set(range(5))
    losses.terms.takes, losses.terms.left = None, []
    losses.prepare((x, labels), 0)
    assert -100 in seen


@pytest.mark.parametrize("margin", [1.0, 3.7, 8.0])
def test_a_small_loss_in_half_precision_is_known_as_well_as_its_margin(margin):
    """Two batches of the same examples may round logits by another hundredth or two: of a small loss that is more than 3%."""
    model, x = nn.Linear(1, 2, bias=False).bfloat16(), torch.ones(8, 1, dtype=torch.bfloat16)

    def loss(model, batch):
        rounded = 1 + 0.015 * (-1) ** len(batch["x"])
        wide = model(batch["x"]).float() * 0 + torch.tensor([0.0, margin * rounded])
        return F.cross_entropy(wide, batch["labels"])

    rows = {"x": x[:7], "labels": torch.ones(7, dtype=torch.long)}  # cut in three and four
    losses = LossSum(model, loss)
    losses.prepare(rows, 0)
    assert losses.terms.of(rows) == (7, 7)
    with pytest.raises(JactusError, match="no sum and no mean"):
        LossSum(model.float(), loss).prepare({"x": rows["x"].float(), "labels": rows["labels"]}, 0)

"""What is found out on the first batch, against the definitions; and that a check that should fail does."""

import copy
import logging
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jactus
from jactus import JactusError
from jactus.calibration.examples import mapped, size, take
from jactus.calibration.losses import LossSum
from jactus.calibration.replay import Replay
from jactus.planning.subspace import eigh
from tests.models import BERT, BY_NAME, FAMILIES, LLAMA, SMALL, T5, compressed, planned
from tests.test_statistics import assert_same_sums, calibrated
from tests.unchanged import assert_same, state


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


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_checks_leave_nothing_behind(family):
    model = family.model().train()
    model(**family.batch())  # transformers writes the kind of problem into the config
    config = copy.deepcopy(model.config.to_dict())
    before, random = state(model), torch.get_rng_state()
    calibrated(model, family.batches(), SMALL)
    assert_same(before, state(model))
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_found_is_in_the_log(caplog):
    with caplog.at_level(logging.INFO, "jactus"):
        calibrated(LLAMA.model(), LLAMA.batches(), SMALL)
    assert "the loss is a mean over shifted labels of labels" in caplog.text
    assert "tokens are told from padding by attention_mask" in caplog.text
    assert "every target is used by its forward alone" in caplog.text


def test_a_plain_models_head_that_stays_dense_trains_and_is_named(caplog):
    model, batch = plain(classes=3), sequences()
    batch[1].clamp_(max=2)
    config = SMALL.replace(rank_multiple=2, budget=0.8)
    statistics = calibrated(model, [batch], config, loss=unreduced)
    assert "last (Linear 3×8) computes what the model returns" in caplog.text
    plan = jactus.plan(model, statistics, config, progress=False)
    assert plan.ranks["last"] is None
    jactus.compress(model, plan)
    assert {"last.weight", "last.bias"} <= {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_named_head_of_a_plain_model_is_fitted():
    model, (x, labels) = plain(), sequences()
    before = model.first.weight.clone()
    labels[labels == -100] = 0
    first = float(F.cross_entropy(model(x).transpose(1, 2), labels))
    final = jactus.fit_head(model, [(x, labels)], head="last", loss=LOSSES["mean over labels"], progress=False)
    assert torch.equal(model.first.weight, before)
    assert final < first
    assert final == pytest.approx(float(F.cross_entropy(model(x).transpose(1, 2), labels)), rel=1e-6)
    with pytest.raises(JactusError, match=r"fit_head.*head='fc'"):
        jactus.fit_head(model, [(x, labels)], loss=LOSSES["mean over labels"], progress=False)


def test_of_hidden_states_only_what_reaches_the_loss_is_kept():
    """A decoder's classifier scores every position and takes one: the other positions need no memory."""
    from transformers import LlamaForSequenceClassification

    config = copy.deepcopy(LLAMA.config)
    config.num_labels = 3
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).double().eval()
    batch = {**LLAMA.batch(length=20), "labels": torch.tensor([0, 1, 2, 0])}
    losses = LossSum(model, None)
    losses.prepare(batch, 0)
    with Replay(model, {n: p for n, p in model.named_parameters() if n.startswith("score")}) as replay:
        replay.record(lambda: losses.of(batch, 0)[0], 0)
        (kept,) = replay.outputs[0]["model"]
        rows = kept.parts["last_hidden_state"].kept
        assert rows.shape == (4, 16)
        with torch.no_grad(), replay.of(0):
            found = losses.of(batch, 0)[0].item()
    assert found == pytest.approx(4 * model(**batch).loss.item(), rel=1e-6)


def test_compress_changes_nothing_when_a_layer_cannot_be_made(monkeypatch):
    model = BERT.model()
    before = state(model)
    real, calls = jactus.compression.surgery.factors, iter(range(100))

    def failing(*args):
        if next(calls) == 5:
            raise torch.linalg.LinAlgError("did not converge")
        return real(*args)

    monkeypatch.setattr("jactus.compression.surgery.factors", failing)
    with pytest.raises(JactusError, match=r"bert\.encoder\.layer\.0.*did not converge; the model is as it was"):
        jactus.compress(model, planned("bert"))
    assert_same(before, state(model))


def test_an_eigensolver_that_fails_has_another_behind_it(monkeypatch):
    def failing(S):
        raise torch.linalg.LinAlgError("did not converge")

    X = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    S = X @ X.T
    wanted = torch.linalg.eigh(S)[0]
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = eigh(S)
    assert torch.allclose(values, wanted)
    assert torch.allclose(vectors @ torch.diag(values) @ vectors.T, S)


def test_accelerates_hook_goes_over_to_the_new_layer():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counts(ModelHook):
        calls = 0

        def post_forward(self, module, output):
            Counts.calls += 1
            return output

    model = BERT.model()
    name = "bert.encoder.layer.0.output.dense"
    add_hook_to_module(model.get_submodule(name), Counts())
    jactus.compress(model, planned("bert"))
    Counts.calls = 0
    model(**BERT.batch())
    assert Counts.calls == 1


def test_weights_that_are_offloaded_are_refused_by_name():
    with torch.device("meta"):
        model = BERT.auto.from_config(copy.deepcopy(BERT.config))
    with pytest.raises(JactusError, match=r"query \(Linear 16×16\) has no weight in memory .*load the model whole"):
        calibrated(model, BERT.batches(), SMALL)
    with pytest.raises(JactusError, match="has no weight in memory"):
        jactus.plan(model, None, SMALL.replace(metric="identity", union=("weight",)), progress=False)


def test_passes_over_other_batches_are_refused():
    class Shuffled:
        def __init__(self):
            self.turn = 0

        def __iter__(self):
            self.turn += 1
            return iter(BERT.batches(rows=4 if self.turn <= 2 else 3))

    with pytest.raises(JactusError, match=r"pass 2 .*they were other batches"):
        calibrated(BERT.model(), Shuffled(), SMALL, memory_limit=12_000)


def test_a_model_that_is_no_longer_what_its_config_says_is_not_written_over_a_good_checkpoint(tmp_path):
    model = compressed(BERT)
    jactus.save_pretrained(model, tmp_path)
    kept = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    model.classifier = nn.Linear(16, 7)
    with pytest.raises(JactusError, match=r"would not be read back .*classifier\.\w+ is \(7,.*a reload asks for \(3,"):
        jactus.save_pretrained(model, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == kept


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


def test_every_family_is_in_the_list():
    assert set(BY_NAME) == {f.name for f in FAMILIES}


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


class Averaging(Plain):
    """Its forward writes into a buffer, puts another in its place, and moves a parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.moved = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x):
        self.written.add_(1)
        self.replaced = self.replaced + 1
        if self.training:
            with torch.no_grad():
                self.moved.mul_(0.9).add_(1)
        return super().forward(x)


def test_a_model_that_changes_itself_is_changed_by_no_look_at_it():
    model = Averaging().double()
    calibrated(model, [sequences()] * 2, loss=unreduced)
    assert (float(model.written), float(model.replaced), float(model.moved)) == (2, 2, 0)  # two batches were run


def test_parameters_of_the_loss_get_no_gradient():
    temperature = nn.Parameter(torch.ones((), dtype=torch.float64))
    model = plain()
    kept = model.last.bias.grad = torch.ones(5, dtype=torch.float64)
    calibrated(model, [sequences()], loss=lambda m, b: unreduced(m, b) * temperature)
    assert temperature.grad is None
    jactus.fit_head(model, [sequences()], head="last", loss=LOSSES["mean over labels"], progress=False)
    assert model.last.bias.grad is kept


def test_layers_inside_an_excluded_module_are_excluded():
    found = calibrated(BERT.model(), BERT.batches(), SMALL.replace(exclude_modules=["pooler", "intermediate"]))
    assert not any("pooler" in name or "intermediate" in name for name in found.layers)


def test_what_cannot_be_cut_says_what_was_cut():
    model, (x, labels) = plain(), sequences(5)
    batch = {"x": x, "labels": labels.clamp(min=0), "weights": torch.ones(5, dtype=torch.float64)}

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["labels"], weight=batch["weights"])

    with pytest.raises(
        JactusError, match=r"take the batch, and not its first examples alone .*'weights'.*verify=False"
    ):
        calibrated(model, [batch], loss=loss)


def test_activation_checkpointing_of_the_users_own_is_recomputed_alike():
    from torch.utils.checkpoint import checkpoint

    class Saving(Plain):
        def forward(self, x):
            h = checkpoint(lambda x: torch.tanh(self.first(x)), x, use_reentrant=False)
            return self.last(torch.tanh(self.second(h)))

    torch.manual_seed(0)
    saving = Saving().double()
    assert_same_sums(
        calibrated(saving, [sequences()], loss=unreduced), calibrated(plain(), [sequences()], loss=unreduced)
    )


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

"""What is looked at before anything is summed or replaced changes nothing; and a check that should fail does."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jactus
from jactus import JactusError
from jactus.calibration.losses import LossSum
from jactus.calibration.replay import Replay
from jactus.planning.subspace import eigh
from tests.models import BERT, BY_NAME, FAMILIES, LLAMA, SMALL, compressed, planned
from tests.plain import LOSSES, Plain, plain, sequences, unreduced
from tests.test_statistics import assert_same_sums, calibrated
from tests.unchanged import assert_same, state


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


@pytest.mark.parametrize("multiple", [2, 4])
def test_a_plain_models_head_trains_by_its_core_or_as_it_is_and_is_named(multiple, caplog):
    model, batch = plain(classes=3), sequences()
    batch[1].clamp_(max=2)
    config = SMALL.replace(rank_multiple=multiple, budget=0.9)
    statistics = calibrated(model, [batch], config, loss=unreduced)
    assert "last (Linear 3×8) computes what the model returns" in caplog.text
    plan = jactus.plan(model, statistics, config, progress=False)
    assert (plan.ranks["last"] is None) == (multiple > 3), "of three classes there are no four directions"
    jactus.compress(model, plan)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("last.")}
    assert trained == ({"last.weight", "last.bias"} if multiple > 3 else {"last.core", "last.bias"})


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


def test_every_family_is_in_the_list():
    assert set(BY_NAME) == {f.name for f in FAMILIES}


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

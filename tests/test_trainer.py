"""transformers.Trainer trains a compressed model, before and after a reload, and its own checkpoints reload."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import jactus
from jactus.model.lowrank import compressed_layers
from tests.models import BERT, EVERY, LLAMA, VIT, compressed


def trainer(model, path, family=BERT, **arguments):
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, **arguments}
    args = TrainingArguments(
        str(path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=4,
        logging_steps=1,
        seed=0,
        **settings,
    )
    batch = family.batch(rows=16)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(16)]
    return Trainer(model=model, args=args, train_dataset=rows)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def mean_loss(model, family):
    return float(model.eval()(**family.batch(rows=16)).loss)


@pytest.mark.parametrize("family", [BERT, LLAMA, VIT], ids=lambda f: f.name)
@pytest.mark.parametrize("reloaded", [False, True])
def test_trainer_lowers_the_loss_and_touches_only_what_trains(family, reloaded, tmp_path):
    model = compressed(family, EVERY)
    if reloaded:
        jactus.save_pretrained(model, tmp_path / "start")
        model = family.auto.from_pretrained(tmp_path / "start")
    before, start = weights(model), mean_loss(model, family)
    trains = trainable(model)
    trainer(model, tmp_path, family, save_strategy="no", max_steps=20).train()
    assert mean_loss(model, family) < start
    changed = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert changed <= trains
    assert changed >= {f"{name}.core" for name in compressed_layers(model)}


def test_the_same_training_follows_from_a_reloaded_model(tmp_path):
    model = compressed(BERT, EVERY)
    jactus.save_pretrained(model, tmp_path / "start")
    again = BERT.auto.from_pretrained(tmp_path / "start")
    trainer(model, tmp_path / "a", save_strategy="no").train()
    trainer(again, tmp_path / "b", save_strategy="no").train()
    assert same(weights(model), weights(again))


def test_trainers_checkpoints_reload_and_train_on(tmp_path):
    model = compressed(BERT, EVERY)
    trainer(model, tmp_path).train()
    again = BERT.auto.from_pretrained(tmp_path / "checkpoint-4")
    assert same(weights(again), weights(model))
    assert trainable(again) == trainable(model)
    trainer(again, tmp_path / "more", save_strategy="no").train()
    assert not same(weights(again), weights(model))


@pytest.mark.parametrize("reloaded", [False, True])
def test_resume_from_checkpoint_ends_where_the_whole_run_ends(reloaded, tmp_path):
    model = compressed(BERT, EVERY)
    trainer(model, tmp_path).train()
    resumed = BERT.auto.from_pretrained(tmp_path / "checkpoint-2") if reloaded else compressed(BERT, EVERY)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(resumed), weights(model))


def test_bfloat16_autocast_trains_float32_cores(tmp_path):
    model = compressed(BERT, EVERY)
    start = mean_loss(model, BERT)
    trainer(model, tmp_path, bf16=True, max_steps=20, save_strategy="no").train()
    assert mean_loss(model, BERT) < start
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_bfloat16_bases_train_float32_cores(tmp_path):
    model = compressed(BERT, EVERY, torch.bfloat16)
    before = weights(model)
    trainer(model, tmp_path, bf16=True).train()
    layers = compressed_layers(model)
    assert {layer.core.dtype for layer in layers.values()} == {torch.float32}
    # a step of 1e-2 on values near 1e-2 to 1: too small for bfloat16 to keep, and kept
    assert all(not torch.equal(layer.core, before[f"{name}.core"]) for name, layer in layers.items())
    assert same(weights(BERT.auto.from_pretrained(tmp_path / "checkpoint-4")), weights(model))


def test_adapt_then_trainer_is_the_whole_story(tmp_path):
    model = jactus.adapt(BERT.model(), BERT.batches(), 0.7, EVERY, fit_head=True, progress=False)
    run = trainer(model, tmp_path, save_strategy="no")
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert same(weights(BERT.auto.from_pretrained(tmp_path / "final")), weights(model))


def test_gradient_checkpointing_in_trainer(tmp_path):
    model, plain = compressed(BERT, EVERY), compressed(BERT, EVERY)
    trainer(model, tmp_path, gradient_checkpointing=True, save_strategy="no").train()
    trainer(plain, tmp_path, save_strategy="no").train()
    assert same(weights(model), weights(plain))

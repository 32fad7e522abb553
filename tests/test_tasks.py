"""Several tasks on one set of bases: each is what it would be alone, to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import jactus
from jactus import JactusError, Tasks
from jactus.model.lowrank import core_layers
from tests.models import BERT, EVERY, LLAMA, compressed


def train(model, seed):
    """A few steps that move cores and head; other ones for each seed."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        model(**BERT.batch(rows=8, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model):
    batch = BERT.batch()
    batch.pop("labels")
    return model.eval()(**batch).logits


@pytest.fixture
def two(tmp_path):
    """A model with two trained tasks; and the models of each, saved and reloaded."""
    model = compressed(BERT, EVERY)
    tasks = Tasks(model, "first")
    tasks.add("second")
    for seed, name in enumerate(tasks):
        tasks.set_active(name)
        train(model, seed)
        jactus.save_pretrained(model, tmp_path / name)
        jactus.save_cores(model, tmp_path / f"{name}.safetensors")
    return tasks, {name: BERT.auto.from_pretrained(tmp_path / name) for name in tasks}


def test_switching_gives_the_logits_of_the_models_saved_apart(two):
    tasks, alone = two
    assert not torch.equal(logits(alone["first"]), logits(alone["second"]))
    for name in ("first", "second", "second", "first"):
        tasks.set_active(name)
        assert torch.equal(logits(tasks.model), logits(alone[name]))


def test_training_the_active_task_is_kept_when_another_takes_its_place(two):
    tasks, alone = two
    tasks.set_active("first")
    train(tasks.model, 5)
    trained = logits(tasks.model)
    tasks.set_active("second")
    assert torch.equal(logits(tasks.model), logits(alone["second"]))
    tasks.set_active("first")
    assert torch.equal(logits(tasks.model), trained)


def test_a_file_of_cores_is_a_task_and_a_file_of_other_bases_is_none(two, tmp_path):
    tasks, alone = two
    before = logits(tasks.model)
    tasks.add("again", tmp_path / "first.safetensors")
    assert torch.equal(logits(tasks.model), before)
    tasks.set_active("again")
    assert torch.equal(logits(tasks.model), logits(alone["first"]))
    other = Tasks(compressed(BERT, EVERY.replace(budget=0.5)), "other")
    with pytest.raises(JactusError, match="other bases"):
        other.add("first", tmp_path / "first.safetensors")
    assert list(other) == ["other"]


def test_the_average_of_tasks_is_the_average_of_their_weights(two):
    tasks, alone = two
    tasks.average("both", ["first", "second"], [0.25, 0.75])
    tasks.average("beyond", ["first", "second"], [2, -1])
    tasks.average("middle", ["first", "second"])
    for name, (a, b) in {"both": (0.25, 0.75), "beyond": (2, -1), "middle": (0.5, 0.5)}.items():
        tasks.set_active(name)
        pairs = [
            (
                layer.dense_weight(torch.float64),
                *(m.get_submodule(key).dense_weight(torch.float64) for m in alone.values()),
            )
            for key, layer in core_layers(tasks.model).items()
        ]
        pairs += [
            (getattr(tasks.model.classifier, key), *(getattr(m.classifier, key) for m in alone.values()))
            for key in ("weight", "bias")
        ]
        for found, one, other in pairs:  # each number of the average is rounded once, to 6e-8 of itself
            assert (found - (a * one + b * other)).norm() <= 1e-6 * (one.norm() + other.norm())


MIXED = ["second", "first", "first", "second", "second"]


def test_rows_of_one_batch_are_each_of_their_own_task(two):
    tasks, alone = two
    batch = BERT.batch(rows=len(MIXED))
    batch.pop("labels")
    forwards = {name: module.forward for name, module in tasks.model.named_modules()}
    with torch.no_grad(), tasks.rows(MIXED):
        found = tasks.model.eval()(**batch).logits
    with torch.no_grad():
        right = {name: model.eval()(**batch).logits for name, model in alone.items()}
    assert not torch.allclose(right["first"], right["second"], atol=1e-2)
    for i, name in enumerate(MIXED):
        assert torch.allclose(found[i], right[name][i], atol=1e-5), (i, name)
    assert all("forward" not in vars(m) or m.forward == forwards[name] for name, m in tasks.model.named_modules())
    assert torch.equal(logits(tasks.model), logits(alone[tasks.active]))


def test_rows_take_the_active_task_as_it_is_now(two):
    tasks, _ = two
    tasks.set_active("first")
    train(tasks.model, 5)
    batch = {**BERT.batch(), "labels": None}
    with torch.no_grad():
        right = tasks.model.eval()(**batch).logits
        with tasks.rows(["first"] * len(right)):
            assert torch.equal(tasks.model(**batch).logits, right)


def test_prompts_of_two_tasks_are_generated_from_together():
    model = compressed(LLAMA, EVERY)
    tasks = Tasks(model, "first")
    tasks.add("second")
    for seed, name in enumerate(tasks):
        tasks.set_active(name)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3)
        for _ in range(4):
            model(**LLAMA.batch(rows=4, seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    ids = LLAMA.batch(rows=1)["input_ids"][:, :4].expand(2, -1)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    right = []
    for name in ("second", "first"):
        tasks.set_active(name)
        right.append(model.eval().generate(ids[:1], **{**how, "attention_mask": how["attention_mask"][:1]})[0])
    with tasks.rows(["second", "first"]):
        found = model.generate(ids, **how)
    assert not torch.equal(*right)
    assert torch.equal(found, torch.stack(right))


def test_a_compiled_model_is_compiled_anew_for_rows(two):
    tasks, alone = two
    batch = {**BERT.batch(rows=4), "labels": None}
    names = ["first", "second", "second", "first"]
    compiled = torch.compile(tasks.model.eval(), backend="eager")
    with torch.no_grad():
        before = compiled(**batch).logits
        right = {name: model.eval()(**batch).logits for name, model in alone.items()}
        with tasks.rows(names):
            found = compiled(**batch).logits
        assert torch.equal(compiled(**batch).logits, before)
    assert all(torch.allclose(found[i], right[name][i], atol=1e-5) for i, name in enumerate(names))


def test_rows_that_cannot_be_told_apart_are_refused(two):
    tasks, alone = two
    batch = {**BERT.batch(rows=4), "labels": None}
    cases = [
        (["first"] * 3, r"was given \(4, .*and 3 rows have a task"),
        ([], "there is none"),
        (["first", "third"], "no task 'third'"),
    ]
    for names, said in cases:
        with pytest.raises(JactusError, match=said), tasks.rows(names):
            tasks.model(**batch)
    with pytest.raises(JactusError, match="was not called"), tasks.rows(["first"] * 4):
        tasks.model.bert(batch["input_ids"])  # and no head
    with pytest.raises(JactusError, match="was not called"), tasks.rows(["first"] * 4):
        pass
    tasks._held[next(name for name in tasks if name != tasks.active)].popitem()
    with pytest.raises(JactusError, match="in one of 'first' and 'second' alone"), tasks.rows(["first", "second"]):
        pass
    assert torch.equal(logits(tasks.model), logits(alone[tasks.active]))


def test_sets_are_counted_and_are_small_beside_a_model_each(two):
    tasks, _ = two
    cores = sum(p.numel() for p in tasks.model.parameters() if p.requires_grad)
    assert tasks.size("first") == tasks.size("second") >= 4 * cores
    assert tasks.size("first") < jactus.size(tasks.model).stored_bytes / 2


def test_what_is_not_held_or_does_not_fit_is_refused(two):
    tasks, _ = two
    assert list(tasks) == ["first", "second"]
    for call in (
        lambda: tasks.set_active("third"),
        lambda: tasks.delete("third"),
        lambda: tasks.average("x", ["third"]),
    ):
        with pytest.raises(JactusError, match="no task 'third'; held are 'first', 'second'"):
            call()
    with pytest.raises(JactusError, match="already"):
        tasks.add("first")
    with pytest.raises(JactusError, match="is active"):
        tasks.delete(tasks.active)
    for weights in ([1], [0.5, 0.6]):
        with pytest.raises(JactusError, match="of sum 1"):
            tasks.average("x", ["first", "second"], weights)
    with pytest.raises(JactusError, match="of sum 1"):
        tasks.average("x", [])
    with pytest.raises(JactusError, match="three-factor"):
        Tasks(BERT.model(), "dense")
    tasks.set_active("second")
    tasks.delete("first")
    assert list(tasks) == ["second"]
    assert len(tasks) == 1


def test_the_example_serves_two_tasks_from_one_base(tmp_path):
    from tests.test_examples import EXAMPLES, tiny_encoder

    tiny_encoder(tmp_path / "model")
    for task, words in {"mood": ("good", "bad"), "length": ("very very", "")}.items():
        rows = [{"text": f"a {word} film", "label": i} for i, word in enumerate(words)] * 8
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [EXAMPLES / "two_tasks.py", "--model", "model", "--data", "mood.jsonl", "length.jsonl", "--output", "out"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mood" in done.stdout
    assert "length" in done.stdout
    assert {p.name for p in Path(tmp_path / "out").iterdir()} >= {"base", "mood.safetensors", "length.safetensors"}

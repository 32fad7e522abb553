"""`jactus fit`, as a stranger runs it: every kind of task, from files to a model that reloads, and from any interruption on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import jactus
from jactus.app import fitting, training
from jactus.app.record import FILE, Run
from jactus.model.lowrank import compressed_layers
from tests import app_made as made
from tests.app_made import fit, same

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    """A folder with models and data."""
    here = tmp_path_factory.mktemp("brought")
    for name, make in (("encoder", made.encoder), ("decoder", made.decoder), ("vision", made.vision)):
        make(here / name)
    made.reviews(here / "reviews.csv")
    made.pairs(here / "pairs.jsonl")
    made.documents(here / "documents.txt")
    made.answers(here / "answers.json")
    made.pictures(here / "pictures")
    return here


TASKS = {
    "classification": ("reviews.csv", "encoder", AutoModelForSequenceClassification, "accuracy"),
    "pairs": ("pairs.jsonl", "encoder", AutoModelForSequenceClassification, "accuracy"),
    "language": ("documents.txt", "decoder", AutoModelForCausalLM, "perplexity"),
    "instructions": ("answers.json", "decoder", AutoModelForCausalLM, "perplexity"),
    "images": ("pictures", "vision", AutoModelForImageClassification, "accuracy"),
}


@pytest.mark.parametrize("task", TASKS)
def test_from_files_to_a_model_that_reloads(task, brought, tmp_path, capsys):
    data, model, auto, metric = TASKS[task]
    output = tmp_path / "small"
    words = ("fit", brought / data, "--model", brought / model, "--output", output, "--epochs", 6, "--batch-size", 8)
    assert made.run(*words, "--json") == 0
    out = capsys.readouterr().out
    told = json.loads(out)
    run = Run.load(output)
    assert (run.task, run.metric, told["scores"][0]["of"]) == (task, metric, "dense")
    assert [score.of for score in run.scores] == ["dense", "compressed", "trained", "reloaded"]
    of = {score.of: score for score in run.scores}
    losses = [point.loss for point in run.training]
    half = len(losses) // 2
    assert sum(losses[-half:]) < sum(losses[:half])
    assert of["reloaded"].loss == pytest.approx(of["trained"].loss, rel=1e-4)
    sizes = {size.of: size for size in run.sizes}
    assert sizes["deployed"].parameters < sizes["dense"].parameters
    assert all(size.milliseconds for size in (sizes["dense"], sizes["deployed"]))
    assert sorted(p.name for p in output.iterdir() if p.name.startswith(".")) == []
    loaded = auto.from_pretrained(output)
    assert sum(p.numel() for p in loaded.parameters()) == sizes["deployed"].parameters
    assert {layer.name: layer.rank for layer in run.layers}.keys() >= compressed_layers(loaded).keys()
    assert next(each for each in run.sweep if each.budget == 0.8).parameters == sizes["deployed"].parameters
    if run.data.get("classes"):
        assert list(loaded.config.id2label.values()) == run.data["classes"]
    (AutoImageProcessor if task == "images" else AutoTokenizer).from_pretrained(output)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert all(word in card for word in (run.data["digest"], auto.__name__, f"{sizes['deployed'].parameters:,}"))
    assert (output / "report.html").stat().st_size > 0


def test_the_cards_three_lines_and_its_recipe_work(brought, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("fit", brought / "reviews.csv", "--model", brought / "encoder", "--output", "small", "--epochs", 1)
    assert made.run(*words) == 0
    card = Path("small/README.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert type(names["model"]).__name__ == "BertForSequenceClassification"
    Path("recipe.yaml").write_text(card.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    assert made.run("fit", "--config", "recipe.yaml", "--output", "again") == 0
    assert Path("small/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_answers_alone_are_learned_where_there_is_a_prompt(brought):
    from jactus.app import encoding, rows
    from jactus.app.settings import Settings

    settings = Settings(data=str(brought / "answers.json"), model=str(brought / "decoder"))
    data = rows.load(settings)
    encoded = encoding.encode(data, settings)
    for row, kept in zip(data.train, encoded.train):
        labelled = [i for i in kept["labels"] if i != -100]
        assert encoded.processor.decode(labelled[:-1]) == row.target
        assert labelled[-1] == encoded.processor.eos_token_id
    seen, trained = next(iter(encoded.calibration(2))), encoded.train[:2]
    for row, labels, ids in zip(trained, seen["labels"], seen["input_ids"]):  # the prompt's loss counts there too
        assert -100 in row["labels"]
        assert labels[: len(row["labels"])].tolist() == row["input_ids"]
        assert ids[: len(row["labels"])].tolist() == row["input_ids"]
    short = encoding.encode(data, Settings(**{**vars(settings), "max_length": 8}))
    assert all(len(row["input_ids"]) <= 8 for row in short.train)
    assert [row["labels"][-2:] for row in short.train] == [row["labels"][-2:] for row in encoded.train]


@pytest.fixture(scope="module")
def undisturbed(brought, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "small"
    assert fit(brought, output) == 0
    return output


@pytest.mark.parametrize("where", ["fit_head", "calibrate", "save_cores"])
def test_an_interruption_anywhere_is_gone_on_from_by_the_same_command(
    where, brought, undisturbed, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "small"
    with monkeypatch.context() as patch:
        patch.setattr(fitting, where, _raise)
        assert fit(brought, output) == 130
    said = capsys.readouterr().err
    assert "the same command goes on" in said
    assert f"--output {output}" in said
    assert fit(brought, output) == 0
    same(output, undisturbed)


def _raise(*args, **options):
    raise KeyboardInterrupt


KILLED = """
import os, signal, sys
from jactus.app import training
from jactus.app.main import main

def on_step_end(self, args, state, control, **more):
    before(self, args, state, control, **more)
    control.should_save = True
    if state.global_step == 9:
        os.kill(os.getpid(), int(sys.argv[1]))

before, training.Keeper.on_step_end = training.Keeper.on_step_end, on_step_end
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_training_goes_on_after_a_signal_to_the_same_bits(by, brought, undisturbed, tmp_path):
    output = tmp_path / "small"
    words = ["fit", brought / "reviews.csv", "--model", brought / "encoder", "--output", output, "--epochs", 2]
    words = [str(word) for word in (*words, "--batch-size", 8)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(int(by)), *words], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == (130 if by == signal.SIGINT else -by), done.stderr
    begun = training.checkpoint(output / ".work" / "train" / "trainer")
    assert begun is not None
    assert begun.name == ("checkpoint-10" if by == signal.SIGINT else "checkpoint-8")
    if by == signal.SIGINT:
        assert "the same command goes on" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "jactus", *words], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"training goes on from step {begun.name[11:]}" in done.stderr
    same(output, undisturbed)


@pytest.fixture(scope="module")
def kept(brought, tmp_path_factory):
    output = tmp_path_factory.mktemp("kept") / "small"
    assert fit(brought, output, "--keep-work") == 0
    return output


CHANGES = [  # in an order in which nothing else changes but what is named
    ((), set(), ""),
    (("--learning-rate", "0.002"), {"train"}, "learning_rate was null, is 0.002"),
    (("--learning-rate", "0.002", "--budget", "0.9"), {"compress", "train"}, "method.budget.fraction was 0.8, is 0.9"),
    (
        ("--learning-rate", "0.002", "--budget", "0.9", "--calibration-rows", "30"),
        {"head", "calibrate", "plan", "compress", "train"},
        "calibration_rows was 54, is 30",
    ),
]


def test_a_changed_setting_does_again_what_depends_on_it_and_says_so(brought, kept, capsys):
    for options, again, said in CHANGES:
        files = {f: f.stat().st_mtime_ns for f in (kept / ".work").glob("*/done.json")}
        assert fit(brought, kept, "--keep-work", *options) == 0
        changed = {f.parent.name for f in files if f.stat().st_mtime_ns != files[f]}
        assert changed == again
        err = capsys.readouterr().err
        assert said in err
        assert all((f"{stage}: done again" in err) == (stage in again) for stage in ("head", "plan", "train"))
    fresh = kept.parent / "fresh"
    assert fit(brought, fresh, *CHANGES[-1][0]) == 0
    same(kept, fresh)


def test_a_dry_run_says_what_it_takes_and_writes_nothing(brought, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(str(p) for p in brought.rglob("*"))
    assert fit(brought, "small", "--dry-run", "--json") == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert (found["steps of training"], found["rows to train"]) == (14, 54)
    assert fit(brought, "small", "--dry-run") == 0
    assert "classification" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert sorted(str(p) for p in brought.rglob("*")) == before


def test_a_verb_goes_as_far_as_its_name_says_and_fit_goes_on(brought, undisturbed, tmp_path, capsys):
    output = tmp_path / "small"
    words = (
        brought / "reviews.csv",
        "--model",
        brought / "encoder",
        "--output",
        output,
        "--epochs",
        2,
        "--batch-size",
        8,
    )
    stages = ["head", "calibrate", "plan", "compress", "train"]
    for verb in stages[1:]:
        assert made.run(verb, *words, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert Path(told["files"]).is_dir()
        done = {f.parent.name for f in (output / ".work").glob("*/done.json")}
        assert done == set(stages[: stages.index(verb) + 1])
        if verb == "plan":
            assert {each["budget"] for each in told["sweep"]} == {0.7, 0.8, 0.9, 1.0}  # others have no rank to give
    model = AutoModelForSequenceClassification.from_pretrained(output / "compressed")
    assert jactus.learning_rate(model) == told.get("learning_rate", jactus.learning_rate(model))
    assert made.run("fold", output / "trained", tmp_path / "folded") == 0
    AutoTokenizer.from_pretrained(tmp_path / "folded")
    assert made.run("fit", *words) == 0
    assert (tmp_path / "folded" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    same(output, undisturbed)


def test_what_would_overwrite_or_cannot_be_is_refused_in_one_line(brought, undisturbed, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    cases = [
        ((tmp_path / "mine",), "holds thesis.tex; choose another --output"),
        ((undisturbed,), "holds a finished run"),
        ((tmp_path / "mine" / "thesis.tex",), "is a file"),
        ((tmp_path / "new", "--budget", "1.5"), "Budget.fraction = 1.5 is not allowed"),
        ((tmp_path / "new", "--label", "what"), "there is no column 'what'"),
        ((tmp_path / "new", "--model", tmp_path / "none"), "has no tokenizer"),
        ((tmp_path / "new", "--config", "none"), "neither a file nor a recipe; there are classify, images"),
        ((tmp_path / "new", "--task", "images"), "needs a folder of images"),
    ]
    for words, said in cases:
        assert fit(brought, *words) == 1
        out, err = capsys.readouterr()
        last = err.strip().splitlines()[-1]
        assert last.startswith("jactus: ")
        assert said in last
        assert out == ""
        assert "Traceback" not in err
    assert not (tmp_path / "new").exists()
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["thesis.tex"]


def test_wrong_usage_ends_with_2(brought, tmp_path, capsys):
    for words in ((), ("fitt",), ("fit", "--budgets", "1"), ("fit", "a.csv"), ("fit", "a.csv", "--budget", "much")):
        assert made.run(*words) == 2
        out, err = capsys.readouterr()
        assert err.startswith("jactus: ")
        assert len(err.strip().splitlines()) == 1
        assert out == ""


def test_recipes_are_listed_and_copied_and_all_can_be_read(tmp_path, monkeypatch, capsys):
    from jactus.app.settings import settings

    monkeypatch.chdir(tmp_path)
    assert made.run("recipe", "ls") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"classify", "images", "language", "paper-vit", "paper-llama"} <= set(names)
    for name in names:
        assert made.run("recipe", "cp", name) == 0
        assert settings({}, f"{name}.yaml") == settings({}, name)
    assert made.run("recipe", "cp", names[0]) == 1
    assert "exists" in capsys.readouterr().err


def test_report_makes_the_page_of_a_record_again(undisturbed, tmp_path):
    assert made.run("report", undisturbed, "--output", tmp_path / "page.html") == 0
    assert (tmp_path / "page.html").read_bytes() == (undisturbed / "report.html").read_bytes()
    assert made.run("report", tmp_path) == 1
    assert FILE in {p.name for p in undisturbed.iterdir()}

"""Data is read as it is written, every bad row is refused by its number, and no row is lost."""

import json
import sys
from dataclasses import replace

import pandas
import pytest

from jactus import JactusError
from jactus.app import rows, tables
from jactus.app.settings import Settings, settings
from tests import app_made as made


def load(path, **options):
    return rows.load(Settings(data=str(path), **options))


def texts(part):
    return sorted((row.inputs, row.target) for row in part)


TABLE = {"text": ["NA", "null", "a, b", "ü\nx", "5", " y "] * 4, "label": ["none", "1.5x"] * 12}


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows_as_they_are_written(kind, tmp_path):
    file, frame = tmp_path / f"rows.{kind}", pandas.DataFrame(TABLE)
    if kind in ("csv", "tsv"):
        frame.to_csv(file, index=False, sep="," if kind == "csv" else "\t")
    elif kind == "parquet":
        frame.to_parquet(file)
    else:
        frame.to_json(file, orient="records", lines=kind == "jsonl")
    assert tables.from_file(file) == TABLE
    data = load(file)
    assert texts(data.train + data.validation) == sorted(zip([(t,) for t in TABLE["text"]], TABLE["label"]))


def test_plain_text_is_parted_by_blank_lines_or_by_lines_and_it_is_said(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\nthree\n", encoding="utf-8")
    columns, _, how = tables.read(str(file))
    assert columns == {"text": ["one", "two", "three"]}
    assert "a line" in how
    file.write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    columns, _, how = tables.read(str(file))
    assert columns == {"text": ["one\ntwo", "three"]}
    assert "blank lines" in how


@pytest.mark.parametrize(
    "cells, said",
    [
        ([("a b", "x"), ("", "y")], "row 2 has no text under 'text'"),
        ([("a b", "x"), ("   ", "y"), (" ", "x")], r"row 2 has no text under 'text' \(and so have 3\)"),
        ([("a b", "x"), ("c d", "y"), ("e", None)], "row 3 has no label under 'label'"),
        ([("a b", "x"), ("c d", "y"), (5, "y")], "row 3 has no text"),
        ([("a b", "x"), ("c d", ["y"])], "row 2 has a list under 'label'"),
        ([("a b", "x"), ("c d", "y"), ("e f", "y")], "one row of the label 'x' \\(row 1\\)"),
        ([("a b", "x"), ("c d", "x")], "every row has the label 'x'"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(cells, said, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"text": text, "label": label} for text, label in cells]), encoding="utf-8")
    with pytest.raises(JactusError, match=said):
        load(file)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.csv", "text,label\na b,1,2\nc d,1\n", "as many cells"),
        ("a.csv", "text,label\na b,1\nc d,1,3\n", "line 3"),
        ("a.csv", "", "not a table"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2, is not JSON"),
        ("a.json", '{"text": "a"}', "holds a dict"),
        ("a.json", "[1]", "row 1 is a int"),
        ("a.parquet", "text", "not a Parquet file"),
        ("a.xlsx", "text", "ends in .xlsx; what can be read ends in .csv"),
    ],
)
def test_a_bad_file_is_refused_by_name(name, content, said, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(JactusError, match=said):
        load(tmp_path / name)


def test_what_is_not_utf8_or_not_there_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\nb\xfc,1\n".encode("latin-1"))
    with pytest.raises(JactusError, match="not text in UTF-8"):
        load(tmp_path / "a.csv")
    with pytest.raises(JactusError, match="there is no file"):
        load(tmp_path / "b.csv")


def test_a_missing_library_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(JactusError, match=r"needs pandas, .* pip install \"jactus-kernels\[fit\]\""):
        load(made.reviews(tmp_path / "a.csv"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(JactusError, match="pip install datasets"):
        load("some/where")


@pytest.mark.parametrize("part", ["0.1", "0.25", "0.9"])
def test_a_split_takes_the_same_part_of_each_class_and_loses_nothing(part, tmp_path):
    file = tmp_path / "rows.json"
    kept = [{"text": f"text {i}", "label": "rare" if i < 10 else "often"} for i in range(110)]
    file.write_text(json.dumps(kept), encoding="utf-8")
    data = load(file, validation=part)
    held = [row.target for row in data.validation]
    assert held.count("rare") == max(1, round(10 * float(part)))
    assert held.count("often") == round(100 * float(part))
    assert sorted(row.number for row in data.train + data.validation) == list(range(1, 111))
    again, other = load(file, validation=part), load(file, validation=part, seed=1)
    assert (again.train, again.digest) == (data.train, data.digest)
    assert other.train != data.train
    assert other.digest != data.digest


def test_classes_are_in_order_and_numbers_are_one_class_however_written(tmp_path):
    file = tmp_path / "rows.json"
    labels = [10, "2", 2.0, "10", True, True, "b", "b"]
    file.write_text(json.dumps([{"text": f"t {i}", "label": x} for i, x in enumerate(labels)]), encoding="utf-8")
    assert load(file).classes == ["2", "10", "True", "b"]


def test_validation_rows_of_a_file_are_checked_against_the_training_rows(tmp_path):
    train = made.reviews(tmp_path / "train.csv")
    held = tmp_path / "held.csv"
    held.write_text("text,label\na film,good\nthe plot,odd\n", encoding="utf-8")
    with pytest.raises(JactusError, match=r"validation row 2 has the label 'odd'.*bad, good"):
        load(train, validation=str(held))
    held.write_text("body,label\na film,good\n", encoding="utf-8")
    with pytest.raises(JactusError, match="no column 'text'; its columns are body, label"):
        load(train, validation=str(held))
    made.reviews(held, rows=6, seed=5)
    data = load(train, validation=str(held))
    assert (len(data.train), len(data.validation)) == (60, 6)


def test_folders_of_images_with_and_without_a_test_split(tmp_path):
    whole = load(made.pictures(tmp_path / "pictures"))
    assert (whole.found.task, whole.classes) == ("images", ["dark", "light"])
    assert len(whole.train) + len(whole.validation) == 32
    for name in ("train", "test"):
        made.pictures(tmp_path / "apart" / name, rows=4)
    apart = load(tmp_path / "apart")
    assert (len(apart.train), len(apart.validation)) == (8, 8)
    (tmp_path / "apart" / "train" / "dark" / "00.png").write_bytes(b"no image")
    with pytest.raises(JactusError, match=r"dark.00\.png is not an image"):
        load(tmp_path / "apart")
    (tmp_path / "empty").mkdir()
    with pytest.raises(JactusError, match="holds no image"):
        load(tmp_path / "empty")


def test_the_digest_is_of_what_is_in_the_rows(tmp_path):
    one = load(made.reviews(tmp_path / "a.csv"))
    assert load(made.reviews(tmp_path / "b.csv")).digest == one.digest
    text = (tmp_path / "b.csv").read_text(encoding="utf-8")
    (tmp_path / "b.csv").write_text(text.replace("film", "movie", 1), encoding="utf-8")
    assert load(tmp_path / "b.csv").digest != one.digest


def test_options_go_before_a_recipe_and_a_recipe_before_defaults(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("budget: 0.5\nlearning-rate: 1e-3\nmemory_limit: 30e9\nrank_multiple: 8\ntext: words\n")
    got = settings({"epochs": 7.0, "budget": None, "seed": 3}, str(file))
    assert (got.budget, got.learning_rate, got.epochs, got.seed) == (0.5, 1e-3, 7.0, 3)
    assert (got.memory_limit, got.text, got.config().allocation.rank_multiple) == (30e9, ["words"], 8)
    assert settings({"budget": 0.6}, str(file)).budget == 0.6
    assert replace(got, method={}).config().allocation.rank_multiple == 16


@pytest.mark.parametrize(
    "written, said",
    [
        ("epoch: 3\n", "has an option 'epoch', which there is not; is it 'epochs'"),
        ("[1, 2]\n", "lines of `option: value`"),
        ("a: b: c\n", "is not YAML"),
        ("epochs: many\n", "epochs is 'many'; it is a number"),
        ("epochs: 0\n", "--epochs is 0"),
        ("batch_size: 0\n", "--batch-size is 0"),
        ("budget: 2\n", "Budget.fraction = 2"),
        ("task: regression\n", "--task is 'regression'; it is one of classification"),
        ("dtype: int8\n", "--dtype is 'int8'"),
    ],
)
def test_a_recipe_that_says_what_cannot_be_is_refused(written, said, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(written)
    with pytest.raises(JactusError, match=said):
        settings({}, str(file))

"""A data set by its name, read by the real `datasets`; what a hub would send lies in a folder, since none is reached from tests."""

import datasets
import pytest

from jactus import JactusError
from jactus.app import rows, tables
from jactus.app.record import Run
from jactus.app.settings import Settings
from tests import app_made as made

NAMES = ["awful", "fine"]


def kept(count, **more):
    """Rows as a data set of texts has them: a class as a number, its name in the features."""
    good = [i % 2 for i in range(count)]
    table = {"text": [f"{'good' if g else 'bad'} film {i}" for i, g in enumerate(good)], "label": good, **more}
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)}
    return datasets.Dataset.from_dict(table, features=datasets.Features(features))


@pytest.fixture
def named(tmp_path, monkeypatch):
    """`make(**splits)`: from then on the name owner/films is a folder of Parquet files, one a split."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    load = datasets.load_dataset

    def make(**splits):
        for split, data in splits.items():
            data.to_parquet(tmp_path / "hub" / f"{split}.parquet")
        here = {"owner/films": str(tmp_path / "hub")}
        monkeypatch.setattr(datasets, "load_dataset", lambda name: load(here[name]))
        return "owner/films"

    return make


def test_a_data_set_by_name_has_its_rows_its_splits_and_the_names_of_its_classes(named):
    data = rows.load(Settings(data=named(train=kept(12), validation=kept(4), test=kept(6))))
    assert data.how == "data set owner/films"
    assert data.found.task == "classification"
    assert data.classes == NAMES
    assert (len(data.train), len(data.validation)) == (12, 4)
    assert {(row.inputs, row.target) for row in data.validation} == {
        ((f"{'good' if i % 2 else 'bad'} film {i}",), NAMES[i % 2]) for i in range(4)
    }


def test_a_data_set_of_one_split_is_split_here(named):
    data = rows.load(Settings(data=named(train=kept(20))))
    assert (len(data.train), len(data.validation)) == (18, 2)


def test_a_row_without_its_class_is_refused_by_its_number(named):
    with pytest.raises(JactusError, match=r"row 3 has no label under 'label'"):
        rows.load(Settings(data=named(train=kept(4, label=[0, 1, -1, 0]))))


def test_a_data_set_without_training_rows_or_that_is_not_there_is_refused(named, monkeypatch):
    name = named(test=kept(4))
    with pytest.raises(JactusError, match="has the splits test; one called train is needed"):
        tables.read(name)
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(JactusError, match="owner/none is neither a file or folder nor a data set that is found"):
        tables.read("owner/none")


def test_fit_goes_from_a_name_to_a_model(named, tmp_path):
    name = named(train=kept(24), validation=kept(8))
    made.encoder(tmp_path / "encoder")
    words = ("fit", name, "--model", tmp_path / "encoder", "--output", tmp_path / "small", "--epochs", 1)
    assert made.run(*words) == 0
    assert Run.load(tmp_path / "small").data["read as"] == "data set owner/films"

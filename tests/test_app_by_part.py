"""`jactus fit` under a memory limit: calibrated and planned part by part, to the model of no limit, from any interruption on."""

import pytest

from jactus.app import fitting
from jactus.app.record import Run
from jactus.calibration.snapshots import Snapshots
from jactus.planning.shelf import Shelf
from tests import app_made as made
from tests.app_made import fit, same, words

LIMIT = ("--memory-limit", "30e3")


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    here = tmp_path_factory.mktemp("brought")
    made.encoder(here / "encoder")
    made.reviews(here / "reviews.csv")
    return here


@pytest.fixture(scope="module")
def undisturbed(brought, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "small"
    assert fit(brought, output) == 0
    return output


def interrupted(*args, **options):
    raise KeyboardInterrupt


def stopping(kept):
    """`Shelf.put` that is interrupted at the fourth layer; what it has put before is in `kept`."""
    put = Shelf.put

    def stopped(self, layer):
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(layer.name)
        put(self, layer)

    return stopped


def test_under_a_memory_limit_layers_are_summed_and_planned_part_by_part_to_the_same_model(
    brought, undisturbed, tmp_path, monkeypatch, capsys
):
    output, put, kept = tmp_path / "small", Shelf.put, []
    monkeypatch.setattr(fitting, "calibrate", lambda *args, **options: pytest.fail("all sums were made at once"))
    with monkeypatch.context() as patch:
        patch.setattr(Shelf, "put", stopping(kept))
        assert fit(brought, output, *LIMIT) == 130
    assert not (output / ".work" / "calibrate").exists()
    monkeypatch.setattr(Shelf, "put", lambda self, layer: (kept.append(layer.name), put(self, layer)))
    assert fit(brought, output, *LIMIT, "--keep-work") == 0
    assert len(kept) == len(set(kept)) == len(Run.load(output).layers), "what was planned was not planned again"
    assert {p.name for p in (output / ".work" / "plan").iterdir() if p.suffix != ".json"} == {
        "plan.safetensors",
        "said.txt",
    }
    assert not list((output / ".work").glob("factors*"))
    record = Run.load(output)
    assert [stage.name for stage in record.stages] == ["head", "plan", "compress", "train", "fold"]
    assert set(record.checks) >= set(Run.load(undisturbed).checks[:-2]), "and what some parts alone were told"
    same(output, undisturbed)


def test_a_limit_that_is_given_later_is_kept(brought, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "small"
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "calibrate", interrupted)
        assert fit(brought, output) == 130
    monkeypatch.setattr(fitting, "calibrate", lambda *args, **options: pytest.fail("all sums were made at once"))
    assert fit(brought, output, *LIMIT) == 0
    same(output, undisturbed)


def test_another_allocation_goes_on_from_what_is_planned_and_other_spectra_do_not(
    brought, tmp_path, monkeypatch, capsys
):
    output, recipe, kept = tmp_path / "small", tmp_path / "recipe.yaml", []
    monkeypatch.setattr(Shelf, "put", stopping(kept))
    assert fit(brought, output, *LIMIT) == 130
    kept.append("more")
    recipe.write_text("uniform_part: 0.9\ncore_width: 2.0\n")
    assert fit(brought, output, *LIMIT, "--config", recipe) == 0
    assert len(kept) == 1 + len(Run.load(output).layers)
    assert "done again" not in capsys.readouterr().err
    others = tmp_path / "others"
    assert made.run("plan", *words(brought, others), *LIMIT) == 0
    recipe.write_text("rank_multiple: 8\n")
    capsys.readouterr()
    assert made.run("plan", *words(brought, others), *LIMIT, "--config", recipe) == 0
    assert "plan: done again, since method.rank_multiple was 16, is 8" in capsys.readouterr().err


def test_a_kill_after_the_plan_is_whole_loses_nothing(brought, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "small"
    with monkeypatch.context() as patch:
        patch.setattr(Snapshots, "clear", lambda self: self.path.exists() and interrupted())
        assert fit(brought, output, *LIMIT) == 130
    kept = output / ".work" / "plan"
    assert (kept / "snapshot.safetensors.planned").is_dir()
    monkeypatch.setattr(fitting, "planned_by_part", lambda *args: pytest.fail("it was planned again"))
    assert fit(brought, output, *LIMIT, "--keep-work") == 0
    assert {p.name for p in kept.iterdir()} == {"of.json", "said.txt", "done.json", "spent.json", "plan.safetensors"}
    assert set(Run.load(output).checks) >= set(Run.load(undisturbed).checks[:-2])
    same(output, undisturbed)


def test_a_plan_from_sums_that_are_gone_knows_what_they_found(brought, undisturbed, tmp_path):
    output = tmp_path / "small"
    given = words(brought, output)
    assert made.run("calibrate", *given, *LIMIT) == 0
    assert made.run("plan", *given, *LIMIT) == 0
    left = output / ".work" / "factors"
    left.mkdir()
    (left / "of a run that was killed").write_text("")
    assert made.run("calibrate", *given) == 0  # of all, in one pass
    assert fit(brought, output, *LIMIT, "--keep-work") == 0
    assert not left.exists()
    assert set(Run.load(output).checks) >= set(Run.load(undisturbed).checks[:-2])
    same(output, undisturbed)


def test_sums_that_were_asked_for_under_a_memory_limit_are_planned_from(brought, undisturbed, tmp_path):
    output = tmp_path / "small"
    assert made.run("calibrate", *words(brought, output), *LIMIT) == 0
    assert (output / ".work" / "calibrate" / "statistics.safetensors").exists()
    assert fit(brought, output, *LIMIT) == 0
    assert "calibrate" in [stage.name for stage in Run.load(output).stages]
    same(output, undisturbed)

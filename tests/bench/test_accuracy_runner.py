"""The runner: rows survive, learning rates are chosen on validation rows, nothing is measured twice."""

import dataclasses

import pytest
import torch
from transformers import BertConfig

import jactus
from bench import rows as files
from bench.accuracy import cell, figures, matrix, methods, tasks
from bench.accuracy.choice import Entry, chosen_rate, wanted
from bench.accuracy.store import Cell, Row
from bench.models import MeanPooledClassifier
from bench.training import Encoded
from jactus import JactusConfig, JactusError

GRID = (1e-3, 2e-3, 4e-3)


def row(method="lora", seed=0, lr=1e-3, value=0.5, validation=0.5, phase="trained", task="sarcasm", budget=1.0, **more):
    sizes = {"trainable": 10, "stored": 30, "folded": 20, "optimizer_bytes": 80}
    return Row(
        task, method, budget, seed, phase, "accuracy", value, validation, **sizes, versions="v", lr=lr, loss=0.1, **more
    )


def chosen_by(e: Entry) -> list[Row]:
    """The rows that an entry waits for: the grid of the method that it takes its rate from, the lowest being the best."""
    first = e.like or e
    return [
        row(first.method, 0, lr, 0.0, 0.9 - k, task=first.task, budget=first.budget) for k, lr in enumerate(first.grid)
    ]


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [row(peak_bytes=3, train_seconds=1.5), row(phase="untrained", lr=None), row(seed=1, value=0.123456)]
    file = tmp_path / "results" / "a.csv"
    for r in rows:
        files.keep(file, [r])
    assert files.read(Row, file) == rows
    assert files.read(Row, tmp_path / "none.csv") == []


def test_a_row_measured_again_takes_the_place_of_the_older_one(tmp_path):
    file = tmp_path / "a.csv"
    rows = [row(lr=1e-3 / 3), row(seed=1), row(phase="untrained", lr=None)]
    files.keep(file, rows)
    before = file.read_text().splitlines()
    files.keep(file, [row(value=0.7, lr=1e-3 / 3), row(seed=2)])  # six digits of the rate were written
    after = file.read_text().splitlines()
    assert after[1] != before[1]
    assert after[2:4] == before[2:4]
    assert [(r.seed, r.value) for r in files.read(Row, file)] == [(0, 0.7), (1, 0.5), (0, 0.5), (2, 0.5)]
    again = file.read_text()
    files.keep(file, files.read(Row, file)[:1])
    assert file.read_text() == again


def test_a_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("task,method\nx,y\n")
    with pytest.raises(JactusError, match="another version"):
        files.read(Row, tmp_path / "a.csv")


def test_the_rate_best_on_validation_rows_goes_on_to_the_other_seeds():
    e = Entry("sarcasm", "lora", 1.0, GRID, (0, 1, 2))
    assert [c.lr for c in wanted([e], [])] == list(GRID)
    rows = [row(lr=lr, value=0.9, validation=0.6) for lr in (1e-3, 4e-3)]
    assert wanted([e], rows) == [Cell("sarcasm", "lora", 1.0, 0, 2e-3)]
    rows.append(row(lr=2e-3, value=0.1, validation=0.7))  # worse on the test rows, which must not count
    assert wanted([e], rows) == [Cell("sarcasm", "lora", 1.0, seed, 2e-3) for seed in (1, 2)]
    rows += [row(seed=seed, lr=2e-3) for seed in (1, 2)]
    assert wanted([e], rows) == []


@pytest.mark.parametrize("best, beyond", [(0, 0.5e-3), (-1, 8e-3)])
def test_a_grid_whose_end_is_the_best_is_widened_there_before_other_seeds_run(best, beyond):
    e = Entry("sarcasm", "lora", 1.0, GRID, (0, 1))
    rows = [row(lr=lr, validation=0.7 if lr == GRID[best] else 0.6) for lr in GRID]
    assert wanted([e], rows) == [Cell("sarcasm", "lora", 1.0, 0, beyond)]
    worse = [*rows, row(lr=beyond, validation=0.65)]
    assert wanted([e], worse) == [Cell("sarcasm", "lora", 1.0, 1, GRID[best])]
    better = [*rows, row(lr=beyond, validation=0.75)]
    assert wanted([e], better) == [Cell("sarcasm", "lora", 1.0, 0, beyond * beyond / GRID[best])]


def test_of_equal_rates_the_grids_lowest_is_chosen_in_whatever_order_they_were_measured():
    e = Entry("sarcasm", "lora", 1.0, GRID, (0, 1))
    rows = [row(lr=lr, validation=0.7 if lr < 4e-3 else 0.6) for lr in (2e-3, 0.5e-3, 4e-3, 1e-3)]
    assert chosen_rate(e, rows) == chosen_rate(e, rows[::-1]) == 1e-3


def test_a_variation_runs_at_the_rate_chosen_for_what_it_varies_and_waits_for_it():
    base = Entry("sarcasm", "lora", 1.0, GRID, (0, 1))
    varied = matrix.varied(base, method="lora+embeddings")
    rows = [row(lr=lr, validation=0.7 if lr == 2e-3 else 0.6) for lr in GRID]
    assert wanted([varied], rows[:2]) == []
    first = Cell("sarcasm", "lora+embeddings", 1.0, 0, 2e-3)
    assert wanted([varied], rows) == [first]
    rows.append(row("lora+embeddings", lr=2e-3))
    assert wanted([varied], rows) == [dataclasses.replace(first, seed=1)]


def test_parts_of_a_taken_rate_are_all_tried_and_the_best_of_them_counts():
    base = Entry("wikipedia", "lora", 1.0, GRID, (0,))
    longer = dataclasses.replace(matrix.varied(base, task="wikipedia-long"), parts=(0.5, 1.0))
    rows = [row(task="wikipedia", lr=lr, validation=30.0 if lr == 2e-3 else 40.0) for lr in GRID]
    assert wanted([longer], rows[:2]) == []
    assert chosen_rate(longer, rows) is None
    assert [c.lr for c in wanted([longer], rows)] == [1e-3, 2e-3]
    rows.append(row(task="wikipedia-long", lr=2e-3, validation=25.0))
    assert chosen_rate(longer, rows) == 2e-3
    assert [c.lr for c in wanted([longer], rows)] == [1e-3]
    rows.append(row(task="wikipedia-long", lr=1e-3, validation=24.0))
    assert chosen_rate(longer, rows) == 1e-3
    assert wanted([longer], rows) == []


def test_a_lower_perplexity_is_the_better_one():
    e = Entry("wikipedia", "lora", 1.0, GRID)
    rows = [row(task="wikipedia", lr=lr, validation=v) for lr, v in zip(GRID, (30.0, 40.0, 50.0))]
    assert chosen_rate(e, rows) == 1e-3


def test_a_run_that_diverged_is_never_the_best():
    e = Entry("wikipedia", "lora", 1.0, GRID)
    rows = [row(task="wikipedia", lr=lr, validation=v) for lr, v in zip(GRID, (30.0, 1.0, 40.0))]
    rows[1] = dataclasses.replace(rows[1], loss=None)
    assert chosen_rate(e, rows) == 1e-3


def test_every_entry_of_the_matrix_is_a_method_that_exists_and_no_grid_is_larger():
    for stage in matrix.STAGES.values():
        for e in stage():
            known = e.method.removesuffix(methods.EMBEDDINGS)
            assert methods.variant(known) or known in methods.METHODS
            assert e.task in tasks.TASKS
            assert 0 < e.budget <= 1
            while e.like:
                e = e.like
            assert len(e.grid) == 3
    names = [(e.task, e.method, e.budget) for e in matrix.comparison()]
    of_questions = {"rslora", "hira"}  # what one would try on language
    assert {(t, m) for t, m, _ in names} >= {(t, m) for t in tasks.TEXT for m in set(methods.METHODS) - of_questions}
    assert {e.method for e in matrix.asked()} >= of_questions


def test_settings_are_read_from_the_name():
    chosen = methods.variant("jactus[union=weight+covariance,union_share=0.1,accounting=folded,calibration=64]")
    assert chosen.config == JactusConfig().replace(accounting="folded", union=("weight", "covariance"), union_share=0.1)
    assert chosen.calibration == 64
    assert methods.variant("jactus").config == JactusConfig(), "a budget is of what is deployed"
    assert methods.variant("lora") is None
    with pytest.raises(JactusError, match="'unifrom'"):
        methods.variant("jactus[cores=unifrom]")
    for unknown in ("colour=red", "leave_dense=True", "full_rank=True"):
        with pytest.raises(JactusError, match="no field"):
            methods.variant(f"jactus[{unknown}]")


def test_the_table_shows_mean_spread_and_paired_difference():
    rows = []
    for task in tasks.TEXT:
        for method, lift, budget in (("lora", 0.0, 1.0), ("jactus", 0.02, 0.8)):
            rows += (waited := chosen_by(matrix.entry(task, method, budget)))
            for seed, value in enumerate((0.80, 0.82, 0.87)):
                rows.append(row(method, seed, waited[0].lr, value + lift, 0.9, task=task, budget=budget))
    text = figures.tables(rows)
    assert "83.00 ± 3.61" in text  # LoRA
    assert "85.00 ± 3.61" in text
    assert "+2.00 ± 0.00" in text


def test_leads_are_over_whole_models_and_over_pipelines_of_the_same_budget():
    scores = {("lora", 1.0): 0.8, ("jactus", 0.8): 0.82, ("jactus", 0.35): 0.79, ("svd+lora", 0.35): 0.75}
    before, after = [], []
    for (method, budget), value in scores.items():
        for task in tasks.TEXT:
            before += (waited := chosen_by(matrix.entry(task, method, budget)))
            after.append(row(method, 0, waited[0].lr, value, 0.9, task=task, budget=budget))
    rows = [*before, *after]
    lines = figures.tables(rows).split("### Points that JACTUS is ahead")[1].splitlines()[2:6]
    header, _, *leads = ([part.strip() for part in line.split("|")[1:-1]] for line in lines)
    assert header == ["", "jactus", "lora", "svd+lora"]
    assert leads == [["jactus 80%", "–", "+2.00", "–"], ["jactus 35%", "–", "-1.00", "+4.00"]]
    of_others = figures.tables([r for r in rows if r.method != "jactus"])
    assert "### Accuracy after training" in of_others
    assert "### Points that JACTUS is ahead" not in of_others


def test_a_partly_measured_table_says_over_how_many_tasks_a_lead_is():
    scores = {
        "lora": (0.7, tasks.PICTURES[:3]),
        "jactus": (0.73, tasks.PICTURES[:2]),
        "full": (0.8, ("cifar10", "mnist")),
    }
    before, after = [], []
    for e in matrix.pictures():
        value, known = scores.get(e.method, (0, ()))
        if e.task in known and (e.method, e.budget) != ("jactus", 0.5):
            before += (waited := chosen_by(e))
            after.append(row(e.method, 0, waited[0].lr, value, 0.9, task=e.task, budget=e.budget))
    rows = [*before, *after]
    text = figures.tables(rows).split("### Accuracy after training, %: DINOv2-small")[1]
    lines = {cells[1].strip(): cells for x in text.splitlines() if len(cells := x.split("|")) > 9}
    assert "+3.00 (2 of 6)" in lines["jactus 80%"][9]
    assert lines["jactus 80%"][8].strip() == "–"  # no mean of all six
    assert "+10.00 (1 of 6)" in lines["full"][9]  # LoRA has no mnist yet
    assert "ahead, DINOv2-small" not in text


def test_pictures_take_the_rate_of_the_first_set():
    found = {(e.task, e.method, e.budget): e for e in matrix.pictures()}
    assert found["textures", "lora", 1.0].like.task == "cifar10"
    assert found["fashion-mnist", "jactus", 0.5].like == found["cifar10", "jactus", 0.8]
    assert [e.method for e in matrix.pictures()][:4] == ["jactus", "lora"] * 2


def test_ablations_without_a_chosen_rate_yet_are_a_table_all_the_same():
    changes = ("", "[metric=input]")
    begun = [row(f"jactus{c}", lr=None, phase="untrained", task="newsgroups", budget=0.35) for c in changes]
    text = figures.tables(begun)
    assert "One setting changed at a time, 35%" in text


def test_the_plot_is_written(tmp_path):
    rows = [row("lora", 0, lr, task="movies") for lr in methods.rates("lora")]
    figures.plot(rows, tmp_path / "p" / "plot.png")
    assert (tmp_path / "p" / "plot.png").stat().st_size > 1000


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A task whose label is whether more than half of the words are above the middle of the vocabulary."""
    monkeypatch.setenv("JACTUS_CACHE", str(tmp_path))
    monkeypatch.setattr(tasks, "HEAD_L2", 1e-4)  # so few rows and epochs start better from a closer fit

    def load():
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=2,
        )
        ids = torch.randint(1, 32, (320, 7))
        data = Encoded(ids.tolist(), ((ids > 16).sum(1) > 3).long().tolist(), 0)
        return tasks.Case(MeanPooledClassifier(config).eval(), data[:192], data[192:256], data[256:])

    monkeypatch.setitem(
        tasks.TASKS, "tiny", tasks.Task("tiny", "accuracy", load, epochs=6, batch_size=16, calibration=64)
    )


@pytest.mark.parametrize("method, rate", [("jactus[rank_multiple=4]", 2e-3), ("lora", 5e-3), ("svd-llm+lora", 5e-3)])
def test_a_cell_gives_a_row_before_and_after_training(tiny, method, rate):
    compressed = method != "lora"
    rows = cell.measure(Cell("tiny", method, 0.7, 3, rate), torch.get_num_threads(), None, untrained=compressed)
    assert [r.phase for r in rows] == ["untrained", "trained"][not compressed :]
    assert rows[-1].value > 0.8  # a guess is right half the time
    assert rows[-1].loss < 0.5
    assert rows[-1].folded < rows[-1].stored
    assert 0 < rows[-1].trainable < rows[-1].stored
    assert (rows[-1].seed, rows[-1].lr, rows[-1].budget) == (3, rate, 0.7)


@pytest.mark.parametrize("method", ["jactus[rank_multiple=4]", "lora"])
def test_embeddings_train_beside_at_a_tenth_of_the_rate(tiny, method, monkeypatch):
    seen = []
    adamw = torch.optim.AdamW

    def noted(groups, **how):
        seen.append([(group["lr"], sum(p.numel() for p in group["params"])) for group in groups])
        return adamw(groups, **how)

    monkeypatch.setattr(torch.optim, "AdamW", noted)
    rows = [cell.measure(Cell("tiny", m, 0.7, 0, 5e-3), 1, None, False)[-1] for m in (method, f"{method}+embeddings")]
    assert rows[1].trainable - rows[0].trainable == 32 * 32
    assert (rows[1].stored, rows[1].folded) == (rows[0].stored, rows[0].folded)
    assert rows[1].value > 0.8
    alone = (5e-3, rows[0].trainable)
    assert seen == [[alone], [alone, (pytest.approx(5e-4), 32 * 32)]]


def test_a_cell_is_the_same_twice(tiny):
    wanted = Cell("tiny", "jactus[rank_multiple=4]", 0.7, 0, 5e-3)
    first, second = (cell.measure(wanted, torch.get_num_threads(), None, untrained=True) for _ in range(2))
    drop = {"train_seconds": None, "peak_bytes": None}
    assert [dataclasses.replace(r, **drop) for r in first] == [dataclasses.replace(r, **drop) for r in second]


def test_a_run_that_diverges_is_a_row_without_a_loss(tiny):
    rows = cell.measure(Cell("tiny", "full", 1.0, 0, 1e30), torch.get_num_threads(), None, untrained=False)
    assert rows[-1].loss is None


def test_cores_can_be_made_as_many_as_uniform_ranks_have(tiny):
    task = tasks.TASKS["tiny"]
    case = task.load()
    statistics = tasks.calibrated(task, case, 64, 0, "fitted", None)
    config = JactusConfig().replace(rank_multiple=1, budget=0.6)
    plan = jactus.plan(case.model, statistics, config, progress=False)
    wanted = plan.with_config(allocation="uniform").core_parameters
    found = methods.with_as_many_cores(plan, wanted)
    assert found.core_parameters <= wanted < plan.at(found.config.budget.fraction + 0.05).core_parameters
    assert found.config.allocation.method == "global"

"""The cost benchmarks on a tiny decoder: counts are exact, wrong results get no time, rows come back as written."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import jactus
from bench import rows as files
from bench.cost import (
    calibration,
    checks,
    figures,
    flops,
    growth,
    inference,
    layers,
    planning,
    race,
    steps,
    store,
    subjects,
)
from bench.cost import files as disk
from bench.cost.__main__ import main, parts, run
from jactus.planning.latency import Times
from jactus_kernels import JactusError

WIDE, INNER, WORDS = 128, 192, 512
AT = store.Setting("llama-7b", threads=1, rows=2, length=6)


def tiny(name="llama-7b"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDE,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The decoder for every subject, and no more rounds than a spread needs."""
    monkeypatch.setattr(subjects, "dense", tiny)
    subjects.planned.cache_clear()
    subjects._compressed.cache_clear()
    for module in (steps, inference, layers, calibration, planning, growth, disk):
        monkeypatch.setattr(module, "race", lambda contenders, **_: race.race(contenders, rounds=(2, 2)))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    subjects.planned.cache_clear()
    subjects._compressed.cache_clear()


LINEAR = 4 * WIDE * WIDE + 3 * WIDE * INNER


def test_counted_work_is_exact_for_every_kind_of_layer():
    tokens, head = 2 * 6, WIDE * WORDS
    batch = subjects.batch("llama-7b", 2, 6)
    assert flops.forward(tiny(), subjects.unlabelled(batch)) == tokens * (LINEAR + head)
    assert flops.training(subjects.ready("llama-7b", "full"), batch) == tokens * 3 * (LINEAR + head)
    adapters = 16 * (4 * 2 * WIDE + 3 * (WIDE + INNER))
    first = 3 * WIDE * (WIDE + 16)  # gradients of the inputs of q, k, v and their adapters: nothing before them trains
    lora = tokens * (2 * (LINEAR + head) + 3 * adapters - first)
    assert flops.training(subjects.ready("llama-7b", "lora"), batch) == lora
    small = subjects.ready("llama-7b", "jactus", 0.5)
    layers = [m for m in small.modules() if isinstance(m, jactus.CoreLinear)]
    deployed = sum(m.rank * (m.in_features + m.out_features - m.rank) for m in layers)
    square = sum(m.rank**2 for m in layers)
    assert len(layers) == 7
    assert all(tokens < m.rank for m in layers)  # so T multiplies the tokens on both sides, forward and backward
    assert flops.forward(small, batch) == tokens * (deployed + 2 * square + head)
    first = sum(m.rank * (WIDE + m.rank) for m in layers[:3])
    assert flops.training(small, batch) == tokens * (2 * deployed + 5 * square + 2 * head - first)
    many = subjects.batch("llama-7b", 40, 6)
    made = sum(2 * m.rank**3 for m in layers)  # T C Tᵀ, once a call and once for its gradient, whatever the tokens
    first = sum(m.rank * WIDE for m in layers[:3])
    assert flops.forward(small, many) == 20 * tokens * (deployed + head) + made
    assert flops.training(small, many) == 20 * tokens * (2 * deployed + square + 2 * head - first) + 2 * made
    assert flops.forward(subjects.folded(small), batch) == tokens * (deployed + head)


def test_a_race_runs_every_contender_each_round_and_rotates():
    order = []
    times = race.race({name: (lambda name=name: order.append(name)) for name in "abc"}, rounds=(3, 3), warmup=0)
    assert "".join(order) == "abcbcacab"
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_paired_by_round():
    """A machine that slows down by ten in the third round moves no ratio."""
    assert race.ratio([1, 1, 10, 1], [2, 2, 20, 2]) == race.Ratio(0.5, 0.0)
    assert race.ratio([3.0], [2.0]) == race.Ratio(1.5, 0.0)
    found = race.ratio([1, 2, 3, 4, 5], [1, 1, 1, 1, 1])
    assert (found.median, found.spread) == (3, 1)


def test_a_wrong_layer_gets_no_time():
    model = subjects.ready("llama-7b", "jactus", 0.5)
    assert checks.layers(model, "float32") < 1e-5
    assert 1e-5 < checks.layers(model, "bfloat16") < 3e-2
    forward = jactus.CoreLinear.forward
    jactus.CoreLinear.forward = lambda self, x: 1.01 * forward(self, x)
    try:
        with pytest.raises(JactusError, match="its time is not reported"):
            checks.layers(model, "float32")
    finally:
        jactus.CoreLinear.forward = forward
    with pytest.raises(JactusError, match="not reported"):
        checks.same_logits(tiny(), model, subjects.unlabelled(subjects.batch("llama-7b", 2, 6)))


def test_bfloat16_is_held_to_the_float32_model():
    batch = subjects.unlabelled(subjects.batch("llama-7b", 2, 6))
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        assert 1e-4 < checks.rounded_logits(model, model, batch) < 3e-2
        other = tiny()
        other.lm_head.weight.data *= 1.1
        with pytest.raises(JactusError, match="in bfloat16"):
            checks.rounded_logits(model, other, batch)


def test_steps_prefill_and_decode_give_a_row_for_each_budget_and_peer():
    rows = list(steps.training((AT,)))
    assert [(r.budget, r.against) for r in rows] == [(b, p) for b in (0.8, 0.5) for p in ("lora", "full", "dora")]
    assert all(r.ratio > 0 and r.error < 1e-4 for r in rows)
    assert [r.floor is None for r in rows] == [False, False, True] * 2
    for found in (list(inference.prefill((AT,))), list(inference.decode((AT,)))):
        assert [(r.budget, r.against) for r in found] == [(0.8, "dense"), (0.5, "dense")]
        assert all(r.floor < 1 for r in found)


def test_decoding_under_a_budget_of_time_takes_ranks_from_times_of_the_dtype_that_runs(monkeypatch):
    def invented(targets, config):
        assert {t.weight.dtype for t in targets.values()} == {torch.bfloat16}
        return {n: Times(t.m * t.n, (0, 999), (0.0, 999.0 * (t.m + t.n))) for n, t in targets.items()}

    monkeypatch.setattr(subjects, "measured", invented)
    plan = subjects.timed("llama-7b", "bfloat16", "cpu")
    assert 0.3 < plan.at(0.5).predicted_time <= 0.5
    rows = list(inference.decode_timed((dataclasses.replace(AT, dtype="bfloat16"),)))
    assert [(r.budget, r.against) for r in rows] == [(0.9, "dense"), (0.8, "dense")]
    assert rows[1].floor < rows[0].floor < 1
    assert all(r.ratio > 0 and 1e-4 < r.error < 3e-2 for r in rows)


def test_bytes_by_category_are_those_of_the_parameters_that_train():
    found = steps.measure_memory(AT, "jactus", 0.5)
    model = subjects.ready("llama-7b", "jactus", 0.5)
    cores = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (found.gradients, found.optimizer) == (4 * cores, 8 * cores)
    assert found.weights == 4 * sum(p.numel() for p in model.parameters())
    assert found.activations > 0
    full = steps.measure_memory(AT, "full", 1.0)
    assert full.gradients == full.weights > found.weights


def test_calibration_is_checked_against_the_usual_way_and_counted_by_shape():
    rows = list(calibration.calibration((AT,)))
    assert [(r.measure, r.against) for r in rows] == [
        (f"calibration, {what}", against) for what in ("covariances", "with gradient") for against in ("bare", "usual")
    ]
    statistics = jactus.calibrate(tiny(), [subjects.batch("llama-7b", 2, 6)], calibration.COVARIANCES, progress=False)
    # q, k and v share one input, gate and up another
    inputs = (3 * WIDE**2 + INNER**2) / 2
    outputs = (5 * WIDE**2 + 2 * INNER**2) / 2
    work = calibration.counted(tiny(), statistics)
    assert work["covariances"] == 2 * LINEAR + inputs + outputs
    assert work["with gradient"] - work["covariances"] == LINEAR
    assert work["usual covariances"] == 2 * LINEAR + 11 * WIDE**2 + 3 * INNER**2


def test_planning_is_checked_against_the_full_svd():
    model = tiny()
    statistics = jactus.calibrate(model, [subjects.batch("llama-7b", 8, 64)], calibration.WITH_GRADIENT, progress=False)
    rows = list(planning._planning(AT, model, statistics, 2))
    assert [r.measure for r in rows] == ["planning, input metric", "planning, fisher and union"]
    assert rows[0].error < 1e-9
    assert rows[1].error is None


def test_a_layer_of_each_shape_stands_for_a_7b_block():
    rows = list(planning.planning_7b())
    assert [r.model for r in rows] == ["llama-7b"] * 2
    assert rows[0].error < 1e-9


def test_models_and_plans_come_back_from_the_disk_before_they_are_timed(tmp_path):
    model = subjects.ready("llama-7b", "jactus", 0.8)
    rows = [*disk._model_files(AT, model, tmp_path), *disk._plan_files(AT, subjects.planned("llama-7b"), tmp_path)]
    ways = [("save", "safetensors"), ("save", "safetensors and fsync"), ("load", "safetensors")]
    expected = [(f"{way} {what}", against) for what in ("model", "plan") for way, against in ways]
    assert [(r.measure, r.against) for r in rows] == expected


def test_growth_fits_the_exponent_of_what_grows(monkeypatch):
    # sizes 1, 2, 4 take 1, 4, 16
    monkeypatch.setattr(growth, "race", lambda made, **_: {size: [float(size) ** 2] for size in made})
    row = growth._fitted("anything", "n", (1, 2, 4), lambda n: lambda: None, 2.0)
    assert row.exponent == pytest.approx(2.0)
    assert (row.sizes, row.relative) == ("1 2 4", "1 4 16")


def rows_of_every_kind():
    found = race.Ratio(0.7, 0.01)
    compared = [
        store.compared("training step", AT, budget, "lora", found, 0.8, 1e-7, "torch 2") for budget in (0.8, 0.5)
    ]
    memory = store.Memory("minilm", "float32", 2, 6, "lora", 1.0, 10**6, 2, 3, 4, None, "cpu", "torch 2")
    grown = store.Growth("planning", "n", "1 2", "1 8", 3.0, 3.0, "cpu", "torch 2")
    return compared, [memory], [grown]


def test_the_tables_name_floor_target_and_miss():
    text = figures.tables(*rows_of_every_kind())
    first, second = (line for line in text.splitlines() if "llama-7b" in line)
    assert "0.70 ± 0.01" in first
    assert "≤ 0.95 met" in first
    assert "≤ 0.60 missed" in second
    assert "0.87" in first.split("|")[9]  # 0.7 / 0.8
    assert "| minilm" in text
    assert "3.00" in text


def test_a_part_measured_again_replaces_its_rows_and_no_others(monkeypatch, tmp_path):
    old, _, _ = rows_of_every_kind()
    again = dataclasses.replace(old[0], ratio=0.6, error=None)
    other = store.compared("prefill", AT, 0.8, "dense", race.Ratio(0.9, 0.0), 0.7, 1e-7, "torch 2")
    on_gpu = store.Row(**{**vars(old[0]), "device": "cuda"})
    another = store.Row(**{**vars(old[0]), "model": "vit-b"})
    files.keep(tmp_path / "cost.csv", [*old, other, on_gpu, another])
    monkeypatch.setattr("bench.cost.__main__.parts", lambda device, models, dtypes: {"training": lambda: [again]})
    run("training", tmp_path, "cpu")
    assert files.read(store.Row, tmp_path / "cost.csv") == [again, old[1], other, on_gpu, another]


def test_a_part_that_is_cut_short_keeps_the_rows_it_had(monkeypatch, tmp_path):
    old, _, _ = rows_of_every_kind()

    def cut():
        yield old[0]
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.cost.__main__.parts", lambda device, models, dtypes: {"training": cut})
    with pytest.raises(KeyboardInterrupt):
        run("training", tmp_path, "cpu")
    assert files.read(store.Row, tmp_path / "cost.csv") == old[:1]


def test_table_and_plot_run_nothing(monkeypatch, tmp_path, capsys):
    for found in rows_of_every_kind():
        files.keep(tmp_path / found[0].FILE, found)
    picture = tmp_path / "p" / "cost.png"
    for do in ("table", "plot"):
        monkeypatch.setattr("sys.argv", ["cost", do, "--results", str(tmp_path), "--out", str(picture)])
        main()
    assert "Training step" in capsys.readouterr().out
    assert picture.stat().st_size > 1000


def test_on_a_gpu_only_what_has_a_device_is_measured():
    assert set(parts("cuda")) < set(parts())
    measured = parts("cuda", ("vit-b",))["training"]
    assert {(s.model, s.device) for s in measured.args[0]} == {("vit-b", "cuda")}
    assert {s.dtype for s in parts("cpu", ("vit-b",), ("float32",))["training"].args[0]} == {"float32"}


def test_a_deployed_layer_is_raced_against_its_pair_and_dense(monkeypatch):
    monkeypatch.setattr(layers, "SHAPES", ((96, 128), (128, 96)))
    rows = list(layers.layers())
    places = {(r.measure, r.model, r.dtype, r.budget, r.against) for r in rows}
    assert len(places) == len(rows) == 2 * 2 * 2 * 3
    assert all(r.floor <= 0.8 for r in rows if r.against == "dense")
    assert all(r.error < (1e-5 if r.dtype == "float32" else 6e-2) for r in rows)

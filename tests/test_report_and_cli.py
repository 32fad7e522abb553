"""What a person sees: tables, pictures, the command line, and the one-line API."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import jactus
from jactus.app.main import main
from jactus.report import places
from tests.models import BERT, FAMILIES, LLAMA, SMALL


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = BERT.model()
    statistics = jactus.calibrate(model, BERT.batches(), SMALL, progress=False)
    plan = jactus.plan(model, statistics, SMALL.replace(budget=0.6), progress=False)
    plan.save(folder / "plan.safetensors")
    jactus.save_pretrained(jactus.compress(model, plan), folder / "model")
    return folder, plan, model


def test_the_table_names_every_layer_and_the_totals(made):
    _, plan, _ = made
    text = str(plan)
    assert all(name in text for name in plan.layers)
    assert f"{plan.stored_parameters:,}" in text
    assert f"{plan.folded_parameters:,}" in text


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_pictures_of_every_family(family, tmp_path):
    model = family.model()
    plan = jactus.plan(model, jactus.calibrate(model, family.batches(), SMALL, progress=False), SMALL, progress=False)
    for draw in (jactus.rank_map, jactus.spectra):
        draw(plan.at(0.6), tmp_path / "picture.png")
        data = (tmp_path / "picture.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5000
    assert len(set(places(plan.layers).values())) == len(plan.layers), (
        "no two layers may fall on one square of the rank map"
    )


def test_inspect_a_plan_and_a_checkpoint(made, capsys):
    folder, plan, model = made
    assert main(["inspect", str(folder / "plan.safetensors"), "--budget", "0.4"]) == 0
    assert capsys.readouterr().out.strip() == str(plan.at(0.4))
    assert main(["inspect", str(folder / "model")]) == 0
    assert f"{jactus.size(model).stored:,} parameters stored" in capsys.readouterr().out


def test_fold_and_merge_give_checkpoints_of_the_same_function(made, tmp_path, capsys):
    folder, _, model = made
    batch = BERT.batch()
    for command in ("fold", "merge"):
        assert main([command, str(folder / "model"), str(tmp_path / command)]) == 0
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / command)
        assert torch.allclose(loaded(**batch).logits, model(**batch).logits, atol=1e-5)
    assert "parameters" in capsys.readouterr().out


def test_errors_are_one_line_on_stderr(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "not a checkpoint folder" in captured.err
    assert "Traceback" not in captured.err


def test_adapt_is_calibrate_plan_compress():
    batches = LLAMA.batches()
    one = jactus.adapt(LLAMA.model(), batches, 0.7, SMALL, progress=False)
    model = LLAMA.model()
    plan = jactus.plan(model, jactus.calibrate(model, batches, SMALL, progress=False), SMALL, progress=False)
    other = jactus.compress(model, plan.at(0.7))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_adapt_can_fit_the_head_first():
    batches = BERT.batches()
    model = BERT.model()
    before = sum(model(**b).loss.item() for b in batches)
    jactus.adapt(model, batches, 1.0, SMALL, fit_head=True, progress=False)
    assert sum(model(**b).loss.item() for b in batches) < before
    with pytest.raises(jactus.JactusError, match="iterator"):
        jactus.adapt(BERT.model(), iter(batches), fit_head=True, progress=False)


def test_a_fitted_head_is_the_minimum_of_the_penalised_mean_loss():
    model, batches = BERT.model(), BERT.batches(8)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("classifier")}
    jactus.fit_head(model, batches, l2=1e-2, progress=False)
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in frozen.items())
    terms = sum(len(b["labels"]) for b in batches)
    loss = sum(model(**b).loss * len(b["labels"]) for b in batches) / terms
    loss = loss + 1e-2 * model.classifier.weight.square().sum()
    gradients = torch.autograd.grad(loss, list(model.classifier.parameters()))
    assert all(float(g.abs().max()) < 1e-4 for g in gradients)
    with pytest.raises(jactus.JactusError, match="no task head"):
        jactus.fit_head(LLAMA.model(), LLAMA.batches(), progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_in_half_precision_is_fitted_in_float32_and_kept_in_its_dtype(dtype):
    model, batches = BERT.model(dtype=dtype), BERT.batches(8)
    exact = jactus.fit_head(BERT.model(), batches, progress=False)
    assert jactus.fit_head(model, batches, progress=False) == pytest.approx(exact, rel=0.02)
    assert model.classifier.weight.dtype == dtype
    assert torch.isfinite(model(**batches[0]).logits).all()


def test_a_head_is_fitted_under_autocast_as_well():
    """Autocast keeps the head's cast until its block ends, and so would not see a step of the solver."""
    model, batches = BERT.model(), BERT.batches(8)
    exact = jactus.fit_head(BERT.model(), batches, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = jactus.fit_head(model, batches, progress=False)
    assert found == pytest.approx(exact, rel=0.02)  # as in bfloat16


def test_a_failing_fit_leaves_the_head_as_it_was():
    model, batches = BERT.model(), BERT.batches(4)
    before = model.classifier.weight.detach().clone()
    calls = []

    def loss(model, batch):
        calls.append(1)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        terms = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        return terms * (float("nan") if len(calls) > 10 else 1.0)

    with pytest.raises(jactus.JactusError, match="nan"):
        jactus.fit_head(model, batches, loss=loss, progress=False)
    assert torch.equal(model.classifier.weight, before)


def test_importing_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import jactus, jactus_kernels; print(jactus.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == jactus.__version__

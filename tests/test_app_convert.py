"""`jactus export`, `estimate` and `cores`: what the Python functions give, from the shell."""

import json

import pytest
import torch
from transformers import BertConfig

import jactus
from jactus.app import pace
from jactus.app.estimate import estimate
from jactus.app.main import main
from jactus.model.lowrank import core_layers
from tests.models import BERT, EVERY, compressed


@pytest.fixture
def checkpoint(tmp_path):
    """A trained checkpoint with a file of a tokenizer beside it."""
    jactus.save_pretrained(compressed(BERT, EVERY), tmp_path / "trained")
    (tmp_path / "trained" / "tokenizer.json").write_text("{}")
    return tmp_path / "trained"


def test_export_writes_a_graph_and_takes_the_tokenizer_along(checkpoint, tmp_path, capsys):
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--to", "torch.export"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "model.pt2")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    batch = {name: t for name, t in BERT.batch().items() if name != "labels"}
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])  # as a tokenizer gives them
    model = type(compressed(BERT, EVERY)).from_pretrained(checkpoint).eval()
    found = torch.export.load(tmp_path / "out" / "model.pt2").module()(**batch)["logits"]
    torch.testing.assert_close(found, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_a_form_that_is_not_known_is_an_error_of_one_line(checkpoint, tmp_path, capsys):
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--to", "gguf"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("jactus: ")
    assert "'onnx'" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_task_is_taken_from_one_checkpoint_and_put_into_another(checkpoint, tmp_path, capsys):
    other = compressed(BERT, EVERY)
    with torch.no_grad():
        for layer in core_layers(other).values():
            layer.core.mul_(1.5)
    jactus.save_pretrained(other, tmp_path / "second")
    assert main(["cores", "take", str(tmp_path / "second"), str(tmp_path / "second.safetensors")]) == 0
    assert main(["cores", "put", str(checkpoint), str(tmp_path / "second.safetensors"), str(tmp_path / "put")]) == 0
    batch = BERT.batch()
    assert torch.equal(type(other).from_pretrained(tmp_path / "put").eval()(**batch).logits, other(**batch).logits)
    assert (tmp_path / "put" / "tokenizer.json").exists()
    assert main(["fold", str(checkpoint), str(tmp_path / "folded")]) == 0
    capsys.readouterr()
    assert main(["cores", "take", str(tmp_path / "folded"), str(tmp_path / "none.safetensors")]) == 1
    assert "three-factor" in capsys.readouterr().err


def test_time_goes_by_the_products_of_all_passes_and_the_cubes_of_sides(tmp_path):
    config = BertConfig(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=16,
        architectures=["BertModel"],
    )
    config.save_pretrained(tmp_path)
    plain = jactus.JactusConfig(exclude_modules="pooler.*|.*intermediate.*|.*attention.output.*")
    once = estimate(tmp_path, plain, tokens=1000)
    assert [(k.count, k.m, k.n) for k in once.kinds] == [(1, 1024, 1024)] * 3 + [(1, 1024, 2048)]
    found = pace.seconds(once, pace.Pace(once.flops, 2.0, "here"))
    assert found["calibrate"] == pytest.approx(1.0)
    assert found["plan"] == pytest.approx(2 * 3 + 2 * (2048 + 5 * 1024) / (6 * 1024))
    more = estimate(tmp_path, plain, tokens=1000, memory_limit=once.sums // 2)
    assert more.passes > 1
    extra = pace.seconds(more, pace.Pace(1.0, 2.0, "here"))["calibrate"] - more.flops
    assert extra == pytest.approx((more.passes - 1) * 2 * 1000 * 5 * 1024**2)


def test_estimate_reads_a_config_alone(tmp_path, capsys):
    BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        architectures=["BertForSequenceClassification"],
    ).save_pretrained(tmp_path)  # fmt: skip
    assert main(["estimate", str(tmp_path), "--budget", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    right = estimate(tmp_path, jactus.JactusConfig(budget=0.5))
    assert (found["sums"], found["deployed"], found["budget"]) == (right.sums, right.deployed, 0.5)
    assert main(["estimate", str(tmp_path), "--memory-limit", "2e5", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)
    assert parts["passes"] == estimate(tmp_path, memory_limit=200_000).passes > 1
    assert main(["estimate", str(tmp_path), "--memory-limit", "2e5", "--time", "--json"]) == 0
    slow = json.loads(capsys.readouterr().out)
    assert slow["seconds"].keys() == {"calibrate", "plan"}
    assert all(taken > 0 for taken in slow["seconds"].values())
    assert slow["sums"] == parts["sums"]
    assert main(["estimate", str(tmp_path / "config.json"), "--time"]) == 0
    assert "on this machine (CPU" in capsys.readouterr().out
    assert main(["estimate", str(tmp_path / "config.json")]) == 0
    assert "BertForSequenceClassification" in capsys.readouterr().out
    assert main(["estimate", str(tmp_path / "nowhere")]) == 1

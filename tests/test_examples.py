"""The example scripts run as they stand, on a tiny model and data in the format they document."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, PreTrainedTokenizerFast

import jactus

EXAMPLES = Path(__file__).parents[1] / "examples"


def tiny_encoder(path):
    """An encoder with its tokenizer: the head is fresh, as for a user."""
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "a", "very"]
    base = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    config = BertConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
    BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture
def tiny(tmp_path):
    tiny_encoder(tmp_path / "model")
    rows = [
        {"text": f"a {'very ' * (i % 3)}{w} film", "label": w == "good"} for i in range(12) for w in ("good", "bad")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({**r, "label": int(r["label"])}) for r in rows))
    return tmp_path


def trains_and_folds(tiny, command):
    """The command, of this Python, leaves a trained model in `out` and the folded one, of the size that the trained one says."""
    done = subprocess.run(
        [sys.executable, *map(str, command), "--budget", "0.9", "--epochs", "1"],
        capture_output=True,
        text=True,
        cwd=tiny,
    )
    assert done.returncode == 0, done.stderr
    trained = AutoModelForSequenceClassification.from_pretrained(tiny / "out/trained")
    folded = AutoModelForSequenceClassification.from_pretrained(tiny / "out/folded")
    assert jactus.size(trained).folded == jactus.size(folded).stored


def test_trainer_example(tiny):
    command = [
        EXAMPLES / "trainer.py",
        "--model",
        tiny / "model",
        "--data",
        tiny / "rows.jsonl",
        "--output",
        tiny / "out",
    ]
    trains_and_folds(tiny, command)


@pytest.mark.slow
def test_several_processes_example(tiny):
    """Under torchrun, of two processes with rows of their own."""
    script = [EXAMPLES / "several_processes.py", "--model", tiny / "model", "--data", tiny / "rows.jsonl"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    trains_and_folds(tiny, [*launch, *script, "--output", "out"])

"""llama.cpp's converter takes the dense form. It brings its own copy of gguf, hence a folder of its own, `converter`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import jactus

FOLDER = Path(__file__).parents[1] / "converter"
SCRIPT = FOLDER / "convert_hf_to_gguf.py"


@pytest.mark.skipif(
    not SCRIPT.exists(), reason="convert-hf-to-gguf is not installed in ./converter (docs/how-to/export.md)"
)
def test_what_llama_cpps_converter_writes_computes_the_same(tmp_path):
    sys.path.append(str(FOLDER))
    try:
        sentencepiece = pytest.importorskip("sentencepiece")
    finally:
        sys.path.remove(str(FOLDER))
    dense = tmp_path / "dense"
    dense.mkdir()
    (tmp_path / "text").write_text("\n".join(f"the cat {i} sat on a mat and left it {i * 7}" for i in range(500)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(dense / "tokenizer"), vocab_size=80, minloglevel=2,
        pad_id=3, hard_vocab_limit=False, character_coverage=1.0,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=80, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(4, 80, (8, 16))
    jactus.adapt(model, [{"input_ids": ids, "labels": ids}], 0.7, progress=False)
    jactus.export_model(model, dense, "dense")
    done = subprocess.run(
        [sys.executable, SCRIPT, dense, "--outtype", "f32", "--outfile", tmp_path / "model.gguf"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(FOLDER)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-4)

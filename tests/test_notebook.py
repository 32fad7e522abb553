"""The notebook runs from its first cell to its last, on a tiny model in the place of MiniLM, and is kept without outputs."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

NOTEBOOK = Path(__file__).parents[1] / "examples" / "method.ipynb"
WORDS = ["good", "bad", "film", "plot", "the", "a", "very", "not", "long", "loud"]


@pytest.fixture
def tiny(tmp_path):
    """A model's folder and a file of reviews, as many as the real splits take."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "model")
    config = BertConfig(
        vocab_size=16, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=192
    )
    BertModel(config).save_pretrained(tmp_path / "model")
    lines = []
    for i in range(10_600):
        words = " ".join(WORDS[int(digit)] for digit in str(i))  # no two alike
        lines.append(f"{i}\t{1 if '0' in str(i) else -1}\t{words}\n")
    (tmp_path / "reviews.txt").write_text("".join(lines))
    return tmp_path


class Here(KernelManager):
    """A kernel of this very Python, whichever others are registered."""

    @property
    def kernel_spec(self):
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python"
        )


def printed(folder, timeout):
    """What the notebook prints, run in a folder of its own, since it writes a picture and a model."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=timeout, resources=where, kernel_manager_class=Here).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert (folder / "small-model/model.safetensors").exists()
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]))


def test_it_runs(tiny, here, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_MODEL", str(tiny / "model"))
    monkeypatch.setenv("NOTEBOOK_REVIEWS", str(tiny / "reviews.txt"))
    monkeypatch.setenv("NOTEBOOK_ROWS", "96")
    said = printed(tiny, 120)
    assert "logits differ by" in said
    assert said.count("predicted") >= 10


@pytest.mark.slow
def test_it_says_of_minilm_what_its_text_says(here, tmp_path):
    """Five minutes: smaller, and better than the head alone."""
    said = printed(tmp_path, 900)
    before, after = map(float, re.findall(r"accuracy ([\d.]+)% before, ([\d.]+)% after", said)[0])
    assert 70 < before < after
    assert int(re.findall(r"parameters became [\d,]+ \((\d+)%\)", said)[0]) < 90


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 8
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)

"""Used by others' code after a reload: generate, pipeline, sentence-transformers."""

import pytest
import torch
from transformers import BertModel, pipeline

import jactus
from jactus.model.lowrank import compressed_layers
from tests.models import BERT, EVERY, LLAMA, compressed
from tests.test_examples import tiny_encoder


@pytest.fixture
def folded_llama(tmp_path):
    model = jactus.fold(compressed(LLAMA, EVERY))
    jactus.save_pretrained(model, tmp_path)
    return model, LLAMA.auto.from_pretrained(tmp_path)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}, {"do_sample": True}], ids=str)
def test_generate_of_a_reloaded_folded_model(folded_llama, how):
    model, again = folded_llama
    ids = LLAMA.batch(rows=2, length=5)["input_ids"][:1]
    made = []
    for m in (model, again):
        torch.manual_seed(0)
        made.append(m.generate(ids, max_new_tokens=6, min_new_tokens=6, **{"do_sample": False, **how}))
    assert torch.equal(*made)
    assert made[0].shape == (1, 11)
    if not how:  # with a cache as without
        assert torch.equal(
            made[0], again.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False)
        )


def energy(model, batch):
    """A loss that everything in an encoder has a part in."""
    outputs = model(**batch)
    return outputs.last_hidden_state.square().sum() + outputs.pooler_output.square().sum(), 1


@pytest.fixture
def encoder(tmp_path):
    """A folded encoder with its tokenizer, as a folder; and the batch by which it was compressed."""
    tiny_encoder(tmp_path / "dense")
    dense = BertModel.from_pretrained(tmp_path / "dense")
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in BERT.batches(rows=16)]
    jactus.adapt(dense, batches, 0.7, EVERY, loss=energy, verify=False, progress=False)
    jactus.save_pretrained(jactus.fold(dense.eval()), tmp_path / "small")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "small")
    return tmp_path / "small", dense


def test_pipeline_of_a_reloaded_folded_model(encoder):
    folder, model = encoder
    found = pipeline("feature-extraction", model=str(folder), tokenizer=str(folder), device="cpu")
    assert compressed_layers(found.model)
    states = torch.tensor(found("a good film"))
    inputs = found.tokenizer("a good film", return_tensors="pt")
    assert torch.equal(states, model(**inputs).last_hidden_state)


def test_sentence_transformers_encodes_with_a_folded_model(encoder, tmp_path):
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    from sentence_transformers.models import Pooling, Transformer

    folder, model = encoder
    words = Transformer(str(folder))
    embedder = sentence_transformers.SentenceTransformer(modules=[words, Pooling(16 * 4, "mean")], device="cpu")
    assert compressed_layers(embedder)
    texts = ["a good film", "a very very bad film"]
    found = embedder.encode(texts, convert_to_tensor=True)
    for text, vector in zip(texts, found):
        inputs = words.tokenizer(text, return_tensors="pt")
        right = model(**inputs).last_hidden_state[0].mean(0)
        assert torch.allclose(vector, right, atol=1e-5)
    embedder.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert compressed_layers(again)
    assert torch.equal(again.encode(texts, convert_to_tensor=True), found)

"""The benchmark substrate, without a network: splits, batches, the loops, baselines."""

import json
import math

import pytest
import torch
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, MPNetConfig

from bench import baselines, data, training
from bench.models import MeanPooledClassifier, MeanPooledMPNet, masked_mean, minilm, smollm2
from jactus_kernels import JactusError


class Words:
    """A tokenizer stand-in: one token per word."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, texts, truncation=False, max_length=None, padding=False, add_special_tokens=True):
        return {"input_ids": [[2 + sum(map(ord, word)) % 60 for word in text.split()][:max_length] for text in texts]}


def tiny_classifier(num_labels=2, dropout=0.0):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=num_labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return MeanPooledClassifier(config).eval()


def tiny_decoder():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def examples(rows=97, seed=0):
    """Sequences of 1 to 12 tokens whose label is the parity of the first one."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (rows,), generator=g).tolist()
    ids = [torch.randint(1, 64, (length,), generator=g).tolist() for length in lengths]
    return training.Encoded(ids, [row[0] % 2 for row in ids], pad_id=0)


def test_splits_are_disjoint_repeatable_and_free_of_repeats():
    rows = [(f"Text  {i % 80}", i % 2) for i in range(200)] + [("text 3", 1), (" ", 0)]
    first = data.shuffled_splits(rows, (40, 20, 20), 0, "toy")
    assert [len(split) for split in first] == [40, 20, 20]
    assert len({text for split in first for text in split.texts}) == 80
    assert first == data.shuffled_splits(rows, (40, 20, 20), 0, "toy")
    assert first != data.shuffled_splits(rows, (40, 20, 20), 1, "toy")
    with pytest.raises(JactusError, match="80 different examples"):
        data.shuffled_splits(rows, (40, 20, 21), 0, "toy")


def test_loaders_read_local_files(tmp_path):
    headlines = tmp_path / "samples.jsonl"
    row = '{"input": [{"content": "is it?"}, {"content": "headline %d"}], "ideal": "%d"}'
    headlines.write_text("\n".join(row % (i, i % 3 == 0) for i in range(12_500)))
    task = data.sarcasm(headlines)
    assert (len(task.train), len(task.validation), len(task.test)) == (6000, 1500, 4500)
    assert all((int(text.split()[1]) % 3 == 0) == label for text, label in zip(task.test.texts, task.test.labels))

    films = tmp_path / "films.txt"
    films.write_text("\n".join(f"{i}\t{(i % 3) - 1}.5\tfilm\t{i}" for i in range(10_600)))
    task = data.movies(films)
    assert all((int(text.split()[1]) % 3 > 0) == label for text, label in zip(task.test.texts, task.test.labels))

    for part, start, stop in (("train", 0, 1300), ("test", 1290, 1500)):
        lines = [f"{'ab'[i % 2]}\tpost {i}" for i in range(start, stop)]
        (tmp_path / f"20newsgroups-{part}.tab").write_text(
            "\n".join(["Category\tText", "d\tstring", "class\t", *lines])
        )
    task = data.newsgroups(tmp_path)
    assert (task.labels, len(task.train), len(task.validation), len(task.test)) == (["a", "b"], 290, 1000, 210)

    (tmp_path / "text.jsonl").write_text(json.dumps({"0": "as written\n", "1": "written as"}) + "\n")
    assert data.wikipedia_lines(tmp_path / "text.jsonl") == ["as written"]


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("size", [1, 8, 97, 200])
def test_batches_hold_every_example_once_each_time(seed, size):
    encoded = examples()
    cut = training.batches(encoded, size, seed)
    assert sorted(i for chosen in cut.order for i in chosen) == list(range(97))
    for _ in range(2):
        for chosen, batch in zip(cut.order, cut):
            assert batch["attention_mask"].sum(1).tolist() == [len(encoded.rows[i]) for i in chosen]
            assert batch["labels"].tolist() == [encoded.labels[i] for i in chosen]
    assert len(cut) == len(list(cut)) == math.ceil(97 / size)
    assert cut == training.batches(encoded, size, seed)


def test_the_training_order_depends_on_the_seed():
    assert training.batches(examples(), 8, 0).order != training.batches(examples(), 8, 1).order


def test_language_model_labels_leave_padding_out():
    batch = training.Encoded([[5, 6, 7], [8]], None, pad_id=0).batch([0, 1])
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]


def test_token_blocks_cut_the_joined_text():
    blocks = training.token_blocks(Words(), ["a b c", "d e", "f g h i"], length=4)
    assert len(blocks) == 3
    assert {len(row) for row in blocks.rows} == {4}
    assert blocks.rows[0][3] == blocks.rows[1][2] == Words.eos_token_id
    with pytest.raises(JactusError, match="do not fill one block"):
        training.token_blocks(Words(), ["a b c"], length=10)


def test_encode_cuts_long_texts():
    encoded = training.encode(Words(), data.Split(["a b c d", "e"], [0, 1]), max_length=3)
    assert [len(row) for row in encoded.rows] == [3, 1]
    assert encoded.labels == [0, 1]


def test_padding_changes_no_logit():
    model, encoded = tiny_classifier(), examples()
    alone = torch.cat([model(torch.tensor([row])).logits for row in encoded.rows])
    # float32 sums over other lengths: some ε per layer
    torch.testing.assert_close(training.logits(model, encoded, 16), alone.detach(), rtol=1e-4, atol=1e-5)


def test_masked_mean_averages_the_tokens_kept():
    states = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1] * 5, [1, 0, 0, 0, 0]])
    expected = torch.stack([s[m.bool()].mean(0) for s, m in zip(states, mask)])
    torch.testing.assert_close(masked_mean(states, mask), expected)


def test_training_learns_and_repeats_itself():
    encoded, results = examples(256), []
    for _ in range(2):
        model = baselines.full_fine_tuning(tiny_classifier(dropout=0.1))
        done = training.train(model, encoded, lr=1e-2, epochs=4, batch_size=16, seed=3, progress=False)
        results.append(training.logits(model, encoded))
    assert done.steps == 64
    assert done.seconds > 0
    assert torch.equal(*results)
    assert training.accuracy(model, encoded) > 0.9 > training.accuracy(tiny_classifier(), encoded)
    assert not model.training


def test_autocast_trains_float32_parameters():
    model = baselines.full_fine_tuning(tiny_classifier())
    training.train(model, examples(64), lr=1e-2, epochs=1, autocast=torch.bfloat16, progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_training_that_cannot_work_stops_with_advice():
    model = tiny_classifier()
    with pytest.raises(JactusError, match="no parameter"):
        training.train(model.requires_grad_(False), examples(8), lr=1e-3, progress=False)
    baselines.full_fine_tuning(model).classifier.weight.data.mul_(1e38)
    with pytest.raises(JactusError, match="the gradient norm is"):
        training.train(model, examples(8), lr=1e-3, progress=False)


def test_perplexity_is_independent_of_batch_size_and_falls_with_training():
    model = tiny_decoder()
    blocks = training.token_blocks(Words(), ["the cat sat on the mat"] * 40, length=16)
    before = training.perplexity(model, blocks, batch_size=3)
    # a mean of means, each in float32: rounding only
    assert math.isclose(before, training.perplexity(model, blocks, batch_size=1), rel_tol=1e-5)
    training.train(baselines.full_fine_tuning(model), blocks, lr=1e-2, epochs=6, batch_size=4, progress=False)
    assert training.perplexity(model, blocks) < before / 4


def test_latency_is_a_time():
    assert 0 < training.latency(tiny_classifier(), examples(8).batch(range(8)), repeats=3) < 10


def test_lora_adapts_the_encoder_and_trains_the_head():
    model = tiny_classifier()
    head = model.classifier.weight.clone()
    wrapped = baselines.lora(model, rank=2)
    linears = 2 * (4 * 2 * (16 + 16) + 2 * 2 * (16 + 32))  # two layers: q, k, v, o and two of the FFN, rank 2
    assert baselines.trainable_parameters(wrapped) == linears + 16 * 2 + 2
    assert baselines.optimizer_bytes(wrapped) == 8 * baselines.trainable_parameters(wrapped)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trained)
    before = training.logits(wrapped, examples(32))
    training.train(wrapped, examples(32), lr=1e-2, epochs=1, batch_size=8, progress=False)
    assert not torch.equal(before, training.logits(wrapped, examples(32)))
    assert torch.equal(model.classifier.original_module.weight, head)
    assert not torch.equal(model.classifier.modules_to_save["default"].weight, head)


def test_lora_leaves_a_tied_output_alone():
    wrapped = baselines.lora(tiny_decoder(), rank=2)
    assert not any("lm_head" in name for name, p in wrapped.named_parameters() if p.requires_grad)


def test_models_are_saved_and_loaded_whole(tmp_path):
    model = tiny_classifier(num_labels=3)
    model.save_pretrained(tmp_path / "bert")
    loaded = MeanPooledClassifier.from_pretrained(tmp_path / "bert").eval()
    batch = examples(4).batch(range(4))
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    assert (
        model(**batch).loss.item() == torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"]).item()
    )


def test_an_mpnet_is_saved_and_loaded_whole_and_its_padding_is_not_seen(tmp_path):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = MeanPooledMPNet(MPNetConfig(vocab_size=64, max_position_embeddings=32, num_labels=3, **size)).eval()
    model.save_pretrained(tmp_path)
    loaded = MeanPooledMPNet.from_pretrained(tmp_path).eval()
    alone = torch.tensor([[5, 9, 11]])
    padded = torch.nn.functional.pad(alone, (0, 2), value=model.config.pad_token_id)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(loaded(padded, attention_mask=mask).logits, model(alone).logits, rtol=0, atol=1e-6)
    assert not torch.allclose(loaded(padded).logits, model(alone).logits, atol=1e-3)


def test_models_load_from_a_local_folder(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w1")
    for name, model in (("bert", tiny_classifier()), ("llama", tiny_decoder())):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    decoder, same = smollm2(tmp_path / "llama")
    assert same("w5")["input_ids"] == [5]
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    tiny_classifier().bert.save_pretrained(tmp_path / "bert")
    encoder, _ = minilm(5, tmp_path / "bert")
    assert encoder.classifier.weight.shape == (5, 16)
    assert not encoder.training
    assert torch.equal(
        encoder.bert.state_dict()["encoder.layer.0.output.dense.weight"],
        tiny_classifier().bert.encoder.layer[0].output.dense.weight,
    )

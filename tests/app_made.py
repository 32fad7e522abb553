"""Folders and files as a stranger would bring them: tiny models with their tokenizers, and tables that can be learned."""

import json
import random

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from jactus.app.main import main
from jactus.app.record import Run

GOOD, BAD = ("good", "lovely", "fine", "great"), ("bad", "awful", "poor", "dull")
FILLING = ("a", "the", "film", "plot", "cast", "is", "was", "very", "it", "we")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLING, "yes", "no", "?")
WIDE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
WIDE["initializer_range"] = 0.2  # so large that the words can be told apart


def tokenizer(encoder):
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "model_max_length": 64}
    if not encoder:
        return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[SEP]", **special)
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, [("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=made, cls_token="[CLS]", sep_token="[SEP]", **special)


def encoder(folder):
    """A sentence encoder: a BertModel without a head."""
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **WIDE)).save_pretrained(folder)
    tokenizer(True).save_pretrained(folder)
    return folder


def decoder(folder):
    """A language model."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, bos_token_id=2, eos_token_id=3, **WIDE)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(False).save_pretrained(folder)
    return folder


def vision(folder):
    """An image encoder."""
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=8, patch_size=4, **WIDE)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def sentence(draw, words):
    told = [draw.choice(FILLING) for _ in range(draw.randint(2, 6))]
    told.insert(draw.randrange(len(told)), draw.choice(words))
    return " ".join(told)


def reviews(file, rows=60, seed=0):
    """text,label"""
    draw = random.Random(seed)
    lines = ["text,label"]
    for i in range(rows):
        lines.append(f"{sentence(draw, GOOD if i % 2 else BAD)},{'good' if i % 2 else 'bad'}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def pairs(file, rows=48):
    """Two sentences: are they of one mind?"""
    draw = random.Random(1)
    kept = []
    for _ in range(rows):
        one, other = draw.choice((GOOD, BAD)), draw.choice((GOOD, BAD))
        kept.append({"premise": sentence(draw, one), "hypothesis": sentence(draw, other), "label": int(one is other)})
    file.write_text("\n".join(map(json.dumps, kept)), encoding="utf-8")
    return file


def documents(file, rows=48):
    """Plain text, a document a line."""
    draw = random.Random(2)
    file.write_text("\n".join(sentence(draw, GOOD) for _ in range(rows)), encoding="utf-8")
    return file


def answers(file, rows=40):
    """Questions and their answers, as a JSON list."""
    draw = random.Random(3)
    kept = [
        {"instruction": f"{sentence(draw, GOOD if i % 2 else BAD)} ?", "output": "yes" if i % 2 else "no"}
        for i in range(rows)
    ]
    file.write_text(json.dumps(kept), encoding="utf-8")
    return file


def pictures(folder, rows=16):
    """class/image: dark ones and light ones."""
    draw = np.random.default_rng(0)
    for name, least in (("dark", 0), ("light", 128)):
        (folder / name).mkdir(parents=True)
        for i in range(rows):
            pixels = draw.integers(least, least + 128, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


def run(*words):
    """The command in this process; returns its exit status."""
    return main([str(word) for word in words])


def words(brought, output):
    """What names the data, the model and the folder to write, for any verb."""
    return (brought / "reviews.csv", "--model", brought / "encoder", "--output", output)


def fit(brought, output, *more):
    return run("fit", *words(brought, output), "--epochs", 2, "--batch-size", 8, *more)


def same(one, other):
    """The same numbers in the same files, and the same scores."""
    a, b = Run.load(one), Run.load(other)
    assert a.scores == b.scores
    assert [point for point in a.training if point.metric] == [point for point in b.training if point.metric]
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()

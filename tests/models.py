"""Tiny random models of every family, with a batch each: real architectures, no downloads."""

import copy
import functools
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    ViTConfig,
)

import jactus
from jactus import JactusConfig

SMALL = JactusConfig().replace(
    rank_multiple=2,
    union=("weight", "covariance", "gradient"),
    union_share=0.25,  # the default's tenth of a tiny rank would be no direction at all
    trainable_extras=("head", "bias"),
)
EVERY = SMALL.replace(budget=0.7)  # in every family most layers have low rank, and some their full one
WIDE = EVERY.replace(core_width=1.5)
FULL = EVERY.replace(budget=0.9)  # at least half of them have their full one


@dataclass(frozen=True)
class Family:
    """How to make a model of one architecture, and a batch with ragged lengths for it."""

    name: str
    auto: type
    config: object
    labels: str  # 'class', 'causal' or 'seq2seq'

    def model(self, seed=0, dtype=torch.float32):
        torch.manual_seed(seed)
        # a model writes into its config, so each gets its own
        return self.auto.from_config(copy.deepcopy(self.config)).to(dtype).eval()

    def batch(self, rows=4, length=7, seed=0):
        g = torch.Generator().manual_seed(seed)
        classes = torch.randint(0, 3, (rows,), generator=g)
        if self.name == "vit":
            return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=g), "labels": classes}
        ids = torch.randint(3, 60, (rows, length), generator=g)
        mask = torch.ones_like(ids)
        for row in range(rows):
            mask[row, length - row % 4 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "labels": classes}
        if self.labels == "causal":
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        if self.labels == "seq2seq":
            target = torch.randint(3, 60, (rows, 5), generator=g)
            batch["labels"] = target.masked_fill(mask[:, -5:] == 0, -100)
        return batch

    def batches(self, count=3, **kwargs):
        return [self.batch(seed=s, **kwargs) for s in range(count)]


_vocab = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = [
    Family(
        "bert",
        AutoModelForSequenceClassification,
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            num_labels=3,
        ),
        "class",
    ),
    Family(
        "llama",
        AutoModelForCausalLM,
        LlamaConfig(
            **_vocab,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            tie_word_embeddings=True,
        ),
        "causal",
    ),
    Family(
        "gpt2",
        AutoModelForCausalLM,
        GPT2Config(**_vocab, n_embd=16, n_layer=2, n_head=2, n_positions=32),
        "causal",
    ),
    Family(
        "vit",
        AutoModelForImageClassification,
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_labels=3,
        ),
        "class",
    ),
    Family(
        "t5",
        AutoModelForSeq2SeqLM,
        T5Config(**_vocab, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0),
        "seq2seq",
    ),
]
BY_NAME = {family.name: family for family in FAMILIES}
BERT, LLAMA, GPT2, VIT, T5 = FAMILIES


def cast(batch, dtype):
    """The batch with its floating-point tensors in dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


@functools.cache
def planned(name, config=SMALL, dtype=torch.float32):
    """The plan of a family's model (seed 0), made once per test run."""
    family = BY_NAME[name]
    model = family.model(dtype=dtype)
    statistics = jactus.calibrate(model, [cast(b, dtype) for b in family.batches()], config, progress=False)
    return jactus.plan(model, statistics, config, progress=False)


def compressed(family, config=SMALL, dtype=torch.float32):
    """A compressed model of a family, in eval mode."""
    return jactus.compress(family.model(dtype=dtype), planned(family.name, config, dtype))

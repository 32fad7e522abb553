"""Which rows are tokens, where a mask's shape does not say so."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jactus
from jactus import JactusError

from .check import Result, configs
from .inputs import EQUAL, RAGGED, Data, ids, text
from .kinds import judged, kind, of_class, tiny
from .media import image, image_size, waves, with_loss
from .oracle import Double
from .steps import TOLERANCE


@kind(
    "llama-left-padded",
    "what padding predicts is in D = ∂L/∂W as in the model's loss; its rows are no tokens; or a refusal",
)
def left_padded() -> Result:
    model = tiny("CAUSAL_LM", "llama")
    data = text("CAUSAL_LM", model, RAGGED)
    long = max(e["input_ids"].shape[1] for e in data.alone)
    batch: dict[str, Tensor] = {}
    for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        batch[key] = torch.cat([F.pad(e[key], (long - e[key].shape[1], 0), value=fill) for e in data.alone])
    terms = int((batch["labels"][:, 1:] != -100).sum())
    try:
        with Double():
            statistics = jactus.calibrate(
                model, [batch], configs()["statistics"], statistics_dtype="float64", progress=False
            )
    except JactusError as e:
        return judged("", model, [], str(e))
    names = list(statistics.layers)
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda m, args, n=n: seen.update({n: args[0].detach().clone()})
        )
        for n in names
    ]
    model.requires_grad_(True)
    with Double():
        loss = model(**batch).loss * terms
    for handle in handles:
        handle.remove()
    wrong = [] if statistics.terms == terms else [f"{statistics.terms} terms, not {terms}"]
    real = batch["attention_mask"].bool()
    worst = [0.0, 0.0]
    for name, D in zip(names, torch.autograd.grad(loss, [model.get_submodule(n).weight for n in names])):
        layer = statistics.layers[name]
        X = seen[name][real]
        worst[0] = max(worst[0], float((layer.gradient_sum - D).norm() / D.norm()))
        worst[1] = max(worst[1], float((statistics.input_sums[layer.inputs] - X.T @ X).norm() / (X.T @ X).norm()))
        if statistics.tokens[layer.inputs] != len(X):
            wrong.append(f"{statistics.tokens[layer.inputs]} tokens in {name}, not {len(X)}")
    for error, what in zip(worst, ("gradient", "input")):
        if error > TOLERANCE:
            wrong.append(f"{what} sums are off by up to {error:.1e}")
    return judged("", model, wrong)


@kind("whisper-prompt", "prompt tokens whose labels are -100 are tokens of the decoder all the same")
def whisper_prompt() -> Any:
    model = tiny("SPEECH_SEQ_2_SEQ", "whisper")
    g = torch.Generator().manual_seed(8)
    alone, terms = [], []
    for e in waves("mel", model, EQUAL, False):
        decoder = ids(g, 8)
        labels = torch.cat([decoder[:, 1:], ids(g, 1)], 1)
        labels[:, :3] = -100
        alone.append(e | {"decoder_input_ids": decoder, "labels": labels})
        terms.append(5)
    return model, Data(alone, terms)


def preference(model: nn.Module, batch: Any) -> Tensor:
    """Bradley–Terry, a term a pair."""
    scores = [
        model(input_ids=batch[f"input_ids_{side}"], attention_mask=batch[f"attention_mask_{side}"]).logits[:, 0]
        for side in ("chosen", "rejected")
    ]
    return -F.logsigmoid(scores[0] - scores[1])


@kind("reward-pairs", "padding by attention_mask_chosen and _rejected is no token")
def reward() -> Any:
    model = tiny("SEQUENCE_CLASSIFICATION", "bert", num_labels=1)
    g = torch.Generator().manual_seed(9)
    alone = []
    for length, other in zip(RAGGED, reversed(RAGGED)):
        e = {}
        for side, size in (("chosen", length), ("rejected", other)):
            e[f"input_ids_{side}"] = ids(g, size)
            e[f"attention_mask_{side}"] = torch.ones(1, size, dtype=torch.long)
        alone.append(e)
    return model, Data(
        alone,
        [1] * 4,
        ragged=True,
        loss=preference,
        summed=lambda m, b, terms: preference(m, b).sum(),
        forward=lambda m, b: preference(m, b),
    )


@kind("clip-17", "text as long as there are patches: the text's mask is not the image's")
def clip_17() -> Any:
    model = tiny("ZERO_SHOT_IMAGE_CLASSIFICATION", "clip")
    patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2 + 1
    words = text("SEQUENCE_CLASSIFICATION", model, (patches, 9, 6, patches)).alone
    for e in words:
        e.pop("labels")
        e["input_ids"][:, -1] = 2
    return model, with_loss([a | b for a, b in zip(words, image(model, image_size(model.config)))], ragged=True)


@kind("xlnet-square", "layers see (length, batch): with as many rows as tokens the mask fits the wrong way round")
def xlnet_square() -> Any:
    model = tiny("TOKEN_CLASSIFICATION", "xlnet")
    return model, [text("TOKEN_CLASSIFICATION", model, lengths) for lengths in ((4, 3, 4, 2), (4, 4, 4, 4))]


def _deberta(**own: Any) -> Any:
    return tiny(
        "TOKEN_CLASSIFICATION",
        "deberta-v2",
        relative_attention=True,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        position_buckets=8,
        max_relative_positions=16,
        norm_rel_ebd="layer_norm",
        **own,
    )


@kind("deberta-v3", "keys are also made of a table of positions, whose rows are no tokens: exact, or refused by name")
def deberta() -> Any:
    model = _deberta()
    return model, text("TOKEN_CLASSIFICATION", model, RAGGED)


@kind("deberta-v3-unmasked", "the same without a mask, so that no shape betrays the table")
def deberta_unmasked() -> Any:
    model = _deberta()
    return model, text("TOKEN_CLASSIFICATION", model, EQUAL, mask=False)


@kind("multiple-choice", "masks are (rows, choices, length), layers see rows·choices: exact, or refused")
def multiple_choice() -> Any:
    model = tiny("MULTIPLE_CHOICE", "bert")
    return model, [text("MULTIPLE_CHOICE", model, lengths) for lengths in (RAGGED, EQUAL)]


def _classified(model: nn.Module) -> Data:
    """Texts that end in the end-of-text token, whose state an encoder–decoder's classifier takes."""
    data = text("SEQUENCE_CLASSIFICATION", model, RAGGED)
    for e in data.alone:
        e["input_ids"][:, -1] = 2
    return Data(data.alone, data.terms, ragged=True)


@kind("bart-classifier", "the decoder is given the same text: its padding is no token either; or refused")
def bart_classifier() -> Any:
    from transformers import BartForSequenceClassification

    model = of_class(BartForSequenceClassification, "bart")
    return model, _classified(model)


@kind("t5-classifier", "the decoder is given the same text: its padding is no token either; or refused")
def t5_classifier() -> Any:
    from transformers import T5ForSequenceClassification

    model = of_class(T5ForSequenceClassification, "t5")
    return model, _classified(model)


@kind("t5-ragged-both", "encoder and decoder have paddings of their own")
def t5_ragged() -> Any:
    model = tiny("SEQ_TO_SEQ_CAUSAL_LM", "t5")
    g = torch.Generator().manual_seed(10)
    alone = text("SEQ_TO_SEQ_CAUSAL_LM", model, RAGGED).alone
    terms = [3, 8, 5, 8]
    for e, length in zip(alone, terms):
        e["labels"] = ids(g, length)
    return model, Data(alone, terms, ragged=True)

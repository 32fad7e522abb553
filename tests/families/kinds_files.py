"""Heads that are fitted, and what is written to files and read again by other classes."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, BertModel, BertPreTrainedModel, T5EncoderModel

import jactus
from jactus import JactusError

from .check import Result, configs
from .inputs import CLASSES, RAGGED, Data, text
from .kinds import judged, kind, of_class, tiny
from .media import classes, image, image_size, segmentation
from .steps import TOLERANCE, brief


def _fitted(model: nn.Module, data: Data, head: str) -> Result:
    """After fit_head the model has the loss that it returned, a lower one, and nothing but its head has changed."""
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}

    def mean() -> float:
        with torch.no_grad():
            sums = [float(data.total(model, b, t)) for b, t in zip(data.alone, data.terms)]
        return sum(sums) / sum(data.terms)

    before = mean()
    try:
        said = jactus.fit_head(model, data.together, loss=data.loss, progress=False)
    except JactusError as e:
        return judged("", model, [], str(e))
    except Exception as e:
        return judged("", model, [f"raised {brief(e)}"])
    after, wrong = mean(), []
    if abs(said - after) > 1e-6 * abs(after) + 1e-9:
        wrong.append(f"fit_head says a loss of {said:.6g}, and the model's is {after:.6g} ({before:.6g} before)")
    if after >= before:
        wrong.append(f"the loss goes from {before:.6g} to {after:.6g}")
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, kept[n])]
    if any(not n.startswith(head) for n in changed) or not changed:
        wrong.append(f"changed {changed[:3]}, not {head}")
    return judged("", model, wrong)


class Siamese(BertPreTrainedModel):
    """Two texts through one base model, a classifier on both: the base is called twice a batch."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.classifier = nn.Linear(2 * config.hidden_size, CLASSES)
        self.post_init()

    def forward(self, first: Tensor, second: Tensor, labels: Tensor, **_: Any) -> dict[str, Tensor]:
        states = [self.bert(input_ids=x).pooler_output for x in (first, second)]
        logits = self.classifier(torch.cat(states, -1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@kind("siamese-fit-head", "the head is fitted to both calls of the base, or it is refused")
def siamese() -> Result:
    model = of_class(Siamese, "bert")
    g = torch.Generator().manual_seed(12)
    alone = [
        {"first": torch.randint(5, 80, (1, 7), generator=g), "second": torch.randint(5, 80, (1, 7), generator=g)}
        for _ in range(8)
    ]
    data = Data(classes(alone), [1] * 8, summed=lambda m, b, terms: m(**b)["loss"] * terms)
    return _fitted(model, data, "classifier")


@kind("clip-images-fit-head", "a model that is its own base has its head fitted, or is refused")
def clip_images() -> Result:
    model = tiny("IMAGE_CLASSIFICATION", "clip")
    return _fitted(model, Data(classes(image(model, image_size(model.config))), [1] * 4), "classifier")


@kind("bert-fit-head", "the head is fitted, and the loss is the one said")
def bert_head() -> Result:
    model = tiny("SEQUENCE_CLASSIFICATION", "bert")
    return _fitted(model, text("SEQUENCE_CLASSIFICATION", model, RAGGED), "classifier")


@torch.no_grad()
def _logits(model: nn.Module, batch: dict) -> Tensor:
    return model.eval()(**batch).logits


def _compressed(model: nn.Module, data: Data) -> nn.Module:
    chosen = configs()
    statistics = jactus.calibrate(
        model, data.together, chosen["statistics"], loss=data.loss, statistics_dtype="float64", progress=False
    )
    return jactus.compress(model, jactus.plan(model, statistics, chosen["low"], progress=False))


@kind(
    "segformer-cores",
    "cores of a task carry the running statistics of the BatchNorm in the head that trained with them",
)
def segformer_cores() -> Result:
    model = tiny("SEMANTIC_SEGMENTATION", "segformer")
    data = segmentation(model)
    model = _compressed(model, data)
    other = copy.deepcopy(model)
    batch = data.together[0]
    model.train()
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad and p.grad is not None:
                    p -= 0.1 * p.grad
        model.zero_grad()
    with tempfile.TemporaryDirectory() as directory:
        try:
            jactus.save_cores(model, Path(directory) / "cores")
            jactus.load_cores(other, Path(directory) / "cores")
        except JactusError as e:
            return judged("", model, [], str(e))
    want, got = _logits(model, batch), _logits(other, batch)
    off = float((got - want).norm() / want.norm())
    return judged("", model, [f"logits after load_cores are off by {off:.1e}"] if off > TOLERANCE else [])


def _fused(cls_name: str, model_type: str) -> Any:
    import transformers

    model = of_class(getattr(transformers, cls_name), model_type)
    return model, text("SEQUENCE_CLASSIFICATION", model, RAGGED)


@kind("nomic-bert-save", "its checkpoints fuse q, k and v: saved and reloaded all the same, or refused")
def nomic() -> Any:
    return _fused("NomicBertForSequenceClassification", "nomic_bert")


@kind("gte-save", "its checkpoints fuse q, k and v: saved and reloaded all the same, or refused")
def gte() -> Any:
    return _fused("GteForSequenceClassification", "gte")


@kind("jina-v3-save", "its checkpoints fuse q, k and v: saved and reloaded all the same, or refused")
def jina() -> Any:
    return _fused("JinaEmbeddingsV3ForSequenceClassification", "jina_embeddings_v3")


def _loaded_as(cls: Any, model: nn.Module) -> Any:
    """The model's checkpoint as another class loads it, in eval mode; or the refusal."""
    with tempfile.TemporaryDirectory() as directory:
        jactus.save_pretrained(model, directory)
        try:
            return cls.from_pretrained(directory, dtype=torch.float64).eval()
        except JactusError as e:
            return e


@kind("bert-other-task", "a sequence classifier reloads as a token classifier with a fresh head, as dense ones do")
def other_task() -> Result:
    model = tiny("SEQUENCE_CLASSIFICATION", "bert")
    data = text("SEQUENCE_CLASSIFICATION", model, RAGGED)
    model = _compressed(model, data).eval()
    batch = {k: v for k, v in data.together[0].items() if k != "labels"}
    again = _loaded_as(AutoModelForTokenClassification, model)
    if isinstance(again, JactusError):
        return judged("", model, [f"dense checkpoints load, this one: {again}"])
    with torch.no_grad():
        off = float((again.bert(**batch)[0] - model.bert(**batch)[0]).norm())
    wrong = [f"the base's states are off by {off:.1e}"] if off > TOLERANCE else []
    if not all(p.requires_grad for p in again.classifier.parameters()):
        wrong.append("the fresh head does not require gradients")
    return judged("", model, wrong)


@kind("t5-encoder-only", "T5EncoderModel loads from a T5 checkpoint, as it does from a dense one")
def encoder_only() -> Result:
    model = tiny("SEQ_TO_SEQ_CAUSAL_LM", "t5")
    data = text("SEQ_TO_SEQ_CAUSAL_LM", model, RAGGED)
    batch = {k: v for k, v in data.together[0].items() if k != "labels"}
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        T5EncoderModel.from_pretrained(directory)  # a dense one loads
    model = _compressed(model, data).eval()
    again = _loaded_as(T5EncoderModel, model)
    if isinstance(again, JactusError):
        return judged("", model, [f"dense checkpoints load, this one: {again}"])
    with torch.no_grad():
        off = float((again(**batch)[0] - model.encoder(**batch)[0]).norm())
    return judged("", model, [f"the encoder's states are off by {off:.1e}"] if off > TOLERANCE else [])

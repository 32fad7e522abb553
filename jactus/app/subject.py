"""The model of a run: loaded for its data, told apart from others, and measured."""

import copy
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from jactus_kernels import JactusError

from ..model.families import head_parameters
from ..model.targets import fingerprint
from .console import say
from .encoding import Batches
from .rows import Data
from .settings import Settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLASSES: dict[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "pairs": AutoModelForSequenceClassification,
    "images": AutoModelForImageClassification,
    "language": AutoModelForCausalLM,
    "instructions": AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Measured:
    """A metric of validation rows (accuracy, or perplexity of a language model) and their mean loss, in nats a term."""

    metric: float
    loss: float


def load(settings: Settings, data: Data, processor: Any) -> PreTrainedModel:
    """The pretrained model under a head for the data's classes, in eval mode on the device.

    Raises JactusError where there is no such model.
    """
    set_seed(settings.seed)
    dtype: Any = settings.dtype or ("float32" if DEVICE == "cpu" else "auto")
    try:
        model, told = CLASSES[data.found.task].from_pretrained(
            settings.model, dtype=dtype, output_loading_info=True, **_labels(data)
        )
    except (OSError, ValueError, KeyError) as e:
        raise JactusError(f"{settings.model} is no model that can be loaded: {' '.join(str(e).split())[:300]}") from e
    if told["error_msgs"]:
        raise JactusError(f"{settings.model} does not fit its class: {told['error_msgs'][0]}")
    fresh = sorted(set(told["missing_keys"]) - set(head_parameters(model)))
    if fresh:
        say(f"note: {settings.model} has no {fresh[0]} (nor {len(fresh) - 1} others), which begin at random values")
    if hasattr(processor, "pad_token_id") and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = processor.pad_token_id  # classifiers of decoders find the last token by it
    return model.to(DEVICE).eval()


def empty(settings: Settings, data: Data) -> PreTrainedModel:
    """The same without weights, on the meta device: shapes alone. Raises JactusError as `load`."""
    try:
        config = AutoConfig.from_pretrained(settings.model, **_labels(data, only=True))
        with torch.device("meta"):
            return CLASSES[data.found.task].from_config(copy.deepcopy(config))
    except (OSError, ValueError, KeyError) as e:
        raise JactusError(f"{settings.model} is no model that can be loaded: {' '.join(str(e).split())[:300]}") from e


def _labels(data: Data, only: bool = False) -> dict[str, Any]:
    if data.of_language:
        return {}
    names = {"id2label": dict(enumerate(data.classes)), "label2id": {name: i for i, name in enumerate(data.classes)}}
    # a checkpoint that was fine-tuned on other classes has a head of another shape
    return {"num_labels": len(data.classes), **names, **({} if only else {"ignore_mismatched_sizes": True})}


def identity(model: PreTrainedModel) -> str:
    """A digest of the pretrained weights (up to 4,096 values of each), the head left out, which begins at random values."""
    hasher = xxhash.xxh3_128(type(model).__name__.encode())
    heads = head_parameters(model)
    for name, p in model.named_parameters():
        if name not in heads:
            hasher.update(f"{name} {p.dtype} {fingerprint(p)}".encode())
    return hasher.hexdigest()


def to(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A batch on the model's device."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


@torch.no_grad()
def measure(model: PreTrainedModel, batches: Batches, of_language: bool, label: str) -> Measured:
    """The metric and the mean loss of all rows; the model is left in the mode it was in."""
    training = model.training
    model.eval()
    loss, terms, right = 0.0, 0, 0
    for batch in tqdm(batches, label, unit="batch", leave=False):
        labels = batch["labels"]
        output = model(**to(batch, model))
        count = int((labels[:, 1:] != -100).sum()) if of_language else len(labels)
        if not count:
            continue  # of one token alone nothing is predicted
        loss += float(output.loss) * count
        terms += count
        if not of_language:
            right += int((output.logits.argmax(-1).cpu() == labels).sum())
    model.train(training)
    if not math.isfinite(loss) or not terms:
        raise JactusError(
            f"the loss on the validation rows is {loss / max(terms, 1)}; the model or the learning rate is at fault"
        )
    return Measured(math.exp(min(loss / terms, 700)) if of_language else right / terms, loss / terms)


@torch.no_grad()
def logits(model: PreTrainedModel, batches: Batches) -> Tensor:
    """Of the first batch, on the CPU in float32."""
    batch = to(next(iter(batches)), model)
    batch.pop("labels")
    return model(**batch).logits.float().cpu()


@torch.no_grad()
def milliseconds(models: list[PreTrainedModel], batches: Batches, rounds: int = 9) -> list[float]:
    """What the first batch takes in each model, in turns so that what disturbs one disturbs all: medians."""
    batch = to(next(iter(batches)), models[0])
    batch.pop("labels")
    times: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 1):
        for model, taken in zip(models, times):
            started = time.perf_counter()
            model(**batch)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if number:  # the first warms up
                taken.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(taken) for taken in times]

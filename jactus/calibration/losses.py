"""From a batch to the *sum* of its loss terms.

Sums are what make statistics independent of the batch size: a mean loss is multiplied by its number of terms.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from jactus_kernels import JactusError

from .tokens import is_encoder_decoder

Loss = Callable[[nn.Module, Any], Any]


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors of a (nested) batch on `device`; everything else as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(v, device) for v in batch)
    return batch


def loss_sum(
    model: nn.Module, batch: Any, loss: Loss | None, index: int, blame: Callable[[int], None] | None = None
) -> tuple[Tensor, int]:
    """The sum of the batch's loss terms, and their number.

    `loss(model, batch)` may return the terms unreduced (any shape), a pair (sum, number), or a mean over the batch's
    labels; None takes the model's own `.loss`. Raises JactusError for a batch without a loss, or one not finite, unless
    `blame(index)` raises it first, naming the layer where it began.
    """
    result = _own_loss(model, batch, index) if loss is None else loss(model, batch)
    if isinstance(result, tuple):
        total, terms = result
        terms = int(terms)
    elif not isinstance(result, Tensor):
        raise JactusError(f"batch {index}: the loss is a {type(result).__name__}; return a tensor or (sum, terms)")
    elif result.dim() > 0:
        total, terms = widened(result).sum(), _unreduced_terms(result, batch)
    else:
        terms = _count_terms(model, batch, index)
        total = widened(result) * terms
    if terms < 1:
        raise JactusError(f"batch {index} has no loss term (all its labels are -100); drop it or check the labels")
    if not torch.isfinite(total):
        if blame is not None:
            blame(index)
        raise JactusError(f"batch {index}: the loss is {total.item()}; check its inputs and labels, or use float32")
    return total, terms


def widened(loss: Tensor) -> Tensor:
    """A half-precision loss in float32: its sum over a batch's terms would overflow."""
    return loss.float() if loss.element_size() < 4 else loss


def _unreduced_terms(terms: Tensor, batch: Any) -> int:
    """Unreduced terms count one each, except those that are zero because their label is -100."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        for wanted in (labels, labels[..., 1:] if labels.dim() > 1 else labels):
            if wanted.numel() == terms.numel():
                return int((wanted != -100).sum())
    return terms.numel()


def _own_loss(model: nn.Module, batch: Any, index: int) -> Tensor:
    if not isinstance(batch, Mapping):
        raise JactusError(
            f"batch {index} is a {type(batch).__name__}: pass a list or loader of dicts with labels (one dict alone: [batch]), or "
            "loss=lambda model, batch: … returning the unreduced loss terms"
        )
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise JactusError(
            f"batch {index} with keys {sorted(batch)} gives no loss; add labels to it, or pass "
            "loss=lambda model, batch: … returning the unreduced loss terms"
        )
    return loss


def _count_terms(model: nn.Module, batch: Any, index: int) -> int:
    """How many terms the batch's mean loss averages, by the convention of transformers."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if labels is None and isinstance(batch, Mapping) and "start_positions" in batch:
        return len(batch["start_positions"])
    if not isinstance(labels, Tensor):
        raise JactusError(
            f"batch {index}: the loss is one number and the batch has no labels tensor to count its terms by; return the "
            "unreduced terms, or (sum, terms)"
        )
    if labels.is_floating_point():
        return labels.numel()
    if _shifts_labels(model):
        labels = labels[..., 1:]  # the model shifts them: the first token is never predicted
    return int((labels != -100).sum())


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss predicts labels[1:]: causal language models, and classes derived from them."""
    names = {base.__name__ for base in type(model).__mro__}
    causal = not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    by_loss = getattr(model, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")
    return causal or (by_loss and not is_encoder_decoder(model))

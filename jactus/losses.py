"""From a batch to the *sum* of its loss terms, and to the masks that say which tokens are real.

Sums are what make statistics independent of the batch size: a mean loss is multiplied by its number of terms.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from jactus_kernels import JactusError

Loss = Callable[[nn.Module, Any], Any]
CROSS_ATTENTION = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention).*\.(k|v|k_proj|v_proj|key|value)$", re.I
)


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


class TokenMasks:
    """Which rows of a layer's input are real tokens, for one batch."""

    def __init__(self, model: nn.Module, batch: Any, index: int) -> None:
        get = batch.get if isinstance(batch, Mapping) else lambda key: None
        self.index = index
        self.encoder_decoder = is_encoder_decoder(model)
        self.mask = _as_mask(get("attention_mask"), index)
        self.decoder_mask = _as_mask(get("decoder_attention_mask"), index)
        labels = get("labels")
        if self.decoder_mask is None and self.encoder_decoder and isinstance(labels, Tensor):
            self.decoder_mask = _as_mask(labels != -100, index)  # a padded label's decoder input is padding too

    def of(self, name: str, shape: torch.Size) -> Tensor | None:
        """The (T,) bool mask for the layer's input of shape (..., n) flattened to (T, n); None keeps all.

        Raises JactusError when padding cannot be told from tokens.
        """
        mask = self.mask
        if self.encoder_decoder and "decoder" in name.split(".") and not CROSS_ATTENTION.search(name):
            mask = self.decoder_mask
        if mask is None:
            return None
        rows = shape[:-1]
        if rows == mask.shape or rows == (mask.numel(),):
            return None if bool(mask.all()) else mask.reshape(-1)
        if rows == mask.shape[:1]:
            return None  # one row an example, e.g. a pooled vector
        raise JactusError(
            f"{name} got an input of shape {tuple(shape)} in batch {self.index}, which does not fit the attention mask "
            f"{tuple(mask.shape)}: its rows cannot be told to be tokens (a table of positions? windows?); exclude the "
            "layer, or pass batches without an attention mask if every row is a token"
        )


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model, or one inside a wrapper, is an encoder–decoder."""
    return any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) for m in model.modules())


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss predicts labels[1:]: causal language models, and classes derived from them."""
    names = {base.__name__ for base in type(model).__mro__}
    causal = not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    by_loss = getattr(model, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")
    return causal or (by_loss and not is_encoder_decoder(model))


def _as_mask(mask: Any, index: int) -> Tensor | None:
    """A 2-D 0/1 mask as bool; None when there is none. Raises JactusError for another kind of mask."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise JactusError(
            f"batch {index}: the attention mask is {what}; pass a 2-D one, of 1 for tokens and 0 for padding"
        )
    return mask.bool()

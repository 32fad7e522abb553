"""Which rows of a layer's input are real tokens."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

CROSS_ATTENTION = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention).*\.(k|v|k_proj|v_proj|key|value)$", re.I
)


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

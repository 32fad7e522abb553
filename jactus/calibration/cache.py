"""With or without a decoder's cache of keys and values: the function that training runs."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .examples import few, tensors
from .rounding import rounding

logger = logging.getLogger("jactus")


class DecoderCache:
    """The cache is off inside the block, as memory goes, where that changes nothing. Where it does, it is off for packed
    sequences, which transformers does not see when there is a cache, and else as the model's config says."""

    def __init__(self, model: nn.Module) -> None:
        configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        self.model = model
        self.on = [c for c in configs.values() if getattr(c, "use_cache", None) is True]

    def __enter__(self) -> "DecoderCache":
        self._set(False)
        return self

    def __exit__(self, *error: Any) -> None:
        self._set(True)

    def _set(self, use: bool) -> None:
        for config in self.on:
            config.use_cache = use

    def decide(self, batch: Any, value: Callable[[Any], float]) -> None:
        """Look at the loss of an example with and without a cache."""
        if not self.on:
            return
        one = few(batch, 1)
        without = value(one)
        self._set(True)
        within = value(one)
        differs = abs(within - without) > rounding(self.model, without)[0] * abs(without)
        off = not differs or packed(batch)
        if off:
            self._set(False)
        if differs:
            logger.warning(
                "the loss of %s is %.6g with a cache of keys and values and %.6g without: calibrated %s; train it so too",
                type(self.model).__name__, within, without, "without, since sequences are packed" if off else "with it",
            )  # fmt: skip


def packed(batch: Any) -> bool:
    """Whether positions start anew within an example: several sequences in one."""
    for path, t in tensors(batch):
        if path and path[-1] == "position_ids" and t.dim() >= 2 and bool((torch.diff(t, dim=-1) < 0).any()):
            return True
    return False

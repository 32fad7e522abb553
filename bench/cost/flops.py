"""Counted work: multiply-adds of the linear layers of a model on one batch, dense, adapted or low-rank.

What is not a linear layer (attention, normalisation, the optimizer) is not counted. Where embeddings are frozen the first layers
need no gradients of their inputs, and none are counted: in a model of one or two blocks that is a part one sees.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from jactus import CoreLinear, FoldedLinear, JactusError

Batch = dict[str, Tensor]
KINDS = (nn.Linear, Conv1D, CoreLinear, FoldedLinear)


@torch.no_grad()
def forward(model: nn.Module, batch: Batch) -> float:
    """Multiply-adds of a forward pass."""
    return sum(tokens * _forward(layer) for layer, tokens, _ in _calls(model, batch))


@torch.enable_grad()
def training(model: nn.Module, batch: Batch) -> float:
    """Multiply-adds of a forward and a backward pass: gradients of the inputs and weights that need one."""
    found = _calls(model, batch)
    return sum(tokens * (_forward(layer) + _backward(layer, inside)) for layer, tokens, inside in found)


def _calls(model: nn.Module, batch: Batch) -> list[tuple[nn.Module, int, bool]]:
    """Each linear layer that the batch goes through, once a call: with the rows it is given, and whether these need a
    gradient."""
    seen: list[tuple[nn.Module, int, bool]] = []

    def record(layer: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append((layer, args[0].numel() // args[0].shape[-1], args[0].requires_grad))

    handles = [layer.register_forward_hook(record) for layer in model.modules() if isinstance(layer, KINDS)]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _forward(layer: nn.Module) -> int:
    if isinstance(layer, CoreLinear | FoldedLinear):
        two = layer.rank * (layer.in_features + layer.out_features)
        if isinstance(layer, CoreLinear) and layer.width > layer.rank:
            raise JactusError(f"{layer}: work is counted for square cores only")
        return two + (layer.rank**2 if isinstance(layer, CoreLinear) else 0)
    return layer.weight.numel()  # type: ignore[union-attr, return-value]


def _backward(layer: nn.Module, inside: bool) -> int:
    if isinstance(layer, CoreLinear):  # q = gU and qᵀh; then qC and (qC)Vᵀ
        square = layer.rank**2
        return layer.rank * layer.out_features + square + inside * (square + layer.rank * layer.in_features)
    return _forward(layer) * (inside + layer.weight.requires_grad)  # type: ignore[union-attr]

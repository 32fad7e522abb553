"""Counted work: multiply-adds of the linear layers of a model on one batch, dense, adapted or low-rank.

What is not a linear layer (attention, normalisation, the optimizer) is not counted. Gradients of inputs are counted for every
layer, though a method whose embeddings are frozen needs none for the inputs of the first ones: in a model of one or two blocks
that is a part one sees.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from jactus import CoreLinear, FoldedLinear

Batch = dict[str, Tensor]
KINDS = (nn.Linear, Conv1D, CoreLinear, FoldedLinear)


@torch.no_grad()
def forward(model: nn.Module, batch: Batch) -> float:
    """Multiply-adds of a forward pass."""
    return sum(tokens * _forward(layer) for layer, tokens in _tokens(model, batch))


@torch.no_grad()
def training(model: nn.Module, batch: Batch) -> float:
    """Multiply-adds of a forward and a backward pass: gradients of all inputs, and of the weights that train."""
    return sum(tokens * (_forward(layer) + _backward(layer)) for layer, tokens in _tokens(model, batch))


def _tokens(model: nn.Module, batch: Batch) -> list[tuple[nn.Module, int]]:
    """Each linear layer that the batch goes through, once a call, with the rows it is given."""
    seen: list[tuple[nn.Module, int]] = []
    handles = [
        layer.register_forward_hook(lambda layer, args, _: seen.append((layer, args[0].numel() // args[0].shape[-1])))
        for layer in model.modules()
        if isinstance(layer, KINDS)
    ]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _forward(layer: nn.Module) -> int:
    if isinstance(layer, CoreLinear | FoldedLinear):
        two = layer.rank * (layer.in_features + layer.out_features)
        return two + (layer.rank**2 if isinstance(layer, CoreLinear) else 0)
    return layer.weight.numel()  # type: ignore[union-attr, return-value]


def _backward(layer: nn.Module) -> int:
    if isinstance(layer, CoreLinear):  # q = gU, qᵀh, qC, (qC)Vᵀ
        return _forward(layer) + layer.rank**2
    return _forward(layer) * (2 if layer.weight.requires_grad else 1)  # type: ignore[union-attr]

"""Counted work: multiply-adds of the linear layers of a model on one batch, dense, adapted or low-rank.

What is not a linear layer (attention, normalisation, the optimizer) is not counted. Where embeddings are frozen the first layers
need no gradients of their inputs, and none are counted: in a model of one or two blocks that is a part one sees.
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
    return sum(_forward(layer, tokens) for layer, tokens, _ in _calls(model, batch))


@torch.enable_grad()
def training(model: nn.Module, batch: Batch) -> float:
    """Multiply-adds of a forward and a backward pass: gradients of the inputs and weights that need one."""
    found = _calls(model, batch)
    return sum(_forward(layer, tokens) + _backward(layer, tokens, inside) for layer, tokens, inside in found)


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


def _forward(layer: nn.Module, tokens: int) -> int:
    if isinstance(layer, FoldedLinear):
        return tokens * (layer.left.numel() + layer.right.numel())
    if isinstance(layer, CoreLinear):
        left, core, right = _parts(layer)
        return tokens * (left + core + right) + _around_the_core(layer, tokens)
    return tokens * layer.weight.numel()  # type: ignore[union-attr, operator]


def _backward(layer: nn.Module, tokens: int, inside: bool) -> int:
    if isinstance(layer, CoreLinear):  # q = gU and qᵀh; then qC and (qC)Vᵀ
        left, core, right = _parts(layer)
        return tokens * (left + core + inside * (core + right)) + _around_the_core(layer, tokens, inside)
    return _forward(layer, tokens) * (inside + layer.weight.requires_grad)  # type: ignore[union-attr]


def _parts(layer: CoreLinear) -> tuple[int, int, int]:
    """Multiply-adds a token of the bases, which leave their pivots out, and of the core."""
    p, q = layer.core.shape
    return layer.U[p:].numel(), layer.core.numel(), layer.V[q:].numel()


def _around_the_core(layer: CoreLinear, tokens: int, inside: bool = True) -> int:
    """T C Tᵀ, once a call, or T times few tokens; the gradient takes as many, but of few tokens whose inputs need none."""
    p, q = layer.core.shape
    few = tokens * (p * p + q * q) < p * q * (p + q)
    return tokens * (p * p + inside * q * q) if few else p * q * (p + q)

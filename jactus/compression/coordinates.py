"""Coordinates of a core: between orthonormal bases, so that a step of the core is a step of the layer as long; and how long to step."""

import math

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..config import JactusConfig
from ..model.families import output_embedding
from ..model.lowrank import core_layers
from ..planning.plans import PlannedLayer

# What was best moved the layers by so large a part of themselves a step: on three text tasks and on photographs, and in a language
# model: `python -m bench.accuracy.rates`.
RELATIVE_STEP, OF_LANGUAGE = 0.006, 0.001


def orthonormal(U: Tensor, C: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same product U C Vᵀ with orthonormal columns in U (m, p) and V (n, q), in the plain inner product: C (p, q) takes up the
    difference. The leading columns span what they did.

    They come orthonormal in the metric, and would do as they are: the function is the same. But Adam moves all elements of C alike,
    and between such bases that moves the layer as far along directions that the data barely has, which few examples say nothing of,
    as along the others (our choice, measured; Wadia et al. 2021 of whitened data).
    """
    (U, R), (V, S) = torch.linalg.qr(U), torch.linalg.qr(V)
    return U, R @ C @ S.T, V


def factors(layer: PlannedLayer, rank: int, config: JactusConfig) -> tuple[Tensor, Tensor, Tensor, float]:
    """U (m, p), C (p, q) and V (n, q) of a planned layer at `rank`, float64; and its reach.

    The reach is what a step of ±1 in every element of C that trains moves the layer by, as a part of the layer: ‖U ΔC Vᵀ‖ is ‖ΔC‖, so
    the root of their number over ‖C‖. NaN of a weight that is zero.
    """
    width, trained = layer.width(rank, config), config.core.trainable_rank
    # A core of which only the leading block trains has the directions for learning lead.
    U, C, V = layer.directions.factors(rank, layer.share(rank, config), trained is not None, width)
    U, C, V = orthonormal(U, C, V)
    whole = float(C.norm())
    return U, C, V, math.sqrt(C[:trained, :trained].numel()) / whole if whole else math.nan


def learning_rate(model: nn.Module) -> float:
    """A rate for Adam or AdamW to start from: at it a step, which moves each element of a core by as much, moves the layers by 0.6% of
    themselves, in a model with an output embedding by 0.1%, in their geometric mean over those with a core (our choice).

    It depends on model and budget, is lower for larger cores, and is known of a model that was compressed or reloaded. At 80%, on text and
    photographs it was within a factor of 1.5 of the best of a grid. Where the loss is on answers alone a language model bears a half or
    a quarter. Other batch sizes and longer training bear other rates, as with any method; the head may take the same. Checkpoints of
    0.1.0, whose bases are no orthonormal ones, may want less.

    Raises JactusError where no layer has a core, or the checkpoint is of before this was recorded.
    """
    layers = core_layers(model)
    if not layers:
        raise JactusError(
            f"{type(model).__name__} has no three-factor layer and so no core to train; compress it first"
        )
    reaches = [layer.reach for layer in layers.values() if layer.reach > 0]  # that of a weight of zeros is not a number
    if not reaches:
        raise JactusError(
            f"none of the {len(layers)} three-factor layers of {type(model).__name__} knows how far its steps reach "
            "(a checkpoint of before that was recorded does not); compress the original model again, or choose a rate by hand"
        )
    step = RELATIVE_STEP if output_embedding(model) is None else OF_LANGUAGE
    return step / math.exp(math.fsum(map(math.log, reaches)) / len(reaches))

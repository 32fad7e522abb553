"""Coordinates of a core: the same function in others, and how far a step in them moves a layer."""

import math

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..config import JactusConfig
from ..model.families import output_embedding
from ..model.lowrank import core_layers
from ..planning.plans import Plan, PlannedLayer

# What was best moved the layers by 0.25% a step on three text tasks; in a language model by 0.2% over 16 steps, and by 0.1% or less over
# 125 and 138, on questions and on text: `python -m bench.accuracy.rates`.
RELATIVE_STEP, OF_LANGUAGE = 0.0025, 0.001


def change_coordinates(
    U: Tensor, C: Tensor, V: Tensor, whiten: bool, extra_left: float, extra_right: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same product U C Vᵀ in other coordinates of the core; and the squared lengths, in the metric, of the new columns of
    U (p,) and of V (q,).

    U and V come orthonormal in the metric. whiten=True whitens them again in the metric plus `extra_left`·I on the left
    and `extra_right`·I on the right, then scales each to unit mean column norm; whiten=False makes their columns
    orthonormal. C takes up the difference. Our choice: with whitened bases plain Adam on C is preconditioned.
    """
    R, S = _new_frame(U, whiten, extra_left), _new_frame(V, whiten, extra_right)
    U = torch.linalg.solve_triangular(R, U, upper=True, left=False)
    V = torch.linalg.solve_triangular(S, V, upper=True, left=False)
    C = R @ C @ S.T
    left, right = (_inverse(frame).square().sum(0) for frame in (R, S))
    if whiten:
        u, v = U.norm(dim=0).mean(), V.norm(dim=0).mean()
        U, C, V, left, right = U / u, C * (u * v), V / v, left / u**2, right / v**2
    return U, C, V, left, right


def _inverse(R: Tensor) -> Tensor:
    """R⁻¹ of an upper triangular R."""
    return torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)


def _new_frame(B: Tensor, whiten: bool, extra: float) -> Tensor:
    """Upper triangular R with B R⁻¹ orthonormal, in the metric plus `extra` or in the plain inner product.

    Triangular, so that the leading directions stay leading.
    """
    if whiten:
        eye = torch.eye(B.shape[1], dtype=B.dtype, device=B.device)
        return torch.linalg.cholesky(eye + extra * (B.T @ B)).T
    return torch.linalg.qr(B)[1]


def step_scales(plan: Plan) -> dict[str, float]:
    """How much faster than the average each layer moves for the same step of its core: `Core.step_scaling`.

    1 for all where the coordinates are not 'fisher' or the metric is the identity on both sides. Layers that stay dense
    count too, so that a layer's steps do not depend on the budget.
    """
    sizes = {name: math.sqrt((layer.scales[0] or 1) * (layer.scales[1] or 1)) for name, layer in plan.layers.items()}
    if plan.config.core.coordinates != "fisher":
        return dict.fromkeys(sizes, 1.0)
    average = math.fsum(map(math.log, sizes.values())) / len(sizes)
    return {name: math.exp(plan.config.core.step_scaling * (math.log(s) - average)) for name, s in sizes.items()}


def factors(layer: PlannedLayer, rank: int, config: JactusConfig, step: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """U (m, p), C (p, q) and V (n, q) of a planned layer at `rank` in the configured coordinates, float64; and its reach.

    step: C is divided by it and U multiplied, so that equal steps of C move the layer so much more. The reach is what a step
    of ±1 in every element of C that trains moves the layer by, as a part of the layer: the root mean square, over signs drawn at
    random, of ‖L_Gᵀ U ΔC Vᵀ L_A‖ / ‖L_Gᵀ W L_A‖ in the metric. NaN of a weight that is zero.
    """
    width, trained = layer.width(rank, config), config.core.trainable_rank
    # A core of which only the leading block trains has the directions for learning lead.
    U, C, V = layer.directions.factors(rank, layer.share(rank, config), trained is not None, width)
    extra = config.core.coordinate_damping - config.damping
    whiten = config.core.coordinates == "fisher"
    U, C, V, left, right = change_coordinates(U, C, V, whiten, extra * layer.scales[0], extra * layer.scales[1])
    step *= (rank / width) ** 0.5  # a step of every element moves the layer as far as that of a square core
    moved = step**2 * float(left[:trained].sum() * right[:trained].sum())
    whole = float(layer.energies.sum())
    return U * step, C / step, V, math.sqrt(moved / whole) if whole else math.nan


def learning_rate(model: nn.Module) -> float:
    """A rate for Adam or AdamW to start from: at it a step moves the layers by 0.25%, in a model with an output embedding by 0.1%, in
    their geometric mean over those with a core, in the metric of their plan and were the signs of the step random (our choice).

    It depends on model, task, budget and configuration, and is known of a model that was compressed or reloaded. In the default
    coordinates it was within a few hundredths of the best of a grid on three text tasks. A language model bears twice as much over a
    dozen steps, and a half or a quarter where the loss is on answers alone. Other batch sizes and longer training bear other rates, as with
    any method; the head may take the same.

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

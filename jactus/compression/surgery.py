"""Step 5 and 6 on a model: put the three factors in, fold them to two, or multiply them out again."""

import torch
from torch import nn

from jactus_kernels import JactusError

from ..checkpoints.quantizer import record, refuse_quantized
from ..config import JactusConfig
from ..model.lowrank import CoreLinear, LowRankLinear, compressed_layers, core_layers, replace_module
from ..model.offload import present
from ..model.sharded import refuse_sharded
from ..model.targets import Target, find_targets
from ..planning.planner import core_dtype
from ..planning.plans import Plan, PlannedLayer
from ..planning.shelf import Shelf
from .coordinates import factors
from .trainable import mark_trainable, refuse_extras


def compress(model: nn.Module, plan: Plan) -> nn.Module:
    """Replace the planned layers of `model` by three factors, in place; only cores and chosen extras then require grad.

    Every layer is checked, and its factors are made, before the first is touched. Returns the model.

    Raises JactusError when the model is compressed already or is not the one the plan was made for.
    """
    return compressed(model, plan)


def compressed(model: nn.Module, plan: Plan, shelf: Shelf | None = None) -> nn.Module:
    """`compress`; with a shelf factors wait on it, and not in memory, until the dense weight goes that they replace."""
    if not isinstance(plan, Plan):
        raise JactusError(
            f"compress takes a Plan, got {type(plan).__name__}; plan first, then pass plan.at(0.6) or the like"
        )
    if torch.is_inference_mode_enabled():
        raise JactusError(
            "compress makes weights that are to train, and is called under torch.inference_mode(); call it outside"
        )
    refuse_quantized(model)
    targets = find_targets(model, plan.config)
    refuse_extras(model, plan.config.trainable_extras)
    _refuse_others(model, plan, targets)
    made: dict[str, CoreLinear] = {}
    for name, layer in plan.layers.items():
        rank = plan.ranks[name]
        if rank is not None:
            try:
                made[name] = core_linear_from(layer, rank, targets[name].module, plan.config)
                if shelf is not None:
                    made[name] = shelf.put_factors(name, made[name])
            except torch.linalg.LinAlgError as e:
                raise JactusError(f"{name} ({layer.m}×{layer.n}) at rank {rank}: {e}; the model is as it was") from e
    for name in list(made):
        new, device = made.pop(name), targets.pop(name).device
        if shelf is not None:
            new = shelf.take_factors(name, new)
        replace_module(model, name, new.to(device))
    mark_trainable(model, plan.config.trainable_extras)
    # A head that is called like any other layer, and stays dense, has no core to train: it trains itself, as heads do.
    heads = [name for name in plan.outputs if plan.ranks.get(name) is None]
    if heads and "head" in plan.config.trainable_extras:
        for name in heads:
            model.get_submodule(name).requires_grad_(True)
        record(model)
    return model


def _refuse_others(model: nn.Module, plan: Plan, targets: dict[str, Target]) -> None:
    """Raise JactusError for a plan of another model, or with fewer directions than its ranks ask for."""
    for name, layer in plan.layers.items():
        target = targets.get(name)
        if target is None or target.fingerprint != layer.fingerprint:
            found = "has no such layer" if target is None else f"has other weights there ({target})"
            raise JactusError(
                f"the plan is of another model: {name} ({layer.m}×{layer.n}) is planned, and this {type(model).__name__} "
                f"{found}; plan this model (and compress before training it, not after)"
            )
        rank = plan.ranks[name]
        wanted = 0 if rank is None else min(layer.width(rank, plan.config), layer.m, layer.n)  # of the weight
        if wanted > layer.directions.kept:
            raise JactusError(
                f"{name} ({layer.m}×{layer.n}) is to have {wanted} directions a side, and the plan kept "
                f"{layer.directions.kept}: its configuration was changed; plan again"
            )


@torch.no_grad()
def core_linear_from(layer: PlannedLayer, rank: int, old: nn.Module, config: JactusConfig) -> CoreLinear:
    """The three-factor layer of a planned layer at `rank`, with the bias, dtype and mode of the old one; its factors on the CPU,
    where they are until the dense weight goes."""
    weight: torch.Tensor = old.weight  # type: ignore[assignment]
    U, C, V, reach = factors(layer, rank, config)
    with torch.device("meta"):
        new = CoreLinear(
            layer.m,
            layer.n,
            rank,
            trainable_rank=config.core.trainable_rank,
            transposed=_is_transposed(old),
            width=max(C.shape),
            reach=reach,
        )
    basis = config.basis_dtype(weight.dtype)
    new.hold(U, C, V, basis, core_dtype(config, basis))
    with present(old):
        new.bias = old.bias  # type: ignore[assignment]
    return new.train(old.training)


def _dtype(model: nn.Module) -> torch.dtype | None:
    """What a transformers model says its dtype is; None of other modules, which have no such thing."""
    dtype = getattr(model, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _is_transposed(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Linear)


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Multiply each core into one side, in place: two factors with the pivots of the other left out, r(m+n−r) parameters, the same
    function to rounding.

    A layer of full rank becomes dense. The folded model is for deployment: its factors do not train. Returns the model.

    Raises JactusError when the model is in training mode, or has no three-factor layer.
    """
    refuse_sharded("fold", model)
    if model.training:
        raise JactusError(
            "fold ends training (a folded layer has no core to train) and the model is in training mode; call "
            "model.eval() first, and save a copy with jactus.save_pretrained if you want to train on"
        )
    layers = core_layers(model)
    if not layers:
        raise JactusError(f"{type(model).__name__} has no three-factor layer to fold; compress it first")
    for name, layer in layers.items():
        if not torch.isfinite(layer.effective_core).all():
            raise JactusError(
                f"{name} ({layer}) has a core that is not finite: training diverged; the model is as it was"
            )
    for name, layer in layers.items():
        whole = layer.rank == min(layer.out_features, layer.in_features)
        replace_module(model, name, layer.dense(_dtype(model)) if whole else layer.folded())
    record(model)
    return model


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Make the model dense again, in place: plain Linear (or Conv1D) layers with the same function to rounding.

    Returns the model, which `save_pretrained` then writes as an ordinary checkpoint; like one freshly loaded, all its
    parameters require grad.

    Raises JactusError when the model has no low-rank layer.
    """
    refuse_sharded("merge", model)
    layers: dict[str, LowRankLinear] = compressed_layers(model)
    if not layers:
        raise JactusError(f"{type(model).__name__} has no low-rank layer to merge; it is dense already")
    for name, layer in layers.items():
        replace_module(model, name, layer.dense(_dtype(model)))
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    record(model)
    return model

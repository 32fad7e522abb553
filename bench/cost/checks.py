"""What must be right before a time is printed. Each returns the relative error found, and raises where it is too large."""

import torch
from torch import Tensor, nn

from jactus.model.lowrank import core_layers
from jactus_kernels import JactusError

# Rounding of a chain of three products: a few units in the last place of the dtype, over sums of up to 11,008 terms.
ALLOWED = {"float32": 1e-4, "bfloat16": 3e-2}
# Of a deployed model in bfloat16. Between the pivots and the other outputs three roundings of 2⁻⁹/√3 each are amplified by the length
# of a row of coefficients, 9 at a width of 4,096 and random weights: 0.018 a layer, and a Llama block is four layers deep.
DEPLOYED = 5e-2


def within(what: str, error: float, allowed: float) -> float:
    """`error`, if it is allowed."""
    if not error <= allowed:
        raise JactusError(f"{what} is off by {error:.2g} (at most {allowed:.2g} is allowed): its time is not reported")
    return error


def relative(found: Tensor, right: Tensor) -> float:
    """‖found − right‖ / ‖right‖."""
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).norm() / right.norm())


def layers(model: nn.Module, dtype: str) -> float:
    """The largest three-factor layer, forward and backward, against float64 products."""
    found = list(core_layers(model).values())
    layer = max(found, key=lambda layer: layer.in_features * layer.out_features * layer.rank)
    device = layer.U.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, layer.in_features, generator=generator).to(device)
    g = torch.randn(64, layer.out_features, generator=generator).to(device)
    (U, V), C = layer.bases(), layer.core.detach().double().requires_grad_()
    right = (x.double() @ V @ C.T @ U.T) + (0 if layer.bias is None else layer.bias.double())
    (right_gradient,) = torch.autograd.grad(right, C, g.double())
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        y = layer(x)
    (gradient,) = torch.autograd.grad(y, layer.core, g.to(y.dtype))
    error = max(relative(y, right), relative(gradient, right_gradient))
    return within(f"a {layer.out_features}×{layer.in_features} layer in {dtype}", error, ALLOWED[dtype])


@torch.no_grad()
def same_logits(model: nn.Module, other: nn.Module, batch: dict[str, Tensor]) -> float:
    """Two models that should compute the same, in float32."""
    error = relative(other(**batch).logits, model(**batch).logits)
    return within(f"{type(model).__name__}, folded,", error, ALLOWED["float32"] * 10)


@torch.no_grad()
def rounded_logits(model: nn.Module, other: nn.Module, batch: dict[str, Tensor]) -> float:
    """`other`, computed in bfloat16 where this is called, against `model` in float32."""
    found = other(**batch).logits
    with torch.autocast(found.device.type, enabled=False):
        right = model(**batch).logits
    return within(f"{type(model).__name__}, folded, in bfloat16,", relative(found, right), DEPLOYED)

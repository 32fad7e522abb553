"""How far rounding moves what a model computes, by the precision that it computes in."""

import math

import torch
from torch import Tensor, nn

# Relative: of a loss; and by how much two ways of counting it must differ to be told apart. transformers computes losses in float32
# whatever the model's dtype, so wider models are no more exact.
HALF, FULL = (3e-2, 1.5e-2), (1e-4, 1e-6)
MOST = 0.4


def is_half(model: nn.Module) -> bool:
    """Whether the model computes in half precision: by its parameters, or under autocast."""
    sizes = [p.element_size() for p in model.parameters() if p.is_floating_point()]
    devices = {p.device.type for p in model.parameters()}
    return min(sizes, default=4) < 4 or any(torch.is_autocast_enabled(d) for d in devices if d != "meta")


def rounding(model: nn.Module, loss: float = 1.0) -> tuple[float, float]:
    """The two tolerances of a loss of about this value.

    A small cross-entropy is exp(−margin), so what half precision knows of a margin of log(1/loss) it does not know of the loss.
    Never so much that a sum and a mean of two, a half apart, look alike.
    """
    if not is_half(model):
        return FULL
    margin = -math.log(abs(loss)) if loss and math.isfinite(loss) else 1.0
    return min(HALF[0] * max(margin, 1.0), MOST), HALF[1]


def widened(x: Tensor) -> Tensor:
    """Half precision in float32: a loss's sum over a batch's terms would overflow; wider is left as it is."""
    return x.float() if x.element_size() < 4 else x

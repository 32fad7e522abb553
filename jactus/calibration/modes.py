"""How a model is put while it is looked at, and put back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from jactus_kernels import JactusError


def refuse_inference(step: str, model: nn.Module) -> None:
    """Raise JactusError where autograd is off for good: in inference mode, or for a model that was made in it."""
    if torch.is_inference_mode_enabled():
        raise JactusError(f"{step} needs gradients and is called under torch.inference_mode(); call it outside")
    if any(p.is_inference() for p in model.parameters()):
        raise JactusError(f"{step}: the weights of {type(model).__name__} were made in inference mode; load it outside")


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode inside the block; afterwards modes are what they were."""
    modes = {m: m.training for m in model.modules()}
    own = [m for m in modes if type(m).train is not nn.Module.train]  # of which changing the mode does more
    try:
        model.train() if training else model.eval()
        yield
    finally:
        for m in own:
            m.train(modes[m])
        for m, mode in modes.items():
            m.training = mode


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """No dropout, no parameter gradients, no checkpointing (which runs layers twice); all put back at the end."""
    config = getattr(model, "config", None)
    guessed = getattr(config, "problem_type", None)  # transformers writes there what the first labels look like
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with in_mode(model, False):
        try:
            _require(model, trainable, False)
            yield
        finally:
            _require(model, trainable, True)
            if getattr(config, "problem_type", None) != guessed:
                config.problem_type = guessed  # type: ignore[union-attr]


def _require(model: nn.Module, names: set[str], gradients: bool) -> None:
    """By name: where weights are offloaded, each call puts another parameter in the place of the last."""
    for name, p in model.named_parameters():
        if name in names:
            p.requires_grad_(gradients)

"""Special inputs and models that such code is apt to get wrong, each with what is right: an exact value, or a refusal by name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .check import Result, check
from .inputs import Data
from .tiny import build, model_class, tiny_config

KINDS: dict[str, Callable[[], Result]] = {}


def kind(name: str, right: str) -> Callable:
    """Register a function that gives (model, data) or (model, [data, …]), or a Result of its own, under `name`."""

    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Result:
            made = function()
            if isinstance(made, Result):
                result = made
            else:
                model, data = made
                result = check(name, model, data if isinstance(data, list) else [data])
            result.notes.insert(0, f"right: {right}")
            return result

        KINDS[name] = run
        return function

    return register


def tiny(task: str, model_type: str, **own: Any) -> Any:
    """A tiny model of a task."""
    return build(model_class(task, model_type), tiny_config(model_type, **own))


def of_class(cls: type, model_type: str, **own: Any) -> Any:
    return build(cls, tiny_config(model_type, **own))


def judged(name: str, model: nn.Module, wrong: list[str], refused: str = "") -> Result:
    """A result of checks of one's own: what is wrong, or the refusal."""
    status = "FAIL" if wrong else "refused" if refused else "exact"
    return Result(name, type(model).__name__, status, "; ".join(wrong) or refused)


def plain_data(model: nn.Module, width: int, count: int = 4, length: int = 5) -> Data:
    """Sequences for a plain module that gives (B, T, width), under the square of its mean output over tokens, a term a row."""

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        return (model(**batch) - batch["y"]).square().mean((1, 2))

    g = torch.Generator().manual_seed(11)
    alone = [
        {"x": torch.randn(1, length, width, generator=g).double(), "y": torch.randn(1, 1, 1, generator=g).double()}
        for _ in range(count)
    ]
    return Data(alone, [1] * count, loss=loss, summed=lambda m, b, terms: loss(m, b).sum())


def plain(model: nn.Module, seed: int = 0) -> nn.Module:
    """A plain module in float64, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return model.double().eval()


from . import kinds_files, kinds_losses, kinds_masks, kinds_modules  # noqa: E402, F401  they register themselves

"""Is a layer used by its forward alone? Found out before anything is replaced.

Some modules read a layer's `weight` themselves (torch's fast path of a transformer layer, fused kernels), which a low-rank layer
has not. So every target is stood in for by a layer that computes the same and whose weight is NaN, as after `compress`: in eval and
in train mode the model must give the same answer.
"""

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..model.lowrank import LowRankLinear, replace_module
from ..model.offload import present
from ..model.targets import Target
from .examples import tensors
from .modes import in_mode

logger = logging.getLogger("jactus")
SAME = 1e-3  # relative: the same operations are made, so that only their order can differ


class StandIn(LowRankLinear):
    """Computes what a layer computes, and has no weight to read."""

    def __init__(self, old: nn.Module, target: Target) -> None:
        super().__init__(target.m, target.n, min(target.m, target.n), target.transposed)
        self.old = [old]  # in a list, so that it is no module of this one
        self.anchor = nn.Parameter(target.weight.new_zeros(1), requires_grad=False)
        with present(old):
            self.bias = old.bias  # type: ignore[assignment]
        self.train(old.training)

    def forward(self, input: Tensor) -> Tensor:
        (old,) = self.old
        with present(old):
            return type(old).forward(old, input)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        (old,) = self.old
        with present(old):
            weight: Any = old.weight
        return (weight.T if self.transposed else weight).to(dtype or weight.dtype)


@torch.no_grad()
def check_forwards(model: nn.Module, targets: dict[str, Target], few: Any, value: Callable[[Any], float]) -> None:
    """Raise JactusError naming a target that the model uses otherwise than by its forward. The model, in eval mode, is left as
    it was, buffers included."""
    name = type(model).__name__
    for training in (False, True):
        with in_mode(model, training):
            try:
                wanted = _answer(model, few, value)
                again = _answer(model, few, value)
                alike = _same(wanted, again)
                del again
            except Exception as e:
                if not training:
                    raise
                # e.g. a batch norm that does not train on one row: there is nothing to compare with
                logger.info("layers are checked in eval mode alone: %s does not run in train mode (%s)", name, e)
                continue
            if not alike:
                logger.warning(
                    "layers are not checked in %s mode: %s is random there beyond any seed", _word(training), name
                )
                continue
            if _answers_alike(model, list(targets.values()), few, value, wanted):
                continue
            culprits = [t for t in targets.values() if not _answers_alike(model, [t], few, value, wanted)]
            if not culprits:
                raise JactusError(
                    f"{name} gives other answers in {_word(training)} mode when all {len(targets)} targets have no weight to read, "
                    "and the same when any one has none: it reads several weights at once; name layers to compress in target_modules"
                )
            first = culprits[0]
            parent = model.get_submodule(first.name.rpartition(".")[0])
            raise JactusError(
                f"{first} is not used by its forward alone: {type(parent).__name__} reads its weight itself or goes around it "
                f"in {_word(training)} mode ({len(culprits)} layers in all), so with factors in its place the "
                "model would compute something else; add it to exclude_modules, e.g. "
                f"exclude_modules=({first.name.split('.', 1)[-1]!r},)"
            )


def _word(training: bool) -> str:
    return "train" if training else "eval"


def _answers_alike(
    model: nn.Module, targets: list[Target], few: Any, value: Callable[[Any], float], wanted: list[Tensor]
) -> bool:
    olds = {t.name: model.get_submodule(t.name) for t in targets}
    try:
        for t in targets:
            replace_module(model, t.name, StandIn(olds[t.name], t))
        return _same(_answer(model, few, value), wanted)
    except Exception:  # whatever the model makes of a layer without a weight
        return False
    finally:
        for name, old in olds.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, old)


def _answer(model: nn.Module, few: Any, value: Callable[[Any], float]) -> list[Tensor]:
    """The loss and all that the model returns, under fixed random numbers."""
    returned: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: returned.extend(_floats(output)))
    state, numpy_state = random.getstate(), np.random.get_state()
    # torch.manual_seed seeds every device there is
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            loss = value(few)
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        handle.remove()
    return [torch.tensor(loss, dtype=torch.float64), *returned]


def _floats(output: Any) -> list[Tensor]:
    return [t.detach().clone() for _, t in tensors(output) if t.is_floating_point()]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    if [t.shape for t in a] != [t.shape for t in b]:
        return False
    return all(torch.allclose(x, y, rtol=SAME, atol=SAME * _size(y), equal_nan=True) for x, y in zip(a, b))


def _size(y: Tensor) -> float:
    finite = y[torch.isfinite(y)]
    return float(finite.abs().max()) if finite.numel() else 0.0

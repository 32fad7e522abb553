"""Is a layer used by its forward alone? Found out before anything is replaced.

Some modules read a layer's `weight` themselves (torch's fast path of a transformer layer, fused kernels), which a low-rank layer
has not. So every target is stood in for by a layer that computes the same and whose weight is NaN, as after `compress`: in eval and
in train mode the model must give the same answer.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..model.lowrank import LowRankLinear, replace_module
from ..model.targets import Target

SAME = 1e-3  # relative: the same operations are made, so that only their order can differ


class StandIn(LowRankLinear):
    """Computes what a layer computes, and has no weight to read."""

    def __init__(self, old: nn.Module, target: Target) -> None:
        super().__init__(target.m, target.n, min(target.m, target.n), target.transposed)
        self.old = [old]  # in a list, so that it is no module of this one
        self.anchor = nn.Parameter(target.weight.new_zeros(1), requires_grad=False)
        self.bias = old.bias  # type: ignore[assignment]
        self.train(old.training)

    def forward(self, input: Tensor) -> Tensor:
        (old,) = self.old
        return type(old).forward(old, input)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        raise NotImplementedError


@torch.no_grad()
def check_forwards(model: nn.Module, targets: dict[str, Target], few: Any, value: Callable[[Any], float]) -> None:
    """Raise JactusError naming a target that the model uses otherwise than by its forward. The model, in eval mode, is left as
    it was, buffers included."""
    for training in (False, True):
        with _mode(model, training):
            try:
                wanted = _answer(model, few, value)
                again = _answer(model, few, value)
            except Exception:
                if not training:
                    raise
                continue  # e.g. a batch norm that does not train on one row: nothing to compare with
            if not _same(wanted, again):
                continue  # random in a way that no seed of torch's fixes
            if _answers_alike(model, list(targets.values()), few, value, wanted):
                continue
            culprits = [t for t in targets.values() if not _answers_alike(model, [t], few, value, wanted)]
            first = culprits[0] if culprits else next(iter(targets.values()))
            parent = model.get_submodule(first.name.rpartition(".")[0])
            raise JactusError(
                f"{first} is not used by its forward alone: {type(parent).__name__} reads its weight itself or goes around it "
                f"in {'train' if training else 'eval'} mode ({len(culprits)} layers in all), so with factors in its place the "
                "model would compute something else; add it to exclude_modules, e.g. "
                f"exclude_modules=({first.name.split('.', 1)[-1]!r},)"
            )


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
    handle = model.register_forward_hook(lambda module, args, output: returned.extend(_tensors(output)))
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=_devices(model)):
            torch.manual_seed(0)
            random.seed(0)
            loss = value(few)
    finally:
        random.setstate(state)
        handle.remove()
    return [torch.tensor(loss, dtype=torch.float64), *returned]


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output.detach().clone()] if output.is_floating_point() else []
    if hasattr(output, "values") and callable(output.values):
        output = tuple(output.values())
    return [t for part in output for t in _tensors(part)] if isinstance(output, tuple | list) else []


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    if [t.shape for t in a] != [t.shape for t in b]:
        return False
    return all(torch.allclose(x, y, rtol=SAME, atol=SAME * _size(y), equal_nan=True) for x, y in zip(a, b))


def _size(y: Tensor) -> float:
    finite = y[torch.isfinite(y)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode; afterwards modes and buffers (running statistics) are what they were."""
    modes = {m: m.training for m in model.modules()}
    buffers = {b: b.clone() for b in model.buffers()} if training else {}
    try:
        model.train(training)
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode
        for b, kept in buffers.items():
            b.copy_(kept)

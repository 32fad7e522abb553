"""What calibration must find, computed without jactus: each example alone, plain hooks, and autograd for the gradient of W.

Σ x xᵀ from the inputs that a forward pre-hook sees; Σ g gᵀ from the gradient of a zero added to each output; D from
torch.autograd.grad of the weight itself, which needs no hook at all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D


class Double(TorchFunctionMode):
    """Models cast to float32 here and there whatever their dtype is; under this mode they cast to float64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@dataclass
class Sums:
    """Of one layer: rows, Σ x xᵀ, Σ g gᵀ and the gradient of its weight."""

    rows: int
    input: Tensor
    output: Tensor
    gradient: Tensor


@dataclass
class Truth:
    layers: dict[str, Sums] = field(default_factory=dict)
    terms: int = 0
    loss: float = 0.0


def truth(
    model: nn.Module,
    batches: list[Any],
    terms: list[int],
    names: list[str],
    total: Callable[[nn.Module, Any, int], Tensor],
) -> Truth:
    """The sums over `batches` of the layers `names`; `total` gives the sum of a batch's loss terms."""
    found = Truth()
    model.requires_grad_(True)
    for batch, count in zip(batches, terms):
        inputs: dict[str, list[Tensor]] = {n: [] for n in names}
        zeros: dict[str, list[Tensor]] = {n: [] for n in names}
        handles = []
        try:
            for name in names:
                handles += _watch(model.get_submodule(name), inputs[name], zeros[name])
            with torch.enable_grad(), Double():
                loss = total(model, batch, count)
        finally:
            for handle in handles:
                handle.remove()
        weights = [model.get_submodule(n).weight for n in names]
        flat = [z for n in names for z in zeros[n]]
        grads = torch.autograd.grad(loss, [*weights, *flat], allow_unused=True)
        grads = [torch.zeros_like(w) if g is None else g for w, g in zip([*weights, *flat], grads)]
        rest = iter(grads[len(names) :])
        for name, D in zip(names, grads):
            if isinstance(model.get_submodule(name), Conv1D):
                D = D.T
            X = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[name]] or [D.new_zeros(0, D.shape[1])])
            G = torch.cat([next(rest).reshape(-1, D.shape[0]) for _ in zeros[name]] or [D.new_zeros(0, D.shape[0])])
            new = Sums(len(X), X.T @ X, G.T @ G, D)
            old = found.layers.get(name)
            found.layers[name] = new if old is None else _add(old, new)
        found.terms += count
        found.loss += float(loss.detach())
    return found


def _add(a: Sums, b: Sums) -> Sums:
    return Sums(a.rows + b.rows, a.input + b.input, a.output + b.output, a.gradient + b.gradient)


def _watch(module: nn.Module, inputs: list[Tensor], zeros: list[Tensor]) -> list[Any]:
    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        if torch.is_grad_enabled():  # what is computed without gradients is no part of the loss
            inputs.append(x.detach().clone())  # the model may overwrite it

    def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        zero = torch.zeros_like(output, requires_grad=True)
        zeros.append(zero)
        return output + zero

    return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]


def difference(a: Truth, b: Truth) -> tuple[float, str]:
    """The largest relative difference of two sets of sums, and where it is."""
    worst, where = 0.0, "same"
    largest = {k: max(float(getattr(s, k).norm()) for s in b.layers.values()) for k in ("output", "gradient")}
    for name, want in b.layers.items():
        got = a.layers[name]
        # Gradients carry the rounding of the largest ones that they are summed from; where they cancel, nothing else is left.
        g2 = float(want.output.norm())
        size = {
            "input": float(want.input.norm()),
            "output": max(g2, 1e-6 * (g2 * largest["output"]) ** 0.5, 1e-18 * largest["output"]),
            "gradient": max(
                1e-3 * float((want.input.trace() * want.output.trace()).abs().sqrt()) + float(want.gradient.norm()),
                1e-6 * largest["gradient"],
            ),
        }
        for kind in ("input", "output", "gradient"):
            error = float((getattr(got, kind) - getattr(want, kind)).norm()) / max(size[kind], 1e-290)
            if not error <= worst:
                ratio = float(getattr(got, kind).norm() / getattr(want, kind).norm().clamp_min(1e-290))
                worst, where = error, f"{kind} sum of {name} is off by {error:.1e} (×{ratio:.4g} in norm)"
        if got.rows != want.rows:
            return float("inf"), f"{name}: {got.rows} rows, not {want.rows}"
    return worst, where

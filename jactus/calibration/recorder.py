"""The hooks of a calibration pass: what each layer saw and was sent back, added to the sums.

Inputs are added when a layer reads them: rows that are tokens. Gradients are taken where a layer's output leaves it, whatever is
done to that output in place afterwards, and all rows of them: one that did not matter to the loss is zero and adds nothing.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError, covariance_update_, wide_product

from ..config import JactusConfig
from ..model.targets import Target
from .sides import sides
from .statistics import LayerStatistics, Statistics
from .summing import Summing
from .tokens import Tokens
from .tracing import Call, input_of


class _Tap(torch.autograd.Function):
    """The identity, whose backward hands on the gradient to `record` first. What it returns may be changed in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, record: Callable[[Tensor], None]) -> Tensor:
        ctx.record = record
        return y.new_empty(0).set_(y.detach())  # type: ignore[call-overload]  # the same memory, and no view of y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        ctx.record(grads[0].detach())
        return grads[0], None


class Recorder:
    """The hooks of one pass over the batches, for the layers whose sums it makes."""

    def __init__(
        self, targets: dict[str, Target], config: JactusConfig, sums: Summing, statistics: Statistics, tokens: Tokens
    ) -> None:
        self.targets, self.config, self.sums, self.statistics, self.tokens = targets, config, sums, statistics, tokens
        self.backward = config.needs_output or config.needs_gradient
        self.in_forward = False
        self.inputs = True
        self.index = -1
        self.calls: dict[str, int] = {}
        self.counted: dict[str, int] = {}
        self.gradients: dict[str, int] = {}
        self.given: dict[Call, tuple[weakref.ref, int]] = {}
        self.starts: list[Tensor] = []  # where the graph begins
        self.totals: dict[str, Tensor] = {}  # of inputs, where no sum of squares tells whether they are finite
        self.reading: dict[str, int] = {}  # which call a layer is in, whose inputs are summed as its weight sees them
        # Sums that come from a snapshot were read onto the CPU.
        for name, S in statistics.input_sums.items():
            statistics.input_sums[name] = S.to(self._device(name))
        for name, layer in statistics.layers.items():
            for kind, S in layer.sums().items():
                setattr(layer, kind, S.to(self._device(name)))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for name, target in self.targets.items():
                handles.append(target.module.register_forward_pre_hook(self._before(name), with_kwargs=True))
                handles.append(target.module.register_forward_hook(self._after(name), with_kwargs=True, prepend=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.given.clear()

    def begin(self, index: int, inputs: bool = True) -> None:
        """Before the forward of batch number `index`, or of an example of it; `inputs`: whether they are summed, and not yet known."""
        if not self.statistics.layers:
            self._make_sums()
        self.in_forward, self.index, self.inputs = True, index, inputs
        self.starts.clear()
        for kept in (self.calls, self.counted, self.gradients, self.given, self.totals, self.reading):
            kept.clear()

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            x = input_of(args, kwargs)
            if (
                not self.in_forward
            ):  # recomputation by activation checkpointing: counted already, but the graph must be alike
                starts = self.backward and torch.is_grad_enabled() and not x.requires_grad
                return ((x.detach().requires_grad_(True),), {}) if starts else None
            call = self.calls[name] = self.calls.get(name, -1) + 1
            if self.backward and not torch.is_grad_enabled():
                return None  # what is computed without gradients does not reach the loss
            self.counted[name] = self.counted.get(name, 0) + 1
            if self.inputs:
                self._see_input(name, call, x)
            if self.backward and not x.requires_grad:
                # With all parameters frozen the graph must begin somewhere: at the input of the first layers.
                self.starts.append(x.detach().requires_grad_(True))
                return (self.starts[-1],), {}
            return None

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if self.in_forward and (call := self.reading.pop(name, None)) is not None:
                self._add_seen_input(name, call, input_of(args, kwargs), output)
            if not (self.backward and torch.is_grad_enabled() and output.requires_grad):
                return None
            if not self.in_forward:
                return _Tap.apply(output, lambda g: None)
            x = input_of(args, kwargs)
            # Only the mean gradient needs the inputs again; without it they are free to go.
            kept, version = (x.detach(), x._version) if self.config.needs_gradient else (None, 0)
            return _Tap.apply(output, lambda g: self._add_gradient(name, kept, version, g))

        return hook

    def _see_input(self, name: str, call: int, x: Tensor) -> None:
        """Add the input, once however many layers are given it."""
        layer = self.statistics.layers[name]
        owner = layer.inputs
        if layer.seen_input_sum is not None:
            self.reading[name] = call
        if owner == name:
            self.given[name, call] = (weakref.ref(x), x._version)
            self._add_input(name, call, x)
            return
        known = self.given.get((owner, call))
        if known is None or known[0]() is not x or known[1] != x._version:
            raise JactusError(
                f"{name} and {owner} were given the same input in the first batch and different ones in batch {self.index}; "
                "the model is dynamic: calibrate them apart, with target_modules naming one at a time"
            )

    def between(self) -> None:
        """After the forward: every layer must have been called."""
        self.in_forward = False
        missing = [n for n in self.targets if not self.counted.get(n)]
        if missing:
            raise JactusError(
                f"{self.targets[missing[0]]} was never called in batch {self.index} (nor were {len(missing) - 1} others), or "
                f"only under torch.no_grad(); add it to exclude_modules, e.g. "
                f"exclude_modules=({missing[0].split('.', 1)[-1]!r},)"
            )

    def send_back(self, loss: Tensor) -> None:
        """The backward, to where the graph begins and no further: parameters of others get no gradient."""
        starts = [x for x in self.starts if x.requires_grad]
        if starts:
            torch.autograd.grad(loss, starts, allow_unused=True)
        else:
            loss.backward()
        self.starts.clear()

    def _device(self, name: str) -> torch.device:
        return self.sums.device or self.targets[name].device

    def _make_sums(self) -> None:
        def zeros(target: Target, *shape: int) -> Tensor:
            try:
                return torch.zeros(shape, dtype=self.sums.dtype, device=self._device(target.name))
            except RuntimeError as e:  # torch.OutOfMemoryError is one too
                size = math.prod(shape) * self.sums.dtype.itemsize / 1e9
                raise JactusError(
                    f"{target}: no memory for a sum of {size:.1f} GB ({' × '.join(map(str, shape))}); exclude the layer, or use "
                    f"memory_limit and statistics_device='cpu' ({e})"
                ) from e

        config, statistics = self.config, self.statistics
        assert self.tokens.first is not None
        owners = {name: self.tokens.first.owners.get(name, name) for name in self.targets}
        for name, side in sides(self.targets, owners, config).items():
            t, owner = self.targets[name], owners[name]
            layer = statistics.layers[name] = LayerStatistics(t.m, t.n, t.fingerprint, owner)
            if owner == name:
                statistics.tokens[name] = 0
                if side.x:
                    statistics.input_sums[name] = zeros(t, t.n, t.n)
            if side.g:
                layer.output_sum = zeros(t, t.m, t.m)
            if side.gradient:
                layer.gradient_sum = zeros(t, t.m, t.n)
            if side.Wx:
                layer.seen_input_sum, layer.input_trace = zeros(t, t.m, t.m), zeros(t)
            if side.Wtg:
                layer.seen_output_sum, layer.output_trace = zeros(t, t.n, t.n), zeros(t)

    def _add_input(self, name: str, call: int, x: Tensor) -> None:
        places, count = self.tokens.of(name, call, x.shape)
        self.statistics.tokens[name] += count
        if (S := self.statistics.input_sums.get(name)) is not None:
            covariance_update_(S, _rows(x.detach(), places, S.device))
        elif self.statistics.layers[name].input_trace is None:
            self.totals[name] = self.totals.get(name, 0) + x.detach().sum(dtype=torch.float32)

    def _add_seen_input(self, name: str, call: int, x: Tensor, output: Tensor) -> None:
        """Add (Wx)(Wx)ᵀ and |x|². The layer's own output has W x where it is as exact as the sum; elsewhere it is made anew."""
        layer, module = self.statistics.layers[name], self.targets[name].module
        S, trace = layer.seen_input_sum, layer.input_trace
        assert S is not None
        assert trace is not None
        places, _ = self.tokens.of(name, call, x.shape)
        x = _rows(x.detach(), places, x.device)
        if x.dtype == module.get_parameter("weight").dtype == output.dtype == S.dtype and "forward" not in vars(module):
            seen, bias = _rows(output.detach(), places, x.device), module._parameters.get("bias")
            seen = seen if bias is None else seen - bias.detach()
        else:
            seen = wide_product(x, self.targets[name].weight.T, S.dtype)
        covariance_update_(S, seen.to(S.device))
        trace += _squares(x, S.dtype).to(S.device)

    def _add_gradient(self, name: str, x: Tensor | None, version: int, g: Tensor) -> None:
        self.gradients[name] = self.gradients.get(name, 0) + 1
        layer, scale = self.statistics.layers[name], self.sums.loss_scale
        if layer.output_sum is not None:
            S = layer.output_sum
            covariance_update_(S, _rows(g, None, S.device), alpha=scale**-2)
        if layer.seen_output_sum is not None:
            assert layer.output_trace is not None
            S, rows = layer.seen_output_sum, _rows(g, None, g.device)
            seen = wide_product(rows, self.targets[name].weight, S.dtype)
            covariance_update_(S, seen.to(S.device), alpha=scale**-2)
            layer.output_trace += _squares(rows, S.dtype).to(S.device) / scale**2
        if layer.gradient_sum is not None:
            assert x is not None
            if x._version != version:
                raise JactusError(
                    f"{self.targets[name]}: the model overwrites the layer's input in place after the layer has read it, so "
                    "its mean gradient would be of other values; make that operation out of place, or exclude the layer"
                )
            D = layer.gradient_sum
            D.addmm_(_rows(g, None, D.device).to(D.dtype).T, _rows(x, None, D.device).to(D.dtype), alpha=1 / scale)

    def end(self) -> None:
        """After the backward: every call must have had its gradient, and every sum be finite."""
        silent = [n for n in self.targets if not self.gradients.get(n)] if self.backward else []
        if silent:
            raise JactusError(
                f"no gradient reached {self.targets[silent[0]]} in batch {self.index} (nor {len(silent) - 1} others): the "
                "loss does not depend on it, or it ran under torch.no_grad(); add it to exclude_modules"
            )
        fewer = [n for n in self.targets if self.backward and self.gradients[n] != self.counted[n]]
        if fewer:
            raise JactusError(
                f"{self.targets[fewer[0]]} was called {self.counted[fewer[0]]} times in batch {self.index} and the loss depends "
                f"on {self.gradients[fewer[0]]} of them; compute the others under torch.no_grad(), or exclude the layer"
            )
        self._check_finite()

    def blame(self, index: int) -> None:
        """The loss is not finite: raise, naming the first layer in the order of the calls that was given such an input."""
        for name in self.counted:
            S, trace = self.statistics.input_sums.get(name), self.statistics.layers[name].input_trace
            total = (self.totals.get(name) if trace is None else trace) if S is None else S.diagonal().sum()
            if total is not None and not torch.isfinite(total):
                raise _not_finite(f"inputs of {self.targets[name]}", index)

    def _check_finite(self) -> None:
        """A sum of squares is finite only if every value was: one number a sum, one synchronisation for all of them.

        In the order in which a bad value spreads, so that the layer named is where it began: inputs go forward,
        gradients backward.
        """
        found: list[tuple[str, Tensor]] = []
        for name, layer in self.statistics.layers.items():
            if (S := self.statistics.input_sums.get(name)) is not None:
                found.append((f"inputs of {self.targets[name]}", S.diagonal().sum()))
            if layer.seen_input_sum is not None and layer.input_trace is not None:
                found.append(
                    (f"inputs of {self.targets[name]}", layer.input_trace + layer.seen_input_sum.diagonal().sum())
                )
        for name, layer in reversed(self.statistics.layers.items()):
            if layer.output_sum is not None:
                found.append((f"gradients of {self.targets[name]}", layer.output_sum.diagonal().sum()))
            if layer.seen_output_sum is not None and layer.output_trace is not None:
                found.append(
                    (f"gradients of {self.targets[name]}", layer.output_trace + layer.seen_output_sum.diagonal().sum())
                )
            if layer.gradient_sum is not None:
                found.append((f"gradients or inputs of {self.targets[name]}", layer.gradient_sum.sum()))
        if not found:
            return
        device = found[0][1].device
        finite = torch.isfinite(torch.stack([total.to(device) for _, total in found]))
        if not finite.all():
            raise _not_finite(found[int((~finite).nonzero()[0])][0], self.index)


def _not_finite(where: str, index: int) -> JactusError:
    return JactusError(
        f"NaN or Inf in the {where} in batch {index}; check that batch, calibrate in float32, or lower loss_scale"
    )


def _rows(x: Tensor, places: Tensor | None, device: torch.device) -> Tensor:
    """x (..., d) as (T, d), on the device of the sums; of its rows those at `places` (None: all)."""
    x = x.reshape(-1, x.shape[-1])
    return (x if places is None else x.index_select(0, places.to(x.device))).to(device)


def _squares(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ|x|² () of rows x (T, d), each |x|² made in `dtype`, or in x's own where that is wider."""
    wide = torch.promote_types(x.dtype, dtype)
    return torch.linalg.vector_norm(x, dim=-1, dtype=wide).square().sum().to(dtype)

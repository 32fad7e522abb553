"""The hooks of a calibration pass: what each layer saw and was sent back, added to the sums."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError, covariance_update_

from ..config import JactusConfig
from ..model.targets import Target
from .statistics import LayerStatistics, Statistics
from .summing import Summing
from .tokens import TokenMasks


class Recorder:
    """The hooks of one pass: what each layer saw and was sent back, added to the sums."""

    def __init__(self, targets: dict[str, Target], config: JactusConfig, sums: Summing, statistics: Statistics) -> None:
        self.targets, self.config, self.sums, self.statistics = targets, config, sums, statistics
        self.backward = config.needs_output or config.needs_gradient
        self.in_forward = False
        self.seen: dict[str, list[Tensor]] = {}
        self.versions: dict[str, list[int]] = {}
        self.gradients: set[str] = set()
        self.masks: TokenMasks
        # Sums that come from a snapshot were read onto the CPU.
        for name, S in statistics.input_sums.items():
            statistics.input_sums[name] = S.to(self._device(name))
        for name, layer in statistics.layers.items():
            for kind in ("output_sum", "gradient_sum"):
                S = getattr(layer, kind)
                setattr(layer, kind, None if S is None else S.to(self._device(name)))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for name, target in self.targets.items():
                handles.append(target.module.register_forward_pre_hook(self._before(name), with_kwargs=True))
                handles.append(target.module.register_forward_hook(self._after(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.seen.clear()

    def begin(self, masks: TokenMasks) -> None:
        self.masks, self.in_forward = masks, True
        self.seen.clear()
        self.versions.clear()
        self.gradients.clear()

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not self.in_forward:
                return None  # recomputation by activation checkpointing: this call was counted already
            x = args[0] if args else kwargs["input"]
            # References keep the inputs alive, so that identity can tell which layers share one.
            self.seen.setdefault(name, []).append(x)
            self.versions.setdefault(name, []).append(x._version)
            if self.backward and torch.is_grad_enabled() and not x.requires_grad:
                # With all parameters frozen the graph must begin somewhere: at the input of the first layers.
                return (x.detach().requires_grad_(True),), {}
            return None

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if self.backward and self.in_forward and output.requires_grad:
                x = self.seen[name][-1]
                shape, version = x.shape, x._version
                # Only the mean gradient needs the inputs again; without it they are free to go.
                kept = x if self.config.needs_gradient else None
                output.register_hook(lambda g: self._add_gradient(name, shape, kept, version, g.detach()))

        return hook

    def between(self, index: int) -> None:
        """After the forward: add the inputs, each once however many layers were given it."""
        self.in_forward = False
        missing = [n for n in self.targets if n not in self.seen]
        if missing:
            raise JactusError(
                f"{self.targets[missing[0]]} was never called in batch {index} (nor were {len(missing) - 1} others); "
                f"add it to exclude_modules, e.g. exclude_modules=({missing[0].split('.', 1)[-1]!r},)"
            )
        groups: dict[tuple[int, ...], str] = {}
        owner = {name: groups.setdefault(tuple(map(id, xs)), name) for name, xs in self.seen.items()}
        if not self.statistics.layers:
            self._make_sums(owner)
        for name in self.targets:
            kept = self.statistics.layers[name].inputs
            if self.seen[name] and owner[name] != owner[kept]:
                raise JactusError(
                    f"{name} and {kept} were given the same input in the first batch and different ones in batch {index}; "
                    "the model is dynamic: calibrate them apart, with target_modules naming one at a time"
                )
            if name == kept:
                for x, version in zip(self.seen[name], self.versions[name]):
                    self._check_unchanged(name, x, version)
                    self._add_input(name, x)
        self.seen.clear()

    def _device(self, name: str) -> torch.device:
        return self.sums.device or self.targets[name].weight.device

    def _make_sums(self, owner: dict[str, str]) -> None:
        def zeros(target: Target, *shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=self.sums.dtype, device=self._device(target.name))

        config, statistics = self.config, self.statistics
        for name, t in self.targets.items():
            statistics.layers[name] = LayerStatistics(
                t.m,
                t.n,
                t.fingerprint,
                owner[name],
                zeros(t, t.m, t.m) if config.needs_output else None,
                zeros(t, t.m, t.n) if config.needs_gradient else None,
            )
            if owner[name] == name:
                statistics.tokens[name] = 0
                if config.needs_input:
                    statistics.input_sums[name] = zeros(t, t.n, t.n)

    def _add_input(self, name: str, x: Tensor) -> None:
        mask = self.masks.of(name, x.shape)
        self.statistics.tokens[name] += x.numel() // x.shape[-1] if mask is None else int(mask.sum())
        if self.config.needs_input:
            S = self.statistics.input_sums[name]
            covariance_update_(S, *_rows(x.detach(), mask, S.device))

    def _add_gradient(self, name: str, shape: torch.Size, x: Tensor | None, version: int, g: Tensor) -> None:
        self.gradients.add(name)
        layer, mask = self.statistics.layers[name], self.masks.of(name, shape)
        scale = self.sums.loss_scale
        if layer.output_sum is not None:
            S = layer.output_sum
            covariance_update_(S, *_rows(g, mask, S.device), alpha=scale**-2)
        if layer.gradient_sum is not None:
            assert x is not None
            self._check_unchanged(name, x, version)
            D = layer.gradient_sum
            rows, kept = _rows(g, mask, D.device)
            inputs, _ = _rows(x.detach(), mask, D.device)
            if kept is not None:
                rows, inputs = rows[kept], inputs[kept]
            D.addmm_(rows.to(D.dtype).T, inputs.to(D.dtype), alpha=1 / scale)

    def _check_unchanged(self, name: str, x: Tensor, version: int) -> None:
        if x._version != version:
            raise JactusError(
                f"{self.targets[name]}: the model overwrites the layer's input in place after the layer has read it, so "
                "its covariance would be of other values; make that operation out of place, or exclude the layer"
            )

    def end(self, index: int) -> None:
        """After the backward: every layer must have had its gradient, and every sum be finite."""
        self.seen.clear()
        silent = [n for n in self.targets if n not in self.gradients] if self.backward else []
        if silent:
            raise JactusError(
                f"no gradient reached {self.targets[silent[0]]} in batch {index} (nor {len(silent) - 1} others): the loss "
                "does not depend on it, or it ran under torch.no_grad(); add it to exclude_modules"
            )
        self._check_finite(index)

    def blame(self, index: int) -> None:
        """The loss is not finite: raise, naming the first layer in the order of the calls that was given such an input."""
        for name, inputs in self.seen.items():
            if not all(bool(torch.isfinite(x).all()) for x in inputs):
                raise _not_finite(f"inputs of {self.targets[name]}", index)

    def _check_finite(self, index: int) -> None:
        """A sum of squares is finite only if every value was: one number a sum, one synchronisation for all of them.

        In the order in which a bad value spreads, so that the layer named is where it began: inputs go forward,
        gradients backward.
        """
        found: list[tuple[str, Tensor]] = []
        for name, S in self.statistics.input_sums.items():
            found.append((f"inputs of {self.targets[name]}", S.diagonal().sum()))
        for name, layer in reversed(self.statistics.layers.items()):
            if layer.output_sum is not None:
                found.append((f"gradients of {self.targets[name]}", layer.output_sum.diagonal().sum()))
            if layer.gradient_sum is not None:
                found.append((f"gradients or inputs of {self.targets[name]}", layer.gradient_sum.sum()))
        if not found:
            return
        device = found[0][1].device
        finite = torch.isfinite(torch.stack([total.to(device) for _, total in found]))
        if not finite.all():
            raise _not_finite(found[int((~finite).nonzero()[0])][0], index)


def _not_finite(where: str, index: int) -> JactusError:
    return JactusError(
        f"NaN or Inf in the {where} in batch {index}; check that batch, calibrate in float32, or lower loss_scale"
    )


def _rows(x: Tensor, mask: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """x (..., d) as (T, d) with its mask, on the device of the sums."""
    return x.reshape(-1, x.shape[-1]).to(device), None if mask is None else mask.to(device)

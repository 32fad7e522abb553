"""Step 1, calibrate: one forward and backward over a few examples, summing covariances at every target layer."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jactus_kernels import JactusError, covariance_update_

from .config import JactusConfig
from .losses import Loss, TokenMasks, loss_sum, to_device
from .resume import Snapshots
from .statistics import LayerStatistics, Statistics
from .targets import Target, find_targets

logger = logging.getLogger("jactus")


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    config: JactusConfig | None = None,
    *,
    loss: Loss | None = None,
    resume: str | os.PathLike | None = None,
    resume_every: float = 60.0,
    progress: bool = True,
) -> Statistics:
    """Sum input covariances, output-gradient covariances and mean gradients over `batches`.

    model: any torch module; it is put in eval mode for the run and left as it was, hooks removed, even on an error.
    batches: dicts of keyword arguments with labels for a transformers model; anything that `loss` takes otherwise.
        Rows where `attention_mask` is 0 enter no sum. The result does not depend on the batch size.
    loss: `loss(model, batch)`, see `losses.loss_sum`; None takes the model's own.
    resume: a file for snapshots, written every `resume_every` seconds and removed at the end. If it exists, the run
        continues from it to the same result; batches must come in the same order (they are checked).

    Raises JactusError for what cannot be calibrated: no target, no loss, values that are not finite (with the layer and
    the batch), a layer that was never called, a snapshot of another run.
    """
    config = config or JactusConfig()
    targets = find_targets(model, config)
    for target in targets.values():
        if not torch.isfinite(target.weight).all():
            raise JactusError(f"{target} has weights that are not finite; the checkpoint is broken")
    passes = partition(targets, config)
    if len(passes) > 1 and iter(batches) is batches:
        raise JactusError(
            f"memory_limit={config.memory_limit} needs {len(passes)} passes over the batches, but they come from an "
            "iterator that runs only once; pass a list or a DataLoader"
        )
    bytes_needed = max(sum(sum_bytes(t, config) for t in part) for part in passes)
    logger.info("calibrating %d layers, sums of at most %.1f MB at a time", len(targets), bytes_needed / 1e6)
    statistics = Statistics()
    snapshots = Snapshots(resume, resume_every, config, targets)
    for number, part in enumerate(passes):
        done = snapshots.finished(number)
        if done is None:
            done = _one_pass(model, batches, config, part, loss, snapshots, number, progress)
            if number + 1 < len(passes):
                snapshots.finish(done, number)
        _append(statistics, done, to_cpu=len(passes) > 1)
    snapshots.clear()
    statistics.symmetrize_()
    fewest, advised = min(statistics.tokens.values(), default=0), statistics.advised_tokens()
    if fewest < advised and (config.needs_input or config.needs_output):
        logger.warning("calibrated on %d tokens; %d are advised for the widest layer", fewest, advised)
    return statistics


def sum_bytes(target: Target, config: JactusConfig) -> int:
    """Bytes of the sums kept for one layer, before any sharing of inputs."""
    m, n = target.m, target.n
    count = config.needs_input * n * n + config.needs_output * m * m + config.needs_gradient * m * n
    return count * getattr(torch, config.statistics_dtype).itemsize


def partition(targets: dict[str, Target], config: JactusConfig) -> list[list[Target]]:
    """Targets, in order, cut into parts whose sums fit in `memory_limit` each; one part without a limit."""
    limit = config.memory_limit
    parts: list[list[Target]] = [[]]
    used = 0
    for target in targets.values():
        size = sum_bytes(target, config)
        if limit is not None and size > limit:
            raise JactusError(f"memory_limit={limit} bytes is too small for {target}, whose sums take {size} bytes")
        if limit is not None and used + size > limit:
            parts.append([])
            used = 0
        parts[-1].append(target)
        used += size
    return parts


def _append(whole: Statistics, part: Statistics, to_cpu: bool) -> None:
    if to_cpu:
        part.input_sums = {k: S.cpu() for k, S in part.input_sums.items()}
        for layer in part.layers.values():
            layer.output_sum = None if layer.output_sum is None else layer.output_sum.cpu()
            layer.gradient_sum = None if layer.gradient_sum is None else layer.gradient_sum.cpu()
    whole.layers |= part.layers
    whole.input_sums |= part.input_sums
    whole.tokens |= part.tokens
    whole.terms = part.terms


def _one_pass(
    model: nn.Module,
    batches: Iterable[Any],
    config: JactusConfig,
    part: list[Target],
    loss: Loss | None,
    snapshots: Snapshots,
    number: int,
    progress: bool,
) -> Statistics:
    statistics, skip = snapshots.started(number)
    recorder = Recorder({t.name: t for t in part}, config, statistics)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    index = -1
    with frozen_eval(model), recorder.hooks():
        label = "calibrating" if number == 0 else f"calibrating, pass {number + 1}"
        for index, batch in enumerate(tqdm(batches, label, unit="batch", disable=not progress)):
            snapshots.see(batch)
            if index < skip:
                if index == skip - 1:
                    snapshots.check(number)
                continue
            batch = to_device(batch, device)
            recorder.begin(TokenMasks(model, batch, index))
            with torch.enable_grad() if recorder.backward else torch.no_grad():
                total, terms = loss_sum(model, batch, loss, index)
                recorder.between(index)
                if recorder.backward:
                    (total * config.loss_scale).backward()
            statistics.terms += terms
            recorder.end(index)
            snapshots.maybe_save(statistics, number, index + 1)
    if index < 0:
        raise JactusError("no batch came out of `batches`; pass a list or loader with at least one")
    if index + 1 < skip:
        raise JactusError(
            f"the snapshot holds {skip} batches and only {index + 1} came; resume with the same batches or delete the file"
        )
    return statistics


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """No dropout, no parameter gradients, no checkpointing (which runs layers twice); all put back at the end."""
    training = [m for m in model.modules() if m.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for m in training:
            m.training = True
        for p in trainable:
            p.requires_grad_(True)


class Recorder:
    """The hooks of one pass: what each layer saw and was sent back, added to the sums."""

    def __init__(self, targets: dict[str, Target], config: JactusConfig, statistics: Statistics) -> None:
        self.targets, self.config, self.statistics = targets, config, statistics
        self.backward = config.needs_output or config.needs_gradient
        self.dtype = getattr(torch, config.statistics_dtype)
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
                f"{self.targets[missing[0]]} was never called in batch {index} (nor were {len(missing) - 1} others); add "
                f"it to exclude_modules, e.g. exclude_modules=({missing[0].split('.', 1)[-1]!r},)"
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
        return torch.device(self.config.statistics_device or self.targets[name].module.weight.device)

    def _make_sums(self, owner: dict[str, str]) -> None:
        def zeros(target: Target, *shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=self.dtype, device=self._device(target.name))

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
        scale = self.config.loss_scale
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
        # A sum of squares is finite only if every value was: one number a sum, one synchronisation for all of them.
        what, sums = [], []
        for name, S in self.statistics.input_sums.items():
            what.append(f"inputs of {self.targets[name]}"), sums.append(S.diagonal().sum())
        for name, layer in self.statistics.layers.items():
            if layer.output_sum is not None:
                what.append(f"gradients of {self.targets[name]}"), sums.append(layer.output_sum.diagonal().sum())
            if layer.gradient_sum is not None:
                what.append(f"gradients or inputs of {self.targets[name]}"), sums.append(layer.gradient_sum.sum())
        if sums:
            finite = torch.isfinite(torch.stack([s.cpu() if self.config.statistics_device else s for s in sums]))
            if not finite.all():
                first = what[int((~finite).nonzero()[0])]
                raise JactusError(
                    f"NaN or Inf in the {first} in batch {index}; check that batch, calibrate in float32, or lower loss_scale"
                )


def _rows(x: Tensor, mask: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """x (..., d) as (T, d) with its mask, on the device of the sums."""
    return x.reshape(-1, x.shape[-1]).to(device), None if mask is None else mask.to(device)

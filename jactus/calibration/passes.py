"""Step 1, calibrate: one forward and backward over a few examples, summing covariances at every target layer."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from jactus_kernels import JactusError

from ..config import JactusConfig
from ..model.families import output_embedding
from ..model.targets import Target, find_targets, refuse_absent
from .cache import DecoderCache
from .checks import check_forwards
from .examples import few, singles, size, to_device
from .losses import Loss, LossSum
from .padding import masks_of
from .recorder import Recorder
from .snapshots import Snapshots
from .statistics import Statistics
from .summing import SUMMING, Summing
from .tokens import Tokens

logger = logging.getLogger("jactus")


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    config: JactusConfig | None = None,
    *,
    loss: Loss | None = None,
    memory_limit: int | None = None,
    statistics_dtype: torch.dtype | str = "float32",
    statistics_device: torch.device | str | None = None,
    loss_scale: float = 1.0,
    resume: str | os.PathLike | None = None,
    resume_every: float = 60.0,
    verify: bool = True,
    progress: bool = True,
) -> Statistics:
    """Sum input covariances, output-gradient covariances and mean gradients over `batches`.

    model: any torch module; it is put in eval mode for the run and left as it was, hooks removed, even on an error.
    batches: dicts of keyword arguments with labels for a transformers model; anything that `loss` takes otherwise.
        Rows of padding enter no sum of inputs. The result does not depend on the batch size.
    loss: `loss(model, batch)`, see `losses.LossSum`; None takes the model's own.
    memory_limit: bytes of sums held at a time; above it, calibration takes several passes over the batches.
    statistics_dtype: float32 or float64, what the covariances are summed in.
    statistics_device: where sums are kept, e.g. "cpu" to spare the GPU; None: each on its layer's.
    loss_scale: the loss is multiplied by it before backward, and the gradients divided by it.
    resume: a file for snapshots, written every `resume_every` seconds and removed at the end. If it exists, the run
        continues from it to the same result; batches must come in the same order (they are checked).
    verify: look into the first batch (and the first with padding), at the price of a few examples' time: what the loss sums or
        averages, which rows are tokens, that layers are used by their forward. False goes by names and shapes.

    Raises JactusError for what cannot be calibrated: no target, no loss, values that are not finite (with the layer and
    the batch), a layer that was never called, a snapshot of another run.
    """
    chosen = config = config or JactusConfig()
    sums = Summing.checked(statistics_dtype, statistics_device, loss_scale, memory_limit)
    targets = find_targets(model, config)
    refuse_inference("calibrate", model)
    config = config.with_share(output_embedding(model) is not None)
    refuse_absent(targets)
    for target in targets.values():
        if not torch.isfinite(target.weight).all():
            raise JactusError(f"{target} has weights that are not finite; the checkpoint is broken")
    passes = partition(targets, config, sums)
    if len(passes) > 1 and iter(batches) is batches:
        raise JactusError(
            f"memory_limit={memory_limit} needs {len(passes)} passes over the batches, but they come from an "
            "iterator that runs only once; pass a list or a DataLoader"
        )
    bytes_needed = max(sum(sum_bytes(t, config, sums) for t in part) for part in passes)
    logger.info("calibrating %d layers, sums of at most %.1f MB at a time", len(targets), bytes_needed / 1e6)
    statistics = Statistics(config=chosen)
    snapshots = Snapshots(resume, resume_every, config, sums, model)
    losses = LossSum(model, loss, verify)
    for number, part in enumerate(passes):
        done = snapshots.finished(number)
        if done is None:
            done = _one_pass(model, batches, config, sums, part, losses, snapshots, number, progress, verify)
            if number + 1 < len(passes):
                snapshots.finish(done, number)
        if number and done.terms != statistics.terms:
            raise JactusError(
                f"pass {number + 1} over the batches had {done.terms} loss terms and the passes before it {statistics.terms}: "
                "they were other batches; give the same in every pass (no shuffling), or a greater memory_limit"
            )
        _append(statistics, done, to_cpu=len(passes) > 1)
    snapshots.clear()
    statistics.symmetrize_()
    short = statistics.short_of_tokens()
    if short and (config.needs_input or config.needs_output):
        logger.warning(
            "%d of %d layers saw fewer tokens than the 4n advised (pass more batches), e.g. %s: %d of %d",
            len(short), len(targets), short[0], statistics.layer_tokens(short[0]), 4 * targets[short[0]].n,
        )  # fmt: skip
    return statistics


def sum_bytes(target: Target, config: JactusConfig, sums: Summing = SUMMING) -> int:
    """Bytes of the sums kept for one layer, before any sharing of inputs."""
    m, n = target.m, target.n
    count = config.needs_input * n * n + config.needs_output * m * m + config.needs_gradient * m * n
    return count * sums.dtype.itemsize


def partition(targets: dict[str, Target], config: JactusConfig, sums: Summing = SUMMING) -> list[list[Target]]:
    """Targets, in order, cut into parts whose sums fit in `memory_limit` each; one part without a limit."""
    limit = sums.memory_limit
    parts: list[list[Target]] = [[]]
    used = 0
    for target in targets.values():
        size = sum_bytes(target, config, sums)
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
    whole.outputs += part.outputs


def _one_pass(
    model: nn.Module,
    batches: Iterable[Any],
    config: JactusConfig,
    sums: Summing,
    part: list[Target],
    losses: LossSum,
    snapshots: Snapshots,
    number: int,
    progress: bool,
    verify: bool,
) -> Statistics:
    statistics, skip = snapshots.started(number)
    resumable = snapshots.path is not None
    targets = {t.name: t for t in part}
    tokens = Tokens(model, targets, losses.value, verify)
    recorder = Recorder(targets, config, sums, statistics, tokens)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    index = -1
    with frozen_eval(model), recorder.hooks(), DecoderCache(model) as cache:
        label = "calibrating" if number == 0 else f"calibrating, pass {number + 1}"
        for index, batch in enumerate(tqdm(batches, label, unit="batch", disable=not progress)):
            snapshots.see(batch)
            if not index and resumable:
                snapshots.loss = losses.value(few(to_device(batch, device)))
            if index < skip:
                if index == skip - 1:
                    snapshots.check(number)
                continue
            batch = to_device(batch, device)
            if tokens.first is None:
                statistics.outputs = _look(model, targets, batch, losses, tokens, cache, index, verify)
            tokens.begin(batch, index)
            for part_of in _alone(batch, index, tokens) if tokens.alone else (batch,):
                losses.prepare(part_of, index)
                if tokens.alone:
                    if losses.is_empty(part_of):
                        continue
                    tokens.one_of(part_of)
                recorder.begin(index)
                with torch.enable_grad() if recorder.backward else torch.no_grad():
                    total, terms = losses.of(part_of, index, recorder.blame)
                    recorder.between()
                    if recorder.backward:
                        if not total.requires_grad:
                            raise JactusError(
                                f"batch {index}: the loss of {type(model).__name__} depends on none of the {len(part)} target "
                                f"layers (the first is {part[0]}): it is detached, made under torch.no_grad(), or of other layers"
                            )
                        recorder.send_back(total * sums.loss_scale)
                statistics.terms += terms
                recorder.end()
            snapshots.maybe_save(statistics, number, index + 1)
    if index < 0:
        raise JactusError("no batch came out of `batches`; pass a list or loader with at least one")
    if index + 1 < skip:
        raise JactusError(
            f"the snapshot holds {skip} batches, and only {index + 1} came; resume with the same ones or delete the file"
        )
    return statistics


def _look(
    model: nn.Module,
    targets: dict[str, Target],
    batch: Any,
    losses: LossSum,
    tokens: Tokens,
    cache: DecoderCache,
    index: int,
    verify: bool,
) -> tuple[str, ...]:
    """What the first batch shows, before anything is summed; returns the layers that compute the model's answer."""
    masks_of(model, batch, index)  # refuses what is no mask of padding before the model is run on it
    losses.prepare(batch, index)
    cache.decide(batch, losses.value)
    tokens.begin(batch, index)
    assert tokens.first is not None
    for name in tokens.first.changed:
        raise JactusError(
            f"{targets[name]}: another tool replaced its forward by one that gives something else than the layer itself, so what its "
            "output's gradient says of the weight cannot be told; take that hook away (accelerate: remove_hook_from_module), or "
            "exclude the layer"
        )
    for name in tokens.first.not_heads if verify else ():
        raise JactusError(
            f"{name} is called like a task head, and is not the layer that computes what {type(model).__name__} returns; whether "
            "it is to be compressed cannot be told: rename it, or name the layers to compress in target_modules"
        )
    for name in tokens.first.outputs:
        logger.warning(
            "%s computes what the model returns, so it looks like a task head, and is to be compressed as any other layer; if it "
            "is one, and fresh, exclude it (exclude_modules), fit it first and name it in trainable_extras", targets[name],
        )  # fmt: skip
    if verify:
        check_forwards(model, targets, few(batch), losses.value)
        logger.info("the loss is %s; every target is used by its forward alone", losses.found())
    return tokens.first.outputs


def _alone(batch: Any, index: int, tokens: Tokens) -> Iterator[Any]:
    if size(batch) is None:
        name, call = min(tokens.tables)
        raise JactusError(
            f"{name} reads rows that are no example's (call {call} of a forward is given as many whatever the number of "
            f"examples), and batch {index} cannot be cut into examples to run them one at a time; exclude the layer"
        )
    return singles(batch)


def refuse_inference(step: str, model: nn.Module) -> None:
    """Raise JactusError where autograd is off for good: in inference mode, or for a model that was made in it."""
    if torch.is_inference_mode_enabled():
        raise JactusError(f"{step} needs gradients and is called under torch.inference_mode(); call it outside")
    if any(p.is_inference() for p in model.parameters()):
        raise JactusError(f"{step}: the weights of {type(model).__name__} were made in inference mode; load it outside")


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """No dropout, no parameter gradients, no checkpointing (which runs layers twice); all put back at the end."""
    training = [m for m in model.modules() if m.training]
    own = [m for m in training if type(m).train is not nn.Module.train]  # of which changing the mode does more
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for m in own:
            m.train()
        for m in model.modules():
            m.training = False
        for m in training:
            m.training = True
        for p in trainable:
            p.requires_grad_(True)

"""Fit a fresh task head before calibrating: gradients through a random head say nothing about the task."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jactus_kernels import JactusError

from ..model.families import head_parameters
from ..model.offload import first_device
from .cache import DecoderCache
from .distributed import Group, agree, first_of, refuse_unready, sum_
from .examples import to_device
from .losses import Loss, LossSum
from .modes import frozen_eval, refuse_inference
from .replay import Replay


def fit_head(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    head: str | Sequence[str] = (),
    loss: Loss | None = None,
    l2: float = 1e-3,
    iterations: int = 100,
    verify: bool = True,
    progress: bool = True,
    group: Group = None,
) -> float:
    """Fit the task head alone, on the frozen features of the base model (a linear probe); returns the mean loss.

    The base model runs once per batch; of its outputs what reaches the loss is kept in memory, and the head is fitted to it by
    full-batch L-BFGS under the model's own loss (or `loss`), with a penalty of l2·‖weights‖² on the mean. A head that fits every
    row leaves small, noisy gradients to calibrate on and to train with: on 3,000 rows of 20 classes a tenth of the default
    cost 3 points of test accuracy before training and about one after it (LOG.md).

    head: name endings of the head's modules, where the model does not say; `verify` as in `calibrate`.
    group: a process group of torch.distributed, each rank of which has its own shard of the batches, maybe none; all fit one head
        to all of them. None: this process alone.

    Raises JactusError when the model has no head outside its base model, a batch has no loss, or what was kept does not give
    the model's own loss again.
    """
    refuse_inference("fit_head", model)
    wanted_head = _head(model, (head,) if isinstance(head, str) else tuple(head))
    refuse_unready("fit_head", group)
    if group is not None:
        agree(group, "fit_head", model, l2=l2, iterations=iterations)
        progress = progress and first_of(group)
    for name, p in wanted_head.items():
        if p.is_meta:
            raise JactusError(
                f"{name} {tuple(p.shape)}, of the head to fit, is offloaded or was never loaded; give its module a device in device_map"
            )
    device = first_device(model)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    losses = LossSum(model, loss, verify)
    kept: list[Any] = []
    with frozen_eval(model), DecoderCache(model) as cache, Replay(model, wanted_head) as replay:
        for index, batch in enumerate(tqdm(batches, "features", unit="batch", disable=not progress)):
            batch = to_device(batch, device)
            losses.prepare(batch, index)
            if not index:
                cache.decide(batch, losses.value)
            replay.record(functools.partial(_summed, losses, batch, index), index)
            kept.append(batch)
        if not kept and group is None:
            raise JactusError("no batch came out of `batches`; pass a list or loader with at least one")
        parameters = list(wanted_head.values())
        before, gradients = [p.data for p in parameters], [p.grad for p in parameters]
        try:
            for p in parameters:
                p.data = p.data.float() if p.element_size() < 4 else p.data.clone()  # no line search in half precision
            final = _minimise(parameters, kept, losses, replay, l2, iterations, group)
            for p, old in zip(parameters, before):
                p.data = p.data.to(old.dtype)
            return final
        except BaseException:
            for p, old in zip(parameters, before):
                p.data = old
            raise
        finally:
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient
            for name, p in model.named_parameters():
                p.requires_grad_(wanted[name])


def _head(model: nn.Module, named: tuple[str, ...]) -> dict[str, nn.Parameter]:
    if not named:
        if found := head_parameters(model):
            return found
        raise JactusError(
            f"{type(model).__name__} has no task head outside its base model; nothing to fit (a language model needs none; name the "
            "head of a model of your own: fit_head(model, batches, head='fc'), and JactusConfig(exclude_modules=('fc',), "
            "trainable_extras=('fc',)) afterwards)"
        )
    modules = {n for n, _ in model.named_modules() if any(n == e or n.endswith(f".{e}") for e in named)}
    found = {n: p for n, p in model.named_parameters() if any(n.startswith(f"{m}.") for m in modules)}
    if not found:
        raise JactusError(f"fit_head: {type(model).__name__} has no module with parameters that is called {named}")
    return found


def _summed(losses: LossSum, batch: Any, index: int) -> Tensor:
    return losses.of(batch, index)[0]


def _minimise(
    head: list[nn.Parameter],
    kept: list[Any],
    losses: LossSum,
    replay: Replay,
    l2: float,
    iterations: int,
    group: Group,
) -> float:
    for p in head:
        p.requires_grad_(True)
    optimizer = torch.optim.LBFGS(head, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")
    final = float("nan")

    def closure() -> Tensor:
        nonlocal final
        optimizer.zero_grad()
        torch.clear_autocast_cache()  # an outer autocast keeps the cast of the head, whatever a step makes of it
        total, count = 0.0, 0
        gradients = [torch.zeros_like(p) for p in head]
        for index, batch in enumerate(kept):
            # The base model answers from memory, so the model's own code computes pooling, logits and loss.
            with replay.of(index):
                summed, terms = losses.of(batch, index)
            for total_gradient, g in zip(gradients, torch.autograd.grad(summed, head, allow_unused=True)):
                if g is not None:  # a batch of another task than this head's
                    total_gradient += g
            total, count = total + float(summed.detach()), count + terms
        if group is not None:
            both = torch.tensor([total, count], dtype=torch.float64)
            sum_(group, "fit_head", [*gradients, both])
            total, count = float(both[0]), int(both[1])
            if not count:
                raise JactusError("fit_head: no batch came out of `batches` on any rank")
        final = total / count
        penalty = sum(l2 * float(p.detach().square().sum()) for p in head if p.dim() > 1)
        for p, g in zip(head, gradients):
            p.grad = g / count + (2 * l2 * p.detach() if p.dim() > 1 else 0)
        return torch.tensor(final + penalty)

    optimizer.step(closure)
    for p in head:
        p.grad = None
    return final

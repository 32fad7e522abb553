"""The frozen part of a model answers from memory: what its modules returned is kept, and given back call by call."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

from .examples import tensors
from .rounding import rounding


@dataclass(frozen=True)
class Rows:
    """A tensor (…, n) of which only some rows reach the loss: those, where they are, and the shape of all."""

    kept: Tensor
    where: Tensor
    shape: torch.Size

    def whole(self) -> Tensor:
        """The tensor with zeros in all other rows."""
        out = self.kept.new_zeros(self.shape.numel() // self.shape[-1], self.shape[-1])
        out[self.where] = self.kept
        return out.view(self.shape)


class Replay:
    """Records the outputs of the largest modules without a parameter of `head`, and plays them back.

    A module may be called several times a batch (towers that share an encoder). Rows that do not reach the loss, for two heads
    drawn at random alike, are not kept: of a language model's hidden states those of one token are.
    """

    def __init__(self, model: nn.Module, head: Mapping[str, nn.Parameter]) -> None:
        self.model, self.head = model, dict(head)
        self.frozen = _largest_without(model, {id(p) for p in head.values()})
        if not self.frozen:
            raise JactusError(
                f"{type(model).__name__} has no module with parameters beside its head; nothing to fit it to"
            )
        self.outputs: list[dict[str, list[Any]]] = []
        self.own: dict[str, Any] = {}

    def __enter__(self) -> "Replay":
        self.own = {n: vars(m)["forward"] for n, m in self.frozen.items() if "forward" in vars(m)}  # e.g. accelerate's
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for name, module in self.frozen.items():
            vars(module).pop("forward", None)
            if name in self.own:
                vars(module)["forward"] = self.own[name]

    def record(self, run: Callable[[], Tensor], index: int) -> None:
        """Run a batch and keep what its frozen modules return. Raises JactusError where that does not give the loss again."""
        called: dict[str, list[Any]] = {}
        handles = [
            module.register_forward_hook(lambda m, a, out, name=name: called.setdefault(name, []).append(out))
            for name, module in self.frozen.items()
        ]
        try:
            with torch.no_grad():
                loss = run()
        finally:
            for handle in handles:
                handle.remove()
        if not called:
            raise JactusError(
                f"batch {index}: no module beside the head was called; there is nothing to fit the head to"
            )
        whole = {name: [_features(out) for out in outs] for name, outs in called.items()}
        self.outputs.append(whole)
        again = self._check(run, loss, index)
        sparse = self._sparse(whole, run, again)
        kept = whole if sparse is None else sparse
        self.outputs[-1] = {name: [_widened(out) for out in outs] for name, outs in kept.items()}

    def _check(self, run: Callable[[], Tensor], loss: Tensor, index: int) -> Tensor:
        """The loss of the kept outputs, which is the model's own."""
        with torch.no_grad(), self.of(len(self.outputs) - 1):
            again = run()
        tolerance = rounding(self.model, float(loss))[0]
        if abs(float(again) - float(loss)) > tolerance * max(abs(float(loss)), 1e-6):
            raise JactusError(
                f"batch {index}: from the kept outputs of {sorted(self.frozen)[:3]} the loss is {float(again):.6g}, and the model's "
                f"own is {float(loss):.6g}: its head depends on more than they return; fit it in a loop of your own"
            )
        return again

    def _sparse(
        self, whole: dict[str, list[Any]], run: Callable[[], Tensor], loss: Tensor
    ) -> dict[str, list[Any]] | None:
        """What of the outputs reaches the loss; None to keep them whole, where that alone gives their very `loss`."""
        draws = [self._reaching(whole, run, seed) for seed in (0, 1)]
        if not draws[0] or any(not torch.equal(a, b) for a, b in zip(*(d.values() for d in draws))):
            return None
        kept = {name: [_cut_rows(out, draws[0]) for out in outs] for name, outs in whole.items()}
        self.outputs[-1] = kept
        with torch.no_grad(), self.of(len(self.outputs) - 1):
            sparse_loss = run()
        return kept if torch.equal(sparse_loss, loss) else None

    def _reaching(self, whole: dict[str, list[Any]], run: Callable[[], Tensor], seed: int) -> dict[int, Tensor]:
        """id of each tensor of three dimensions → which of its rows have a gradient under a random head."""
        kept = (t for outs in whole.values() for out in outs for _, t in tensors(out))
        leaves = [t for t in kept if t.is_floating_point() and t.dim() > 2]
        before = {p: p.data for p in self.head.values()}
        try:
            draw = torch.Generator().manual_seed(seed)  # of its own: nobody else's random numbers change
            for p in before:
                p.data = p.data + 0.02 * torch.randn(p.shape, generator=draw).to(p.device, p.dtype)
            for t in leaves:
                t.requires_grad_(True)
            with torch.enable_grad(), self.of(len(self.outputs) - 1):
                loss = run()
                none = [None] * len(leaves)
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else none
        finally:
            for p, old in before.items():
                p.data = old
            for t in leaves:
                t.requires_grad_(False)
        return {
            id(t): torch.zeros(t[..., 0].numel(), dtype=torch.bool, device=t.device)
            if g is None
            else (g.flatten(0, -2) != 0).any(-1)
            for t, g in zip(leaves, gradients)
        }

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """The frozen modules answer as they did for batch number `index`."""
        turns = {name: iter(outs) for name, outs in self.outputs[index].items()}
        try:
            for name, module in self.frozen.items():
                vars(module)["forward"] = functools.partial(_answer, name, turns.get(name, iter(())), index)
            yield
        finally:
            self._restore()


def _answer(name: str, turns: Iterator[Any], index: int, *args: Any, **kwargs: Any) -> Any:
    try:
        return _whole(next(turns))
    except StopIteration:
        raise JactusError(
            f"batch {index}: {name} is called more often than when its outputs were kept; the model calls it differently from one "
            "forward to the next, so its head cannot be fitted from memory"
        ) from None


def _largest_without(model: nn.Module, head: set[int]) -> dict[str, nn.Module]:
    """The largest modules that have parameters, and none of the head."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{n}.") for n in found):
            continue
        own = {id(p) for p in module.parameters()}
        if name and own and not own & head:
            found[name] = module
    return found


def _widened(kept: Any) -> Any:
    """What is kept in float32 where it was narrower: no line search in half precision."""
    if isinstance(kept, Tensor):
        return kept.float() if kept.is_floating_point() and kept.element_size() < 4 else kept
    if isinstance(kept, Rows):
        return Rows(_widened(kept.kept), kept.where, kept.shape)
    if isinstance(kept, _Parts):
        return _Parts(kept.kind, {k: _widened(v) for k, v in kept.parts.items()})
    if isinstance(kept, Mapping):
        return type(kept)(**{k: _widened(v) for k, v in kept.items()})
    return tuple(map(_widened, kept)) if isinstance(kept, tuple) else kept


def _features(output: Any) -> Any:
    """A module's output to keep, without a decoder's cache."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, Mapping):
        return type(output)(**{k: _features(v) for k, v in output.items() if k != "past_key_values"})
    if isinstance(output, tuple):
        return tuple(map(_features, output))
    return output


def _cut_rows(output: Any, reaching: dict[int, Tensor]) -> Any:
    if isinstance(output, Tensor):
        rows = reaching.get(id(output))
        if rows is None or int(rows.sum()) * 2 > rows.numel():
            return output
        where = rows.nonzero()[:, 0]
        return Rows(output.flatten(0, -2)[where].clone(), where, output.shape)
    if isinstance(output, Mapping):
        return _Parts(type(output), {k: _cut_rows(v, reaching) for k, v in output.items()})
    return tuple(_cut_rows(v, reaching) for v in output) if isinstance(output, tuple) else output


@dataclass(frozen=True)
class _Parts:
    """A mapping of transformers, which takes nothing but tensors, taken apart."""

    kind: type
    parts: dict[str, Any]


def _whole(kept: Any) -> Any:
    if isinstance(kept, Rows):
        return kept.whole()
    if isinstance(kept, _Parts):
        return kept.kind(**{k: _whole(v) for k, v in kept.parts.items()})
    return tuple(map(_whole, kept)) if isinstance(kept, tuple) else kept

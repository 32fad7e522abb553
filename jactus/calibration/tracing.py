"""What the target layers are given in one forward of a few examples: the evidence that the checks go by."""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model.families import HEADS, inner_models
from ..model.offload import present
from ..model.targets import Target
from .examples import tensors

Call = tuple[str, int]  # a layer's name, and which of its calls in a forward


@dataclass
class Trace:
    """What one forward gave the targets.

    shapes: of what each call was given, (…, n); inputs: that itself, as it was then; owners: for each layer the first one that
    was given the very same tensors; outputs: names of layers whose last output is what the model returns; not_heads: modules of
    a plain model that are called like a head, and whose output is not; changed: layers whose forward another tool replaced, and
    gives something else than the layer's own.
    """

    inputs: dict[Call, Tensor] = field(default_factory=dict)
    shapes: dict[Call, torch.Size] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    not_heads: tuple[str, ...] = ()
    changed: list[str] = field(default_factory=list)

    def rows(self, call: Call) -> int:
        """How many rows a call was given; 0 for one that was not made."""
        return self.shapes[call][:-1].numel() if call in self.shapes else 0


def input_of(args: tuple, kwargs: dict) -> Tensor:
    """The input of a linear layer's call, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


@torch.no_grad()
def trace(model: nn.Module, targets: dict[str, Target], run: Callable[[], Any], values: bool = False) -> Trace:
    """Run the model and see what the targets are given; with `values`, the inputs too, on the CPU. Hooks are removed again."""
    found = Trace()
    seen: dict[str, list[int]] = {}  # the numbers of the tensors that each layer was given
    numbers: dict[int, tuple[weakref.ref, int]] = {}
    fresh = itertools.count()
    copies: dict[tuple[int, int], Tensor] = {}
    last: dict[str, tuple[int, weakref.ref]] = {}  # where a layer's last output is, while its memory is in use
    returned: list[Any] = []

    def number(x: Tensor) -> int:
        """One for each tensor: an id is given anew once its tensor is gone, and no tensor is kept for the sake of its id."""
        known = numbers.get(id(x))
        if known is None or known[0]() is not x:
            known = numbers[id(x)] = (weakref.ref(x), next(fresh))
        return known[1]

    def before(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = input_of(args, kwargs)
            call, which = (name, len(seen.setdefault(name, []))), number(x)
            found.shapes[call] = x.shape
            if values:  # as they are now: the model may overwrite them; layers that share a tensor share its copy
                key = (which, x._version)
                copies.setdefault(key, x.detach().to("cpu", copy=True))
                found.inputs[call] = copies[key]
            seen[name].append(which)

        return hook

    def after(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if isinstance(output, Tensor):
                last[name] = output.data_ptr(), weakref.ref(output.untyped_storage())
            if name in targets and "forward" in vars(module):  # e.g. accelerate's
                with present(module):
                    own = type(module).forward(module, input_of(args, kwargs))
                if not torch.allclose(own, output, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
                    found.changed.append(name)

        return hook

    handles = [model.register_forward_hook(lambda module, args, output: returned.append(output))]
    heads = {} if inner_models(model) else {n: m for n, m in model.named_children() if n in HEADS}
    try:
        for name, target in targets.items():
            handles.append(target.module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(target.module.register_forward_hook(after(name), with_kwargs=True, prepend=True))
        handles += [head.register_forward_hook(after(name), with_kwargs=True) for name, head in heads.items()]
        run()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[int, ...], str] = {}
    found.owners = {name: groups.setdefault(tuple(which), name) for name, which in seen.items()}
    ends = {t.data_ptr() for output in returned for t in logits_in(output)}
    returns = {name for name, (place, storage) in last.items() if storage() is not None and place in ends}
    found.outputs = tuple(name for name in targets if name in returns)
    found.not_heads = tuple(name for name in heads if ends and name not in returns)
    return found


def logits_in(output: Any) -> list[Tensor]:
    """What a model returns as its answer: `logits`, or all there is of a plain module's tensors."""
    found = {where: t for where, t in tensors(output) if t.dim()}  # a loss alone is no answer
    return [t for where, t in found.items() if where[-1:] == ("logits",)] or list(found.values())

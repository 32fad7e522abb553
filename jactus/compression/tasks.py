"""Several tasks on one set of bases, each under a name: what `save_cores` writes of a model, held in memory."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from jactus_kernels import JactusError

from ..checkpoints.checkpoint import put_task, read_cores, task_of


class Tasks:
    """Named sets of cores (with the head and whatever else trains) for one model with three-factor layers.

    The active set is in the model: train it there; switching away takes along what it has become. Switching copies the sets'
    numbers and no bases, so that a compiled or captured model goes on. Rows of one batch may be of several tasks: `rows`.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        """Call what the model holds now `name`. Raises JactusError when it has no three-factor layer."""
        self.model, self.active = model, name
        self._held: dict[str, dict[str, Tensor]] = {name: _copied(task_of(model))}

    def __iter__(self):
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def add(self, name: str, path: str | os.PathLike | None = None) -> None:
        """Hold as `name` a copy of what the model holds now, or a file of `save_cores`; the active set stays active.

        Raises JactusError for a name that is taken, and where the file does not fit, as `load_cores` does.
        """
        self._refuse_taken(name)
        self._held[name] = _copied(task_of(self.model)) if path is None else read_cores(self.model, path)

    def set_active(self, name: str) -> None:
        """Put the set `name` into the model. Raises JactusError for a name that is not held."""
        there = self._get(name)
        if name != self.active:
            self._held[self.active] = _copied(task_of(self.model))
            put_task(self.model, there)
            self.active = name

    def average(self, name: str, of: Sequence[str], weights: Sequence[float] | None = None) -> None:
        """Hold as `name` the weighted mean of the sets `of` (None: the plain one): of the layers' weights too, in which cores are
        linear. Weights may be negative and sum to 1, since each core has the pretrained layer in it.

        Raises JactusError for names that are not held or taken, weights that do not fit, and sets that do not have the same in them.
        """
        self._refuse_taken(name)
        weights = [1 / len(of)] * len(of) if weights is None and of else weights or []
        if len(weights) != len(of) or not math.isclose(math.fsum(weights), 1, abs_tol=1e-6):
            raise JactusError(
                f"average({name!r}): {len(of)} tasks have the weights {list(weights)}; one for each, of sum 1, is needed"
            )
        sets = self._alike(f"average({name!r})", of)
        self._held[name] = {key: _mean([sets[task][key] for task in of], weights) for key in sets[of[0]]}

    @contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[None]:
        """Inside the block row i of every batch is of the task `names[i]`; the model is as it was after it.

        In each layer that a task has numbers in, the rows of a task go through together: as many multiply-adds as one task takes, in
        as many calls as there are tasks. Made for eager serving, `generate` included. Beams and returned sequences are rows too.

        Raises JactusError for a name that is not held, sets that do not have the same in them, a layer that is given another number of
        rows, and, at the end, one that computed without being called.
        """
        if not names:
            raise JactusError("rows: a name for each row of the batch is needed, and there is none")
        of: dict[str, dict[str, dict[str, Tensor]]] = {}  # what each task has in a module, by the module's name
        for name, tensors in self._alike("rows", names).items():
            for key, t in tensors.items():
                owner, _, own = key.rpartition(".")
                there = getattr(self.model.get_submodule(owner), own)
                of.setdefault(owner, {}).setdefault(name, {})[own] = t.detach().to(there)
        where = {name: [i for i, each in enumerate(names) if each == name] for name in dict.fromkeys(names)}
        called: set[str] = set()
        with ExitStack() as stack:
            for owner, tasks in of.items():
                stack.enter_context(_by_rows(self.model.get_submodule(owner), owner, tasks, where, called))
            yield
            if silent := [owner for owner in of if owner not in called]:
                raise JactusError(
                    f"rows: {silent[0]} was not called, so its rows were all of the task {self.active!r} if they were computed at all; "
                    "run the model in the block, uncompiled, or a task at a time"
                )

    def delete(self, name: str) -> None:
        """Forget the set `name`. Raises JactusError for one that is not held, or is active."""
        self._get(name)
        if name == self.active:
            raise JactusError(f"the task {name!r} is active: it is in the model; set another one active first")
        del self._held[name]

    def size(self, name: str) -> int:
        """Bytes of the set `name`, held beside the model. Raises JactusError for a name that is not held."""
        return sum(t.numel() * t.element_size() for t in self._get(name).values())

    def _now(self, name: str) -> dict[str, Tensor]:
        """The set as it is at this moment: the active one may have been trained."""
        held = self._get(name)
        return task_of(self.model) if name == self.active else held

    def _alike(self, step: str, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """The sets of these names as they are now. Raises JactusError where one has something that another has not."""
        sets = {name: self._now(name) for name in dict.fromkeys(names)}
        for name, tensors in sets.items():
            if odd := sorted(tensors.keys() ^ sets[names[0]].keys()):
                raise JactusError(
                    f"{step}: {odd[0]} is in one of {names[0]!r} and {name!r} alone; take sets that train the same"
                )
        return sets

    def _get(self, name: str) -> dict[str, Tensor]:
        if name not in self._held:
            raise JactusError(f"there is no task {name!r}; held are {', '.join(map(repr, self._held))}")
        return self._held[name]

    def _refuse_taken(self, name: str) -> None:
        if name in self._held:
            raise JactusError(f"there is a task {name!r} already; delete it first, or take another name")


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Made in float64; counters, which are whole numbers, to the nearest."""
    mean = sum(w * t.double() for w, t in zip(weights, (t.to(tensors[0].device) for t in tensors)))
    assert isinstance(mean, Tensor)
    return (mean if tensors[0].is_floating_point() else mean.round()).to(tensors[0].dtype)


@contextmanager
def _by_rows(
    module: nn.Module, owner: str, of: dict[str, dict[str, Tensor]], where: dict[str, list[int]], called: set[str]
) -> Iterator[None]:
    """The module computes the rows of each task with the task's own numbers."""
    count, plain, inside = sum(map(len, where.values())), module.forward, False
    before = vars(module).get("forward")

    def forward(*inputs: Any, **named: Any) -> Tensor:
        nonlocal inside
        x = inputs[0] if inputs else None
        if inside:
            return plain(x)
        if not isinstance(x, Tensor) or len(inputs) > 1 or named or x.dim() < 2 or len(x) != count:
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise JactusError(
                f"rows: {owner} ({type(module).__name__}) was given {given}, and {count} rows have a task: give a name for each row of "
                "the batch; a model that mixes the rows of a batch is to be run a task at a time"
            )
        called.add(owner)
        y: Tensor | None = None
        for name, own in of.items():
            index = torch.tensor(where[name], device=x.device)
            inside = True
            try:
                part = functional_call(module, own, (x[index],))
            finally:
                inside = False
            y = part.new_empty(count, *part.shape[1:]) if y is None else y
            y[index] = part
        assert y is not None
        return y

    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before

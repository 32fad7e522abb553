"""Several tasks on one set of bases, each under a name: what `save_cores` writes of a model, held in memory."""

import math
import os
from collections.abc import Sequence

from torch import Tensor, nn

from jactus_kernels import JactusError

from ..checkpoints.checkpoint import put_task, read_cores, task_of


class Tasks:
    """Named sets of cores (with the head and whatever else trains) for one model with three-factor layers.

    The active set is in the model: train it there; switching away takes along what it has become. Switching copies the sets'
    numbers and no bases, so that a compiled or captured model goes on. The whole model has one task at a time: examples of
    one batch that are of several tasks are run a task at a time.
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
        sets = [self._now(task) for task in of]
        for task, tensors in zip(of, sets):
            if tensors.keys() != sets[0].keys():
                odd = sorted(tensors.keys() ^ sets[0].keys())[0]
                raise JactusError(
                    f"average({name!r}): {odd} is in one of {of[0]!r} and {task!r} alone; average sets that train the same"
                )
        self._held[name] = {key: _mean([tensors[key] for tensors in sets], weights) for key in sets[0]}

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

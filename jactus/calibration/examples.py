"""A batch as examples: move it, count them, take some of them. Batches may be nested in any way."""

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

Where = tuple[str, ...]  # of a leaf in a nested batch


def mapped(batch: Any, change: Callable[[Where, Any], Any], path: Where = ()) -> Any:
    """The batch with `change(path, leaf)` in the place of every leaf; containers are new, and of their kind."""
    if isinstance(batch, Mapping):
        changed = {key: mapped(value, change, (*path, str(key))) for key, value in batch.items()}
        return changed if type(batch) is dict else _like(batch, changed)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(v, change, (*path, name)) for name, v in zip(batch._fields, batch)))
    if isinstance(batch, list | tuple):
        return type(batch)(mapped(v, change, (*path, str(i))) for i, v in enumerate(batch))
    if is_dataclass(batch) and not isinstance(batch, type):
        held = {f.name: mapped(getattr(batch, f.name), change, (*path, f.name)) for f in fields(batch) if f.init}
        return replace(batch, **held)
    return change(path, batch)


def _like(batch: Mapping, changed: dict) -> Any:
    """A mapping of another kind (BatchEncoding and its kin, which people read by attribute) with other values."""
    again = copy.copy(batch)
    if isinstance(again, UserDict):
        again.data = changed
    elif isinstance(again, MutableMapping):
        for key, value in changed.items():
            again[key] = value
    else:
        return changed
    return again


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`, and none of inference mode, which autograd refuses; everything else as it is."""

    def moved(path: Where, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, copy=leaf.is_inference())

    return mapped(batch, moved)


def copied(batch: Any) -> Any:
    """The batch with tensors of its own: whoever is given it may overwrite them."""
    return mapped(batch, lambda path, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def tensors(batch: Any) -> Iterator[tuple[Where, Tensor]]:
    """The tensors of a batch with where they are in it."""
    found: list[tuple[Where, Tensor]] = []

    def see(path: Where, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append((path, leaf))
        return leaf

    mapped(batch, see)
    return iter(found)


# Tensors that have a row for every example, where a batch has one of that name.
BY_EXAMPLE = (
    "input_ids",
    "labels",
    "attention_mask",
    "inputs_embeds",
    "input_features",
    "input_values",
    "pixel_values",
)


def size(batch: Any) -> int | None:
    """How many examples a batch has, by the first dimension that its tensors have in common; None where they have none.

    A first dimension of 1 may stand for all examples (positions), and numbers belong to none.
    """
    leading = [(path[-1] if path else "", t.shape[0]) for path, t in tensors(batch) if t.dim()]
    if not leading:
        return None
    named = (rows for name in BY_EXAMPLE for other, rows in leading if other == name)
    rows = next(named, max(rows for _, rows in leading))
    return rows if {rows for _, rows in leading} <= {rows, 1} else None


def take(batch: Any, chosen: Sequence[int]) -> Any:
    """The chosen examples of a batch whose `size` is known: of tensors, and of lists of as many plain values."""
    rows = size(batch)

    def lists(part: Any) -> Any:
        if (
            isinstance(part, list)
            and len(part) == rows
            and not any(isinstance(v, Tensor | Mapping | list) for v in part)
        ):
            return [part[i] for i in chosen]
        if type(part) is dict:
            return {key: lists(value) for key, value in part.items()}
        return part

    def pick(path: Where, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows:
            return leaf[list(chosen)]
        return leaf

    return mapped(lists(batch), pick)


def few(batch: Any, count: int = 2) -> Any:
    """The first examples of a batch; all of one that cannot be cut."""
    rows = size(batch)
    return batch if rows is None else take(batch, range(min(rows, count)))


def singles(batch: Any) -> Iterator[Any]:
    """The examples of a batch one at a time."""
    return (take(batch, [i]) for i in range(size(batch) or 0))

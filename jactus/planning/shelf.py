"""Planned layers and made factors on the disk, a file each, for models whose plan has no room in memory."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from ..checkpoints import storage
from ..model.lowrank import CoreLinear
from .latency import Times
from .plans import PlannedLayer
from .subspace import PARTS, Directions, Side

PLANNED, FACTORS = "planned layer", "factors"


class Shelved(Directions):
    """Directions whose sides are mapped from a file each time they are asked for; what ranks go by is in memory."""

    def __init__(self, path: Path, sigma: torch.Tensor, task_core: torch.Tensor, kept: int) -> None:
        self.path, self.sigma, self.task_core, self.count = path, sigma, task_core, kept

    @property
    def kept(self) -> int:
        return self.count

    @property
    def left(self) -> Side:  # type: ignore[override]
        return self._side("left")

    @property
    def right(self) -> Side:  # type: ignore[override]
        return self._side("right")

    def _side(self, which: str) -> Side:
        return Side(*storage.mapped(self.path, *(f"{which}_{part}" for part in PARTS)))


class Shelf:
    """A folder of planned layers and, later, of their factors.

    Files are written atomically and digested; that they are of this run is for its snapshot to tell.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.layers: dict[str, PlannedLayer] = {}

    def put(self, layer: PlannedLayer) -> None:
        """Keep a layer; in memory only what its ranks go by. Raises JactusError when the disk refuses."""
        d = layer.directions
        tensors = {f"{side}_{part}": getattr(getattr(d, side), part) for side in ("left", "right") for part in PARTS}
        meta = {key: getattr(layer, key) for key in ("name", "m", "n", "fingerprint", "tokens", "sizes")}
        meta["times"] = layer.times and asdict(layer.times)
        path = self._path(layer.name)
        storage.write(path, PLANNED, tensors | {"sigma": d.sigma, "task_core": d.task_core}, meta)
        self.layers[layer.name] = replace(layer, directions=Shelved(path, d.sigma, d.task_core, d.kept))

    def has(self, name: str) -> bool:
        """Whether a layer was kept, in this process or by one that was interrupted."""
        return name in self.layers or self._path(name).exists()

    def get(self, name: str) -> PlannedLayer:
        """A layer that was kept. Raises JactusError for a file that is damaged."""
        if name not in self.layers:
            path = self._path(name)
            tensors, meta = storage.read(path, PLANNED)
            d = Shelved(path, tensors["sigma"].clone(), tensors["task_core"].clone(), tensors["left_weight"].shape[1])
            times = meta.pop("times")
            meta.pop("scales", None)  # kept by an interrupted run of before bases were orthonormal
            meta["sizes"] = tuple(meta["sizes"])
            if times:
                times = Times(times["dense"], tuple(times["ranks"]), tuple(times["folded"]))
            self.layers[name] = PlannedLayer(directions=d, times=times, **meta)
        return self.layers[name]

    def put_factors(self, name: str, layer: CoreLinear) -> CoreLinear:
        """Keep the factors of a layer; it has none in memory then, and its bias as it was."""
        storage.write(self._path(name, FACTORS), FACTORS, _factors(layer), {})
        for key, factor in _factors(layer).items():
            _set(layer, key, factor.to("meta"))
        return layer

    def take_factors(self, name: str, layer: CoreLinear) -> CoreLinear:
        """Give a layer its factors again, in memory."""
        path = self._path(name, FACTORS)
        tensors, _ = storage.read(path, FACTORS)
        for key in _factors(layer):
            _set(layer, key, tensors.pop(key).clone())
        path.unlink()
        return layer

    def _path(self, name: str, kind: str = PLANNED) -> Path:
        return self.folder / f"{name}.{kind.split()[0]}.safetensors"


def _factors(layer: CoreLinear) -> dict[str, torch.Tensor]:
    own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {key: t for key, t in own.items() if key != "bias"}


def _set(layer: CoreLinear, key: str, value: torch.Tensor) -> None:
    old = getattr(layer, key)
    setattr(layer, key, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)

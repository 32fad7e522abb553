"""What calibration found: sums over tokens that merge, and the averages the method uses.

Σ_x = Σ x xᵀ (n, n)    Σ_g = Σ g gᵀ (m, m)    D = Σ g xᵀ (m, n),  g = ∂L/∂y, L the sum of the loss terms
A = Σ_x / tokens       G = Σ_g / terms        mean gradient = D / terms

Where that is all that is needed, Σ_x is kept as the weight sees it, W Σ_x Wᵀ (m, m), or Σ_g as Wᵀ Σ_g W (n, n): `sides`.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from jactus_kernels import JactusError, symmetrize_

from ..checkpoints import storage
from ..config import JactusConfig


@dataclass
class LayerStatistics:
    """The sums of one layer. `inputs` names the layer whose Σ_x it shares (its own name if none).

    output_sum: Σ_g (m, m); gradient_sum: D (m, n); seen_input_sum: W Σ_x Wᵀ (m, m), with input_trace, tr Σ_x (); seen_output_sum:
    Wᵀ Σ_g W (n, n), with output_trace, tr Σ_g (). None where it is not summed.
    """

    m: int
    n: int
    fingerprint: str
    inputs: str
    output_sum: Tensor | None = None
    gradient_sum: Tensor | None = None
    seen_input_sum: Tensor | None = None
    input_trace: Tensor | None = None
    seen_output_sum: Tensor | None = None
    output_trace: Tensor | None = None

    def sums(self) -> dict[str, Tensor]:
        """Those that there are, by the names of their fields."""
        named = {f.name: getattr(self, f.name) for f in fields(self)[4:]}
        return {name: total for name, total in named.items() if total is not None}


# Of which only lower triangles are summed, and which side of the layer they are as large as.
TRIANGLES = {"output_sum": "m", "seen_input_sum": "m", "seen_output_sum": "n"}
FILED = {  # what they are called in a file
    "output_sum": "output",
    "gradient_sum": "gradient",
    "seen_input_sum": "seen input",
    "input_trace": "input trace",
    "seen_output_sum": "seen output",
    "output_trace": "output trace",
}


@dataclass(repr=False)
class Statistics:
    """Sums of a calibration run, by layer name; Σ_x and its token count by the name of the first layer sharing it.

    `config` is the one that the run was made under, which `plan` goes by; None in files of before it was kept.
    `outputs` are the layers that compute what the model returns; `drawn`: gradients are of labels that the model drew (`drawing.py`).
    """

    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    input_sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    terms: int = 0
    config: JactusConfig | None = None
    outputs: tuple[str, ...] = ()
    drawn: bool = False
    forgotten: set[str] = field(default_factory=set)

    def __repr__(self) -> str:
        seen = max(self.tokens.values(), default=0)
        return (
            f"Statistics({len(self.layers)} layers, {seen:,} tokens, {self.terms:,} terms, labels {'drawn' if self.drawn else 'given'}, "
            f"{self.nbytes / 1e6:.1f} MB)"
        )

    def input_covariance(self, name: str) -> Tensor | None:
        """A = Σ_x / tokens (n, n) of the layer's inputs; None when it was not collected."""
        key = self.layers[name].inputs
        return self.input_sums[key] / max(self.tokens[key], 1) if key in self.input_sums else None

    def output_covariance(self, name: str) -> Tensor | None:
        """G = Σ_g / terms (m, m) of the gradients at the layer's outputs; None when it was not collected."""
        total = self.layers[name].output_sum
        return None if total is None else total / max(self.terms, 1)

    def mean_gradient(self, name: str) -> Tensor | None:
        """D / terms (m, n), the mean gradient of the weight; None when it was not collected."""
        total = self.layers[name].gradient_sum
        return None if total is None else total / max(self.terms, 1)

    def seen_input(self, name: str) -> Tensor | None:
        """W A Wᵀ (m, m), the layer's input covariance as its weight sees it; None when it was not collected so."""
        total = self.layers[name].seen_input_sum
        return None if total is None else total / max(self.layer_tokens(name), 1)

    def seen_output(self, name: str) -> Tensor | None:
        """Wᵀ G W (n, n), the covariance of gradients as the weight sees it; None when it was not collected so."""
        total = self.layers[name].seen_output_sum
        return None if total is None else total / max(self.terms, 1)

    def input_scale(self, name: str) -> float:
        """mean diag A; 0 when neither A nor W A Wᵀ was collected."""
        layer = self.layers[name]
        return _scale(self.input_sums.get(layer.inputs), layer.input_trace, layer.n) / max(self.layer_tokens(name), 1)

    def output_scale(self, name: str) -> float:
        """mean diag G; 0 when neither G nor Wᵀ G W was collected."""
        layer = self.layers[name]
        return _scale(layer.output_sum, layer.output_trace, layer.m) / max(self.terms, 1)

    def layer_tokens(self, name: str) -> int:
        """Tokens that went through the layer."""
        return self.tokens[self.layers[name].inputs]

    def short_of_tokens(self) -> list[str]:
        """Layers that saw fewer than 4n tokens: legal, but their covariances are noisy or rank-deficient."""
        return [name for name, layer in self.layers.items() if self.layer_tokens(name) < 4 * layer.n]

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(t.numel() * t.element_size() for t in self._sums())

    def _sums(self) -> list[Tensor]:
        return [*self.input_sums.values(), *(t for layer in self.layers.values() for t in layer.sums().values())]

    def merge_(self, others: Iterable["Statistics"]) -> "Statistics":
        """Add the sums of other runs over other examples of the same model; returns self.

        Raises JactusError when they are not of the same model and layers.
        """
        for other in others:
            self._check_like(other)
            for mine, theirs in zip(self._sums(), other._sums()):
                mine += theirs.to(mine.device, mine.dtype)
            for key in self.tokens:
                self.tokens[key] += other.tokens[key]
            self.terms += other.terms
        return self

    def all_reduce_(self, group: Any = None) -> "Statistics":
        """Sum over the ranks of a process group of torch.distributed, each of which calibrated its own shard; returns self.

        group: None is the default one. Sums of no batch at all, `Statistics()`, count as zeros. Covariances go as triangles.

        Raises JactusError when the ranks calibrated other models or configurations, or when one does not come within the group's
        timeout; each rank then still has the sums of its own.
        """
        from .distributed import all_reduce_

        all_reduce_(self, group)
        return self

    def _check_like(self, other: "Statistics") -> None:
        for name, layer in self.layers.items():
            twin = other.layers.get(name)
            if twin is None or twin.fingerprint != layer.fingerprint:
                raise JactusError(f"statistics do not merge: {name} is missing or has other weights in one of them")
            if twin.inputs != layer.inputs or twin.sums().keys() != layer.sums().keys():
                raise JactusError(f"statistics do not merge: {name} was calibrated with another configuration")
        if self.drawn != other.drawn:
            raise JactusError(
                "statistics do not merge: gradients of one are of the labels given, of the other of labels drawn"
            )
        if len(self.layers) != len(other.layers) or list(self.input_sums) != list(other.input_sums):
            raise JactusError("statistics do not merge: they cover different layers")

    def forget(self, name: str) -> None:
        """Drop the sums of a layer, and its Σ_x once no other layer has any left: what is planned needs them no more."""
        layer = self.layers[name]
        for kind in layer.sums():
            setattr(layer, kind, None)
        self.forgotten.add(name)
        if all(other in self.forgotten for other, its in self.layers.items() if its.inputs == layer.inputs):
            self.input_sums.pop(layer.inputs, None)

    def symmetrize_(self) -> "Statistics":
        """Complete the covariances, of which only the lower triangles were summed; returns self."""
        for S in self.input_sums.values():
            symmetrize_(S)
        for layer in self.layers.values():
            for kind, S in layer.sums().items():
                if kind in TRIANGLES:
                    symmetrize_(S)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file (covariances as triangles), atomically. Raises JactusError when the disk refuses."""
        storage.write(path, "statistics", *self.to_tensors())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Statistics":
        """Read what `save` wrote. Raises JactusError for a missing, truncated, corrupted or newer file."""
        tensors, meta = storage.read(path, "statistics")
        with storage.parsed(path, "statistics"):
            return cls.from_tensors(tensors, meta).symmetrize_()

    def to_tensors(self) -> tuple[dict[str, Tensor | storage.Triangle], dict]:
        tensors: dict[str, Tensor | storage.Triangle] = {
            f"input/{key}": storage.Triangle(S) for key, S in self.input_sums.items()
        }
        for name, layer in self.layers.items():
            for kind, S in layer.sums().items():
                tensors[f"{FILED[kind]}/{name}"] = storage.Triangle(S) if kind in TRIANGLES else S
        meta = {
            "terms": self.terms,
            "outputs": list(self.outputs),
            "drawn": self.drawn,
            "config": None if self.config is None else self.config.to_dict(),
            "tokens": self.tokens,
            "layers": {
                name: {"m": s.m, "n": s.n, "fingerprint": s.fingerprint, "inputs": s.inputs}
                for name, s in self.layers.items()
            },
        }
        return tensors, meta

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], meta: dict) -> "Statistics":
        """The inverse of `to_tensors`. Raises what `storage.parsed` takes for a file that is not what it says."""
        config = meta.get("config")
        counts = {"terms": meta["terms"], "tokens": meta["tokens"], "outputs": tuple(meta.get("outputs", ()))}
        counts["drawn"] = meta.get("drawn", False)
        self = storage.made(cls, counts)
        self.config = None if config is None else JactusConfig.from_dict(config)
        for name, kept in meta["layers"].items():
            layer = self.layers[name] = storage.made(LayerStatistics, kept)
            for kind, filed in FILED.items():
                if (S := tensors.get(f"{filed}/{name}")) is not None:
                    setattr(layer, kind, storage.unpack(S, getattr(layer, TRIANGLES[kind])) if kind in TRIANGLES else S)
            if f"input/{name}" in tensors:
                self.input_sums[name] = storage.unpack(tensors[f"input/{name}"], layer.n)
        for name, layer in self.layers.items():
            self.layer_tokens(name)
            shapes = {"gradient_sum": (layer.m, layer.n), "input_trace": (), "output_trace": ()}
            for kind, S in layer.sums().items():
                if not S.is_floating_point() or S.shape != shapes.get(kind, S.shape):
                    raise ValueError(f"{kind} of {name} ({layer.m}×{layer.n}) is {tuple(S.shape)} of {S.dtype}")
        return self


def _scale(whole: Tensor | None, trace: Tensor | None, d: int) -> float:
    """The mean diagonal of a sum of squares (d, d), or what is known of it."""
    if whole is not None:
        return float(whole.diagonal().double().mean())
    return 0.0 if trace is None else float(trace) / d

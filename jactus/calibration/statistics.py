"""What calibration found: sums over tokens that merge, and the averages the method uses.

Σ_x = Σ x xᵀ (n, n)    Σ_g = Σ g gᵀ (m, m)    D = Σ g xᵀ (m, n),  g = ∂L/∂y, L the sum of the loss terms
A = Σ_x / tokens       G = Σ_g / terms        mean gradient = D / terms
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jactus_kernels import JactusError, symmetrize_

from ..checkpoints import storage
from ..config import JactusConfig


@dataclass
class LayerStatistics:
    """The sums of one layer. `inputs` names the layer whose Σ_x it shares (its own name if none)."""

    m: int
    n: int
    fingerprint: str
    inputs: str
    output_sum: Tensor | None = None
    gradient_sum: Tensor | None = None


@dataclass(repr=False)
class Statistics:
    """Sums of a calibration run, by layer name; Σ_x and its token count by the name of the first layer sharing it.

    `config` is the one that the run was made under, which `plan` goes by; None in files of before it was kept.
    `outputs` are the layers that compute what the model returns.
    """

    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    input_sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    terms: int = 0
    config: JactusConfig | None = None
    outputs: tuple[str, ...] = ()

    def __repr__(self) -> str:
        seen = max(self.tokens.values(), default=0)
        return (
            f"Statistics({len(self.layers)} layers, {seen:,} tokens, {self.terms:,} terms, {self.nbytes / 1e6:.1f} MB)"
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
        sums = list(self.input_sums.values())
        for layer in self.layers.values():
            sums += [t for t in (layer.output_sum, layer.gradient_sum) if t is not None]
        return sums

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

    def all_reduce_(self) -> "Statistics":
        """Sum over the ranks of torch.distributed, each of which calibrated its own shard: one reduction, at the end."""
        import torch.distributed as dist

        sums = self._sums()
        for total in sums:
            dist.all_reduce(total)
        device = sums[0].device if sums else None
        counts = torch.tensor([self.terms, *self.tokens.values()], dtype=torch.int64, device=device)
        dist.all_reduce(counts)
        self.terms = int(counts[0])
        self.tokens = dict(zip(self.tokens, counts[1:].tolist()))
        return self

    def _check_like(self, other: "Statistics") -> None:
        for name, layer in self.layers.items():
            twin = other.layers.get(name)
            if twin is None or twin.fingerprint != layer.fingerprint:
                raise JactusError(f"statistics do not merge: {name} is missing or has other weights in one of them")
            if twin.inputs != layer.inputs or [t is None for t in (layer.output_sum, layer.gradient_sum)] != [
                t is None for t in (twin.output_sum, twin.gradient_sum)
            ]:
                raise JactusError(f"statistics do not merge: {name} was calibrated with another configuration")
        if len(self.layers) != len(other.layers) or list(self.input_sums) != list(other.input_sums):
            raise JactusError("statistics do not merge: they cover different layers")

    def symmetrize_(self) -> "Statistics":
        """Complete the covariances, of which only the lower triangles were summed; returns self."""
        for S in [*self.input_sums.values(), *(layer.output_sum for layer in self.layers.values())]:
            if S is not None:
                symmetrize_(S)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file (covariances as triangles), atomically. Raises JactusError when the disk refuses."""
        storage.write(path, "statistics", *self.to_tensors())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Statistics":
        """Read what `save` wrote. Raises JactusError for a missing, truncated, corrupted or newer file."""
        return cls.from_tensors(*storage.read(path, "statistics")).symmetrize_()

    def to_tensors(self) -> tuple[dict[str, Tensor], dict]:
        tensors = {f"input/{key}": storage.pack(S) for key, S in self.input_sums.items()}
        for name, layer in self.layers.items():
            if layer.output_sum is not None:
                tensors[f"output/{name}"] = storage.pack(layer.output_sum)
            if layer.gradient_sum is not None:
                tensors[f"gradient/{name}"] = layer.gradient_sum
        meta = {
            "terms": self.terms,
            "outputs": list(self.outputs),
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
        config = meta.get("config")
        self = cls(
            terms=meta["terms"],
            tokens=meta["tokens"],
            config=None if config is None else JactusConfig.from_dict(config),
            outputs=tuple(meta.get("outputs", ())),
        )
        for name, kept in meta["layers"].items():
            layer = self.layers[name] = LayerStatistics(**kept)
            if f"output/{name}" in tensors:
                layer.output_sum = storage.unpack(tensors[f"output/{name}"], layer.m)
            layer.gradient_sum = tensors.get(f"gradient/{name}")
            if f"input/{name}" in tensors:
                self.input_sums[name] = storage.unpack(tensors[f"input/{name}"], layer.n)
        return self

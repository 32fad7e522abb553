"""Snapshots of a calibration run, so that one that was killed continues to the same result, or says it cannot."""

import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..checkpoints import storage
from ..checkpoints.writing import alone, refusing, tidy
from ..config import JactusConfig
from ..model.targets import fingerprint
from .statistics import Statistics
from .summing import Summing

logger = logging.getLogger("jactus")
# The settings that decide what is summed; a snapshot made under others is another run.
DECISIVE = ("target_modules", "exclude_modules", "metric", "union", "union_share")


@dataclass
class Part:
    """Of one pass, beside its sums: batches that they hold, their digest, whether they are all, the loss of the run's first
    examples, and how its terms are counted."""

    batches: int
    digest: str
    complete: bool
    loss: float | None
    rule: dict[str, Any] | None


class Snapshots:
    """Reads and writes the snapshot file of one run, which is its alone inside `with`; does nothing without a path.

    A snapshot is made between batches only, so an interruption at any moment loses at most the work since the last one.
    """

    def __init__(
        self, path: str | os.PathLike | None, every: float, config: JactusConfig, sums: Summing, model: nn.Module
    ) -> None:
        self.path = Path(path) if path is not None else None
        self.every, self.last = every, time.monotonic()
        self.hasher = xxhash.xxh3_128()
        self.loss: float | None = None  # of the run's first examples
        self.found: dict[str, Any] | None = None  # how the loss's terms are counted
        self.identity = {
            "config": {
                **{key: _plain(getattr(config, key)) for key in DECISIVE},
                "statistics_dtype": str(sums.dtype).removeprefix("torch."),
                "memory_limit": sums.memory_limit,
                **({"sums": "smaller sides"} if config.smaller_sides else {}),
                "loss_scale": sums.loss_scale,
            },
            "weights": _fingerprints(model) if path is not None else {},
        }
        self.parts: dict[int, tuple[Statistics, dict]] = {}
        self.held = ExitStack()

    def __enter__(self) -> "Snapshots":
        if self.path is None:
            return self
        with ExitStack() as held, refusing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone(self.path.with_name(f".{self.path.name}.run"), self.path))
            tidy(self.path)
            if self.path.exists():
                self._load(self.path)
            self.held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.held.close()
        if kind is KeyboardInterrupt and self.path is not None and self.path.exists():
            logger.warning("interrupted; the same call with resume=%r goes on from there", str(self.path))

    def _load(self, path: Path) -> None:
        tensors, meta = storage.read(path, "calibration snapshot")
        with storage.parsed(path, "calibration snapshot"):
            self._restore(tensors, meta)

    def _restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        for what, named in (("weights", "model (or a head fitted anew)"), ("config", "configuration")):
            if meta["identity"][what] != self.identity[what]:
                raise JactusError(
                    f"{self.path} is a snapshot of a run with another {named}; resume with the same, or delete the file to "
                    "start again"
                )
        for key, part in meta["parts"].items():
            prefix = f"{key}/"
            own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            kept = storage.made(Part, {f.name: part.get(f.name) for f in fields(Part)})
            self.parts[int(key)] = (Statistics.from_tensors(own, part["meta"]), vars(kept))

    def finished(self, number: int) -> Statistics | None:
        """The sums of pass `number` if the snapshot has it whole."""
        self.hasher.reset()
        statistics, part = self.parts.get(number, (None, {}))
        return statistics if part.get("complete") else None

    def started(self, number: int) -> tuple[Statistics, int]:
        """The sums to go on with in pass `number`, and how many batches they hold already."""
        statistics, part = self.parts.get(number, (Statistics(), {"batches": 0}))
        return statistics, part["batches"]

    def rule(self) -> dict[str, Any] | None:
        """How the run counted the terms of its loss when the snapshot was made."""
        kept = [part["rule"] for _, part in self.parts.values() if part.get("rule")]
        return kept[-1] if kept else None

    def see(self, batch: Any) -> None:
        """Take note of a batch, in order."""
        if self.path is not None:
            _feed(self.hasher, batch)

    def check(self, number: int) -> None:
        """After the last batch that the snapshot holds: were they the same ones, under the same loss?"""
        part = self.parts[number][1]
        if part["digest"] != self.hasher.hexdigest():
            raise JactusError(
                f"the first {part['batches']} batches are not those that {self.path} was made from (another order or other "
                "data), so the run cannot be continued; fix the order, or delete the file to start again"
            )
        before, loss = part.get("loss"), self.loss
        if before is not None and loss is not None and abs(before - loss) > 1e-3 * max(abs(before), 1e-9):
            raise JactusError(
                f"{self.path} is a snapshot of a run with another loss ({before:.6g} on its first examples, now {loss:.6g}); resume "
                "with the same, or delete the file to start again"
            )

    def maybe_save(self, statistics: Statistics, number: int, batches: int, rule: dict[str, Any]) -> None:
        self.found = rule
        if self.path is not None and time.monotonic() - self.last >= self.every:
            self._save(statistics, number, batches, complete=False)

    def finish(self, statistics: Statistics, number: int) -> None:
        if self.path is not None:
            self._save(statistics, number, 0, complete=True)

    def _save(self, statistics: Statistics, number: int, batches: int, complete: bool) -> None:
        part = {"batches": batches, "digest": self.hasher.hexdigest(), "complete": complete}
        part |= {"loss": self.loss, "rule": self.found}
        self.parts[number] = (statistics, part)
        tensors: dict[str, Tensor] = {}
        for key, (kept, its) in self.parts.items():
            own, its["meta"] = kept.to_tensors()
            tensors |= {f"{key}/{k}": t for k, t in own.items()}
        parts = {str(key): its for key, (_, its) in self.parts.items()}
        storage.write(self.path, "calibration snapshot", tensors, {"identity": self.identity, "parts": parts})  # type: ignore[arg-type]
        self.last = time.monotonic()

    def clear(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _fingerprints(model: nn.Module) -> dict[str, str]:
    """All weights and buffers: a head fitted anew, or other statistics of a norm, give other gradients in every layer."""
    kept = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: fingerprint(t) for name, t in kept.items() if t.numel()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _feed(hasher: Any, batch: Any) -> None:
    if isinstance(batch, Tensor):
        hasher.update(f"{batch.dtype}{tuple(batch.shape)}".encode())
        storage.update(hasher, batch)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for f in fields(batch):
            hasher.update(f.name.encode())
            _feed(hasher, getattr(batch, f.name))
    elif isinstance(batch, Mapping):
        for key in sorted(batch, key=str):
            hasher.update(str(key).encode())
            _feed(hasher, batch[key])
    elif isinstance(batch, list | tuple):
        for value in batch:
            _feed(hasher, value)
    elif type(batch).__repr__ is object.__repr__:
        hasher.update(type(batch).__qualname__.encode())  # shown by its address, which is another each time
    else:
        hasher.update(repr(batch).encode())

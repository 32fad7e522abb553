"""Snapshots of a calibration run, so that one that was killed continues to the same result, or says it cannot."""

import json
import logging
import os
import shutil
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
from ..model import offload
from ..model.targets import fingerprint
from .statistics import Statistics
from .summing import Summing

KIND = "calibration snapshot"
logger = logging.getLogger("jactus")
# The settings that decide what is summed; a snapshot made under others is another run.
DECISIVE = ("target_modules", "exclude_modules", "metric", "union", "union_share")


@dataclass
class Part:
    """Of one pass, beside its sums: batches that they hold, their digest, whether they are all, the loss of the run's first
    examples, how its terms are counted, what the sums are of, whether they have a file of their own, and whether its layers are planned."""

    batches: int
    digest: str
    complete: bool
    loss: float | None
    rule: dict[str, Any] | None
    meta: dict[str, Any]
    apart: bool | None = None
    planned: bool | None = None


class Snapshots:
    """Reads and writes the snapshot of one run, which is its alone inside `with`; does nothing without a path.

    The file has the sums of the pass that runs, and says which are finished: of these each has a file of its own beside it,
    written once, which goes when its layers are planned. A snapshot is made between batches only, so an interruption at any
    moment loses at most the work since the last one.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        every: float,
        config: JactusConfig,
        sums: Summing,
        model: nn.Module,
        planned_under: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path) if path is not None else None
        self.every, self.last = every, time.monotonic()
        self.hasher = xxhash.xxh3_128()
        self.loss: float | None = None  # of the run's first examples
        self.found: dict[str, Any] | None = None  # how the loss's terms are counted
        self.identity = {
            "config": {
                **{key: _plain(getattr(config, key)) for key in DECISIVE},
                **sums.decisive(),
                **({"sums": "smaller sides"} if config.smaller_sides else {}),
                **({"planned under": json.loads(json.dumps(planned_under))} if planned_under else {}),
            },
            "weights": fingerprints(model) if path is not None else {},
        }
        self.parts: dict[int, Part] = {}
        self.held: dict[int, Statistics] = {}  # the sums that are in the file itself
        self.locks = ExitStack()

    def __enter__(self) -> "Snapshots":
        if self.path is None:
            return self
        with ExitStack() as locks, refusing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            locks.enter_context(alone(self.path.with_name(f".{self.path.name}.run"), self.path))
            tidy(self.path)
            if self.path.exists():
                self._load(self.path)
            else:
                self.clear()  # of another run, whose snapshot somebody deleted
            self.locks = locks.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.locks.close()
        if kind is KeyboardInterrupt and self.path is not None and self.path.exists():
            logger.warning("interrupted; the same call with resume=%r goes on from there", str(self.path))

    def _load(self, path: Path) -> None:
        tensors, meta = storage.read(path, KIND)
        with storage.parsed(path, KIND):
            self._restore(tensors, meta)

    def _restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        for what, named in (("weights", "model (or a head fitted anew)"), ("config", "configuration")):
            if meta["identity"][what] != self.identity[what]:
                raise JactusError(
                    f"{self.path} is a snapshot of a run with another {named}; resume with the same, or delete the file to "
                    "start again"
                )
        for key, part in meta["parts"].items():
            known = storage.made(Part, {f.name: part.get(f.name) for f in fields(Part)})
            self.parts[int(key)] = known
            if not known.apart:
                own = {k.removeprefix(f"{key}/"): t for k, t in tensors.items() if k.startswith(f"{key}/")}
                self.held[int(key)] = Statistics.from_tensors(own, known.meta)

    def finished(self, number: int) -> Statistics | None:
        """The sums of pass `number` if the snapshot has it whole; without the sums where its layers are planned."""
        self.hasher.reset()
        part = self.parts.get(number)
        if part is None or not part.complete:
            return None
        if part.planned:
            known = Statistics.from_tensors({}, part.meta)
            known.forgotten |= set(known.layers)
            return known
        if number in self.held:
            return self.held[number]
        tensors, meta = storage.read(self._apart(number), KIND)
        with storage.parsed(self._apart(number), KIND):
            return Statistics.from_tensors(tensors, meta)

    def started(self, number: int) -> tuple[Statistics, int]:
        """The sums to go on with in pass `number`, and how many batches they hold already."""
        return self.held.get(number) or Statistics(), self.parts[number].batches if number in self.parts else 0

    def rule(self) -> dict[str, Any] | None:
        """How the run counted the terms of its loss when the snapshot was made."""
        kept = [part.rule for part in self.parts.values() if part.rule]
        return kept[-1] if kept else None

    def see(self, batch: Any) -> None:
        """Take note of a batch, in order."""
        if self.path is not None:
            _feed(self.hasher, batch)

    def check(self, number: int) -> None:
        """After the last batch that the snapshot holds: were they the same ones, under the same loss?"""
        part = self.parts[number]
        if part.digest != self.hasher.hexdigest():
            raise JactusError(
                f"the first {part.batches} batches are not those that {self.path} was made from (another order or other "
                "data), so the run cannot be continued; fix the order, or delete the file to start again"
            )
        before, loss = part.loss, self.loss
        if before is not None and loss is not None and abs(before - loss) > 1e-3 * max(abs(before), 1e-9):
            raise JactusError(
                f"{self.path} is a snapshot of a run with another loss ({before:.6g} on its first examples, now {loss:.6g}); resume "
                "with the same, or delete the file to start again"
            )

    def maybe_save(self, statistics: Statistics, number: int, batches: int, rule: dict[str, Any]) -> None:
        """Between batches: write the sums of the pass that runs, if the last time is `every` seconds ago."""
        self.found = rule
        if self.path is not None and time.monotonic() - self.last >= self.every:
            self.held[number] = statistics
            self._note(statistics, number, batches)

    def finish(self, statistics: Statistics, number: int) -> None:
        """After a pass: its sums go into a file of their own, and are written no more."""
        if self.path is not None:
            storage.write(self._apart(number), KIND, *statistics.to_tensors())
            self.held.pop(number, None)
            self._note(statistics, number, 0, finished=True)

    def planned(self, number: int) -> None:
        """The layers of a pass are planned, and on the disk: its sums are needed no more."""
        if self.path is not None:
            self.parts[number].planned = True
            self._save()
            self._apart(number).unlink(missing_ok=True)

    def _note(self, statistics: Statistics, number: int, batches: int, finished: bool = False) -> None:
        _, meta = statistics.to_tensors()
        digest = self.hasher.hexdigest()
        self.parts[number] = Part(batches, digest, finished, self.loss, self.found, meta, apart=finished)
        self._save()

    def _save(self) -> None:
        tensors: dict[str, Tensor | storage.Triangle] = {}
        for key, kept in self.held.items():
            tensors |= {f"{key}/{k}": t for k, t in kept.to_tensors()[0].items()}
        parts = {str(key): vars(part) for key, part in self.parts.items()}
        storage.write(self.path, KIND, tensors, {"identity": self.identity, "parts": parts})  # type: ignore[arg-type]
        self.last = time.monotonic()

    def _apart(self, number: int) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.part{number}")

    @property
    def folder(self) -> Path | None:
        """Where the layers wait that the run has planned; None without a path."""
        return None if self.path is None else self.path.with_name(f"{self.path.name}.planned")

    def clear(self) -> None:
        """Remove all of it: the run is done."""
        if self.path is None or self.folder is None:
            return
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        prefix = f"{self.path.name}.part"
        for file in self.path.parent.glob("*") if self.path.parent.is_dir() else ():
            if file.name.startswith(prefix) and file.name.removeprefix(prefix).isdigit():
                file.unlink()


def fingerprints(model: nn.Module) -> dict[str, str]:
    """All weights and buffers: a head fitted anew, or other statistics of a norm, give other gradients in every layer."""
    return {name: fingerprint(t) for name, t in offload.tensors(model) if t.numel()}


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

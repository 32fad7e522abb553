"""One pass over the batches: a look at the first, then sums of them all."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from jactus_kernels import JactusError

from ..checkpoints import storage
from ..config import JactusConfig
from ..model.offload import first_device, light_graph
from ..model.targets import Target
from .cache import DecoderCache
from .checks import check_forwards
from .examples import few, singles, size, to_device
from .losses import LossSum
from .modes import frozen_eval
from .padding import masks_of
from .recorder import Recorder
from .snapshots import KIND, Snapshots
from .statistics import Statistics
from .summing import Summing
from .tokens import Tokens

logger = logging.getLogger("jactus")


class Sweep:
    """Pass number `number` over the batches, which sums for the layers `targets`; it goes on from a snapshot if there is one."""

    def __init__(
        self,
        model: nn.Module,
        targets: dict[str, Target],
        config: JactusConfig,
        sums: Summing,
        losses: LossSum,
        snapshots: Snapshots,
        number: int,
    ) -> None:
        self.model, self.targets, self.sums, self.losses = model, targets, sums, losses
        self.snapshots, self.number = snapshots, number
        self.statistics, self.skip = snapshots.started(number)
        self.tokens = Tokens(model, targets, losses.value, losses.verify)
        self.recorder = Recorder(targets, config, sums, self.statistics, self.tokens)
        self.cache = DecoderCache(model)
        if (rule := snapshots.rule()) is not None:
            with storage.parsed(str(snapshots.path), KIND):
                losses.restore(rule)

    def run(self, batches: Iterable[Any], progress: bool, may_be_empty: bool = False) -> Statistics:
        """Raises JactusError as `calibrate`. may_be_empty: no batch at all gives no sums, and is no error."""
        device = first_device(self.model)
        label = "calibrating" if self.number == 0 else f"calibrating, pass {self.number + 1}"
        index = -1
        with frozen_eval(self.model), light_graph(self.model), self.recorder.hooks(), self.cache:
            for index, batch in enumerate(tqdm(batches, label, unit="batch", disable=not progress)):
                self.snapshots.see(batch)
                if index == 0 and self.snapshots.path is not None:
                    self.snapshots.loss = self.losses.value(few(to_device(batch, device)))
                if index < self.skip:
                    if index == self.skip - 1:
                        self.snapshots.check(self.number)
                    continue
                self._add(to_device(batch, device), index)
                self.snapshots.maybe_save(self.statistics, self.number, index + 1, self.losses.state())
        if index < 0 and not (may_be_empty and not self.skip):
            raise JactusError("no batch came out of `batches`; pass a list or loader with at least one")
        if index + 1 < self.skip:
            raise JactusError(
                f"the snapshot holds {self.skip} batches, and only {index + 1} came; resume with the same ones or delete the file"
            )
        drawing = self.losses.drawing
        self.statistics.drawn = bool(drawing.found)
        if drawing.draws and not drawing.found:
            # one draw is the default, more were asked for
            level = logging.WARNING if drawing.draws > 1 else logging.INFO
            logger.log(level, "output gradients are of the labels given: %s", drawing.why)
        return self.statistics

    def _add(self, batch: Any, index: int) -> None:
        if self.tokens.first is None:
            self._look(batch, index)
        else:
            self.tokens.begin(batch, index)
        for part in self._alone(batch, index) if self.tokens.alone else (batch,):
            self.losses.prepare(part, index)
            if self.tokens.alone:
                if self.losses.is_empty(part):
                    continue
                self.tokens.one_of(part)
            self._record(part, index)
            for draw in self.losses.drawing.more:
                self._record(part, index, draw)

    def _record(self, batch: Any, index: int, draw: int = 0) -> None:
        """Add a batch to the sums."""
        recorder = self.recorder
        recorder.begin(index, inputs=not draw)
        with torch.enable_grad() if recorder.backward else torch.no_grad():
            total, terms = self.losses.of(batch, index, recorder.blame, draw)
            recorder.between()
            if recorder.backward:
                if not total.requires_grad:
                    raise JactusError(
                        f"batch {index}: the loss of {type(self.model).__name__} depends on none of the {len(self.targets)} target "
                        f"layers (the first is {next(iter(self.targets.values()))}): it is detached, made under torch.no_grad(), or "
                        "of other layers"
                    )
                recorder.send_back(total * self.sums.loss_scale)
        recorder.end()
        self.statistics.terms += terms

    def _look(self, batch: Any, index: int) -> None:
        """What the first batch shows, before anything is summed."""
        model, verify = self.model, self.losses.verify
        masks_of(model, batch, index)  # refuses what is no mask of padding before the model is run on it
        self.losses.prepare(batch, index)
        self.cache.decide(batch, self.losses.value)
        self.tokens.begin(batch, index)
        seen = self.tokens.first
        assert seen is not None
        for name in seen.changed:
            raise JactusError(
                f"{self.targets[name]}: another tool replaced its forward by one that gives something else than the layer itself, so "
                "what its output's gradient says of the weight cannot be told; take that hook away (accelerate: "
                "remove_hook_from_module), or exclude the layer"
            )
        for name in seen.not_heads if verify else ():
            raise JactusError(
                f"{name} is called like a task head, and is not the layer that computes what {type(model).__name__} returns; whether "
                "it is to be compressed cannot be told: rename it, or name the layers to compress in target_modules"
            )
        for name in seen.outputs:
            logger.warning(
                "%s computes what the model returns, so it looks like a task head, and is to be compressed as any other layer; if "
                "it is one, and fresh, exclude it (exclude_modules), fit it first and name it in trainable_extras",
                self.targets[name],
            )
        self.statistics.outputs = seen.outputs
        if verify:
            check_forwards(model, self.targets, few(batch), self.losses.value)
            logger.info("the loss is %s; every target is used by its forward alone", self.losses.found())

    def _alone(self, batch: Any, index: int) -> Iterator[Any]:
        if size(batch) is None:
            name, call = min(self.tokens.tables)
            raise JactusError(
                f"{name} reads rows that are no example's (call {call} of a forward is given as many whatever the number of "
                f"examples), and batch {index} cannot be cut into examples to run them one at a time; exclude the layer"
            )
        return singles(batch)

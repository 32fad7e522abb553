"""Training of what is to train, by transformers' Trainer: it can be stopped at any step, and goes on to the same result."""

import json
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from jactus_kernels import JactusError

from ..checkpoints.quantizer import file_digest
from ..checkpoints.writing import atomic
from .console import say
from .encoding import Encoded
from .record import Point
from .settings import Settings
from .subject import DEVICE, Measured, measure

METRIC, LOSS = "validation_metric", "validation_loss"  # in the history that checkpoints keep
COMPLETE = "complete"  # in a checkpoint that was written to its end
LEAST = 60.0  # seconds between checkpoints, which take a twentieth of the time at most


class Keeper(TrainerCallback):
    """Shows progress, measures the validation rows after each epoch, and writes checkpoints: now and then, and when asked to
    stop by Ctrl-C."""

    def __init__(self, model: PreTrainedModel, encoded: Encoded, of_language: bool) -> None:
        self.model, self.encoded, self.of_language = model, encoded, of_language
        self.asked = False
        self.saved = self.began = time.monotonic()
        self.wait = LEAST
        self.bar: Any = None

    def ask(self, number: int, frame: FrameType | None) -> None:
        """A first Ctrl-C: stop after this step. A second: at once."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)
        if self.asked:
            control.should_save = control.should_training_stop = True
        elif time.monotonic() - self.saved >= self.wait:
            control.should_save = True
        self.began = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        digests = {file.name: file_digest(file) for file in folder.iterdir() if file.name != COMPLETE}
        with atomic(folder / COMPLETE) as part:
            part.write_text(json.dumps(digests), encoding="utf-8")
        self.saved = time.monotonic()
        self.wait = max(LEAST, 20 * (self.saved - self.began))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        logs = more.get("logs") or {}
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.4g}")

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if self.asked:
            return
        found = measure(self.model, self.encoded.held_out(), self.of_language, "validating")
        point = {"step": state.global_step, "epoch": float(state.epoch or 0.0)}
        state.log_history.append({**point, METRIC: found.metric, LOSS: found.loss})
        shown = f"perplexity {found.metric:.2f}" if self.of_language else f"accuracy {found.metric:.4f}"
        self.bar.write(f"after epoch {state.epoch or 0:.3g}: {shown}, loss {found.loss:.4f}", file=sys.stderr)
        control.should_log = True  # so that the training loss is known at that step, too

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self.bar.close()


def steps(rows: int, settings: Settings) -> int:
    """How many steps training takes."""
    return max(1, int(-(-rows // settings.batch_size) * settings.epochs))


def trained(
    model: PreTrainedModel, encoded: Encoded, settings: Settings, of_language: bool, rate: float, folder: Path
) -> tuple[list[Point], Measured | None]:
    """Train the model in place, from a checkpoint in `folder` if there is one; returns what was seen on the way, and what was
    measured after the last step (None where an epoch did not end with it).

    Raises KeyboardInterrupt after Ctrl-C, when a checkpoint was written.
    """
    half = next(model.parameters()).dtype == torch.bfloat16
    less_memory: dict[str, Any] = {"gradient_checkpointing": True} if settings.gradient_checkpointing else {}
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        learning_rate=rate,
        warmup_steps=0.06,
        per_device_train_batch_size=settings.batch_size,
        seed=settings.seed,
        bf16=half,
        use_cpu=DEVICE == "cpu",
        dataloader_pin_memory=DEVICE != "cpu",
        logging_steps=max(1, steps(len(encoded.train), settings) // 50),
        save_strategy="no",  # `Keeper` says when
        save_total_limit=2,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        **less_memory,
    )
    keeper = Keeper(model, encoded, of_language)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=encoded.train, data_collator=encoded.collate, callbacks=[keeper]
    )
    trainer.remove_callback(PrinterCallback)
    begun = checkpoint(folder)
    if begun is not None:
        say(f"training goes on from {begun.name.replace('checkpoint-', 'step ')}")
    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, keeper.ask) if here else None
    try:
        trainer.train(resume_from_checkpoint=str(begun) if begun else None)
    except (OSError, SafetensorError) as e:
        raise JactusError(
            f"could not write a checkpoint into {folder}: {e}; the same command goes on from the last one"
        ) from e
    finally:
        if here:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        if keeper.bar is not None:
            keeper.bar.close()
    if keeper.asked and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    model.eval()
    history = trainer.state.log_history
    last = {each["step"]: Measured(each[METRIC], each[LOSS]) for each in history if METRIC in each}
    return _points(history), last.get(trainer.state.global_step)


def checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end, and is as it was written."""
    found = [each.parent for each in folder.glob(f"checkpoint-*/{COMPLETE}")]
    for each in sorted(found, key=lambda each: int(each.name.rpartition("-")[2]), reverse=True):
        if _is_whole(each):
            return each
        say(f"{each} is truncated or corrupted, and is left out")
    return None


def _is_whole(folder: Path) -> bool:
    try:
        digests = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return bool(digests) and all(file_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _points(history: list[dict[str, Any]]) -> list[Point]:
    metrics = {entry["step"]: entry[METRIC] for entry in history if METRIC in entry}
    seen = [entry for entry in history if "loss" in entry]
    return [Point(e["step"], float(e["epoch"]), float(e["loss"]), metrics.get(e["step"])) for e in seen]

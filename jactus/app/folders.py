"""Checkpoint folders: loaded as the class they name, and described."""

import json
import shutil
from pathlib import Path

import transformers
from transformers import PreTrainedModel

from jactus_kernels import JactusError

from ..checkpoints.checks import roots
from ..checkpoints.storage import parsed
from ..checkpoints.writing import FOLDER_LOCK, WEIGHT_FILE, alone, atomic, complete, unfinished
from ..planning.plans import Plan
from ..report import describe_layers, size
from .console import say
from .record import FILE

MADE = (FILE, "report.html", "README.md")  # of a run; of another form of its model they would say what is not so


def load(folder: Path) -> PreTrainedModel:
    """A checkpoint as the class its config names. Raises JactusError where transformers has no such class, or it cannot be read."""
    with parsed(folder, "checkpoint folder"):
        if unfinished(folder):
            with alone(folder / FOLDER_LOCK, folder):
                complete(folder)
        if not (folder / "config.json").is_file():
            raise JactusError(f"{folder} is not a checkpoint folder: it holds no config.json")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = (config.get("architectures") or [None])[0]
        model_class = getattr(transformers, str(name), None)
        if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
            raise JactusError(
                f"{folder} is a {name}, a class of your own; load it with that class, and fold or merge in Python"
            )
        return model_class.from_pretrained(folder, dtype="auto")


def copy_others(source: Path, target: Path) -> None:
    """The files beside a checkpoint's own (tokenizer, image processor) that the target has not; none that only link elsewhere."""
    for file in source.iterdir():
        own = file.name.startswith(".") or file.name in MADE or WEIGHT_FILE.fullmatch(file.name)
        if not file.is_file() or own or (target / file.name).exists():
            continue
        if not any(root in file.resolve().parents for root in roots(source)):
            say(f"note: {file} is a link to {file.resolve()}, outside the folder, and is not copied")
            continue
        with atomic(target / file.name, file.stat().st_size) as part:
            shutil.copyfile(file, part)


def described(path: Path, budget: float | None) -> str:
    """What a plan's ranks or a checkpoint's layers are. Raises JactusError for what is neither."""
    if path.is_file():
        plan = Plan.load(path)
        return str(plan if budget is None else plan.at(budget))
    model = load(path)
    counted = size(model)
    return (
        f"{describe_layers(model) or 'no low-rank layers'}\n{type(model).__name__}: {counted.stored:,} parameters stored "
        f"({counted.stored_bytes / 1e6:.1f} MB), {counted.folded:,} once folded, {counted.trainable:,} trainable "
        f"({counted.optimizer_bytes / 1e6:.1f} MB of AdamW state)"
    )

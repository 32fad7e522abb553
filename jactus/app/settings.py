"""What can be chosen on the command line or in a recipe, each with its help and default, in one data class."""

import difflib
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jactus_kernels import JactusError

from ..config import FLAT, JactusConfig
from .guess import TASKS

RECIPES = Path(__file__).parent / "recipes"


def choice(default: Any, help: str, **more: Any) -> Any:
    """A field with its default and what it means."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Settings:
    """All of a run. `method` holds options of `JactusConfig` by their flat names, which only a recipe can give."""

    data: str = choice(
        "",
        "A CSV, TSV, JSON, JSONL or Parquet file, a text file, a folder of images (class/*.jpg, or the same in train/ and "
        "test/), or a name for the `datasets` library.",
    )
    model: str = choice("", "A folder or hub name of a transformers model.")
    output: str = choice("", "The folder to write; `.work` in it keeps what is done until all is.")
    budget: float = choice(0.8, "What to keep of the linear layers, in (0, 1].")
    task: str | None = choice(None, f"One of {', '.join(TASKS)}. Guessed from the columns by default.")
    text: list[str] | None = choice(None, "The column of the text; twice for pairs.")
    label: str | None = choice(None, "The column of the label, or of the answer that a language model is to give.")
    validation: str = choice("0.1", "A file with validation rows, or the part of the rows to split off.")
    max_length: int = choice(256, "Tokens of a text; what is cut off is counted and said.")
    calibration_rows: int = choice(2000, "Rows to fit the head and to calibrate on.")
    epochs: float = choice(2.0, "Passes over the training rows.")
    batch_size: int = choice(32, "Rows of a training step.")
    learning_rate: float | None = choice(None, "Of the cores and the head. What jactus.learning_rate says by default.")
    seed: int = choice(0, "Of the split, the head's first weights and training.")
    dtype: str | None = choice(
        None,
        "Of the weights: float32 or bfloat16. By default float32 on a CPU, and on a GPU what the model is stored in.",
    )
    memory_limit: float | None = choice(
        None,
        "Bytes of calibration sums at a time, e.g. 3e9: layers are calibrated and planned part by part, a pass over the rows each.",
    )
    gradient_checkpointing: bool = choice(False, "Train in less memory, and more slowly.")
    keep_work: bool = choice(False, "Leave the files of the stages in OUTPUT/.work.")
    method: dict[str, Any] = field(default_factory=dict)

    def checked(self) -> "Settings":
        """Itself. Raises JactusError naming the option, what was given and what is allowed."""
        least = {"max_length": 8, "calibration_rows": 1, "batch_size": 1, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise JactusError(f"--{name.replace('_', '-')} is {value!r}; it is a whole number, {low} or more")
        for name in ("epochs", "learning_rate", "memory_limit"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise JactusError(f"--{name.replace('_', '-')} is {value!r}; it is a number above 0")
        if self.task not in (None, *TASKS):
            raise JactusError(f"--task is {self.task!r}; it is one of {', '.join(TASKS)}")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise JactusError(f"--dtype is {self.dtype!r}; it is float32 or bfloat16")
        self.config()
        return self

    @staticmethod
    def help(name: str) -> str:
        """What an option means."""
        return next(f.metadata["help"] for f in fields(Settings) if f.name == name)

    def config(self) -> JactusConfig:
        """The settings of the method. Raises JactusError for a value out of range."""
        return JactusConfig().replace(budget=self.budget, **self.method)

    def recipe(self) -> dict[str, Any]:
        """All that was chosen or is the default, flat, as a recipe has it."""
        names = [f.name for f in fields(self) if f.name not in ("method", "output", "keep_work")]
        return {name: value for name in names if (value := getattr(self, name)) is not None} | self.method


def settings(given: dict[str, Any], recipe: str | None = None) -> Settings:
    """Options given on the command line (None: not given) over those of a recipe over the defaults.

    Raises JactusError for an unknown name in the recipe, or a value that is not allowed.
    """
    known = {f.name for f in fields(Settings)} - {"method"}
    method_names = ({f.name for f in fields(JactusConfig)} | set(FLAT)) - {"core"} - known
    read = read_recipe(recipe) if recipe else {}
    method = {}
    for name in list(read):
        if name in method_names:
            method[name] = read.pop(name)
        elif name not in known:
            near = difflib.get_close_matches(name, known | method_names, 1)
            raise JactusError(
                f"{recipe} has an option {name!r}, which there is not{f'; is it {near[0]!r}?' if near else ''}"
            )
    for name in ("epochs", "budget", "learning_rate", "memory_limit"):
        if isinstance(read.get(name), str | int) and not isinstance(read.get(name), bool):
            read[name] = _number(name, read[name])  # YAML takes 30e9 for a word
    if "validation" in read:
        read["validation"] = str(read["validation"])
    if isinstance(read.get("text"), str):
        read["text"] = [read["text"]]
    given = {name: value for name, value in given.items() if value is not None}
    return Settings(**{**read, **given}, method=method).checked()


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except ValueError as e:
        raise JactusError(f"{name} is {value!r}; it is a number") from e


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe of this package by its name, or a file of yours. Raises JactusError where there is none, or it is not flat."""
    import yaml

    file = Path(name) if Path(name).is_file() else RECIPES / f"{name}.yaml"
    if not file.is_file():
        raise JactusError(f"{name} is neither a file nor a recipe; there are {', '.join(sorted(recipes()))}")
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise JactusError(f"{file} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(read, dict) or not all(isinstance(key, str) for key in read):
        raise JactusError(f"{file} is to hold lines of `option: value`")
    return {key.replace("-", "_"): value for key, value in read.items()}


def recipes() -> dict[str, str]:
    """The recipes of this package: name and first line."""
    files = sorted(RECIPES.glob("*.yaml"))
    return {f.stem: f.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for f in files}

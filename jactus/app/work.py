"""The files of a run's stages, so that the same command goes on where it stopped, and a changed setting redoes what depends on
it and nothing else."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jactus_kernels import JactusError

from ..checkpoints import storage
from ..checkpoints.writing import FOLDER_LOCK, alone, refusing
from .console import say

FOLDER, DONE = ".work", ".work-done"
LOCK = ".jactus-run.lock"


class Work:
    """The folder OUTPUT/.work: for each stage a folder with what determines it (`of.json`), its files, and, once it is done,
    what it found and how long it took (`done.json`)."""

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output / FOLDER
        self.stages: dict[str, dict[str, Any]] = {}
        check_output(output)

    def stage(self, name: str, of: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> Path:
        """The folder of a stage with its files, which `make` writes unless they are there; it returns what is to be kept in
        `done.json`. `of`: what determines the stage, by names that a person knows."""
        folder = self.folder / name
        of = _as_kept(of)
        before = _read_json(folder / "of.json")
        if before is not None and before != of:
            changed = [key for key in {**before, **of} if before.get(key) != of.get(key)]
            told = "; ".join(f"{key} was {_short(before.get(key))}, is {_short(of.get(key))}" for key in changed[:3])
            say(f"{name}: done again, since {told}")
        if before != of:
            if folder.exists():
                (folder / "of.json").unlink(missing_ok=True)  # first: what a kill leaves is no stage's
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            _write_json(folder / "of.json", of)
        found = _read_json(folder / "done.json")
        if found is None:
            started = time.perf_counter()
            try:
                found = make(folder)
            except BaseException:
                with contextlib.suppress(
                    JactusError
                ):  # a full disk was to be told of, and not that it has no room for this
                    _write_json(folder / "spent.json", self._spent(folder) + time.perf_counter() - started)
                raise
            found["seconds"] = self._spent(folder) + time.perf_counter() - started
            _write_json(folder / "done.json", found)
        else:
            say(f"{name}: as it was done before ({found['seconds']:.0f} s)")
        self.stages[name] = found
        return folder

    def holds(self, name: str, of: dict[str, Any]) -> bool:
        """Whether a stage that is determined so was begun or done here."""
        return _read_json(self.folder / name / "of.json") == _as_kept(of)

    def _spent(self, folder: Path) -> float:
        """Seconds of attempts that were interrupted, but by a kill."""
        return _read_json(folder / "spent.json") or 0.0

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other run writes here meanwhile. Raises JactusError where one does, or has finished here."""
        with ExitStack() as held:
            with refusing(self.output):
                self.output.mkdir(parents=True, exist_ok=True)
                held.enter_context(alone(self.output / LOCK, self.output))
                check_output(self.output)
                self.folder.mkdir(exist_ok=True)
            yield

    def clear(self) -> None:
        """Take the folder away, under another name first: what a kill leaves of it is no run's that can go on."""
        os.replace(self.folder, self.output / DONE)
        shutil.rmtree(self.output / DONE, ignore_errors=True)


def check_output(output: Path) -> None:
    """Raise JactusError where the folder holds what is not of a run that can go on."""
    if output.exists() and not output.is_dir():
        raise JactusError(f"{output} is a file; --output is a folder to write")
    if not output.is_dir() or (output / FOLDER).is_dir():
        return
    held = [file.name for file in output.iterdir() if file.name not in (LOCK, FOLDER_LOCK)]
    if held:
        what = "a finished run" if "jactus-run.json" in held else held[0]
        raise JactusError(f"{output} holds {what}; choose another --output, or take it away")


def _as_kept(of: dict[str, Any]) -> dict[str, Any]:
    """What determines a stage, as its file has it."""
    kept: dict[str, Any] = json.loads(json.dumps(_flat(of)))
    return kept


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat


def _short(value: Any) -> str:
    return json.dumps(value) if len(json.dumps(value)) <= 40 else f"{json.dumps(value)[:36]}…"


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise JactusError(f"{file} cannot be read ({e}); take {file.parent} away to do that stage again") from e


def _write_json(file: Path, value: Any) -> None:
    with storage.atomic(file) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

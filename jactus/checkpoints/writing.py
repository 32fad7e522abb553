"""How files come to their places: whole or not at all, one writer at a time, whenever the process is killed or the disk is full."""

import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from jactus_kernels import JactusError

logger = logging.getLogger("jactus")
# What transformers calls its weight files; anything else in a directory is the user's.
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
PARTIAL = ".saving-"  # folders that are being filled
SAVED, NAMES = ".saved", ".names"  # one that is complete, with the names of its files, which are on their way up
FOLDER_LOCK = ".jactus.lock"
PATIENCE = 60.0  # seconds for another to write one file
# Some network file systems have no locks.
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def alone(lock: Path, written: Path, wait: float = 0.0) -> Iterator[None]:
    """Holds the file `lock` while `written` is written to; the system lets go of it when its holder dies, however it does.

    Raises JactusError where another holds it for longer than `wait` seconds, and OSError where it cannot be made.
    """
    held = FileLock(lock, timeout=wait)
    try:
        held.acquire()
    except Timeout as e:
        raise JactusError(
            f"{written} is being written by another process, or by another run in this one: wait for it, stop it, or choose "
            "another path"
        ) from e
    except OSError as e:
        if e.errno not in LOCKLESS:
            raise
        logger.warning("%s is on a file system without locks: see to it that only one process writes there", written)
        yield
        return
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: whoever waits for it finds that it is gone, and makes another
        held.release()


@contextmanager
def atomic(path: Path, size: int | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path` which takes its place, durably, only when the block succeeds.

    size: bytes that it will take, where they are known. Raises JactusError when the disk refuses.
    """
    with refusing(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock, partial = _beside(path)  # one name, so that a killed writer's is written over
        with alone(lock, path, PATIENCE):
            try:
                partial.unlink(missing_ok=True)
                partial.touch(0o644)
                yield partial
                _sync(partial)
                os.chmod(partial, 0o644)
                os.replace(partial, path)
                _sync(path.parent)
            finally:
                partial.unlink(missing_ok=True)


def tidy(path: Path) -> None:
    """Take away what a killed writer of `path` left beside it, where nobody else writes it. Raises OSError."""
    for left in _beside(path):
        left.unlink(missing_ok=True)


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}.lock"), path.with_name(f".{path.name}.partial")


@contextmanager
def refusing(path: Path, size: int | None = None) -> Iterator[None]:
    """Where the disk refuses to write `path`, of `size` bytes, says so in a JactusError."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise JactusError(
            f"could not write {path}: {e}{_room(path.parent, size)}; what was there before is untouched: free some space or "
            "choose another path"
        ) from e


@contextmanager
def together(directory: Path, size: int | None = None) -> Iterator[Path]:
    """Yields an empty folder in `directory`, whose files take their places there when the block succeeds, config.json last;
    other files in `directory` stay, but for weights of an older checkpoint.

    Raises JactusError when the disk refuses, or another process writes there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with alone(directory / FOLDER_LOCK, directory):
            complete(directory)
            for left in directory.glob(f"{PARTIAL}*"):  # by a writer that was killed
                shutil.rmtree(left, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=directory))
            try:
                yield partial
                names = sorted(file.name for file in partial.iterdir())
                (partial / NAMES).write_text(json.dumps(names), encoding="utf-8")
                for file in partial.iterdir():
                    _sync(file)
                _sync(partial)
                os.rename(partial, directory / SAVED)
                complete(directory)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        raise JactusError(
            f"could not save to {directory}: {e}{_room(directory, size)}; "
            + (
                unfinished(directory)
                or "an older checkpoint there is untouched: free some space or choose another directory"
            )
        ) from e


def complete(directory: Path) -> None:
    """Bring up what `together` had written whole and was stopped from putting in its place. Raises OSError."""
    saved = directory / SAVED
    if not saved.is_dir():
        return
    if (saved / NAMES).exists():
        names = json.loads((saved / NAMES).read_text(encoding="utf-8"))
        # config.json last: until it comes, a reader has the old checkpoint or sees its digests and says so.
        for name in sorted(names, key=lambda each: each == "config.json"):
            if name == "config.json":
                for stale in directory.iterdir():
                    if WEIGHT_FILE.fullmatch(stale.name) and stale.name not in names:
                        stale.unlink()
            if (saved / name).exists():
                os.replace(saved / name, directory / name)
        _sync(directory)
        (saved / NAMES).unlink()
    saved.rmdir()


def unfinished(directory: Path) -> str:
    """What to do where a save was stopped when all was written and not all in its place; nothing where none was."""
    if not (saved := directory / SAVED).is_dir():
        return ""
    return f"the last save was stopped when all was written, and not all in its place: move the files of {saved} up into {directory}"


def _sync(path: Path) -> None:
    """A file's bytes, or a folder's names, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _room(folder: Path, size: int | None) -> str:
    if size is None:
        return ""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return f"; it takes {size / 1e6:.1f} MB, beside what is there until it is written, and {shutil.disk_usage(there).free / 1e6:.1f} MB are free"

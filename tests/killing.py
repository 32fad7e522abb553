"""Work that is killed whenever it touches the disk: a process with everything imported, which forks one child an attempt.

python -m tests.killing FOLDER runs every scenario, and prints as JSON how many kills each saw.
"""

import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import jactus
from jactus.app.record import Run
from jactus.checkpoints.writing import SAVED
from tests import app_made as made
from tests.models import BERT, EVERY, SMALL

CHANGES = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "shutil.rmtree",
)  # Python's audit events


class Ended(NamedTuple):
    """How a child ended: its status (negative: of that signal), and how often it was about to change something in the folder."""

    status: int
    moments: int


def child(work: Callable[[Path], object], folder: Path, kill_at: int | None = None) -> Ended:
    """Do `work(folder)` in a process of its own, and kill that just before it changes something in `folder` the `kill_at`-th time."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status, moments = 1, 0

        def hook(event: str, args: tuple) -> None:
            nonlocal moments
            if event not in CHANGES or not any(str(folder) in str(arg) for arg in args):
                return
            if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            moments += 1
            if moments == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            work(folder)
            os.write(write, str(moments).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as told:
        moments = int(told.read() or 0)
    return Ended(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), moments)


def must(work: Callable[[Path], object], folder: Path) -> int:
    """Do the work to its end; returns its moments. Raises where it fails."""
    ended = child(work, folder)
    assert ended.status == 0, f"{work} failed in {folder}"
    return ended.moments


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def chain(work: Callable[[Path], object], folder: Path, kills: int, longest: int, seed: int) -> int:
    """Start the work and kill it, again and again in one folder, then let it end; returns how often it was killed."""
    draw, done = random.Random(seed), 0
    for _ in range(kills):
        ended = child(work, folder, draw.randint(1, longest))
        if ended.status == 0:
            return done
        assert ended.status == -signal.SIGKILL
        done += 1
    must(work, folder)
    return done


def pipeline(folder: Path) -> None:
    """Calibrate, plan, compress and save, as a script that leaves out what it has."""
    model, statistics, plan = BERT.model(), folder / "statistics", folder / "plan"
    if not statistics.exists():
        options = {"resume": folder / "snapshot", "resume_every": 0, "save": statistics, "memory_limit": 20_000}
        jactus.calibrate(model, BERT.batches(2), SMALL, progress=False, **options)
    if not plan.exists():
        jactus.plan(model, jactus.Statistics.load(statistics), SMALL, progress=False).save(plan)
    jactus.compress(model, jactus.Plan.load(plan))
    jactus.save_cores(model, folder / "cores")
    jactus.save_pretrained(model, folder / "model", max_shard_size="8KB")


def calibrate_to_plan_to_checkpoint(scratch: Path) -> int:
    calm = scratch / "calm"
    calm.mkdir()
    moments = must(pipeline, calm)
    rough = scratch / "rough"
    rough.mkdir()
    kills = chain(pipeline, rough, 8, moments // 3, 0)
    left = contents(rough)
    for lock in (".snapshot.run", ".statistics.lock", ".plan.lock"):  # empty, where the kill came after all was written
        assert left.pop(lock, b"") == b""
    assert left == contents(calm)
    return kills


def logits(model: torch.nn.Module) -> list:
    with torch.no_grad():
        return model(**BERT.batch()).logits.tolist()


def checkpoint_at_every_moment(scratch: Path) -> int:
    """A save over an older checkpoint: whenever it is killed there is the old one or the new one, or what is to be moved is named."""

    def save(folder: Path, budget=0.7, shards="8KB") -> None:
        model = jactus.compress(BERT.model(), jactus.Plan.load(scratch / "plan").at(budget))
        jactus.save_pretrained(model, folder, max_shard_size=shards)
        (scratch / "logits.json").write_text(json.dumps(logits(model)))

    def old(folder: Path) -> None:
        model = BERT.model()
        jactus.plan(model, jactus.calibrate(model, BERT.batches(1), EVERY, progress=False)).save(scratch / "plan")
        save(folder, 0.5, "1GB")

    def look(folder: Path) -> None:
        try:
            found = logits(BERT.auto.from_pretrained(folder).eval())
        except jactus.JactusError as e:
            if f"move the files of {folder / SAVED} up into {folder}" not in str(e):
                raise
            (folder / "moved").touch()
            return
        (folder / "found.json").write_text(json.dumps(found))

    calm, before = scratch / "calm", scratch / "before"
    must(old, before)
    olds = json.loads((scratch / "logits.json").read_text())
    shutil.copytree(before, calm)
    moments = must(save, calm)
    news = json.loads((scratch / "logits.json").read_text())
    seen = set()
    for at in range(1, moments + 1):
        rough = scratch / "rough"
        shutil.copytree(before, rough)
        assert child(save, rough, at).status == -signal.SIGKILL
        must(look, rough)
        if (rough / "moved").exists():
            seen.add("between")
            (rough / "moved").unlink()
        else:
            found = json.loads((rough / "found.json").read_text())
            assert found in (olds, news)
            seen.add("old" if found == olds else "new")
            (rough / "found.json").unlink()
        if at % 4 == 0:  # each takes a third of a second
            must(save, rough)
            assert contents(rough) == contents(calm)
        shutil.rmtree(rough)
    assert seen >= {"old", "new"}
    return moments


def fit_from_csv(scratch: Path) -> int:
    """`jactus fit`, training included, with a checkpoint after each step."""
    made.encoder(scratch / "encoder")
    made.reviews(scratch / "reviews.csv", rows=20)
    words = ["fit", scratch / "reviews.csv", "--model", scratch / "encoder", "--epochs", 1, "--batch-size", 8]

    def fit(folder: Path) -> None:
        from jactus.app import training

        training.LEAST = 0.0
        assert made.run(*words, "--output", folder / "small") == 0

    folders = [scratch / name for name in ("calm", "rough")]
    for folder in folders:
        folder.mkdir()
    moments = must(fit, folders[0])
    kills = chain(fit, folders[1], 3, moments // 2, 1)
    calm, rough = (folder / "small" for folder in folders)
    assert Run.load(calm).scores == Run.load(rough).scores
    assert sorted(p.name for p in calm.iterdir()) == sorted(p.name for p in rough.iterdir())
    assert (calm / "model.safetensors").read_bytes() == (rough / "model.safetensors").read_bytes()
    return kills


SCENARIOS = (calibrate_to_plan_to_checkpoint, checkpoint_at_every_moment, fit_from_csv)


def main(folder: Path) -> None:
    found: dict[str, object] = {}
    for scenario in SCENARIOS:
        scratch = folder / scenario.__name__
        scratch.mkdir()
        try:
            found[scenario.__name__] = scenario(scratch)
        except BaseException:
            found[scenario.__name__] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

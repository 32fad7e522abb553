"""SmolLM2-135M calibrated and planned by two processes under a third of the memory that one pass takes, killed again and again, to
the same bits.

python -m bench.soak                 writes bench/results/soak.md

A run is RANKS processes, `python -m bench.soak run FOLDER LIMIT MEETING RANK`: what a user's script would be. Both are killed by
SIGKILL at random moments and started again, until they were killed KILLS times; the files they end with are compared, byte for byte,
with those of a run that nobody disturbed.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import jactus
from jactus.calibration.passes import sum_bytes
from jactus.checkpoints.quantizer import file_digest
from jactus.model.targets import find_targets

from . import report
from .models import smollm2

RESULTS = Path(__file__).parent / "results" / "soak.md"
COMMAND = (sys.executable, "-m", "bench.soak", "run")
RANKS = 2
KILLS, IN_CALIBRATION = 12, 8
SEQUENCES, TOKENS = 4, 32
# A plan of all thirty blocks takes minutes, and is made again and again.
PLANNED = r"model\.layers\.[0-2]\..*_proj"
FILES = ("statistics.safetensors", "plan.safetensors")


def run(folder: Path, limit: int, meeting: str, rank: int) -> None:
    """What is killed: rank 0 says on stdout when a stage begins."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    model, _ = smollm2()
    config = jactus.JactusConfig()
    statistics, plan = (folder / name for name in FILES)
    say = print if rank == 0 else lambda *_, **__: None
    say("calibrating", flush=True)
    if not statistics.exists():
        options = {"memory_limit": limit, "resume": folder / "snapshot", "resume_every": 2.0, "save": statistics}
        jactus.calibrate(model, _batches()[rank::RANKS], config, verify=False, progress=False, group=group, **options)
    else:  # killed when that was written, and its snapshot still there
        for left in folder.glob(f"*snapshot.rank{rank}of{RANKS}*"):
            left.unlink()
    dist.barrier()
    say("planning", flush=True)
    sums = jactus.Statistics.load(statistics)
    made = jactus.plan(model, sums, config.replace(target_modules=PLANNED), progress=False, group=group)
    say("writing", flush=True)
    if rank == 0:
        made.save(plan)
    dist.barrier()
    say("done", flush=True)


def _batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 5000, (1, TOKENS), generator=generator) for _ in range(SEQUENCES)]
    return [{"input_ids": each, "labels": each} for each in ids]


@dataclass
class Attempt:
    """A start of the run: how it ended, in which stage, how long after that began, and the most memory a process of it held."""

    killed: bool
    stage: str
    seconds: float
    bytes: int
    began: dict[str, float]


def attempt(folder: Path, limit: int, stage: str = "", after: float = 0.0) -> Attempt:
    """Start the run, and kill its processes `after` seconds of that stage; or let it come to its end."""
    with tempfile.TemporaryDirectory() as meeting:
        common = (*COMMAND, str(folder), str(limit), f"{meeting}/here")
        ranks = [
            subprocess.Popen([*common, str(rank)], stdout=subprocess.PIPE if rank == 0 else None, text=True)
            for rank in range(RANKS)
        ]
        assert ranks[0].stdout is not None
        began: dict[str, float] = {}
        for line in ranks[0].stdout:
            began[line.strip()] = time.monotonic()
            if line.strip() == stage:
                break
        if stage in began:
            time.sleep(after)
            for process in ranks:  # one that has ended waits to be asked how, which send_signal would do
                os.kill(process.pid, signal.SIGKILL)
            for line in ranks[0].stdout:  # what it still said
                began[line.strip()] = time.monotonic()
        ended = [os.wait4(process.pid, 0) for process in ranks]
    for process, (_, status, _) in zip(ranks, ended):
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"a run in {folder} ended with {process.returncode}")
    last = list(began)[-1]
    spent = time.monotonic() - began[last]
    most = max(usage.ru_maxrss for *_, usage in ended) * 1024
    return Attempt(any(process.returncode for process in ranks), last, spent, most, began)


def soak() -> str:
    """The log of it all, as a document. Raises SystemExit where the results differ."""
    started = time.monotonic()
    model, _ = smollm2()
    config = jactus.JactusConfig()
    whole = sum(sum_bytes(target, config) for target in find_targets(model, config).values())
    del model
    limit = whole // 3
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        calm, rough = Path(scratch, "undisturbed"), Path(scratch, "killed")
        for folder in (calm, rough):
            folder.mkdir()
        undisturbed = attempt(calm, limit)
        at = undisturbed.began
        calibrating, planning = at["planning"] - at["calibrating"], at["writing"] - at["planning"]
        _say(f"undisturbed: calibrated in {calibrating:.0f} s, planned in {planning:.0f} s")
        attempts: list[Attempt] = []
        while sum(each.killed for each in attempts) < KILLS:
            kills = sum(each.killed for each in attempts)
            calibrated = (rough / FILES[0]).exists()
            if kills < IN_CALIBRATION and not calibrated:
                stage, span = "calibrating", calibrating / 8
            else:
                stage, span = ("writing", 0.3) if kills == KILLS - 1 else ("planning", planning / 4)
            attempts.append(attempt(rough, limit, stage, draw.uniform(0, span)))
            last = attempts[-1]
            _say(
                f"kill {kills + 1}: {last.stage}, {last.seconds:.1f} s in; left: {', '.join(sorted(os.listdir(rough)))}"
            )
            if not last.killed:  # it was done before the signal came
                (rough / FILES[1]).unlink()
        final = attempt(rough, limit)
        equal = {name: file_digest(calm / name) == file_digest(rough / name) for name in FILES}
        sizes = {name: (calm / name).stat().st_size for name in FILES}
        left = sorted(set(os.listdir(rough)) - set(FILES))
    if not all(equal.values()) or left:
        raise SystemExit(f"not the same after {KILLS} kills: {equal}, left behind: {left}")
    rows = [
        (f"{number}", each.stage if each.killed else "had ended", f"{each.seconds:.1f}", f"{each.bytes / 1e6:.0f}")
        for number, each in enumerate(attempts, 1)
    ]
    rows.append(("last", "not killed", "", f"{final.bytes / 1e6:.0f}"))
    return "\n".join(
        [
            "# Killed again and again: SmolLM2-135M",
            "",
            f"`python -m bench.soak`: {SEQUENCES} sequences of {TOKENS} tokens through all 210 layers, by {RANKS} processes over "
            f"gloo, and a plan of the first three blocks. Sums of {whole / 1e6:.0f} MB, of which {limit / 1e6:.0f} MB may be held at a "
            f"time. Undisturbed: calibrated in {calibrating:.0f} s, planned in {planning:.0f} s, {undisturbed.bytes / 1e6:.0f} MB at the "
            f"most. Then both killed by SIGKILL {sum(each.killed for each in attempts)} times and started again each time: "
            + " and ".join(f"{name} ({sizes[name] / 1e6:.0f} MB)" for name in FILES)
            + f" are those of the undisturbed run, byte for byte, and nothing is left beside them. {time.monotonic() - started:.0f} s in "
            "all.",
            "",
            report.table(("start", "killed while", "seconds into it", "MB at the most"), rows),
            "",
            report.versions(),
            "",
        ]
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    if argv[:1] == ["run"]:
        run(Path(argv[1]), int(argv[2]), argv[3], int(argv[4]))
        return
    RESULTS.write_text(soak(), encoding="utf-8")
    print(RESULTS)


if __name__ == "__main__":
    main(sys.argv[1:])

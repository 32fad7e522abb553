"""`jactus fit` and its stages: head, calibrate, plan, compress, train, and what becomes of it (`finish.py`).

A verb a stage goes as far as its name says. Each stage keeps its files in OUTPUT/.work by what determines it.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration.head import fit_head
from ..calibration.passes import calibrate
from ..calibration.snapshots import DECISIVE
from ..calibration.statistics import Statistics
from ..calibration.summing import Summing
from ..checkpoints import storage
from ..checkpoints.checkpoint import load_cores, save_cores
from ..compression.coordinates import learning_rate
from ..compression.surgery import compressed as put_in
from ..model.families import head_parameters
from ..pipeline import planned_by_part
from ..planning.planner import plan
from ..planning.plans import REALLOCATES, Plan, makes_spectra
from ..planning.shelf import Shelf
from . import rows, subject
from .console import Findings, say
from .encoding import Encoded, encode
from .rows import Data
from .settings import Settings
from .training import trained
from .work import Work

SNAPSHOT, SAID = "snapshot.safetensors", "said.txt"


@dataclass
class Run:
    """A run on its way: what was read, the model as it is by now, and what the stages left."""

    settings: Settings
    command: list[str]
    data: Data
    encoded: Encoded
    work: Work
    model: PreTrainedModel
    findings: Findings
    of: dict[str, Any]

    @property
    def memory_limit(self) -> int | None:
        """Bytes of sums at a time; None for no limit."""
        limit = self.settings.memory_limit
        return None if limit is None else int(limit)

    @property
    def calibration(self) -> dict[str, Any]:
        """What calibrating found, in a stage of its own or together with planning."""
        return self.work.stages.get("plan") or self.work.stages["calibrate"]


def begun(settings: Settings, command: list[str], findings: Findings) -> Run:
    """Read the data and the model; nothing is written yet. Raises JactusError for what cannot be used."""
    work = Work(Path(settings.output))
    data = told(settings)
    encoded = encode(data, settings)
    model = subject.load(settings, data, encoded.processor)
    of = {
        "data": data.digest,
        "model": subject.identity(model),
        "seed": settings.seed,
        "max_length": None if data.found.task == "images" else settings.max_length,
    }
    return Run(settings, command, data, encoded, work, model, findings, of)


def told(settings: Settings) -> Data:
    """The data, and on stderr what it was taken for. Raises JactusError as `rows.load`."""
    data = rows.load(settings)
    why = "" if settings.task else f", since {data.found.why}"
    say(f"{settings.data} ({data.how}): {data.found.task}{why}")
    classes = f"; {len(data.classes)} classes: {', '.join(data.classes[:10])}" if data.classes else ""
    more = ", …" if len(data.classes) > 10 else ""
    say(f"{len(data.train):,} rows to train and {len(data.validation):,} to validate on{classes}{more}")
    return data


def upto(run: Run, verb: str) -> None:
    """Go through the stages to the one of that name. Under a memory limit layers are calibrated and planned part by part, unless
    the sums of all of them were asked for."""
    stages = {"head": head, "calibrate": calibrated, "plan": planned, "compress": compressed, "train": train}
    for name, stage in stages.items():
        if name == "calibrate" != verb and run.memory_limit is not None and not _has_sums(run):
            continue
        stage(run)
        if name == verb:
            return


def head(run: Run) -> None:
    """The dense model under a fitted head, and what it makes of the validation rows."""
    run.of["calibration_rows"] = min(run.settings.calibration_rows, len(run.encoded.train))
    heads = head_parameters(run.model)

    def make(folder: Path) -> dict[str, Any]:
        if heads:
            fit_head(run.model, run.encoded.calibration(run.settings.calibration_rows))
        storage.write(folder / "head.safetensors", "head", dict(heads), {})
        return {"score": score(run, "dense")}

    folder = run.work.stage("head", dict(run.of), make)
    fitted, _ = storage.read(folder / "head.safetensors", "head")
    with torch.no_grad():
        for name, p in heads.items():
            p.copy_(fitted[name])


def calibrated(run: Run) -> None:
    """What the training rows say of every layer, as sums in a file."""
    config = run.settings.config()
    run.of["method"] = _calibrated_under(run)

    def make(folder: Path) -> dict[str, Any]:
        chosen = run.encoded.calibration(run.settings.calibration_rows)
        snapshot, result = folder / SNAPSHOT, folder / "statistics.safetensors"
        with run.findings.into(folder / SAID):
            sums = calibrate(run.model, chosen, config, memory_limit=run.memory_limit, resume=snapshot, save=result)
        return _found(run, sums.tokens.values())

    run.work.stage("calibrate", dict(run.of), make)


def _found(run: Run, tokens: Iterable[int]) -> dict[str, Any]:
    """What calibrating said of the model and the data, and how many tokens a layer saw."""
    said = [said for said in dict.fromkeys(run.findings.said) if not said.startswith("calibrating ")]
    return {"checks": said, "tokens": max(tokens)}


def _has_sums(run: Run) -> bool:
    """Whether `jactus calibrate` was begun or done with these settings."""
    return run.work.holds("calibrate", run.of | {"method": _calibrated_under(run)})


def _calibrated_under(run: Run) -> dict[str, Any]:
    config = run.settings.config()
    return {name: _plain(getattr(config, name)) for name in DECISIVE} | {"memory_limit": run.memory_limit}


def planned(run: Run) -> None:
    """Directions and spectra of every layer, from which ranks follow for any budget."""
    config = run.settings.config()
    run.of["method"] = _calibrated_under(run) | _plain(makes_spectra(config))

    def make(folder: Path) -> dict[str, Any]:
        file = folder / "plan.safetensors"
        if found := run.work.stages.get("calibrate"):
            sums = Statistics.load(run.work.folder / "calibrate" / "statistics.safetensors")
            plan(run.model, sums, config).save(file)
            return {"checks": found["checks"], "tokens": found["tokens"]}
        chosen = run.encoded.calibration(run.settings.calibration_rows)
        limit = Summing.checked(memory_limit=run.memory_limit)
        with run.findings.into(folder / SAID):
            if file.exists():  # it was killed while what the plan was made from was being taken away
                made = Plan.load(file)
            else:
                with planned_by_part(run.model, chosen, config, limit, folder / SNAPSHOT) as (made, _):
                    made.save(file)
        for left in folder.glob(f"*{SNAPSHOT}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return _found(run, [layer.tokens for layer in made.layers.values()])

    run.work.stage("plan", dict(run.of), make)


def the_plan(run: Run) -> Plan:
    """The plan at the run's budget."""
    made = Plan.load(run.work.folder / "plan" / "plan.safetensors")
    config = run.settings.config()
    return made.with_config(**{name: getattr(config, name) for name in REALLOCATES})


def compressed(run: Run) -> None:
    """The model with factors in its layers, and what it makes of the validation rows before it is trained."""
    config = run.settings.config()
    run.of["method"] = run.of["method"] | {name: _plain(getattr(config, name)) for name in REALLOCATES}
    factors = run.work.folder / "factors"
    shutil.rmtree(factors, ignore_errors=True)  # of a run that was killed
    shelf = None
    if run.memory_limit is not None:
        factors.mkdir()
        shelf = Shelf(factors)
    put_in(run.model, the_plan(run), shelf)
    shutil.rmtree(factors, ignore_errors=True)

    def make(folder: Path) -> dict[str, Any]:
        return {"score": score(run, "compressed"), "rate": learning_rate(run.model)}

    run.work.stage("compress", dict(run.of), make)


def train(run: Run) -> None:
    """The model trained on the task; only cores and the head change."""
    settings = run.settings
    rate = settings.learning_rate or run.work.stages["compress"]["rate"]
    own = ("epochs", "batch_size", "gradient_checkpointing")
    run.of |= {name: getattr(settings, name) for name in own} | {"learning_rate": settings.learning_rate}

    def make(folder: Path) -> dict[str, Any]:
        points, last = trained(run.model, run.encoded, settings, run.data.of_language, rate, folder / "trainer")
        save_cores(run.model, folder / "trained.safetensors")
        return {"score": score(run, "trained", last), "points": [asdict(point) for point in points], "rate": rate}

    folder = run.work.stage("train", dict(run.of), make)
    load_cores(run.model, folder / "trained.safetensors")
    run.model.eval()


def score(run: Run, of: str, known: subject.Measured | None = None) -> dict[str, float]:
    """What the model makes of the validation rows, said on stderr; measured unless it is known."""
    batches, of_language = run.encoded.held_out(), run.data.of_language
    found = known or subject.measure(run.model, batches, of_language, f"validating ({of})")
    named = f"perplexity {found.metric:.2f}" if of_language else f"accuracy {found.metric:.4f}"
    say(f"{of}: {named}, loss {found.loss:.4f}")
    return asdict(found)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(asdict(value) if dataclasses.is_dataclass(value) else value))  # type: ignore[arg-type]

"""The verbs of the command line: each is a function that typer reads. What is heavy is imported when a verb runs."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from jactus_kernels import JactusError

from .console import quiet, table
from .flags import with_settings
from .settings import RECIPES, Settings, recipes


def _upto(verb: str, chosen: Settings, command: list[str]) -> Any:
    """The run after the stage of that name."""
    from . import fitting

    with quiet() as findings:
        run = fitting.begun(chosen, command, findings)
        with run.work.held():
            fitting.upto(run, verb)
    return run


@with_settings
def fit(chosen: Settings, command: list[str], as_json: bool) -> None:
    """From DATA to a smaller, adapted model. Goes through all the stages, checks, and writes it with its card and page."""
    from . import finish, fitting

    with quiet() as findings:
        described = finish.finished(Path(chosen.output), command)
        if described is None:
            run = fitting.begun(chosen, command, findings)
            with run.work.held():
                fitting.upto(run, "train")
                described = finish.finish(run)
    if as_json:
        print(json.dumps({"output": chosen.output, **asdict(described)}, indent=1))
        return
    shown = table(f"{described.base}, {described.task}", "", described.metric, "loss", "parameters", "ms a batch")
    sizes = {size.of: size for size in described.sizes}
    for score in described.scores:
        size = sizes.get({"dense": "dense", "trained": "training", "reloaded": "deployed"}.get(score.of, ""))
        took = f"{size.milliseconds:.1f}" if size and size.milliseconds is not None else ""
        parameters = f"{size.parameters:,}" if size else ""
        shown.add_row(score.of, f"{score.metric:.4f}", f"{score.loss:.4f}", parameters, took)
    _print(shown)


@with_settings
def calibrate(chosen: Settings, command: list[str], as_json: bool) -> None:
    """Sum what DATA says of every layer. Fits the head first; all is kept in OUTPUT/.work."""
    run = _upto("calibrate", chosen, command)
    found = run.calibration
    _result(run, "calibrate", {"tokens": found["tokens"], "checks": found["checks"]}, as_json)


@with_settings
def plan(chosen: Settings, command: list[str], as_json: bool) -> None:
    """Give every layer a rank. Goes on from `calibrate`, and shows what each budget would give."""
    from . import finish, fitting

    run = _upto("plan", chosen, command)
    made = fitting.the_plan(run)
    sweep = [asdict(each) for each in finish.swept(made)]
    if not as_json:
        print(made)
        shown = table("What each budget would give", "budget", "parameters", "loss it is predicted to add")
        for each in sweep:
            shown.add_row(f"{each['budget']:.0%}", f"{each['parameters']:,}", f"{each['predicted']:.4f}")
        _print(shown)
    _result(run, "plan", {"ranks": made.ranks, "predicted": made.predicted_loss, "sweep": sweep}, as_json)


@with_settings
def compress(chosen: Settings, command: list[str], as_json: bool) -> None:
    """Put the factors in, untrained. Goes on from `plan`, and writes OUTPUT/compressed for a training loop of your own."""
    run = _upto("compress", chosen, command)
    _keep(run, "compressed")
    found = run.work.stages["compress"]
    _result(run, "compressed", {"score": found["score"], "learning_rate": found["rate"]}, as_json)


@with_settings
def train(chosen: Settings, command: list[str], as_json: bool) -> None:
    """Train the cores and the head. Goes on from `compress`, and writes OUTPUT/trained, which `jactus fold` makes ready to deploy."""
    run = _upto("train", chosen, command)
    _keep(run, "trained")
    _result(run, "trained", {"score": run.work.stages["train"]["score"]}, as_json)


def _keep(run: Any, name: str) -> None:
    from ..checkpoints.checkpoint import save_pretrained

    folder = Path(run.settings.output) / name
    save_pretrained(run.model, folder)
    run.encoded.processor.save_pretrained(folder)


def _result(run: Any, name: str, found: dict[str, Any], as_json: bool) -> None:
    where = Path(run.settings.output)
    files = where / name if (where / name).is_dir() else run.work.folder / name
    if as_json:
        print(json.dumps({"files": str(files), **found}, indent=1))
    else:
        print(files)


def fold(
    checkpoint: Annotated[Path, typer.Argument(help="A trained checkpoint.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Make a trained checkpoint ready to deploy. Multiplies the cores in: r(m+n−r) parameters a layer."""
    from ..compression import surgery

    _convert(surgery.fold, checkpoint, output)


def merge(
    checkpoint: Annotated[Path, typer.Argument(help="A compressed checkpoint.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Make an ordinary dense checkpoint. Multiplies everything out."""
    from ..compression import surgery

    _convert(surgery.merge, checkpoint, output)


def _convert(change: Callable[[Any], Any], checkpoint: Path, output: Path) -> None:
    from ..checkpoints.checkpoint import save_pretrained
    from ..report import size
    from .folders import copy_others, load

    with quiet():
        model = load(checkpoint)
        change(model)
        save_pretrained(model, output)
        copy_others(checkpoint, output)
    print(f"{output}: {size(model).stored:,} parameters")


def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint folder or a plan file.")],
    budget: Annotated[float | None, typer.Option(help="Show a plan at another budget.")] = None,
) -> None:
    """Show a checkpoint's layers or a plan's ranks. And what they cost."""
    from .folders import described

    with quiet():
        text = described(path, budget)
    print(text)


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A compressed checkpoint, trained or folded.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="torch, onnx, torch.export or dense.")] = "onnx",
) -> None:
    """Write a checkpoint in a form that needs no jactus, checked against the model."""
    from ..export.exporter import export_model
    from .folders import copy_others, load

    with quiet():
        written = export_model(load(checkpoint).eval(), output, to)
        copy_others(checkpoint, output)
    print(written)


def estimate(
    model: Annotated[Path, typer.Argument(help="A folder with a config.json, or that file.")],
    budget: Annotated[float, typer.Option(help="What to keep of the linear layers, in (0, 1].")] = 0.8,
    memory_limit: Annotated[
        float | None, typer.Option(help="Bytes of sums at a time, e.g. 2e9; all if not given.")
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Measure this machine, a few seconds, and say how long.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """What a model will take, from its config alone: memory by stage, ranks, sizes."""
    from ..config import JactusConfig
    from . import estimate as from_config
    from . import pace

    with quiet():
        limit = None if memory_limit is None else int(memory_limit)
        config = JactusConfig().replace(budget=budget)
        found = from_config.estimate(model, config, memory_limit=limit)
        seconds, line = pace.of_run(model, config, limit) if time else ({}, "")
    if json_:
        print(json.dumps(asdict(found) | ({"seconds": seconds} if time else {}), indent=1))
    else:
        print(from_config.table(found) + (f"\n\n{line}" if time else ""))


def take_cores(
    checkpoint: Annotated[Path, typer.Argument(help="A trained checkpoint, not folded.")],
    file: Annotated[Path, typer.Argument(help="The file to write, .safetensors.")],
) -> None:
    """Write a checkpoint's cores, its head and what else trained to a file: its task."""
    from ..checkpoints.checkpoint import save_cores
    from .folders import load

    with quiet():
        save_cores(load(checkpoint), file)
    print(file)


def put_cores(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint with the same bases, not folded.")],
    file: Annotated[Path, typer.Argument(help="What `cores take` wrote.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Write the checkpoint with another task's cores in it."""
    from ..checkpoints.checkpoint import load_cores

    _convert(lambda model: load_cores(model, file), checkpoint, output)


def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `jactus fit` wrote.")],
    output: Annotated[Path | None, typer.Option(help="The page to write; FOLDER/report.html by default.")] = None,
) -> None:
    """Make the page of a run again. From its record alone."""
    from . import page
    from .record import Run

    target = output or folder / "report.html"
    page.write(Run.load(folder), target)
    print(target)


def list_recipes() -> None:
    """The recipes: name and what each is for."""
    for name, first in recipes().items():
        print(f"{name:<12} {first}")


def copy_recipe(
    name: Annotated[str, typer.Argument(help="Of `jactus recipe ls`.")],
    file: Annotated[Path | None, typer.Argument(help="Where to; NAME.yaml here by default.")] = None,
) -> None:
    """Copy a recipe, to edit and to give to --config."""
    target = file or Path(f"{name}.yaml")
    if name not in recipes():
        raise JactusError(f"there is no recipe {name!r}, but {', '.join(recipes())}")
    if target.exists():
        raise JactusError(f"{target} exists; name another file")
    target.write_text((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    print(target)


def _print(shown: Table) -> None:
    from rich.console import Console

    Console(highlight=False).print(shown)

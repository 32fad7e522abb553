"""The options of `Settings` as typer reads them from the signature of a verb."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from json import dumps
from typing import Annotated, Any

import typer
from rich.console import Console

from .console import quiet, table
from .settings import Settings, settings

Recipe = Annotated[str | None, typer.Option("--config", help="A recipe: a YAML file of these options, or its name.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and what it takes; change nothing.")]


def with_settings(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with an option for each field of `Settings`, given to it as one `Settings`."""

    @functools.wraps(verb)
    def called(context: typer.Context, config: str | None, json: bool, dry_run: bool, **given: Any) -> None:
        chosen = settings({name: value or None if name == "text" else value for name, value in given.items()}, config)
        for name, word in (("data", "DATA"), ("model", "--model"), ("output", "--output")):
            if not getattr(chosen, name):
                raise typer.BadParameter(f"{word} is missing: {chosen.help(name)}")
        if dry_run:
            _dry_run(chosen, verb.__name__, json)
        else:
            verb(chosen, list(context.obj or ()), json)

    parameters = [_parameter("context", typer.Context)]
    for f in dataclasses.fields(Settings):
        if f.name != "method":
            parameters.append(_parameter(f.name, _annotated(f), None))
    parameters += [
        _parameter("config", Recipe, None),
        _parameter("json", Json, False),
        _parameter("dry_run", DryRun, False),
    ]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


def _parameter(name: str, annotation: Any, *default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(
        name, kind, annotation=annotation, default=default[0] if default else inspect.Parameter.empty
    )


def _annotated(f: Any) -> Any:
    if f.name == "data":
        return Annotated[str | None, typer.Argument(help=f.metadata["help"], show_default=False)]
    shown = f" [default: {f.default}]" if f.default not in (None, "") and f.default is not False else ""
    return Annotated[f.type | None, typer.Option(help=f.metadata["help"] + shown, show_default=False)]


def _dry_run(chosen: Settings, verb: str, as_json: bool) -> None:
    with quiet():
        from . import dry

        found = dry.cost(chosen, verb)
    if as_json:
        print(dumps(found, indent=1))
        return
    shown = table("What would be done; nothing was", "", "")
    for name, value in found.items():
        shown.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console(highlight=False).print(shown)

"""The command `jactus`: a verb a stage, and `fit`, which is all of them.

To add a verb: import its function and name it in `VERBS`.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import typer

from jactus_kernels import JactusError

from .verbs import (
    calibrate,
    compress,
    copy_recipe,
    estimate,
    export,
    fit,
    fold,
    inspect,
    list_recipes,
    merge,
    plan,
    put_cores,
    report,
    take_cores,
    train,
)

VERBS: tuple[Callable[..., Any], ...] = (
    fit, estimate, calibrate, plan, compress, train, fold, merge, export, inspect, report,
)  # fmt: skip

USAGE: Any = typer.BadParameter.__bases__[0]  # the error of usage, which typer does not export by name
INTERRUPTED = 130  # which typer returns after Ctrl-C, too
app = typer.Typer(
    name="jactus",
    help="Make a pretrained transformer smaller and adapt it to your task, in one step.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for verb in VERBS:
    app.command()(verb)
recipe = typer.Typer(help="Recipes that come with the package.")
recipe.command("ls")(list_recipes)
recipe.command("cp")(copy_recipe)
app.add_typer(recipe, name="recipe")
cores = typer.Typer(help="The cores of a task, apart from the bases that tasks share.")
cores.command("take")(take_cores)
cores.command("put")(put_cores)
app.add_typer(cores, name="cores")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 after an error, 2 of usage, 130 when it was interrupted. An error is a line
    on stderr, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = app(args=words, prog_name="jactus", standalone_mode=False, obj=["jactus", *words])
        return _interrupted(words) if status == INTERRUPTED else status if isinstance(status, int) else 0
    except JactusError as e:
        return _failed(str(e), 1)
    except (OSError, MemoryError, torch.OutOfMemoryError) as e:
        less = (
            "" if isinstance(e, OSError) else "; a smaller --batch-size or --max-length, or --memory-limit, takes less"
        )
        return _failed(f"{type(e).__name__}: {e}{less}", 1)
    except USAGE as e:
        return _failed(f"{e.format_message()} (jactus --help)", 2)
    except KeyboardInterrupt:
        return _interrupted(words)


def _interrupted(words: list[str]) -> int:
    # of a run the stages that were done are in files, and of its training the last step
    again = shlex.join(["jactus", *words])
    print(f"jactus: interrupted; the same command goes on from here:\n  {again}", file=sys.stderr)
    return INTERRUPTED


def _failed(message: str, status: int) -> int:
    print(f"jactus: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

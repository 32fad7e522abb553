"""`jactus inspect | fold | merge`: look at plans and checkpoints, and convert checkpoints, from the shell."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers import PreTrainedModel

from jactus_kernels import JactusError

from .checkpoints.checkpoint import save_pretrained
from .compression.surgery import fold, merge
from .planning.plans import Plan
from .report import describe_layers, size


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, and prints a JactusError without a traceback."""
    parser = argparse.ArgumentParser(prog="jactus", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect", help="what a checkpoint's layers or a plan's ranks are, and what they cost"
    )
    inspect.add_argument("path", type=Path, help="a checkpoint folder or a plan file")
    inspect.add_argument("--budget", type=float, help="show a plan at another budget")
    for name, help in (
        ("fold", "multiply the cores in: a checkpoint of two factors a layer, for deployment"),
        ("merge", "multiply everything out: an ordinary dense checkpoint"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("checkpoint", type=Path)
        command.add_argument("output", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.command == "inspect":
            print(_inspect(args.path, args.budget))
        else:
            model = load(args.checkpoint)
            (fold if args.command == "fold" else merge)(model)
            save_pretrained(model, args.output)
            print(f"{args.output}: {size(model).stored:,} parameters")
    except JactusError as e:
        print(f"jactus: {e}", file=sys.stderr)
        return 1
    return 0


def load(folder: Path) -> PreTrainedModel:
    """A checkpoint as the class its config names. Raises JactusError where transformers has no such class."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise JactusError(f"{folder} is not a checkpoint folder: {e}") from e
    name = (config.get("architectures") or [None])[0]
    model_class = getattr(transformers, str(name), None)
    if model_class is None:
        raise JactusError(
            f"{folder} is a {name}, a class of your own; load it with that class, and fold or merge in Python"
        )
    return model_class.from_pretrained(folder, dtype="auto")


def _inspect(path: Path, budget: float | None) -> str:
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


if __name__ == "__main__":
    sys.exit(main())

"""The tables and plots of what was measured; nothing is run here. Ratios are ours / theirs: under 1 is better."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from ..report import named, table
from .store import Growth, Memory, Row

# (measure, against, budget) → the ratio aimed at; a speed-up of 1.25 is 0.8.
TARGETS = {
    ("training step", "lora", 0.8): 0.95,
    ("training step", "lora", 0.5): 0.60,
    ("training step", "full", 0.8): 0.62,
    ("training step", "full", 0.5): 0.45,
    ("training step, captured", "full", 0.8): 0.75,
    ("training step", "dora", 0.8): 0.60,
    ("training step", "dora", 0.5): 0.45,
    ("prefill", "dense", 0.8): 1 / 1.25,
    ("prefill", "dense", 0.5): 1 / 1.7,
    ("decode", "dense", 0.8): 1.0,
    ("decode", "dense", 0.5): 1.0,
    ("decode, budget of time", "dense", 0.8): 1.0,
    ("decode, budget of time", "dense", 0.9): 1.0,
    ("calibration, covariances", "usual", 1.0): 0.65,
    ("planning, input metric", "whitening + full SVD", 1.0): 0.35,
    ("planning, fisher and union", "whitening + full SVD", 1.0): 0.35,
    ("plan.at", "one second", 1.0): 1.0,
    ("import jactus", "import torch, transformers", 1.0): 1.1,
    ("save model", "safetensors", 0.8): 1.2,
    ("load model", "safetensors", 0.8): 1.2,
    ("save plan", "safetensors", 1.0): 1.2,
    ("load plan", "safetensors", 1.0): 1.2,
}
OVER_FLOOR = 1.1  # calibration against the bare passes: at most this many times the counted work


def target(row: Row) -> float | None:
    """The ratio aimed at, where there is one."""
    if row.measure.startswith("calibration") and row.against == "bare" and row.floor:
        return OVER_FLOOR * row.floor
    if row.measure == "covariance update":
        wide = row.model in ("n = 3072", "n = 4096")
        return {"addmm_": 1 / 1.4 if wide else 1.0, "float32 update": 1 / 3}.get(row.against)
    return TARGETS.get((row.measure, row.against, row.budget))


def tables(rows: Sequence[Row], memory: Sequence[Memory], growth: Sequence[Growth]) -> str:
    """Everything that was measured, as Markdown."""
    parts = []
    for measure in dict.fromkeys(row.measure for row in rows):
        parts += [f"### {measure.capitalize()}", _comparison([row for row in rows if row.measure == measure])]
    if memory:
        parts += ["### Memory of a training step, MB", _memory(memory)]
    if growth:
        parts += ["### Growth", _growth(growth)]
    return "\n\n".join([*parts, *sorted({row.versions for row in (*rows, *memory, *growth)})])


def _comparison(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        aim = target(row)
        size = f"{row.batch} × {row.length}" if row.batch else "–"
        lines.append(
            (
                row.model, row.dtype, str(row.threads), size, f"{row.budget:.0%}", row.against,
                f"{row.ratio:.2f} ± {row.spread:.2f}", "–" if row.floor is None else f"{row.floor:.2f}",
                "–" if row.floor is None else f"{row.ratio / row.floor:.2f}",
                "–" if aim is None else f"≤ {aim:.2f} {'met' if row.ratio <= aim else 'missed'}", "–" if row.error is None else f"{row.error:.0e}",
            )
        )  # fmt: skip
    of = ("model", "dtype", "threads", "batch", "budget", "against")
    return table((*of, "ratio", "floor", "ratio / floor", "target", "error"), lines)


def _memory(rows: Sequence[Memory]) -> str:
    def mb(count: int | None) -> str:
        return "–" if count is None else f"{count / 1e6:.1f}"

    lines = [
        (
            row.model, f"{row.batch} × {row.length}", named(row.method, row.budget),
            *(mb(getattr(row, kind)) for kind in ("weights", "gradients", "optimizer", "activations", "peak")),
        )
        for row in rows
    ]  # fmt: skip
    return table(("model", "batch", "method", "weights", "gradients", "optimizer", "activations", "peak"), lines)


def _growth(rows: Sequence[Growth]) -> str:
    lines = [
        (row.measure, row.variable, row.sizes, row.relative, f"{row.exponent:.2f}", f"{row.predicted:g}")
        for row in rows
    ]
    return table(("what", "in", "sizes", "time, relative", "exponent", "asymptotic"), lines)


def plot(rows: Sequence[Row], file: Path) -> None:
    """Training steps and prefill: each ratio beside its floor."""
    panels = (("training step", "lora"), ("training step", "full"), ("prefill", "dense"))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(15, 4.6), layout="constrained")
    for axis, (measure, against) in zip(axes, panels):
        shown = [row for row in rows if (row.measure, row.against) == (measure, against)]
        names = list(dict.fromkeys(_name(row) for row in shown))
        for budget, colour in ((0.8, "tab:blue"), (0.5, "tab:orange")):
            mine = {_name(row): row for row in shown if row.budget == budget}
            x = [names.index(name) for name in mine]
            axis.errorbar(
                x, [row.ratio for row in mine.values()], [row.spread for row in mine.values()],
                fmt="o", capsize=3, color=colour, label=f"JACTUS {budget:.0%}",
            )  # fmt: skip
            floors = [row.floor if row.floor is not None else float("nan") for row in mine.values()]
            axis.plot(x, floors, "_", ms=14, color=colour, label=f"counted work, {budget:.0%}")
        axis.axhline(1, color="grey", lw=0.8)
        axis.set(title=f"{measure}: time / {against}'s", ylim=(0, None))
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axis.grid(alpha=0.3, axis="y")
    axes[0].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _name(row: Row) -> str:
    half = ", bf16" if row.dtype == "bfloat16" else ""
    return f"{row.model} {row.batch}×{row.length}{half}, {row.threads} thr."

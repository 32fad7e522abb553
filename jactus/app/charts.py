"""The pictures of a run's page, as SVG for the page's own text and colours: no text here comes from the data."""

import io
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .record import Layer, Point, Swept

# Colours that matplotlib writes down, and that the page replaces by its own in light and in dark.
INK, MUTED, RULE, ACCENT, WARM, PAPER = (f"#01020{i}" for i in range(1, 7))
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent", WARM: "warm", PAPER: "paper"}
STYLE = {
    "svg.fonttype": "none",  # text stays text: in the page's font, found by a search, read out
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
}
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MOST_DECADES = 9  # of a spectrum: what lies further down is nothing beside the rest


def spectrum(layers: Sequence[Layer], span: tuple[float, float], name: str, label: str) -> str:
    """The spectra of layers of one kind, from the first (faint) to the last (strong), with a dot at each cut.

    span: the lowest and the highest σ² of the picture, the same for all kinds.
    """
    with _style(name):
        figure, axes = _figure(235, 150, 40, 24)
        axes.set_yscale("log")
        for i, layer in enumerate(layers):
            alpha = 0.3 + 0.7 * (i + 1) / len(layers)
            energies = [max(e, span[0]) for e in layer.energies]
            alone = "." if len(energies) == 1 else ""
            axes.plot(layer.at, energies, marker=alone, color=ACCENT, lw=1.3, alpha=alpha, zorder=2)
            if layer.rank is not None and 0 < layer.cut < min(layer.m, layer.n):
                axes.plot(
                    layer.cut, _at(layer, layer.cut, energies), "o", color=WARM, mec=PAPER, mew=0.7, ms=5, zorder=3
                )
        axes.set_ylim(span[0], span[1] * 2)
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        return _svg(figure, name, label)


def sweep(
    swept: Sequence[Swept], chosen: Swept | None, here: int | None, limit: float, unit: float, word: str, label: str
) -> str:
    """Predicted loss against the size of the whole model: a ring round the `chosen` budget, a line at the limit, and one at
    the parameters of this run.

    unit: parameters of one unit of the axis, which `word` names.
    """
    with _style("sweep"):
        figure, axes = _figure(340, 230, 60, 42)
        sizes, losses = [s.parameters / unit for s in swept], [s.predicted for s in swept]
        axes.axhline(limit, color=WARM, lw=1, ls=(0, (4, 3)))
        if here is not None:
            axes.axvline(here / unit, color=MUTED, lw=1, ls=(0, (1, 2)))
        axes.plot(sizes, losses, "-o", color=ACCENT, lw=1.4, ms=4.5, zorder=2)
        if chosen is not None:
            axes.plot(chosen.parameters / unit, chosen.predicted, "o", ms=12, mfc="none", mec=WARM, mew=2, zorder=3)
        if steep(swept):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.set_xlabel(f"parameters, {word}" if word else "parameters")
        axes.set_ylabel("predicted added loss")
        return _svg(figure, "sweep", label)


def steep(swept: Sequence[Swept]) -> bool:
    """Whether predicted losses are so far apart that they are drawn in powers of ten, which leaves out those of zero."""
    positive = [s.predicted for s in swept if s.predicted > 0]
    return bool(positive) and max(positive) > 30 * min(positive)


def curve(points: Sequence[tuple[int, float]], dense: float | None, name: str, what: str, label: str) -> str:
    """Values against training steps; a broken line where the dense model is."""
    with _style(name):
        figure, axes = _figure(340, 210, 60, 42)
        if dense is not None:
            axes.axhline(dense, color=WARM, lw=1.2, ls=(0, (4, 3)))
        marked = len(points) < 30
        axes.plot(*zip(*points), marker="o" if marked else "", ms=4, color=ACCENT, lw=1.4)
        axes.set_xlabel("step")
        axes.set_ylabel(what)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        return _svg(figure, name, label)


def validation(training: Sequence[Point], scale: float) -> list[tuple[int, float]]:
    """The steps at which validation rows were looked at, and what was found, times `scale`."""
    return [(p.step, p.metric * scale) for p in training if p.metric is not None]


def spread(layers: Sequence[Layer]) -> tuple[float, float] | None:
    """The lowest and highest σ² to draw, whole decades; None where nothing is above zero."""
    positive = [e for layer in layers for e in layer.energies if e > 0]
    if not positive:
        return None
    top = max(positive)
    return max(min(positive), top * 10.0**-MOST_DECADES, 1e-300) / 2, top


def _at(layer: Layer, cut: int, energies: Sequence[float]) -> float:
    """σ² at a direction, by the nearest two of those that were kept."""
    for (a, x), (b, y) in pairwise(zip(layer.at, energies)):
        if a <= cut <= b:
            return x * (y / x) ** ((cut - a) / (b - a))
    return energies[0] if cut < layer.at[0] else energies[-1]


def _power(value: float) -> str:
    """10⁻³, as text that needs no other font."""
    exponent = round(math.log10(value))
    return f"{value:g}" if exponent in (-1, 0, 1) else "10" + str(exponent).translate(RAISED)


def _style(name: str) -> Any:
    style: Any = {**STYLE, "svg.hashsalt": name}
    return matplotlib.rc_context(style)


def _figure(width: float, height: float, left: float, bottom: float) -> tuple[Figure, Axes]:
    # Margins by hand: finding them out would take most of the time of the whole page.
    figure = Figure(figsize=(width / 72, height / 72))
    figure.patch.set_visible(False)
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + 8) / width, 1 - (bottom + 8) / height))
    axes.patch.set_visible(False)
    return figure, axes


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an element of a page: coloured by its variables, its ids its own, and `label` (escaped) to be read out."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = written.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<style.*?</style>|font-family: [^;]*; ", "", text, flags=re.DOTALL)  # its style would be the page's
    text = re.sub(r'\bid="|url\(#|href="#', lambda found: f"{found[0]}{name}-", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)

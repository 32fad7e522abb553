"""What a model or a plan amounts to: counts, a table, a rank map and the spectra with the chosen cut."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .model.lowrank import LowRankLinear, compressed_layers, core_layers
from .model.sharded import whole_shape
from .planning.allocation import parameters as deployed
from .planning.plans import Plan


@dataclass(frozen=True)
class Size:
    """Parameters of a model: `stored` as it is, `folded` once its cores are folded, `trainable`; and the bytes that
    AdamW keeps for the trainable ones (two moments in the parameter's dtype)."""

    stored: int
    folded: int
    trainable: int
    optimizer_bytes: int
    stored_bytes: int


def size(model: nn.Module) -> Size:
    """Count a model's parameters; tied ones once."""
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    saved = 0
    for layer in core_layers(model).values():
        own = sum(_count(p) for n, p in layer.named_parameters() if n != "bias")
        saved += own - int(deployed(layer.out_features, layer.in_features, layer.rank))
    stored = sum(map(_count, parameters))
    return Size(
        stored,
        stored - saved,
        sum(map(_count, trainable)),
        sum(2 * _count(p) * p.element_size() for p in trainable),
        sum(_count(p) * p.element_size() for p in parameters),
    )


def _count(p: nn.Parameter) -> int:
    return whole_shape(p).numel()


def rank_map(plan: Plan, path: str | os.PathLike) -> None:
    """Draw the share of each layer's full rank that was kept: blocks of the model across, kinds of layer down."""
    import numpy as np

    where = places(plan.layers)
    rows, columns = (list(dict.fromkeys(axis)) for axis in zip(*where.values()))
    figure, axes = _figure(0.55 * len(columns) + 3.2, 0.4 * len(rows) + 1.4)
    grid = np.full((len(rows), len(columns)), np.nan)
    for name, (kind, block) in where.items():
        rank, layer = plan.ranks[name], plan.layers[name]
        i, j = rows.index(kind), columns.index(block)
        grid[i, j] = 1.0 if rank is None else rank / min(layer.m, layer.n)
        axes.text(j, i, "dense" if rank is None else rank, ha="center", va="center", fontsize=7, color="black")
    image = axes.imshow(grid, cmap="YlGnBu", vmin=0, vmax=1.6, aspect="auto")
    image.set_clim(0, 1.4)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xlabel("block")
    axes.set_title(
        f"Ranks at {plan.config.budget.fraction:.0%} ({plan.config.budget.accounting.replace('_', '-')} accounting)",
        fontsize=10,
    )
    _save(figure, path)


def spectra(plan: Plan, path: str | os.PathLike) -> None:
    """Draw every layer's squared singular values in the metric, with a dot where its weight directions were cut."""
    figure, axes = _figure(7.5, 4.2)
    where = places(plan.layers)
    kinds = sorted({kind for kind, _ in where.values()})
    colours = {kind: f"C{i % 10}" for i, kind in enumerate(kinds)}
    for name, layer in plan.layers.items():
        kind = where[name][0]
        energy, rank = layer.energies.numpy(), plan.ranks[name]
        seen = axes.get_legend_handles_labels()[1]
        label = kind if kind not in seen else None
        axes.semilogy(range(1, len(energy) + 1), energy, color=colours[kind], lw=0.9, alpha=0.65, label=label)
        if rank is not None:
            cut = max(layer.weight_rank(rank, plan.config), 1)
            axes.plot(cut, energy[cut - 1], "o", color=colours[kind], ms=4, mec="white", mew=0.5)
    top = max(float(layer.energies.max()) for layer in plan.layers.values())
    axes.set_ylim(max(top * 1e-10, 1e-30), top * 3)
    axes.set_xlabel("direction")
    axes.set_ylabel("σ²: loss if dropped, ×2")
    axes.set_title(
        f"Spectra in the {plan.config.metric} metric; a dot marks the cut at {plan.config.budget.fraction:.0%}",
        fontsize=10,
    )
    axes.legend(fontsize=7, ncol=2)
    _save(figure, path)


def places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Each layer's kind and block: 'bert.encoder.layer.3.attention.self.query' → ('attention.self.query', '3').

    Where a model has several stacks of blocks, their names tell kinds apart ('decoder SelfAttention.q').
    """
    split = {name: re.split(r"\.(\d+)\.", name, maxsplit=1) for name in names}
    stacks = {parts[0] for parts in split.values() if len(parts) > 1}
    found = {}
    for name, parts in split.items():
        if len(parts) == 1:
            found[name] = (name, "–")
            continue
        kind = re.sub(r"\blayer\.\d+\.", "", parts[2])
        found[name] = (f"{parts[0].split('.')[0]} {kind}" if len(stacks) > 1 else kind, parts[1])
    return found


def _figure(width: float, height: float):
    # Imported here: matplotlib would double the time of `import jactus`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure, path: str | os.PathLike) -> None:
    figure.savefig(path, dpi=130)


def describe_layers(model: nn.Module) -> str:
    """One line per low-rank layer of a model."""
    layers: dict[str, LowRankLinear] = compressed_layers(model)
    return "\n".join(f"{name}: {layer}" for name, layer in layers.items())

"""Planning against whitening and a full SVD of every layer; plan.at on the spectra of a whole 7B model."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import jactus
from jactus.model.targets import find_targets
from jactus.planning.plans import Plan, PlannedLayer
from jactus.planning.subspace import Directions, Side

from ..report import versions
from . import checks, subjects
from .calibration import COVARIANCES, WITH_GRADIENT
from .race import Ratio, race, ratio
from .store import Row, Setting, compared

CONFIGS = {
    "input metric": jactus.JactusConfig(metric="input", union=("weight",)),
    "fisher and union": WITH_GRADIENT,
}
LLAMA_LAYERS = 32
ROWS = 32  # images of 197 tokens: twice as many as the widest layer has inputs


def planning(threads: tuple[int, ...] = (1, 2)) -> Iterator[Row]:
    """All spectra, directions and the allocation of two blocks of ViT-B."""
    model = subjects.dense("vit-b")
    statistics = jactus.calibrate(model, [subjects.batch("vit-b", ROWS, 197)], WITH_GRADIENT, progress=False)
    for count in threads:
        torch.set_num_threads(count)
        yield from _planning(Setting("vit-b", "float64", count), model, statistics, 5)


def planning_7b() -> Iterator[Row]:
    """One layer of each shape in a Llama-7B block (q, up, down), once: a full SVD of one takes minutes."""
    torch.set_num_threads(2)
    model = subjects.dense("llama-7b")
    kept = r"self_attn\.q_proj|mlp\.(up|down)_proj"
    narrowed = {"target_modules": rf".*({kept})", "union_share": 0.0}  # its rows have no union
    configs = {name: config.replace(**narrowed) for name, config in CONFIGS.items()}
    seen = [subjects.batch("llama-7b", 2, 512)]
    whole = COVARIANCES.replace(target_modules=configs["input metric"].target_modules)  # the full SVD asks for them
    statistics = jactus.calibrate(model, seen, whole, progress=False)
    yield from _planning(Setting("llama-7b", "float64", 2), model, statistics, 1, configs)


def _planning(
    at: Setting, model: nn.Module, statistics: jactus.Statistics, rounds: int, configs: dict | None = None
) -> Iterator[Row]:
    configs = configs or CONFIGS
    made: dict[str, Plan] = {}

    def ours(name: str) -> None:
        made[name] = jactus.plan(model, statistics, configs[name], progress=False)

    spectra: dict[str, Tensor] = {}

    def recipe() -> None:
        config = configs["input metric"]
        for name in find_targets(model, config):
            spectra[name] = whitened_spectrum(model.get_submodule(name).weight, statistics, name, config.damping)

    contenders = {**{name: (lambda name=name: ours(name)) for name in configs}, "svd": recipe}
    times = race(contenders, rounds=(rounds, rounds), warmup=0)
    plan = made["input metric"]
    error = max(checks.relative(layer.energies.sqrt(), spectra[name]) for name, layer in plan.layers.items())
    checks.within("the spectra", error, 1e-9)
    for name in configs:
        against = "whitening + full SVD"
        checked = error if name == "input metric" else None  # the recipe has no other metric
        yield compared(
            f"planning, {name}", at, 1.0, against, ratio(times[name], times["svd"]), None, checked, versions()
        )


def whitened_spectrum(weight: Tensor, statistics: jactus.Statistics, name: str, damping: float) -> Tensor:
    """SVD-LLM's recipe: W L with A = L Lᵀ, and all of its SVD, in float64; returns σ."""
    A = statistics.input_covariance(name)
    assert A is not None
    A = A.double()
    L = torch.linalg.cholesky(A + damping * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype))
    _, sigma, _ = torch.linalg.svd(weight.detach().double() @ L, full_matrices=False)
    return sigma


def reallocation() -> Iterator[Row]:
    """plan.at(budget) with the layers of a Llama-2-7B, against one second."""
    torch.set_num_threads(1)
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    layers = {}
    generator = torch.Generator().manual_seed(0)
    for block in range(LLAMA_LAYERS):
        for i, (m, n) in enumerate(shapes):
            sigma = torch.rand(4096, generator=generator, dtype=torch.float64).sort(descending=True)[0]
            empty = sigma.new_zeros(0, 0)
            nothing = [Side(sigma.new_zeros(0, 4096), empty, empty, empty) for _ in range(2)]
            found = Directions(*nothing, sigma, sigma.new_zeros(0, 0))
            layers[f"{block}.{i}"] = PlannedLayer(f"{block}.{i}", m, n, "", found, 1, (2, 4, 2))
    plan = Plan(layers, jactus.JactusConfig().replace(union=("weight",)), {}, 0)
    seconds = []
    for budget in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.35):
        started = time.perf_counter()
        there = plan.at(budget)
        seconds.append(time.perf_counter() - started)
        over = there.folded_parameters / (budget * there.dense_parameters) - 1
        checks.within(f"the budget {budget}", max(over, 0.0), 1e-9)
    middle, spread = sorted(seconds)[3], (sorted(seconds)[5] - sorted(seconds)[1]) / 2
    at = Setting("llama-7b, 32 blocks", "float64", 1)
    yield compared("plan.at", at, 1.0, "one second", Ratio(middle, spread), None, 0.0, versions())

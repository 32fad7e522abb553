"""Models made smaller by a low-rank approximation of their weights, before anything is trained.

Four replace each targeted W (m, n) by two linear layers of uniform rank r = ⌊b·mn/(m+n)⌋, and differ in the norm ‖S (W − LR) T‖
in which LR is the best: `svd` (S = T = I), `fwsvd` (S from the gradients), `asvd` and `svd_llm` (T from the activations).
`cersa` keeps three factors of which the core trains. b is the deployed size of the targeted weights as published, Σ r(m+n) ≤ b·Σ mn.
`svd-llm-compact` has the ranks that its pair bears without its pivots, Σ r(m+n−r) ≤ b·Σ mn, as JACTUS deploys.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import jactus
from jactus import JactusConfig, JactusError, Plan, Statistics
from jactus.model.lowrank import replace_module
from jactus.model.targets import Target, find_targets

Factorise = Callable[[Tensor, int, Statistics | None, str], tuple[Tensor, Tensor]]
CERSA = JactusConfig().replace(
    metric="identity",
    union=("weight",),
    accounting="folded",
    allocation="uniform",
    rank_multiple=1,
)
FLOOR = 1e-6  # of the largest scale: ASVD's own guard against channels that never fire


def svd(weight: Tensor, rank: int, statistics: Statistics | None, name: str) -> tuple[Tensor, Tensor]:
    """Plain truncated SVD."""
    return best(weight, weight, rank)


def fwsvd(weight: Tensor, rank: int, statistics: Statistics | None, name: str) -> tuple[Tensor, Tensor]:
    """FWSVD (arXiv 2207.00112): rows weighted by the root of their summed Fisher information.

    The sum over row i of E[(∂L/∂W_ij)²] is taken as G_ii · tr A, its Kronecker approximation, and tr A, the same for all
    rows, is left out. So the row's weight is √G_ii.
    """
    G = _covariance("output-gradient", None if statistics is None else statistics.output_covariance(name), name)
    rows = _positive(G.diagonal().to(weight).sqrt())  # (m,)
    right, left = best(weight.T, weight.T * rows, rank)
    return left.T, right.T


def asvd(weight: Tensor, rank: int, statistics: Statistics | None, name: str) -> tuple[Tensor, Tensor]:
    """ASVD (arXiv 2312.05821) with α = 0.5: columns scaled by the root of their activations' size.

    The size is the root mean square √A_jj, where the paper takes the mean absolute value.
    """
    A = _covariance("input", None if statistics is None else statistics.input_covariance(name), name)
    columns = _positive(A.diagonal().to(weight).sqrt()).sqrt()  # (n,)
    return best(weight, weight * columns, rank)


def svd_llm(weight: Tensor, rank: int, statistics: Statistics | None, name: str) -> tuple[Tensor, Tensor]:
    """SVD-LLM (arXiv 2403.07378): W whitened by the Cholesky factor of the input covariance, A = T Tᵀ."""
    A = _covariance("input", None if statistics is None else statistics.input_covariance(name), name)
    return best(weight, weight @ cholesky(A.to(weight)), rank)


def best(weight: Tensor, scaled: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L (m, r) and R (r, n) with the least ‖(W − LR) T‖, given W (m, n) and scaled = W T.

    [W T]_r T⁻¹ = U_r U_rᵀ W for the left singular vectors U of W T, so that an ill-conditioned T is never inverted. Each
    factor takes √σ; tiny σ are raised, which moves scale between the factors and leaves their product as it is.
    """
    U, sigma, _ = torch.linalg.svd(scaled, full_matrices=False)
    U, sigma = U[:, :rank], sigma[:rank]
    root = _positive(sigma).sqrt()
    return U * root, (U.T @ weight) / root[:, None]


def cholesky(A: Tensor) -> Tensor:
    """The lower Cholesky factor (n, n) of A + λ·mean(diag A)·I with the smallest λ of 0, 1e-12, 1e-11, … that has one."""
    mean = A.diagonal().mean()
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    for damping in (0.0, *(10.0**k for k in range(-12, 1))):
        factor, info = torch.linalg.cholesky_ex(A + damping * mean * eye)
        if info == 0 and factor.isfinite().all():
            return factor
    raise JactusError(f"an input covariance ({len(A)}×{len(A)}) has no Cholesky factor: it is zero or not finite")


@torch.no_grad()
def compress(
    model: nn.Module, statistics: Statistics | None, budget: float, factorise: Factorise = svd, compact: bool = False
) -> nn.Module:
    """Replace every target by nn.Sequential(Linear(n, r), Linear(r, m, bias)), in place; returns the model.

    Args:
        model: its targets, those of `jactus.JactusConfig()`, must be nn.Linear.
        statistics: from `jactus.calibrate` on this very model; None is enough for `svd`.
        budget: r(m+n) ≤ budget·mn in every layer; r is at least 1 and at most min(m, n).
        compact: r(m+n−r) ≤ budget·mn, which is what the pair then counts.
        factorise: one of the functions above; it is given W in float64.

    Raises JactusError for a target that is not nn.Linear, and for statistics that are missing or of another model.
    """
    targets = find_targets(model, JactusConfig())
    for target in targets.values():
        _check(target, statistics)
    for name, target in targets.items():
        rank = uniform_rank(target.m, target.n, budget, compact)
        left, right = factorise(target.weight.double(), rank, statistics, name)
        replace_module(model, name, _pair(target.module, left, right, CompactPair if compact else nn.Sequential))
    return model


def pair_names(model: nn.Module) -> list[str]:
    """Names of the two linear layers of every target of a model that is still dense, once it is compressed."""
    return [f"{name}.{i}" for name in find_targets(model, JactusConfig()) for i in (0, 1)]


def uniform_rank(m: int, n: int, budget: float, compact: bool = False) -> int:
    """The largest r with r(m+n) ≤ budget·mn, or r(m+n−r) where `compact`; at least 1, at most min(m, n)."""
    most = budget * m * n / (m + n)
    if compact:
        most = ((m + n) - math.sqrt((m + n) ** 2 - 4 * min(budget, 1) * m * n)) / 2
    return min(max(1, int(most + 1e-9)), m, n)


class CompactPair(nn.Sequential):
    """A pair of linear layers of rank r that is deployed without its pivots, in r² numbers less."""


def cersa(model: nn.Module, statistics: Statistics | None, budget: float) -> nn.Module:
    """CERSA, JACTUS's forerunner: plain SVD, ranks by one energy fraction, U and V frozen, the core r×r trained.

    In place; returns the model. `statistics` are not used. Raises JactusError when rank 1 everywhere is over the budget.
    """
    plan = jactus.plan(model, None, CERSA, progress=False)
    return jactus.compress(model, replace(plan, ranks=energy_ranks(plan, budget)[1]))


def energy_ranks(plan: Plan, budget: float) -> tuple[float, dict[str, int]]:
    """The largest energy fraction, common to all layers, that fits Σ r(m+n) ≤ budget·Σ mn, and the ranks it gives.

    A layer's rank is the least whose singular values hold that part of ‖W‖², or, where less, the largest with
    r(m+n) < mn.
    """
    shares = {name: layer.energies.cumsum(0) / layer.energies.sum() for name, layer in plan.layers.items()}

    def ranks(energy: float) -> dict[str, int]:
        return {
            name: min(int((shares[name] < energy).sum()) + 1, (layer.m * layer.n - 1) // (layer.m + layer.n))
            for name, layer in plan.layers.items()
        }

    def cost(energy: float) -> int:
        return sum(r * (plan.layers[name].m + plan.layers[name].n) for name, r in ranks(energy).items())

    levels = torch.cat(list(shares.values())).unique().tolist()  # ranks change only there; sorted
    fitting = bisect_right(levels, budget * plan.dense_parameters, key=cost)
    if not fitting:
        raise JactusError(f"cersa: rank 1 in every layer already costs more than {budget:.4g} of the weights")
    return levels[fitting - 1], ranks(levels[fitting - 1])


COMPRESSORS: dict[str, Callable[[nn.Module, Statistics | None, float], nn.Module]] = {
    "svd": partial(compress, factorise=svd),
    "fwsvd": partial(compress, factorise=fwsvd),
    "asvd": partial(compress, factorise=asvd),
    "svd-llm": partial(compress, factorise=svd_llm),
    "svd-llm-compact": partial(compress, factorise=svd_llm, compact=True),
}


def _pair(old: nn.Module, left: Tensor, right: Tensor, kind: type[nn.Sequential]) -> nn.Sequential:
    """x ↦ left (right x) + b, in the dtype, device and mode of the old layer, whose bias it takes."""
    (m, r), n = left.shape, right.shape[1]
    with torch.device("meta"):
        pair = kind(nn.Linear(n, r, bias=False), nn.Linear(r, m, bias=False))
    for new, value in zip(pair, (right, left)):
        new.weight = nn.Parameter(value.to(old.weight.dtype).contiguous())
    pair[1].bias = old.bias
    return pair.train(old.training)


def _check(target: Target, statistics: Statistics | None) -> None:
    if not isinstance(target.module, nn.Linear):
        raise JactusError(f"{target}: compressing in pairs is for nn.Linear only")
    if statistics is not None:
        known = statistics.layers.get(target.name)
        if known is None or known.fingerprint != target.fingerprint:
            raise JactusError(
                f"{target}: the statistics are of another model; calibrate this one, before it is trained"
            )


def _covariance(kind: str, found: Tensor | None, name: str) -> Tensor:
    if found is None:
        raise JactusError(f"{name}: this compressor needs {kind} covariances; pass statistics that hold them")
    return found


def _positive(scales: Tensor) -> Tensor:
    """Scales raised to at least FLOOR times the largest, so that they can be divided by."""
    return scales.clamp(min=max(FLOOR * float(scales.max()), torch.finfo(scales.dtype).tiny))

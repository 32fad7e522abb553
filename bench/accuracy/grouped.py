"""Should layers that share an input (q, k, v; gate, up) share their V? The rise of the loss by either way, from spectra alone.

`python -m bench.accuracy.grouped` prints a table. Stacked, the layers W₁, W₂, … (mᵢ, n) have one rank r and cost
r(Σmᵢ + n) instead of Σ rᵢ(mᵢ + n); the best stacked weight in the metric keeps the leading singular values of the rows
Gᵢᵀᐟ² Wᵢ A^½ put together. Each way takes ranks from its own spectra by `jactus.allocation`, for the same deployed size.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import jactus
from jactus.model.targets import Target, find_targets
from jactus.planning.allocation import Offer, admissible_ranks, allocate
from jactus.planning.subspace import metric

from ..report import table, versions
from .methods import CONFIG
from .tasks import TASKS, TEXT, calibrated, prepared

BUDGETS = (0.8, 0.5, 0.35)


def whitened(target: Target, statistics: jactus.Statistics) -> Tensor:
    """L_Gᵀ W L_A (m, n), float64."""
    A, G = (
        metric(S, CONFIG.damping, target.weight.device)
        for S in (statistics.input_covariance(target.name), statistics.output_covariance(target.name))
    )
    assert A is not None
    assert G is not None
    return torch.linalg.cholesky(G).T @ target.weight.double() @ torch.linalg.cholesky(A)


def offer(name: str, M: Tensor) -> Offer:
    """What the stacked layer M (m, n) has to offer, all of its rank to the weight and none of it dense."""
    m, n = M.shape
    ranks = admissible_ranks(m, n, CONFIG.allocation.rank_multiple, folded=True)
    kept = np.cumsum(np.concatenate([[0.0], torch.linalg.svdvals(M).square().numpy()]))
    return Offer(name, ranks, ranks * float(m + n), kept[ranks], False, float(m * n))


def rises(stacks: list[Tensor], budgets: Sequence[float]) -> list[float]:
    """½ Σ of the squared singular values left out at each of `budgets` of the dense size."""
    offers = [offer(str(k), M) for k, M in enumerate(stacks)]
    dense = sum(o.dense_cost for o in offers)
    everything = sum(float(M.square().sum()) for M in stacks)
    found = []
    for budget in budgets:
        chosen = allocate(offers, budget * dense, budget, False, part=CONFIG.allocation.uniform_part)
        found.append((everything - sum(float(o.gain[c]) for o, c in zip(offers, chosen))) / 2)
    return found


@torch.no_grad()
def compared(task_name: str) -> list[tuple[str, ...]]:
    """A table row per budget: the rise of the loss with V of their own, with a shared one, and the quotient."""
    task = TASKS[task_name]
    case = prepared(task, "fitted", 0)
    statistics = calibrated(task, case, task.calibration, 0, "fitted", torch.bfloat16)
    targets = find_targets(case.model, CONFIG)
    alone = {name: whitened(target, statistics) for name, target in targets.items()}
    groups: dict[str, list[Tensor]] = {}
    for name, M in alone.items():
        groups.setdefault(statistics.layers[name].inputs, []).append(M)
    stacked = [torch.cat(members) for members in groups.values()]
    return [
        (task_name, f"{budget:.0%}", f"{apart:.4g}", f"{shared:.4g}", f"{shared / apart:.2f}")
        for budget, apart, shared in zip(BUDGETS, rises(list(alone.values()), BUDGETS), rises(stacked, BUDGETS))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, action="append", help="may be repeated; all text tasks if not given")
    args = parser.parse_args()
    rows = [row for name in args.task or TEXT for row in compared(name)]
    print(table(("task", "budget", "own V each", "one V shared", "shared / own"), rows))
    print(f"\n{versions('statistics under bfloat16 autocast')}")


if __name__ == "__main__":
    main()

"""Which sums a layer needs. Without task directions a covariance of its longer side is needed only as the weight sees it.

For m ≤ n that is W Σ_x Wᵀ = Σ (Wx)(Wx)ᵀ (m×m) with tr Σ_x in place of Σ_x (n×n); for m > n it is Wᵀ Σ_g W = Σ (Wᵀg)(Wᵀg)ᵀ (n×n)
with tr Σ_g in place of Σ_g (m×m): docs/method.md, "Smaller sides". Layers with one input share one Σ_x, which may be less than a
sum for each of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..config import JactusConfig
from ..model.targets import Target


@dataclass(frozen=True)
class Sides:
    """The sums of one layer: of inputs x and gradients g, whole or as its weight sees them; and of the weight's gradient."""

    x: bool
    Wx: bool
    g: bool
    Wtg: bool
    gradient: bool

    def numel(self, target: Target, owner: bool = True) -> int:
        """Elements of the sums, with Σ_x where it is the layer's own."""
        m, n = target.m, target.n
        return (self.x and owner) * n * n + self.Wx * m * m + self.g * m * m + self.Wtg * n * n + self.gradient * m * n


def sides(targets: Mapping[str, Target], owners: Mapping[str, str], config: JactusConfig) -> dict[str, Sides]:
    """What each layer sums. owners: for layers with a shared input the first of them; those it lacks share with none."""
    groups: dict[str, list[Target]] = {}
    for name, target in targets.items():
        groups.setdefault(owners.get(name, name), []).append(target)
    found: dict[str, Sides] = {}
    for group in groups.values():
        n = group[0].n
        less = all(t.m <= n for t in group) and sum(t.m**2 for t in group) < n**2
        seen = config.smaller_sides and less
        for t in group:
            longer = config.smaller_sides and t.m > t.n
            found[t.name] = Sides(
                config.needs_input and not seen,
                config.needs_input and seen,
                config.needs_output and not longer,
                config.needs_output and longer,
                config.needs_gradient,
            )
    return found

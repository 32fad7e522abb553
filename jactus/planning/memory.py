"""Bytes that planning takes, by the shape of a layer: what it leaves in the plan, and what it works in."""


def plan_bytes(m: int, n: int, tasks: int = 0) -> int:
    """What a layer of m outputs and n inputs is in a plan: all its directions in float32, and σ; small matrices of `tasks` task
    directions in float64."""
    k = min(m, n)
    return 4 * (m + n) * (k + tasks) + 8 * k + 8 * tasks * (2 * k + 3 * tasks)


def working_bytes(m: int, n: int, smaller_sides: bool) -> int:
    """The most that `directions` holds at once for a layer, in float64, beside its weight and sums; counted in the source.

    With sums of the smaller side k: three matrices (k, l) and five (k, k), or two and eight, while eigenvectors are found. Else six
    (k, l), five (k, k) and one (l, l). Means of the sums are made in their float32.
    """
    k, l = sorted((m, n))  # noqa: E741
    if smaller_sides:
        return 8 * max(3 * k * l + 5 * k * k, 2 * k * l + 8 * k * k) + 4 * k * k
    return 8 * (6 * k * l + 5 * k * k + l * l) + 4 * (k * k + l * l)

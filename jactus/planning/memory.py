"""Bytes that planning and compressing take, by the shape of a layer: what they leave, and what they work in.

Counted in the source, at the line where most is held; float64 but for what is said, and for a float32 weight.
"""


def plan_bytes(m: int, n: int, tasks: int = 0) -> int:
    """What a layer of m outputs and n inputs is in a plan: all its directions in float32, and σ; small matrices of `tasks` task
    directions in float64."""
    k = min(m, n)
    return 4 * (m + n) * (k + tasks) + 8 * k + 8 * tasks * (2 * k + 3 * tasks)


def working_bytes(m: int, n: int, seen: bool, tasks: bool = False) -> int:
    """The most that planning a layer holds at once, beside its weight and sums.

    seen: the covariance of its longer side l is known as its weight sees it; tasks: eigenvectors of the covariances are wanted.
    Means of the sums are in their float32. A solver of eigenvalues works in three matrices of the size of its own.
    """
    k, l = sorted((m, n))  # noqa: E741
    if seen:  # while eigenvectors are found, or when directions are mapped back
        return int(8 * max(8.5 * k * k + 2 * k * l, 7.5 * k * k + 3 * k * l))
    whole = 4.5 * k * k + 8 * k * l + 1.5 * l * l  # where right directions are made orthonormal
    return int(8 * max(whole, (3.5 * k * k + 5 * k * l + 5.5 * l * l) * tasks))


def factor_bytes(m: int, n: int, p: int, q: int) -> int:
    """The most that making the factors U (m, p), C (p, q) and V (n, q) of a layer holds at once, beside its weight and its directions:
    four times the bases, while their coordinates change, and six small matrices."""
    return 8 * (4 * (m * p + n * q) + 6 * p * q)

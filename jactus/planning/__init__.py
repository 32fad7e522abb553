"""Steps 2 to 4: directions in the metric, their union, and a rank for every layer under one budget.

In: a model's weights and its `Statistics`. Out: a `Plan`. Begin in `planner.py` (`plan`, and which covariances a metric takes); `subspace.py` has the metric, the
union and the best core inside it, and how a rank is shared between weight and task directions; `allocation.py` shares the
budget between layers; `plans.py` is the result, `latency.py` the budget of measured time.
"""

"""Step 1: what a small calibration set says of every layer.

In: a model and batches. Out: `Statistics`, sums over tokens of x xᵀ, g gᵀ and g xᵀ a layer. Begin in `passes.py` (`calibrate`);
`sweep.py` is one pass over the batches, `recorder.py` has the hooks, `statistics.py` the sums, `snapshots.py` the runs that go
on after a kill, `distributed.py` the ranks of a process group. What is found out on the first batch: `losses.py` and
`terms.py`, what the loss sums; `padding.py` and `tokens.py`, which rows count as tokens; `checks.py`, whether layers are used
by their forward alone. `head.py` fits a fresh task head before.
"""

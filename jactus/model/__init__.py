"""The model as the method sees it: which layers are targets, and the low-rank layers that stand in their place.

In: any torch module and a `JactusConfig`. Out: `Target`s by name; `CoreLinear` (three factors, to train) and `FoldedLinear`
(two, to deploy). Begin in `targets.py` for what is replaced or refused, in `lowrank.py` for what is computed afterwards.
"""

"""Steps 5 and 6: put three factors where a layer was, choose what trains, fold or merge at the end.

In: a model and a `Plan`. Out: the same model with `CoreLinear`s, of which only cores and chosen extras train. Begin in
`surgery.py` (`compress`, `fold`, `merge`; what a folded layer holds is made in `model/lowrank.py`); `coordinates.py` has the coordinates of a core and its learning rate,
`trainable.py` what requires gradients.
"""

"""Whether a step left a model as it was."""

import torch


def state(model):
    """All that a caller could notice: modules, hooks, modes, flags, weights and gradients."""
    hooks = {k: [list(v) for n, v in vars(m).items() if n.endswith("hooks") and v] for k, m in model.named_modules()}
    modes = {k: (id(m), m.training, "forward" in vars(m)) for k, m in model.named_modules()}
    values = {k: (id(p), p.requires_grad, p.grad is None, p.detach().clone()) for k, p in model.named_parameters()}
    return hooks, modes, values


def assert_same(before, after):
    assert before[:2] == after[:2]
    assert before[2].keys() == after[2].keys()
    for name, (*flags, value) in before[2].items():
        assert after[2][name][:3] == tuple(flags), name
        assert torch.equal(value.nan_to_num(7), after[2][name][3].nan_to_num(7)), name

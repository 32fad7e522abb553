"""torch.compile, mode by mode: outputs and gradients as without, in one graph. The table of docs/how-to/deploy.md links here."""

import copy

import pytest
import torch
from torch import nn

from tests.models import BERT, EVERY, compressed

MODES = {
    "default": {},
    "dynamic": {"dynamic": True},
    "reduce-overhead": {"mode": "reduce-overhead"},  # no graphs to capture on a CPU: that it does no harm
    "max-autotune": {"mode": "max-autotune"},
}


def layers(folded):
    """A wide and a tall layer one after the other, each with pivots: all that core and folded layers compute."""
    block = copy.deepcopy(compressed(BERT, EVERY).bert.encoder.layer[0])
    chain = nn.Sequential(block.intermediate.dense, nn.GELU(), block.output.dense)
    if folded:
        chain[0], chain[2] = chain[0].folded(), chain[2].folded()
    return chain


def run(call, chain, x):
    """Outputs and the gradients of inputs and of what trains."""
    x = x.detach().requires_grad_()
    y = call(x)
    y.square().sum().backward()
    grads = [x.grad, *(p.grad for p in chain.parameters() if p.requires_grad)]
    for p in chain.parameters():
        p.grad = None
    return [y.detach(), *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("folded", [False, True], ids=["core", "folded"])
def test_a_mode_compiles_whole_and_changes_nothing_but_rounding(folded, mode, dtype):
    torch.compiler.reset()
    chain = layers(folded).to(dtype)
    exact = copy.deepcopy(chain).double()
    compiled = torch.compile(chain, fullgraph=True, **MODES[mode])
    g = torch.Generator().manual_seed(0)
    for tokens in (5, 9, 6):
        x = torch.randn(tokens, 16, generator=g).to(dtype)
        right = run(exact, exact, x.double())
        plain, found = run(chain, chain, x), run(compiled, chain, x)
        assert len(found) == (2 if folded else 4)
        for got, eager, true in zip(found, plain, right):
            # twice what is rounded without, and one rounding: a compiler may keep more digits, and joins products otherwise
            bound = 2 * (eager.double() - true).norm() + 2 * torch.finfo(dtype).eps * true.norm()
            assert (got.double() - true).norm() <= bound

"""torch.compile, mode by mode: outputs and gradients as without, in one graph. The table of docs/how-to/deploy.md links here."""

import copy

import pytest
import torch
from torch import nn

from jactus.model.lowrank import core_layers
from tests.models import BERT, EVERY, compressed

pytestmark = pytest.mark.slow  # half a minute of a C++ compiler each; test_families compiles a model without one
MODES = {
    "default": {},
    "dynamic": {"dynamic": True},
    "reduce-overhead": {"mode": "reduce-overhead"},  # a CPU has no graphs to capture: it does no harm
    "max-autotune": {"mode": "max-autotune"},
}


def every_form():
    """A wide and a tall layer with cores, and the same folded, one after the other: all that low-rank layers compute."""
    block = copy.deepcopy(compressed(BERT, EVERY).bert.encoder.layer[0])
    wide, tall = block.intermediate.dense, block.output.dense
    return nn.Sequential(wide, nn.GELU(), tall, wide.folded(), nn.GELU(), tall.folded())


def run(call, chain, x):
    """Outputs, and the gradients of inputs and of what trains."""
    x = x.detach().requires_grad_()
    y = call(x)
    y.square().sum().backward()
    trained = [p for p in chain.parameters() if p.requires_grad]
    found = [y.detach(), x.grad, *(p.grad for p in trained)]
    for p in trained:
        p.grad = None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_compiles_whole_and_changes_nothing_but_rounding(mode, dtype):
    torch.compiler.reset()
    chain = every_form().to(dtype)
    assert all(layer.core.requires_grad for layer in core_layers(chain).values())
    exact = copy.deepcopy(chain).double()
    compiled = torch.compile(chain, fullgraph=True, **MODES[mode])
    g = torch.Generator().manual_seed(0)
    for tokens in (5, 9, 6) if mode == "dynamic" else (5,):
        x = torch.randn(tokens, 16, generator=g).to(dtype)
        right = run(exact, exact, x.double())
        plain, found = run(chain, chain, x), run(compiled, chain, x)
        for got, eager, true in zip(found, plain, right, strict=True):
            # twice what is rounded without, and one rounding: a compiler keeps other digits where it joins products
            bound = 2 * (eager.double() - true).norm() + 2 * torch.finfo(dtype).eps * true.norm()
            assert (got.double() - true).norm() <= bound

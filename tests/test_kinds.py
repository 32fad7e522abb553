"""Every kind of model and batch that was once silently wrong: exact against an independent computation, or refused by name."""

import pytest

from tests.families.kinds import KINDS

# What is refused, and by which words; every other kind is exact.
REFUSED = {
    "bart-causal": "was never called",
    "encoder-layer": "not used by its forward alone",
    "hf-hook-scaling": "another tool replaced its forward",
    "mamba": "not used by its forward alone",
    "pruned": "no weight of its own",
    "spectral-norm": "no weight of its own",
    "top-names": "called like a task head",
    "weight-also-read": "not used by its forward alone",
    "weight-norm": "no weight of its own",
}


@pytest.mark.parametrize("name", KINDS)
def test_right_or_refused_by_name(name):
    result = KINDS[name]()
    assert result.status == ("refused" if name in REFUSED else "exact"), result.reason
    assert REFUSED.get(name, "") in result.reason

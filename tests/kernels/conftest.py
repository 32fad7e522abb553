"""Fixtures of the kernel tests: they run on a GPU, or without one under the sanitiser of `make kernels-check`."""

import pytest
import torch

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    reason = pytest.mark.skip(reason="runs Triton kernels: needs a GPU, or `make kernels-check`")
    for item in items:
        if item.get_closest_marker("kernel"):
            item.add_marker(reason)


def relative(a, b):
    """‖a − b‖ / ‖b‖ in float64."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


@pytest.fixture
def randn():
    """Seeded normal numbers, made in float64 and rounded, so that every dtype sees the same problem."""
    generator = torch.Generator().manual_seed(7)

    def make(*shape, dtype=torch.float32, scale=1.0):
        made = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return made.to(dtype).to("cuda")

    return make


@pytest.fixture(autouse=True)
def poisoned_workspace(monkeypatch):
    """Memory from `empty` holds NaN, so a part of an output that no block wrote shows in the values."""
    real = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        made = real(self, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)

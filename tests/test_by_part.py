"""A model adapted by part, under a limit of memory: the same result, from less memory, and after a kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import jactus
from jactus import JactusError
from tests.models import BERT, FAMILIES, LLAMA, SMALL, VIT
from tests.unchanged import assert_same, state

LIMIT = 25_000  # several parts of every family
# With sums of whole covariances in float64, no layer's sums depend on which others are in its part.
EXACT = {"statistics_dtype": "float64"}


def adapted(family, config=SMALL, batches=None, seed=0, **options):
    batches = family.batches() if batches is None else batches
    return jactus.adapt(family.model(seed), batches, 0.7, config, progress=False, **options)


def assert_alike(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_result_is_that_of_no_limit_bit_for_bit(family, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    whole = adapted(family)
    assert_alike(adapted(family, memory_limit=LIMIT), whole)
    assert list(tmp_path.iterdir()) == []

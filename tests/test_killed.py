"""SIGKILL at any moment: what is started again ends with the same bytes. The long form, with a real model, is `make soak`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if not hasattr(os, "fork"):
    pytest.skip("POSIX", allow_module_level=True)

LEAST = {"calibrate_to_plan_to_checkpoint": 5, "checkpoint_at_every_moment": 15, "fit_from_csv": 3}


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    """How often each scenario was killed, or how it failed. All in one process, apart from this one, whose threads do not fork."""
    here = Path(__file__).parent.parent
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.killing", str(tmp_path_factory.mktemp("killed"))]
    done = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("scenario", LEAST)
def test_what_was_killed_ends_with_the_same_bytes(scenario, kills):
    found, told = kills
    assert isinstance(found[scenario], int), f"{found[scenario]}\n{told}"
    assert found[scenario] >= LEAST[scenario]

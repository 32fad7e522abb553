"""A calibration that was interrupted, by Ctrl-C or a kill, continues to the same result, or says that it cannot."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import jactus
from jactus import JactusError
from tests.models import BERT, SMALL, VIT
from tests.unchanged import assert_same, state


def calibrate(model, batches, config=SMALL, **kwargs):
    return jactus.calibrate(model, batches, config, progress=False, **kwargs)


def assert_identical(a, b):
    (tensors, meta), (others, other_meta) = a.to_tensors(), b.to_tensors()
    assert meta == other_meta
    assert tensors.keys() == others.keys()
    assert all(torch.equal(t.detach(), others[name].detach()) for name, t in tensors.items())


def interrupted(batches, at, by=KeyboardInterrupt):
    """An iterable whose `at`-th batch, counted over all passes, never comes."""
    counter = iter(range(1000))

    class Batches:
        def __iter__(self):
            for batch in batches:
                if next(counter) == at:
                    raise by
                yield batch

    return Batches()


@pytest.mark.parametrize("memory_limit", [None, 20_000])
@pytest.mark.parametrize("at", [0, 2, 5, 8])
def test_ctrl_c_resumes_to_a_bit_identical_result(at, memory_limit, tmp_path):
    model, batches = BERT.model(), BERT.batches(5)
    whole = calibrate(model, batches, SMALL, memory_limit=memory_limit)
    file = tmp_path / "snapshot"
    before = state(model)
    runs_through = memory_limit is None and at >= 5
    if not runs_through:
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, interrupted(batches, at), SMALL, resume=file, resume_every=0, memory_limit=memory_limit)
        assert_same(before, state(model))
        assert file.exists() == (at > 0)
    assert_identical(calibrate(model, batches, SMALL, resume=file, resume_every=0, memory_limit=memory_limit), whole)
    assert list(tmp_path.iterdir()) == []  # the snapshot goes when the run is done


KILLED = """
import os, signal, sys
import jactus
from tests.models import BERT, SMALL

def batches():
    for index, batch in enumerate(BERT.batches(5)):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

jactus.calibrate(BERT.model(), batches(), SMALL, resume=sys.argv[1], resume_every=0, progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
def test_sigkill_resumes_to_a_bit_identical_result(tmp_path):
    here = Path(__file__).parent
    threads = torch.get_num_threads()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": str(threads)}
    file = tmp_path / "snapshot"
    done = subprocess.run([sys.executable, "-c", KILLED, str(file)], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert file.exists()
    seen = []

    def loss(model, batch):
        if torch.is_grad_enabled():  # without gradients the first batch is only looked into
            seen.append(batch)
        return model(**batch).loss

    resumed = calibrate(BERT.model(), BERT.batches(5), loss=loss, resume=file)
    assert len(seen) == 2  # the last two batches only: nothing is computed twice
    assert_identical(resumed, calibrate(BERT.model(), BERT.batches(5)))


@pytest.fixture
def snapshot(tmp_path):
    """Of a run over five batches that was stopped after three."""
    file = tmp_path / "snapshot"
    with pytest.raises(KeyboardInterrupt):
        calibrate(BERT.model(), interrupted(BERT.batches(5), 3), resume=file, resume_every=0)
    return file


def _other_head(model):
    torch.nn.init.normal_(model.classifier.weight)
    return model


OTHER_RUNS = [
    (lambda: (BERT.model(), BERT.batches(5)[::-1], SMALL), "first 3 batches are not those.*another order"),
    (lambda: (BERT.model(), BERT.batches(5, rows=2), SMALL), "first 3 batches are not those"),
    (lambda: (BERT.model(), BERT.batches(2), SMALL), "holds 3 batches, and only 2 came"),
    (lambda: (BERT.model(), [], SMALL), "no batch|holds 3 batches, and only 0 came"),
    (lambda: (BERT.model(), BERT.batches(5), SMALL.replace(metric="input")), "another configuration"),
    (lambda: (BERT.model(), BERT.batches(5), SMALL, {"statistics_dtype": "float64"}), "another configuration"),
    (lambda: (BERT.model(), BERT.batches(5), SMALL.replace(exclude_modules=("query",))), "another configuration"),
    (
        lambda: (BERT.model(), BERT.batches(5), SMALL, {"loss": lambda m, b: 2 * m(**b).loss}),
        "another loss",
    ),
    (lambda: (_other_head(BERT.model()), BERT.batches(5), SMALL), "head fitted anew"),
    (lambda: (BERT.model(seed=1), BERT.batches(5), SMALL), "another model"),
    (lambda: (VIT.model(), VIT.batches(5), SMALL), "another model"),
]


@pytest.mark.parametrize("case, message", OTHER_RUNS)
def test_resuming_another_run_is_refused_and_keeps_the_snapshot(case, message, snapshot):
    model, batches, config, *more = case()
    before, kept = state(model), snapshot.read_bytes()
    with pytest.raises(JactusError, match=message):
        calibrate(model, batches, config, resume=snapshot, **(more[0] if more else {}))
    assert_same(before, state(model))
    assert snapshot.read_bytes() == kept
    calibrate(BERT.model(), BERT.batches(5), resume=snapshot)  # the right run still can


def test_settings_that_do_not_change_the_sums_may_change_between_runs(snapshot):
    config = SMALL.replace(budget=0.3, damping=0.05)
    resumed = calibrate(BERT.model(), BERT.batches(5), config, resume=snapshot)
    assert_identical(resumed, calibrate(BERT.model(), BERT.batches(5), config))


def test_a_damaged_snapshot_is_refused(snapshot):
    os.truncate(snapshot, snapshot.stat().st_size - 8)
    with pytest.raises(JactusError, match="snapshot is truncated or corrupted"):
        calibrate(BERT.model(), BERT.batches(5), resume=snapshot)


def test_a_run_that_goes_on_counts_terms_as_it_did(tmp_path):
    """What the loss averages was told by a batch that the resumed run does not compute again."""
    model = BERT.model()
    batches = BERT.batches(6)
    for batch in batches:
        batch["labels"] = torch.zeros(4, dtype=torch.long)
    for row in range(3):
        batches[0]["labels"][row] = row

    def loss(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits, batch["labels"])

    file = tmp_path / "snapshot"
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, interrupted(batches, 3), loss=loss, resume=file, resume_every=0)
    assert_identical(calibrate(model, batches, loss=loss, resume=file), calibrate(model, batches, loss=loss))

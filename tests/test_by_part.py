"""A model adapted by part, under a limit of memory: the same result, from less memory, also after it was stopped anywhere."""

import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import jactus
from jactus import JactusError
from jactus.calibration.snapshots import Snapshots
from jactus.checkpoints import storage
from jactus.planning.shelf import PLANNED, Shelf, Shelved
from tests.models import BERT, FAMILIES, LLAMA, SMALL, planned
from tests.unchanged import assert_same, state

LIMIT = 25_000  # several parts of every family
LESS = {"config": SMALL.replace(union_share=0.0), "memory_limit": 5_000}  # of LLAMA, two or three layers a part


def adapted(family, config=SMALL, batches=None, model=None, **options):
    batches = family.batches() if batches is None else batches
    return jactus.adapt(model or family.model(), batches, 0.7, config, verify=False, progress=False, **options)


def assert_alike(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def stopping(monkeypatch, owner, name, at):
    """Let the `at`-th call of a method be interrupted before it does anything; with the numbers of the calls that were made."""
    calls, own = [], getattr(owner, name)

    def method(*args, **kwargs):
        calls.append(len(calls))
        if len(calls) == at:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)
    return calls


def stopped(monkeypatch, owner, name, at, **options):
    """A run of LLAMA that is interrupted there."""
    with monkeypatch.context() as patch:
        stopping(patch, owner, name, at)
        with pytest.raises(KeyboardInterrupt):
            adapted(LLAMA, **LESS, **options)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_result_is_that_of_no_limit_bit_for_bit(family, temporary):
    model = adapted(family, memory_limit=LIMIT)
    assert_alike(model, adapted(family))
    assert list(temporary.iterdir()) == []
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in adapted(family).parameters()]


def test_no_more_is_held_than_the_sums_of_a_part_and_the_dense_weights_that_are_left(temporary, monkeypatch):
    parts, held, dense = [], [], []
    started, put, take = Snapshots.started, Shelf.put, Shelf.take_factors
    model = LLAMA.model()
    weights = [weakref.ref(m) for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]

    def noted(self, number):
        statistics, batches = started(self, number)
        parts.append(weakref.ref(statistics))
        return statistics, batches

    def watched(self, layer):
        held.append(sum(part().nbytes for part in parts if part() is not None))
        put(self, layer)
        assert isinstance(self.get(layer.name).directions, Shelved)

    def taken(self, name, layer):
        dense.append(sum(module() is not None for module in weights))
        return take(self, name, layer)

    monkeypatch.setattr(Snapshots, "started", noted)
    monkeypatch.setattr(Shelf, "put", watched)
    monkeypatch.setattr(Shelf, "take_factors", taken)
    adapted(LLAMA, model=model, **LESS)
    assert len(parts) > 2
    assert len(held) == len(weights) == 14
    assert 0 < max(held) <= LESS["memory_limit"]
    assert dense == list(range(14, 0, -1))
    assert not any(module() for module in weights)


@pytest.mark.parametrize(
    "owner, name, at",
    [(Shelf, "put", 1), (Shelf, "put", 4), (Shelf, "put", 8), (Shelf, "put_factors", 2), (Shelf, "take_factors", 2)],
)
def test_stopped_while_it_plans_or_compresses_it_goes_on_to_the_same_bits(owner, name, at, tmp_path, monkeypatch):
    file, model = tmp_path / "run", LLAMA.model()
    before = state(model)
    stopped(monkeypatch, owner, name, at, model=model, resume=file)
    if name != "take_factors":  # the first layer is replaced then
        assert_same(before, state(model))
    planned = stopping(monkeypatch, Shelf, "put", 0)
    again = adapted(LLAMA, **LESS, resume=file)
    assert len(planned) == (14 - (at - 1) if name == "put" else 0)  # nothing is planned twice
    assert_alike(again, adapted(LLAMA, LESS["config"]))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_the_model_as_it_was(temporary, monkeypatch):
    model, write = LLAMA.model(), storage.write
    before = state(model)

    def full(path, kind, *args):
        if kind == "factors" and len(list(Path(path).parent.glob("*.factors.*"))) == 3:
            raise JactusError(f"could not write {path}")
        write(path, kind, *args)

    monkeypatch.setattr(storage, "write", full)
    with pytest.raises(JactusError, match=r"could not write .*factors"):
        adapted(LLAMA, model=model, **LESS)
    assert_same(before, state(model))
    assert list(temporary.iterdir()) == []


KILLED = """
import os, signal, sys
from jactus.planning.shelf import Shelf
from tests.models import LLAMA
from tests.test_by_part import LESS, adapted

put = Shelf.put
def killed(self, layer):
    if len(self.layers) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, layer)
Shelf.put = killed
adapted(LLAMA, **LESS, resume=sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
def test_killed_while_it_plans_it_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    here, file = Path(__file__).parent, tmp_path / "run"
    env = {**os.environ, "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", KILLED, str(file)], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    planned = stopping(monkeypatch, Shelf, "put", 0)
    assert_alike(adapted(LLAMA, **LESS, resume=file), adapted(LLAMA, LESS["config"]))
    assert len(planned) == 7
    assert list(tmp_path.iterdir()) == []


def test_what_is_finished_is_written_once(tmp_path, monkeypatch):
    """Each part's sums once; the file of the run holds those of the part that runs, and no others."""
    written, write = [], storage.write

    def noted(path, kind, tensors, meta):
        written.append((Path(path).name, {key.split("/")[0] for key in tensors}))
        write(path, kind, tensors, meta)

    monkeypatch.setattr(storage, "write", noted)
    jactus.calibrate(
        BERT.model(),
        BERT.batches(),
        SMALL,
        resume=tmp_path / "run",
        resume_every=0,
        memory_limit=LIMIT,
        verify=False,
        progress=False,
    )
    parts = [name for name, _ in written if name != "run"]
    assert len(parts) == len(set(parts)) > 1
    running = [keys for name, keys in written if name == "run"]
    assert all(len(keys) <= 1 for keys in running)
    assert len(set.union(*running)) == len(parts) + 1


def test_what_another_run_left_is_not_taken_for_this_ones(tmp_path, monkeypatch):
    """Its snapshot was deleted, as the messages say, and the layers that it planned were not."""
    file = tmp_path / "run"
    stopped(monkeypatch, Shelf, "put", 5, batches=LLAMA.batches(2), resume=file)
    file.unlink()
    assert (tmp_path / "run.planned").exists()
    assert_alike(adapted(LLAMA, **LESS, resume=file), adapted(LLAMA, LESS["config"]))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_go_on_says_so(tmp_path, monkeypatch):
    file = tmp_path / "run"
    stopped(monkeypatch, Shelf, "put", 12, resume=file)
    model = LLAMA.model()
    before = state(model)
    with pytest.raises(JactusError, match="another configuration"):
        adapted(LLAMA, LESS["config"].replace(damping=0.05), model=model, memory_limit=5_000, resume=file)
    lost = next((tmp_path / "run.planned").glob("*layers.0.*q_proj*"))
    whole = lost.read_bytes()
    lost.unlink()
    with pytest.raises(JactusError, match=r"q_proj is planned, and its directions are not in .*delete .*run to start"):
        adapted(LLAMA, model=model, **LESS, resume=file)
    lost.write_bytes(whole[:-8])
    with pytest.raises(JactusError, match="truncated or corrupted"):
        adapted(LLAMA, model=model, **LESS, resume=file)
    assert_same(before, state(model))
    lost.write_bytes(whole)
    adapted(LLAMA, model=model, **LESS, resume=file)  # the right run still can


def test_sums_that_are_never_whole_are_not_saved(tmp_path):
    model = LLAMA.model()
    before = state(model)
    with pytest.raises(JactusError, match=r"memory_limit.*never there together.*leave save out"):
        adapted(LLAMA, model=model, **LESS, save=tmp_path / "sums")
    assert_same(before, state(model))
    assert not list(tmp_path.iterdir())


def test_layers_that_an_interrupted_run_of_before_bases_were_orthonormal_planned_are_read(tmp_path):
    layer = next(iter(planned("bert").layers.values()))
    Shelf(tmp_path).put(layer)
    (file,) = tmp_path.iterdir()
    tensors, meta = storage.read(file, PLANNED)
    storage.write(file, PLANNED, tensors, meta | {"scales": [1.0, 2.0]})
    assert torch.equal(Shelf(tmp_path).get(layer.name).energies, layer.energies)

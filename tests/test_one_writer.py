"""One writer at a time, full disks and Ctrl-C: nothing that was there is lost, and each error says what to do."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from filelock import FileLock

import jactus
from jactus import JactusError
from jactus.app.work import LOCK, Work
from jactus.checkpoints import storage, writing
from tests.models import BERT, EVERY, SMALL, compressed, planned
from tests.test_checkpoint import contents, full_disk
from tests.test_resume import assert_identical, interrupted


def calibrate(batches, **kwargs):
    return jactus.calibrate(BERT.model(), batches, SMALL, progress=False, **kwargs)


def test_two_runs_on_one_snapshot_are_refused(tmp_path):
    file, other = tmp_path / "snapshot", []

    def batches():
        for batch in BERT.batches(3):
            if not other:
                with pytest.raises(
                    JactusError, match=rf"{file} is being written by another process, or by another run"
                ):
                    calibrate(BERT.batches(3), resume=file)
                other.append("refused")
            yield batch

    found = calibrate(batches(), resume=file, resume_every=0)
    assert other
    assert_identical(found, calibrate(BERT.batches(3)))
    assert list(tmp_path.iterdir()) == []


def test_two_saves_into_one_folder_are_refused_and_the_first_comes_to_its_end(tmp_path, monkeypatch):
    model, seen = compressed(BERT, EVERY), []
    add = jactus.checkpoints.checkpoint._add_digests

    def meanwhile(folder):
        if not seen:
            seen.append(folder)
            with pytest.raises(JactusError, match=rf"{tmp_path} is being written by another process"):
                jactus.save_pretrained(model, tmp_path)
            with pytest.raises(JactusError, match=rf"{tmp_path} is being written by another process"):
                jactus.export_model(model, tmp_path, "dense")
        add(folder)

    monkeypatch.setattr(jactus.checkpoints.checkpoint, "_add_digests", meanwhile)
    jactus.save_pretrained(model, tmp_path)
    assert seen
    assert contents(tmp_path).keys() == {"config.json", "model.safetensors"}
    BERT.auto.from_pretrained(tmp_path)


def test_two_writers_of_one_file_wait_for_each_other_and_then_refuse(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "PATIENCE", 0.1)
    path = tmp_path / "plan"
    planned("bert").save(path)
    before = path.read_bytes()
    with FileLock(tmp_path / ".plan.lock"), pytest.raises(JactusError, match=rf"{path} is being written by another"):
        planned("bert").save(path)
    assert path.read_bytes() == before


HOLDS = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_fits_of_one_output_are_refused_and_the_lock_of_a_killed_one_is_nobodys(tmp_path):
    """Held by a process of its own, which is then killed."""
    output = tmp_path / "small"
    output.mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDS, output / LOCK], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        work = Work(output)
        with pytest.raises(JactusError, match=rf"{output} is being written by another process"), work.held():
            raise AssertionError
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert (output / LOCK).exists()
    with work.held():
        assert work.folder.is_dir()
    assert not (output / LOCK).exists()


def test_where_there_are_no_locks_it_is_written_all_the_same(tmp_path, monkeypatch, caplog):
    def none(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", none)
    planned("bert").save(tmp_path / "plan")
    assert jactus.Plan.load(tmp_path / "plan").ranks == planned("bert").ranks
    assert "without locks" in caplog.text


def test_a_full_disk_in_calibration_leaves_the_snapshot_and_says_how_much_is_needed(tmp_path):
    file = tmp_path / "snapshot"
    whole = calibrate(BERT.batches(3))
    with pytest.raises(KeyboardInterrupt):
        calibrate(interrupted(BERT.batches(3), 2), resume=file, resume_every=0)
    before = contents(tmp_path)
    with (
        full_disk(),
        pytest.raises(JactusError, match=rf"could not write {file}.* takes 0\.\d MB.* MB are free.*untouched"),
    ):
        calibrate(BERT.batches(3), resume=file, resume_every=0)
    assert contents(tmp_path) == before
    with full_disk(), pytest.raises(JactusError, match=rf"could not write {tmp_path / 'result'}.* takes 0\.\d MB"):
        calibrate(BERT.batches(3), resume=file, resume_every=600, save=tmp_path / "result")
    assert contents(tmp_path) == before  # the snapshot goes only when the result is there
    calibrate(BERT.batches(3), resume=file, save=tmp_path / "result")
    assert_identical(jactus.Statistics.load(tmp_path / "result"), whole)
    assert contents(tmp_path).keys() == {"result"}


@pytest.mark.parametrize("call", ["replace", "fsync", "rename"])
def test_a_disk_that_is_full_at_the_last_moment_loses_nothing(call, tmp_path, monkeypatch):
    """What fails then is not the writing of tensors, but what follows it."""
    folder, model = tmp_path / "model", compressed(BERT, EVERY)
    jactus.save_pretrained(model, folder)
    planned("bert").save(tmp_path / "plan")
    before = contents(tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with torch.no_grad():
        model.classifier.bias += 1
    with monkeypatch.context() as patch:
        patch.setattr(writing.os, call, full)
        with pytest.raises(JactusError, match=rf"could not save to {folder}: .*No space left") as error:
            jactus.save_pretrained(model, folder)
        if call != "rename":  # by which folders come to their places
            with pytest.raises(JactusError, match=r"could not write .*plan: .*No space left.*untouched"):
                planned("bert", EVERY).save(tmp_path / "plan")
    assert contents(tmp_path).items() >= before.items()
    if call == "replace":
        assert f"move the files of {folder / '.saved'} up into {folder}" in str(error.value)
    jactus.save_pretrained(model, folder)
    assert contents(tmp_path).keys() == before.keys()
    again = BERT.auto.from_pretrained(folder)
    assert torch.equal(again.classifier.bias, model.classifier.bias)


def test_what_was_written_and_not_moved_is_moved_by_the_next_save_even_if_that_fails(tmp_path, monkeypatch):
    model = compressed(BERT, EVERY)
    jactus.save_pretrained(compressed(BERT, EVERY.replace(budget=0.5)), tmp_path)

    def stop(directory):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "complete", lambda folder: stop(folder) if (folder / writing.SAVED).exists() else None)
        with pytest.raises(KeyboardInterrupt):
            jactus.save_pretrained(model, tmp_path)
    with full_disk(), pytest.raises(JactusError, match=r"untouched: free some space"):
        jactus.save_pretrained(compressed(BERT, EVERY.replace(budget=0.5)), tmp_path)
    assert contents(tmp_path).keys() == {"config.json", "model.safetensors"}
    assert torch.equal(
        BERT.auto.from_pretrained(tmp_path).state_dict()["bert.pooler.dense.core"], model.bert.pooler.dense.core
    )


def test_a_stage_that_finds_the_disk_full_says_so_and_not_that_its_clock_could_not_be_kept(tmp_path):
    work = Work(tmp_path / "small")

    def make(folder):
        with full_disk(0):
            storage.write(folder / "head", "head", {"x": torch.zeros(1000)}, {})

    with work.held(), pytest.raises(JactusError, match=r"could not write .*head/head"):
        work.stage("head", {"seed": 0}, make)


def test_a_killed_writers_leftovers_are_gone_after_the_next(tmp_path):
    for name in (".saving-abc", ".saving-abc/config.json"):
        (tmp_path / name).mkdir() if name.endswith("abc") else (tmp_path / name).write_text("half")
    (tmp_path / ".jactus.lock").touch()
    (tmp_path / ".plan.partial").write_text("half")
    (tmp_path / ".plan.lock").touch()
    (tmp_path / ".snapshot.partial").write_text("half")
    jactus.save_pretrained(compressed(BERT, EVERY), tmp_path)
    planned("bert").save(tmp_path / "plan")
    calibrate(BERT.batches(1), resume=tmp_path / "snapshot")
    assert contents(tmp_path).keys() == {"config.json", "model.safetensors", "plan"}


def test_ctrl_c_in_a_calibration_says_how_to_go_on(tmp_path, caplog):
    file = tmp_path / "snapshot"
    with pytest.raises(KeyboardInterrupt):
        calibrate(interrupted(BERT.batches(3), 2), resume=file, resume_every=0)
    assert f"the same call with resume={str(file)!r} goes on from there" in caplog.text


def test_ctrl_c_in_any_verb_says_how_to_go_on(monkeypatch, capsys):
    from jactus.app import folders
    from jactus.app.main import main

    def stop(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "load", stop)
    assert main(["fold", "in here", "out"]) == 130
    assert "the same command goes on from here:\n  jactus fold 'in here' out" in capsys.readouterr().err


def test_a_damaged_training_checkpoint_is_left_out(tmp_path, capsys):
    import json

    from jactus.app.training import COMPLETE, checkpoint
    from jactus.checkpoints.quantizer import file_digest

    for step in (8, 16, 24):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(os.urandom(64))
        if step < 24:
            (folder / COMPLETE).write_text(json.dumps({"optimizer.pt": file_digest(folder / "optimizer.pt")}))
    assert checkpoint(tmp_path).name == "checkpoint-16"
    os.truncate(tmp_path / "checkpoint-16" / "optimizer.pt", 63)
    assert checkpoint(tmp_path).name == "checkpoint-8"
    assert "checkpoint-16 is truncated or corrupted" in capsys.readouterr().err.replace("\n", "")

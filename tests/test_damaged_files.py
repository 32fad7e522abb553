"""Files that are truncated, flipped, swapped or made up end in a JactusError that names them, or are right; they run nothing,
reach nowhere else, and nothing is allocated that they only claim."""

import contextlib
import functools
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import jactus
from jactus import JactusError
from jactus.app.folders import copy_others, load
from jactus.app.record import FILE, Run
from jactus.checkpoints import storage
from jactus.checkpoints.checkpoint import read_cores
from jactus.model.lowrank import compressed_layers
from tests.models import BERT, EVERY, SMALL, compressed, planned
from tests.test_checkpoint import contents, logits
from tests.unchanged import assert_same, state

resource = pytest.importorskip("resource", reason="memory limits are a POSIX matter")
FILES = Path(__file__).parent / "files"
EXAMPLES = int(os.environ.get("JACTUS_EXAMPLES", "25"))  # more of them for a longer search
quick = settings(
    derandomize=True, deadline=None, database=None, max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@contextlib.contextmanager
def little_memory(beyond=2**30):
    """No more than `beyond` bytes above what the process has: what a header claims is not there. (Linux tells what it has.)"""
    if not (statm := Path("/proc/self/statm")).exists():
        yield
        return
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + beyond, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def stopped(batches):
    yield from batches
    raise KeyboardInterrupt


def snapshot(path):
    with pytest.raises(KeyboardInterrupt):
        jactus.calibrate(BERT.model(), stopped(BERT.batches(2)), SMALL, resume=path, resume_every=0, progress=False)


def resumed(path):
    return jactus.calibrate(BERT.model(), BERT.batches(2), SMALL, resume=path, progress=False)


@functools.cache
def bases():
    return compressed(BERT, EVERY)


MADE = {
    "statistics": (
        lambda path: jactus.calibrate(BERT.model(), BERT.batches(1), SMALL, progress=False).save(path),
        lambda path: jactus.Statistics.load(path),
    ),
    "plan": (lambda path: planned("bert").save(path), lambda path: jactus.Plan.load(path)),
    "cores": (
        lambda path: jactus.save_cores(compressed(BERT, EVERY), path),
        lambda path: read_cores(bases(), path),
    ),
    "snapshot": (snapshot, resumed),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for kind, (make, _) in MADE.items():
        make(folder / kind)
    return {kind: (folder / kind).read_bytes() for kind in MADE}


def refused_or_right(path, load, right=None):
    """Loading ends in a JactusError that names the file, or gives `right`."""
    with little_memory():
        try:
            found = load(path)
        except JactusError as e:
            assert str(path) in str(e)  # noqa: PT017
            assert not any(word in str(e).lower() for word in ("allocate ", "memory"))  # noqa: PT017
            return False
    return right is None or right(found)


damage = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 0.9999)),
    st.tuples(st.just("flip"), st.floats(0, 0.9999), st.integers(0, 7)),
    st.tuples(st.just("write"), st.floats(0, 0.9999), st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("length"), st.integers(0, 2**64 - 1)),
)


def damaged(data, how):
    made = bytearray(data)
    kind, *more = how
    at = int(more[0] * len(data)) if kind != "length" else 0
    if kind == "cut":
        return bytes(made[:at])
    if kind == "flip":
        made[at] ^= 1 << more[1]
    elif kind == "write":
        made[at : at + len(more[1])] = more[1]
    else:
        made[:8] = more[0].to_bytes(8, "little")  # of the header, as safetensors has it
    return bytes(made)


@pytest.mark.parametrize("kind", ["statistics", "plan", "cores"])
@quick
@given(how=damage)
def test_no_damage_of_bytes_is_taken_for_what_was_written(kind, originals, tmp_path, how):
    path = tmp_path / "file"
    data = damaged(originals[kind], how)
    path.write_bytes(data)
    if refused_or_right(path, MADE[kind][1]):
        # what is left of JSON's blanks and safetensors' padding says the same
        (tmp_path / "whole").write_bytes(originals[kind])
        found, wanted = (storage.read(p, kind) for p in (path, tmp_path / "whole"))
        assert found[1] == wanted[1]
        assert all(torch.equal(t, wanted[0][name]) for name, t in found[0].items())


@pytest.mark.parametrize(
    "how", [("cut", 0.5), ("cut", 0.0), ("flip", 0.3, 2), ("flip", 0.9, 0), ("length", 2**60)], ids=str
)
def test_a_damaged_snapshot_is_refused_and_stays(how, originals, tmp_path):
    path = tmp_path / "snapshot"
    path.write_bytes(damaged(originals["snapshot"], how))
    kept = path.read_bytes()
    assert not refused_or_right(path, resumed)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("one", MADE)
def test_a_file_in_the_place_of_another_is_refused(one, originals, tmp_path):
    for other, (_, read) in MADE.items():
        if other != one:
            path = tmp_path / "file"
            path.write_bytes(originals[one])
            assert not refused_or_right(path, read)


def leaves(value, path=()):
    """Where the plain values of JSON are."""
    if isinstance(value, dict | list) and value:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, (*path, key))
    yield path


def put(value, path, new):
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    if new is GONE and len(path) == 1:
        del copied[path[0]]
    else:
        copied[path[0]] = put(copied[path[0]], path[1:], new)
    return copied


GONE = object()
ODD = (
    None, True, -1, 0, 1, 2**40, 10**9, 1e300, float("nan"), "", "float32", "../../x", "load", [], {}, [1], {"a": 1}, GONE,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["statistics", "plan", "cores"])
@quick
@given(data=st.data())
def test_a_header_that_says_something_else_is_refused_even_with_its_digest(kind, originals, tmp_path, data):
    """What it claims is allocated nowhere: a layer of 10⁹ rows, tensors of other shapes or dtypes."""
    path = tmp_path / "file"
    path.write_bytes(originals[kind])
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["jactus"])
    if data.draw(st.booleans()):
        where = data.draw(st.sampled_from(list(leaves(header["meta"]))[:-1]))
        header["meta"] = put(header["meta"], where, data.draw(st.sampled_from(ODD)))
        if not isinstance(header["meta"], dict):
            header["meta"] = {}
    else:
        name = data.draw(st.sampled_from(sorted(tensors)))
        other = data.draw(
            st.sampled_from([None, torch.zeros(0), torch.zeros(3, 2), torch.zeros((), dtype=torch.int64)])
        )
        if other is None:
            del tensors[name]
        else:
            tensors[name] = other
    header["digest"] = storage.digest(tensors, header["meta"])
    save_file(tensors, path, metadata={"jactus": json.dumps(header)})
    refused_or_right(path, MADE[kind][1])


def test_ten_terabytes_in_a_header_are_not_allocated(tmp_path):
    claim = json.dumps({"x": {"dtype": "F32", "shape": [2500, 10**9], "data_offsets": [0, 10**13]}}).encode()
    path = tmp_path / "file"
    path.write_bytes(len(claim).to_bytes(8, "little") + claim + b"\0" * 64)
    for _, read in MADE.values():
        assert not refused_or_right(path, read)
    jactus.save_pretrained(compressed(BERT, EVERY), tmp_path / "model")
    shutil.copy(path, tmp_path / "model" / "model.safetensors")
    assert not refused_or_right(tmp_path / "model", BERT.auto.from_pretrained)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder without digests, as Trainer writes it, and the logits of its model."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    model = compressed(BERT, EVERY)
    model.save_pretrained(folder)
    return folder, logits(model)


@quick
@given(data=st.data())
def test_an_entry_of_config_json_that_is_not_so_is_refused(checkpoint, tmp_path, data):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint[0], folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    entry = config["quantization_config"]
    names = sorted(entry["layers"])
    where = data.draw(
        st.one_of(
            st.sampled_from([("layers",), ("trainable",), ("format",), ("files",), ("trainable", 0)]),
            st.tuples(st.just("layers"), st.sampled_from(names)),
            st.tuples(st.just("layers"), st.sampled_from(names), st.sampled_from(sorted(entry["layers"][names[0]]))),
        )
    )
    entry.setdefault("files", {})
    config["quantization_config"] = put(entry, where, data.draw(st.sampled_from(ODD)))
    (folder / "config.json").write_text(json.dumps(config))
    before = contents(folder)

    def right(model):
        """What trains may be another, and a dtype; the layers are these or are dense."""
        return len(compressed_layers(model)) == len(names) and torch.allclose(logits(model), checkpoint[1], atol=1e-2)

    try:
        assert refused_or_right(folder, lambda path: BERT.auto.from_pretrained(path).eval(), right) in (True, False)
    except AssertionError as e:
        assert "format" in str(e) or "newer" in str(e)  # noqa: PT017
    assert contents(folder) == before


def test_a_rank_of_a_thousand_million_is_refused_before_anything_is_made(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint[0], folder)
    config = json.loads((folder / "config.json").read_text())
    for kept in config["quantization_config"]["layers"].values():
        kept["rank"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    with little_memory(), pytest.raises(JactusError, match=rf"{folder}/config\.json is corrupted: of bert\."):
        BERT.auto.from_pretrained(folder)


def test_a_model_that_config_json_makes_larger_than_its_files_is_refused(checkpoint, tmp_path):
    """Layers and model agree on 10⁵ rows; the weights of such layers are in no file."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 10**8
    for kept in config["quantization_config"]["layers"].values():
        kept.update({key: 10**8 for key in ("m", "n") if kept[key] == 24})
    (folder / "config.json").write_text(json.dumps(config))
    with (
        little_memory(),
        pytest.raises(JactusError, match=r"claims low-rank layers of [\d,]+ numbers.*the weight files"),
    ):
        BERT.auto.from_pretrained(folder)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_no_pickle_is_read(name, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(checkpoint[0], folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, folder / name)
    for load_it in (BERT.auto.from_pretrained, load):
        with pytest.raises(JactusError, match=r"is not safetensors|truncated or corrupted"):
            load_it(folder)
    for _, read in MADE.values():
        (tmp_path / "file").write_bytes(pickle.dumps(Bomb()))
        assert not refused_or_right(tmp_path / "file", read)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("way", ["..", "absolute", "link", "linked folder"])
def test_weights_outside_the_folder_are_not_read(way, checkpoint, tmp_path):
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    shutil.copytree(checkpoint[0], folder)
    elsewhere.mkdir()
    shutil.move(folder / "model.safetensors", elsewhere / "secret.safetensors")
    with safe_open(elsewhere / "secret.safetensors", framework="pt") as file:
        names = list(file.keys())
    inside = folder / "model-00001-of-00001.safetensors"
    if way == "link":
        inside.symlink_to(elsewhere / "secret.safetensors")
    if way == "linked folder":
        (folder / "sub").symlink_to(elsewhere)
    named = {
        "..": "../elsewhere/secret.safetensors",
        "absolute": str(elsewhere / "secret.safetensors"),
        "link": inside.name,
        "linked folder": "sub/secret.safetensors",
    }[way]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, named)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(JactusError, match="lies outside the checkpoint's folder"):
        BERT.auto.from_pretrained(folder)


def test_the_blobs_of_a_hubs_cache_are_read(checkpoint, tmp_path):
    folder, blobs = tmp_path / "models--a--b" / "snapshots" / "1f3", tmp_path / "models--a--b" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for file in checkpoint[0].iterdir():
        shutil.copy(file, blobs / f"digest-of-{file.name}")
        (folder / file.name).symlink_to(f"../../blobs/digest-of-{file.name}")
    assert torch.equal(logits(BERT.auto.from_pretrained(folder).eval()), checkpoint[1])


def test_what_only_links_elsewhere_is_not_copied_along(checkpoint, tmp_path, capsys):
    folder, target = tmp_path / "model", tmp_path / "target"
    shutil.copytree(checkpoint[0], folder)
    target.mkdir()
    (tmp_path / "secret").write_text("of the system")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    (folder / "merges.txt").write_text("own")
    copy_others(folder, target)
    assert "vocab.txt" in capsys.readouterr().err.replace("\n", "")
    assert "vocab.txt" not in contents(target)
    assert contents(target)["merges.txt"] == b"own"


@quick
@given(data=st.data())
def test_a_record_of_a_run_that_is_not_one_is_refused(tmp_path, data):
    text = (FILES / "run" / FILE).read_text(encoding="utf-8")
    if data.draw(st.booleans()):
        read = json.loads(text)
        some = data.draw(st.sampled_from(sorted(read)))
        where = data.draw(st.sampled_from([path for path in leaves(read) if path[:1] == (some,)]))
        text = json.dumps({k: v for k, v in put(read, where, data.draw(st.sampled_from(ODD))).items() if v is not GONE})
        made = text.encode()
    else:
        made = damaged(text.encode(), data.draw(damage))
    (tmp_path / FILE).write_bytes(made)

    refused_or_right(tmp_path, Run.load)


def test_a_model_is_left_alone_by_cores_that_are_damaged(originals, tmp_path):
    path = tmp_path / "cores"
    path.write_bytes(originals["cores"][:-1])
    model = compressed(BERT, EVERY)
    before = state(model)
    with pytest.raises(JactusError, match="truncated or corrupted"):
        jactus.load_cores(model, path)
    assert_same(before, state(model))

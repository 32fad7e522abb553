"""Files: what was written is what is read, in another process too, and nothing half-written or foreign is ever taken."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import jactus
from jactus import JactusError
from jactus.model.lowrank import compressed_layers
from tests.models import BERT, EVERY, FAMILIES, FULL, GPT2, LLAMA, SMALL, WIDE, compressed, planned

FORMS = {"square": EVERY, "block": EVERY.replace(trainable_rank=2), "wide": WIDE, "full": FULL}
resource = pytest.importorskip("resource", reason="file size limits are a POSIX matter")


@contextlib.contextmanager
def full_disk(after=2000):
    """No file can grow beyond `after` bytes: writes fail in the kernel, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@torch.no_grad()
def logits(model, family=BERT):
    return model(**family.batch()).logits


@torch.no_grad()
def change(model, seed=1):
    """Stands for training."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def run_python(code, *args):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True)


RELOAD = """
import pathlib, sys, torch, transformers
root = pathlib.Path(sys.argv[1])
model = transformers.AutoModelForSequenceClassification.from_pretrained(root / "merged").eval()
with torch.no_grad():
    torch.save(model(**torch.load(root / "batch.pt")).logits, root / "merged" / "logits.pt")
assert "jactus" not in sys.modules

import jactus
from tests.models import FAMILIES
for family in FAMILIES:
    for form in ("core", "folded"):
        model = family.auto.from_pretrained(root / family.name / form).eval()
        with torch.no_grad():
            torch.save(model(**family.batch()).logits, root / family.name / form / "logits.pt")
"""


def test_a_fresh_process_computes_identical_logits_and_a_merged_model_needs_no_jactus(tmp_path):
    # with the thread count of the other process: sums may be split by threads
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = {}
        for family in FAMILIES:
            model = change(compressed(family, EVERY))
            for form in ("core", "folded"):
                model = jactus.fold(model) if form == "folded" else model
                jactus.save_pretrained(model, tmp_path / family.name / form)
                expected[f"{family.name}/{form}"] = logits(model, family)
        merged = jactus.merge(change(compressed(BERT, EVERY)))
        jactus.save_pretrained(merged, tmp_path / "merged")
        torch.save(BERT.batch(), tmp_path / "batch.pt")
        expected["merged"] = logits(merged)
    finally:
        torch.set_num_threads(threads)
    done = run_python(RELOAD, tmp_path)
    assert done.returncode == 0, done.stderr
    for path, wanted in expected.items():
        assert torch.equal(torch.load(tmp_path / path / "logits.pt"), wanted), path


def truncate(directory):
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def truncate_to_nothing(directory):
    os.truncate(directory / "model.safetensors", 0)


def flip_a_byte(directory):
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        byte = file.read(1)
        file.seek(-10, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def edit_config(**changes):
    def edit(directory):
        path = directory / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            part = config
            *parents, last = key.split("__")
            for parent in parents:
                part = part[parent]
            part[last] = value
        path.write_text(json.dumps(config))

    return edit


def weights_of_another(directory):
    other = change(compressed(BERT, EVERY), seed=2)
    other.save_pretrained(directory / "other")
    shutil.move(directory / "other" / "model.safetensors", directory / "model.safetensors")


DAMAGE = [
    (truncate, "model.safetensors is truncated, corrupted or of another checkpoint"),
    (truncate_to_nothing, "model.safetensors is truncated, corrupted or of another checkpoint"),
    (flip_a_byte, "model.safetensors is truncated, corrupted or of another checkpoint"),
    (weights_of_another, "model.safetensors is truncated, corrupted or of another checkpoint"),
    (edit_config(quantization_config__format=99), "format 99, newer than 2: upgrade"),
    (edit_config(hidden_size=32), r"of another model: it has a low-rank layer bert\.encoder\.layer\.0.* \(16×16\)"),
    (edit_config(num_hidden_layers=1), r"of another model.*bert\.encoder\.layer\.1.*none of that name"),
    (edit_config(model_type="distilbert"), "of another model"),
]


@pytest.mark.parametrize("damage, message", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_refused(damage, message, tmp_path):
    jactus.save_pretrained(compressed(BERT, EVERY), tmp_path)
    BERT.auto.from_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(JactusError, match=message):
        BERT.auto.from_pretrained(tmp_path)


def test_weights_without_the_factors_are_refused_even_without_digests(tmp_path):
    compressed(BERT, EVERY).save_pretrained(tmp_path)  # transformers' own save, as Trainer's: no digests
    BERT.model().save_pretrained(tmp_path / "dense")
    shutil.move(tmp_path / "dense" / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(JactusError, match=r"bert\.encoder\.layer\.0\S+ .* has no U in the weight files"):
        BERT.auto.from_pretrained(tmp_path)


@pytest.mark.parametrize(("form", "key"), [("core", "rows"), ("core", "columns"), ("folded", "order")])
def test_weights_without_the_pivots_are_refused_too(form, key, tmp_path):
    """Rows in a made-up order would be another layer's."""
    model = compressed(BERT, EVERY)
    (jactus.fold(model) if form == "folded" else model).save_pretrained(tmp_path)
    kept = {name: t for name, t in load_file(tmp_path / "model.safetensors").items() if not name.endswith(f".{key}")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JactusError, match=rf"bert\.encoder\.layer\.\d\S+ .* has no {key} in the weight files"):
        BERT.auto.from_pretrained(tmp_path)


@pytest.mark.parametrize("limit", [2000, 20_000])
def test_a_disk_that_fills_up_leaves_the_old_checkpoint_whole(limit, tmp_path):
    # the small limit fails at config.json, the larger one at the weights
    model = compressed(BERT, EVERY)
    jactus.save_pretrained(model, tmp_path)
    before, expected = contents(tmp_path), logits(model)
    change(model)
    with full_disk(limit), pytest.raises(JactusError, match=r"could not save to .*untouched: free some space"):
        jactus.save_pretrained(model, tmp_path)
    assert contents(tmp_path) == before
    assert torch.equal(logits(BERT.auto.from_pretrained(tmp_path).eval()), expected)
    jactus.save_pretrained(model, tmp_path)  # the model itself is unharmed
    assert torch.equal(logits(BERT.auto.from_pretrained(tmp_path).eval()), logits(model))


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file with space").write_text("")
    with pytest.raises(JactusError, match=r"could not save to .*file with space.*choose another directory"):
        jactus.save_pretrained(compressed(BERT), tmp_path / "file with space")


def test_only_transformers_models_are_saved(tmp_path):
    with pytest.raises(JactusError, match=r"Linear.*state_dict"):
        jactus.save_pretrained(torch.nn.Linear(2, 2), tmp_path)


def test_sharded_saves_reload_and_stale_shards_go_while_the_users_files_stay(tmp_path):
    model = compressed(BERT, EVERY)
    mine = {"notes.txt": b"mine", "model_before.safetensors": b"mine too", "model-card.safetensors.bak": b"and this"}
    for name, text in mine.items():
        (tmp_path / name).write_bytes(text)
    jactus.save_pretrained(model, tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-0*-of-*.safetensors"))) > 1
    assert torch.equal(logits(BERT.auto.from_pretrained(tmp_path).eval()), logits(model))

    jactus.save_pretrained(change(model), tmp_path)  # one file now
    written = {p.name for p in tmp_path.iterdir()} - mine.keys()
    assert written == {"config.json", "model.safetensors"}
    assert torch.equal(logits(BERT.auto.from_pretrained(tmp_path).eval()), logits(model))

    jactus.save_pretrained(model, tmp_path, max_shard_size="8KB")  # and back
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(BERT.auto.from_pretrained(tmp_path).eval()), logits(model))
    assert {name: (tmp_path / name).read_bytes() for name in mine} == mine


def test_a_damaged_shard_is_named(tmp_path):
    jactus.save_pretrained(compressed(BERT, EVERY), tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("model-0*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 4)
    with pytest.raises(JactusError, match=shard.name):
        BERT.auto.from_pretrained(tmp_path)


def test_the_models_own_save_after_a_reload_reloads(tmp_path):
    jactus.save_pretrained(compressed(BERT, EVERY), tmp_path)
    model = change(BERT.auto.from_pretrained(tmp_path).eval())
    model.save_pretrained(tmp_path)  # over it: the digests of the old weights must not stay
    assert torch.equal(logits(BERT.auto.from_pretrained(tmp_path).eval()), logits(model))


@pytest.mark.parametrize("family", [BERT, LLAMA, GPT2], ids=lambda f: f.name)
@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_two_tasks_swap_on_the_same_bases(family, config, tmp_path):
    model = compressed(family, config)
    found = {}
    for seed in (1, 2):
        change(model, seed)
        found[seed] = logits(model, family)
        jactus.save_cores(model, tmp_path / f"{seed}.safetensors")
    assert not torch.equal(found[1], found[2])
    other = compressed(family, config)
    for seed in (1, 2, 1):
        jactus.load_cores(model, tmp_path / f"{seed}.safetensors")
        jactus.load_cores(other, tmp_path / f"{seed}.safetensors")
        assert torch.equal(logits(model, family), found[seed])
        assert torch.equal(logits(other, family), found[seed])


def indices(model):
    return {name: t for name, t in model.named_buffers() if name.endswith((".rows", ".columns", ".order"))}


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_a_file_of_cores_holds_what_trains_and_no_pivots(config, tmp_path):
    model = change(compressed(BERT, config))
    assert indices(model)
    jactus.save_cores(model, tmp_path / "cores")
    with safe_open(tmp_path / "cores", framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = json.loads(file.metadata()["jactus"])["meta"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    cores = {name for name, _ in model.named_parameters() if name.endswith((".core", ".block"))}
    assert found.keys() == trained | cores
    assert all(torch.equal(t, model.get_parameter(name)) for name, t in found.items())
    assert meta["state"] == []
    before = {name: t.clone() for name, t in indices(model).items()}
    jactus.load_cores(model, tmp_path / "cores")
    assert all(torch.equal(t, before[name]) for name, t in indices(model).items())


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_cores_go_into_a_model_that_was_reloaded(config, tmp_path):
    model = change(compressed(BERT, config))
    jactus.save_pretrained(model, tmp_path / "model")
    jactus.save_cores(model, tmp_path / "first")
    jactus.save_cores(change(model, seed=2), tmp_path / "second")
    again = BERT.auto.from_pretrained(tmp_path / "model").eval()
    for file in ("second", "first", "second"):
        for each in (model, again):
            jactus.load_cores(each, tmp_path / file)
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("form", ["core", "folded"])
@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_a_compact_checkpoint_is_read_as_it_was_written_bit_for_bit(config, form, dtype, tmp_path):
    model = change(compressed(BERT, config.replace(dtype=dtype)))
    model = jactus.fold(model) if form == "folded" else model
    jactus.save_pretrained(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["format"] == 2
    assert written["layers"].keys() == compressed_layers(model).keys()
    assert all(kept["form"] == form and kept["pivoted"] for kept in written["layers"].values())
    if form == "folded":
        in_file = load_file(tmp_path / "model.safetensors")
        for name, layer in compressed_layers(model).items():
            m, n, r = layer.out_features, layer.in_features, layer.rank
            assert sum(in_file[f"{name}.{key}"].numel() for key in ("left", "right")) == r * (m + n - r)
            assert in_file[f"{name}.order"].shape == (2, min(m, n))
    again = BERT.auto.from_pretrained(tmp_path).eval()
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) and t.dtype == theirs[name].dtype for name, t in ours.items())
    assert indices(again).keys() == indices(model).keys() != set()
    assert torch.equal(logits(again), logits(model))


def test_cores_of_a_model_frozen_for_inference_are_saved_whole(tmp_path):
    model = change(compressed(BERT, EVERY.replace(trainable_rank=2, trainable_extras=())))
    jactus.save_cores(model.requires_grad_(False), tmp_path / "cores")
    again = compressed(BERT, EVERY.replace(trainable_rank=2, trainable_extras=("head",)))
    jactus.load_cores(again, tmp_path / "cores")
    assert torch.equal(logits(again), logits(model))


def test_frozen_models_swap_whole_tasks_extras_included(tmp_path):
    config = EVERY.replace(trainable_extras=("head", "LayerNorm"))
    model = change(compressed(BERT, config)).requires_grad_(False)
    jactus.save_cores(model, tmp_path / "cores")
    again = compressed(BERT, config).requires_grad_(False)
    jactus.load_cores(again, tmp_path / "cores")
    assert torch.equal(logits(again), logits(model))
    jactus.save_cores(compressed(BERT, EVERY.replace(trainable_extras=())), tmp_path / "bare")
    with pytest.raises(JactusError, match="LayerNorm"):
        jactus.load_cores(again, tmp_path / "bare")


def test_cores_without_an_extra_that_trains_here_are_refused(tmp_path):
    """The extra would stay another task's."""
    model = compressed(BERT, EVERY.replace(trainable_extras=("head",)))
    jactus.save_cores(model, tmp_path / "cores")
    other = change(compressed(BERT, EVERY.replace(trainable_extras=("head", "word_embeddings"))))
    before = logits(other)
    with pytest.raises(JactusError, match=r"no \S*word_embeddings\.weight .* the same extras train"):
        jactus.load_cores(other, tmp_path / "cores")
    assert torch.equal(logits(other), before)
    jactus.save_cores(other, tmp_path / "cores")
    jactus.load_cores(model, tmp_path / "cores")  # more than trains here is put in its place
    assert torch.equal(logits(model), before)


MISFITS = [
    (lambda: compressed(BERT, EVERY.replace(budget=0.5)), "other bases.*bert.encoder.layer.0"),
    (lambda: compressed(LLAMA, EVERY), "other bases"),
    (lambda: compressed(BERT, EVERY.replace(trainable_rank=2)), "other bases"),
    (lambda: BERT.model(), "no three-factor layer"),
    (lambda: jactus.fold(compressed(BERT, EVERY)), "no three-factor layer"),
]


@pytest.mark.parametrize("other, message", MISFITS)
def test_cores_are_refused_by_other_bases_and_change_nothing(other, message, tmp_path):
    jactus.save_cores(change(compressed(BERT, EVERY)), tmp_path / "cores")
    model = other()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(JactusError, match=message):
        jactus.load_cores(model, tmp_path / "cores")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def statistics():
    return jactus.calibrate(BERT.model(), BERT.batches(), SMALL, progress=False)


KINDS = {
    "statistics": (statistics, jactus.Statistics.load),
    "plan": (lambda: planned("bert"), jactus.Plan.load),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def test_a_plan_file_compresses_as_the_plan_does(tmp_path):
    planned("bert").save(tmp_path / "plan")
    model = jactus.compress(BERT.model(), jactus.Plan.load(tmp_path / "plan"))
    assert torch.equal(logits(model), logits(compressed(BERT)))


@kinds
@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(kind, cut, tmp_path):
    make, load = KINDS[kind]
    path = tmp_path / "file"
    make().save(path)
    os.truncate(path, cut if cut >= 0 else path.stat().st_size + cut)
    with pytest.raises(JactusError, match=r"file is truncated or corrupted.*make it again"):
        load(path)


@kinds
@pytest.mark.parametrize("where", [0.3, 0.6, 0.999])
def test_a_flipped_byte_is_noticed(kind, where, tmp_path):
    make, load = KINDS[kind]
    path = tmp_path / "file"
    make().save(path)
    data = bytearray(path.read_bytes())
    start = int.from_bytes(data[:8], "little") + 8
    data[start + int(where * (len(data) - start))] ^= 1
    path.write_bytes(data)
    with pytest.raises(JactusError, match=r"file is corrupted.*digest"):
        load(path)


@kinds
def test_the_numbers_in_the_header_are_digested_too(kind, tmp_path):
    make, load = KINDS[kind]
    path = tmp_path / "file"
    make().save(path)
    rewrite(path, lambda header: header["meta"]["layers"]["bert.pooler.dense"].update(m=15))
    with pytest.raises(JactusError, match="file is corrupted"):
        load(path)


@kinds
def test_a_newer_format_asks_for_an_upgrade(kind, tmp_path):
    make, load = KINDS[kind]
    path = tmp_path / "file"
    make().save(path)
    rewrite(path, lambda header: header.update(format=99))
    with pytest.raises(JactusError, match="format 99, newer than 1: upgrade"):
        load(path)


def rewrite(path, change_header):
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["jactus"])
    change_header(header)
    save_file(tensors, path, metadata={"jactus": json.dumps(header)})


def test_another_kind_of_file_is_named_for_what_it_is(tmp_path):
    planned("bert").save(tmp_path / "plan")
    with pytest.raises(JactusError, match="plan is a plan file, not a jactus statistics file"):
        jactus.Statistics.load(tmp_path / "plan")
    with pytest.raises(JactusError, match="is a plan file, not a jactus cores file"):
        jactus.load_cores(compressed(BERT), tmp_path / "plan")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(JactusError, match="foreign is another program's file"):
        jactus.Plan.load(tmp_path / "foreign")
    (tmp_path / "text").write_text("hello, this is not a safetensors file")
    with pytest.raises(JactusError, match="text is truncated or corrupted"):
        jactus.Plan.load(tmp_path / "text")
    with pytest.raises(JactusError, match="is not a file; a jactus plan file was expected"):
        jactus.Plan.load(tmp_path / "nowhere")


@kinds
def test_a_full_disk_leaves_the_old_file_whole(kind, tmp_path):
    made = KINDS[kind][0]()
    path = tmp_path / "file"
    made.save(path)
    before = contents(tmp_path)
    with full_disk(), pytest.raises(JactusError, match=r"could not write .*file.*untouched: free some space"):
        made.save(path)
    assert contents(tmp_path) == before
    assert KINDS[kind][1](path)


def test_cores_survive_a_full_disk(tmp_path):
    model = compressed(BERT, EVERY)
    jactus.save_cores(model, tmp_path / "cores")
    before = contents(tmp_path)
    with full_disk(), pytest.raises(JactusError, match="untouched"):
        jactus.save_cores(change(model), tmp_path / "cores")
    assert contents(tmp_path) == before
    jactus.load_cores(model, tmp_path / "cores")
    assert torch.equal(logits(model), logits(compressed(BERT, EVERY)))


def test_without_jactus_a_checkpoint_is_refused_and_never_filled_with_made_up_weights(tmp_path):
    jactus.save_pretrained(compressed(BERT), tmp_path)
    code = "import sys; from transformers import AutoModelForSequenceClassification as Auto; Auto.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "mismatch" in done.stderr.lower()


def test_cores_of_another_trainable_rank_are_refused_by_name(tmp_path):
    jactus.save_cores(compressed(BERT, EVERY.replace(trainable_rank=2)), tmp_path / "cores")
    with pytest.raises(JactusError, match=r"bert\.encoder\.layer\.0\S+block is \(2, 2\)"):
        jactus.load_cores(compressed(BERT, EVERY.replace(trainable_rank=3)), tmp_path / "cores")

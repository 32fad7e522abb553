"""Pictures in folders and zips, and DINOv2 out of its graph, without a network: splits, sizes, what is refused."""

import functools
import zipfile

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from bench import dinov2, images, training, vision
from bench.accuracy import cell, tasks
from bench.accuracy.store import Cell
from jactus_kernels import JactusError
from tests.test_recipes import vit

KINDS = ("a-red", "green", "violet-blue")


@pytest.fixture
def root(tmp_path):
    """Pictures of 20×24 of three colours in 14 training and 8 test files each, one of which is in both."""
    g = np.random.default_rng(0)
    for split, count in (("train", 14), ("test", 8)):
        for k, kind in enumerate(KINDS):
            folder = tmp_path / "colours" / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = g.integers(0, 120, (20, 24, 3), dtype=np.uint8)
                pixels[..., k] += 120
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "colours/train/green/again.png").write_bytes((tmp_path / "colours/test/green/3.png").read_bytes())
    (tmp_path / "colours/train/green/notes.txt").write_text("not a picture")
    return tmp_path


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A random DINOv2 with its processor, of 28 pixels, in the place of the real one."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=7, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(tmp_path / "model")
    sides = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    dinov2.write_processor(tmp_path / "model", **sides)
    monkeypatch.setattr(dinov2, "folder", lambda: tmp_path / "model")
    return dinov2.processor()


def zipped(folder):
    file = folder.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return file


def keys(pictures):
    return {image.numpy().tobytes() for image in pictures.pixels}


def test_a_folder_and_a_zip_of_it_give_the_same_splits_and_no_picture_is_in_two(root, small, monkeypatch):
    monkeypatch.setenv("JACTUS_IMAGES", str(root))
    sizes = (30, 12, 24)  # all there are: the repeated one is the test's alone
    found = images.picture_task("colours", small, sizes=sizes)
    again = images.picture_task("colours", small, zipped(root / "colours"), sizes)
    assert found.labels == list(KINDS)
    splits = [(t.train, t.validation, t.test) for t in (found, again)]
    for one, other, size in zip(*splits, sizes):
        assert torch.equal(one.pixels, other.pixels)
        assert one.labels == other.labels
        assert one.pixels.shape == (size, 3, 28, 28)
        assert one.pixels.float().mean((2, 3)).argmax(1).tolist() == one.labels
    train, validation, test = (keys(part) for part in splits[0])
    assert (len(train), len(validation), len(test)) == sizes
    assert not (train & validation)
    assert not (test & (train | validation))


def test_the_model_sees_what_its_processor_and_the_example_make_of_a_picture(root, small):
    found = images.picture_task("colours", small, root / "colours", (30, 12, 24))
    args = vit.parse(["--model", "m", "--data", "d", "--output", "o"])
    _, theirs, classes = vit.load(str(root / "colours"), args, small)
    assert classes == found.labels

    def ordered(rows):
        return sorted(rows, key=lambda row: (row[1], float(row[0].sum())))

    batch = found.test.batch(range(24))
    mine = ordered(zip(batch["pixel_values"], batch["labels"].tolist()))
    for (pixels, label), (expected, known) in zip(mine, ordered((x["pixel_values"], x["labels"]) for x in theirs)):
        assert label == known
        # x / (255 σ) − μ/σ instead of (x/255 − μ)/σ: ε of values up to 3
        torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-6)


def test_grey_images_get_three_channels_alike(small):
    pixels = torch.arange(5 * 28 * 28).remainder(251).byte().reshape(5, 1, 28, 28)
    grey = training.Images(pixels, [3, 1, 4, 1, 5])
    task = images.in_colour(vision.ImageTask("grey", list("012345"), grey, grey, grey), small, (4, 2, 5))
    assert [len(part) for part in (task.train, task.validation, task.test)] == [4, 2, 5]
    assert torch.equal(task.test.pixels, pixels.expand(-1, 3, -1, -1))  # of the model's size already
    assert (task.train.labels, task.train.mean) == ([3, 1, 4, 1], tuple(small.image_mean))


def test_a_hubs_data_set_gives_the_same_pictures(root, small, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
    (root / "colours/train/green/notes.txt").unlink()
    load = datasets.load_dataset
    local = {"data_dir": str(root / "colours"), "cache_dir": str(root / "cache")}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: load("imagefolder", split=split, **local))
    found = images.picture_task("colours", small, "someone/colours", (30, 12, 24))
    expected = images.picture_task("colours", small, root / "colours", (30, 12, 24))
    assert found.labels == expected.labels
    assert keys(found.test) == keys(expected.test)


def test_what_is_wanted_is_said_where_it_is_not_there(root, small, monkeypatch):
    monkeypatch.delenv("JACTUS_IMAGES", raising=False)
    with pytest.raises(JactusError, match=r"set JACTUS_IMAGES to a folder that holds flowers5/ or flowers5\.zip"):
        images.picture_task("flowers5", small)
    monkeypatch.setenv("JACTUS_IMAGES", str(root))
    with pytest.raises(JactusError, match=r"which is not a folder that holds flowers5/"):
        images.picture_task("flowers5", small)
    with pytest.raises(JactusError, match="different examples cannot fill"):
        images.picture_task("colours", small, sizes=(100, 1, 1))
    (root / "colours/test/white").mkdir()
    (root / "colours/test/white/0.png").write_bytes(b"no picture")
    with pytest.raises(JactusError, match="white"):
        images.picture_task("colours", small)
    (root / "colours/train/white").mkdir()
    (root / "colours/train/white/0.png").write_bytes(b"nor this")
    with pytest.raises(JactusError, match=r"white/0\.png: is no picture that Pillow reads"):
        images.picture_task("colours", small, sizes=(31, 12, 25))
    with pytest.raises(JactusError, match="neither a folder nor a zip"):
        images.picture_task("colours", small, root / "colours/train/green/notes.txt")


def test_a_linear_layers_weight_is_found_by_the_bias_that_is_added_to_its_product(monkeypatch):
    monkeypatch.setattr(dinov2, "POSITIONS", ("class", "patches"))
    torch.manual_seed(0)
    weight, bias = torch.randn(3, 2), torch.randn(3)
    values = {
        "backbone.a.bias": bias,
        "backbone.norm.weight": torch.ones(2),
        "onnx::MatMul_1": weight.T,
        "class": torch.zeros(1, 1, 2),
        "patches": torch.ones(1, 4, 2),
        "head.bias": torch.ones(3),
    }
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["y"]),
        onnx.helper.make_node("Add", ["backbone.a.bias", "y"], ["z"]),
        onnx.helper.make_node("Add", ["z", "head.bias"], ["out"]),
    ]
    found = dinov2.weights(onnx.helper.make_graph(nodes, "g", [], []), values)
    assert set(found) == {
        "a.bias",
        "a.weight",
        "norm.weight",
        "embeddings.position_embeddings",
        "embeddings.mask_token",
    }
    assert torch.equal(found["a.weight"], weight)
    assert found["embeddings.position_embeddings"].shape == (1, 5, 2)


def test_the_example_takes_the_same_model_and_folders(root, small, monkeypatch):
    monkeypatch.setattr(vit, "DEVICE", "cpu")
    model, data, output = (str(root / name) for name in ("model", "colours", "out"))
    how = ["--epochs", "4", "--learning-rate", "2e-3", "--batch-size", "8", "--workers", "0"]
    results = vit.main(["--model", model, "--data", data, "--output", output, *how])
    found = results["datasets"]["colours"]
    assert found["rows"] == {"train": 43, "test": 24, "classes": 3}
    assert found["accuracy"]["folded"] > 0.8


@pytest.mark.parametrize("method", ["jactus[rank_multiple=4]", "lora", "dora", "full", "svd-llm+lora"])
def test_a_cell_of_the_vision_transformer_is_measured(root, small, monkeypatch, method):
    monkeypatch.setenv("JACTUS_CACHE", str(root / "cache"))
    monkeypatch.setenv("JACTUS_IMAGES", str(root))
    load = functools.partial(tasks._photographs, "colours", (30, 12, 24))
    monkeypatch.setitem(tasks.TASKS, "tiny", tasks.Task("tiny", "accuracy", load, epochs=4, batch_size=8))
    rows = cell.measure(Cell("tiny", method, 0.7, 0, 2e-3), 1, None, untrained=True)
    assert [row.phase for row in rows] == ["untrained", "trained"]
    assert rows[-1].value > 0.8  # a guess is right a third of the time
    assert rows[-1].folded <= rows[-1].stored

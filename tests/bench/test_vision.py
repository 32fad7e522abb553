"""The vision task, without a network: loaders, splits, a tiny ViT."""

import copy
import gzip
import json

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import jactus
from bench import baselines, training, vision
from jactus_kernels import JactusError
from tests.models import SMALL


def pictures(rows, seed=0):
    """Noise, with a bright band at the height that the label says."""
    g = np.random.default_rng(seed)
    labels = np.arange(rows, dtype=np.uint8) % 10
    pixels = g.integers(0, 64, (rows, 28, 28), dtype=np.uint8)
    for image, label in zip(pixels, labels):
        image[2 * label + 2 : 2 * label + 5] += 150
    return pixels, labels


def write_idx(folder, part, pixels, labels, compress=True):
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        content = header + array.tobytes()
        name = f"{part}-{kind}-ubyte"
        (folder / (f"{name}.gz" if compress else name)).write_bytes(gzip.compress(content) if compress else content)


def write_json(folder, pixels, labels):
    """As the npm package has them: one file a digit, greys k / 255 in three decimals."""
    for digit in range(10):
        values = (pixels[labels == digit] / 255).round(3).reshape(-1).tolist()
        (folder / f"{digit}.json").write_text(json.dumps({"data": values}))


def keys(images):
    return {image.numpy().tobytes() for image in images.pixels}


def tiny_vit():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=10,
    )
    return ViTForImageClassification(config).eval()


def tiny_images(rows=97, seed=0):
    pixels, labels = pictures(rows, seed)
    return training.Images(torch.from_numpy(pixels).unsqueeze(1), labels.tolist())


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
def test_fashion_keeps_its_standard_split_less_repeated_images(tmp_path, compress, below):
    pixels, labels = pictures(60)
    write_idx(tmp_path / below, "train", pixels[:45], labels[:45], compress)
    write_idx(tmp_path / below, "t10k", np.concatenate([pixels[40:], pixels[50:]]), np.tile(labels, 2)[:30], compress)
    task = vision.fashion_mnist(tmp_path, validation=10)
    assert (len(task.train), len(task.validation), len(task.test)) == (30, 10, 20)
    assert np.array_equal(task.test.pixels[:, 0].numpy(), pixels[40:])
    assert task.labels[9] == "Boot"
    assert not keys(task.train) & keys(task.validation)
    assert not keys(task.test) & (keys(task.train) | keys(task.validation))


def test_digits_come_back_whole_from_both_formats(tmp_path):
    pixels, labels = pictures(60)
    pixels[:, 0].flat = np.arange(60 * 28) % 256  # every grey survives three decimals
    label_of = {image.tobytes(): int(label) for image, label in zip(pixels, labels)}
    (tmp_path / "json").mkdir()
    write_json(tmp_path / "json", pixels, labels)
    write_idx(tmp_path / "idx/MNIST/raw", "train", pixels[:50], labels[:50])
    write_idx(tmp_path / "idx/MNIST/raw", "t10k", pixels[50:], labels[50:])
    for path in (tmp_path / "json", tmp_path / "idx"):
        task = vision.mnist_digits(path, sizes=(30, 10, 20))
        splits = (task.train, task.validation, task.test)
        assert [len(split) for split in splits] == [30, 10, 20]
        assert set().union(*map(keys, splits)) == set(label_of)  # 60 in all: none is in two
        for split in splits:
            assert split.labels == [label_of[image.numpy().tobytes()] for image in split.pixels]
    again, other = (vision.mnist_digits(tmp_path / "json", seed, (30, 10, 20)) for seed in (0, 1))
    same = vision.mnist_digits(tmp_path / "json", 0, (30, 10, 20))
    assert torch.equal(again.train.pixels, same.train.pixels)
    assert not torch.equal(again.train.pixels, other.train.pixels)


def test_bad_image_files_are_refused_by_name(tmp_path):
    pixels, labels = pictures(20)
    write_json(tmp_path, pixels, labels)
    with pytest.raises(JactusError, match=r"20 different examples cannot fill splits of \(30, 10, 20\)"):
        vision.mnist_digits(tmp_path, sizes=(30, 10, 20))
    (tmp_path / "7.json").write_text('{"data": [0, 1, 0.5]}')
    with pytest.raises(JactusError, match=r"7\.json: holds values of shape \(3,\)"):
        vision.mnist_digits(tmp_path)
    (tmp_path / "7.json").write_text("{}")
    with pytest.raises(JactusError, match=r"7\.json: cannot be read.*KeyError"):
        vision.mnist_digits(tmp_path)

    folder = tmp_path / "idx"
    write_idx(folder, "t10k", pixels, labels)
    with pytest.raises(JactusError, match=r"neither train-images-idx3-ubyte\.gz nor"):
        vision.fashion_mnist(folder)
    write_idx(folder, "train", pixels, labels[:-1])
    with pytest.raises(JactusError, match=r"train images are \(20, 28, 28\) and the labels \(19,\)"):
        vision.fashion_mnist(folder)
    file = folder / "train-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    for content, why in ((whole[:-12], "unpacked"), (gzip.compress(gzip.decompress(whole)[:-1]), "whole idx file")):
        file.write_bytes(content)
        with pytest.raises(JactusError, match=rf"train-labels-idx1-ubyte\.gz.* {why}"):
            vision.fashion_mnist(folder)


def test_batches_of_images_hold_every_image_once():
    images = tiny_images()
    for seed in (None, 0):
        cut = training.batches(images, 8, seed)
        assert sorted(i for chosen in cut.order for i in chosen) == list(range(97))
        for chosen, batch in zip(cut.order, cut):
            assert batch["labels"].tolist() == [images.labels[i] for i in chosen]
            # float32 of a byte, twice: one rounding each way
            torch.testing.assert_close((batch["pixel_values"] + 1) * 127.5, images.pixels[chosen].float())
    assert training.batches(images, 8, 0).order != training.batches(images, 8, 1).order
    part = images[10:30]
    assert (len(part), part.labels) == (20, images.labels[10:30])
    assert torch.equal(part.pixels, images.pixels[10:30])


def test_a_vit_learns_and_is_measured_on_images():
    images, model = tiny_images(512), baselines.full_fine_tuning(tiny_vit())
    before = training.accuracy(model, images)
    training.train(model, images, lr=1e-2, epochs=4, batch_size=16, progress=False)
    found = training.logits(model, images, batch_size=100)
    alone = torch.cat([model(images.batch([i])["pixel_values"]).logits for i in range(16)])
    # float32 sums in other batch sizes: some ε per layer
    torch.testing.assert_close(found[:16], alone.detach(), rtol=1e-4, atol=1e-5)
    assert (
        training.share_right(found, torch.tensor(images.labels)) == training.accuracy(model, images, 100) > 0.9 > before
    )
    assert 0 < training.latency(model, images.batch(range(8)), repeats=3) < 10


def test_the_method_runs_on_images_from_head_to_fold():
    images, model = tiny_images(128), tiny_vit()
    jactus.fit_head(model, training.batches(images, 32), progress=False)
    statistics = jactus.calibrate(model, training.batches(images, 32, seed=0), SMALL, progress=False)
    small = jactus.compress(copy.deepcopy(model), jactus.plan(model, statistics, SMALL, progress=False).at(0.8))
    training.train(small, images, lr=1e-2, epochs=2, batch_size=16, progress=False)
    expected = training.logits(small, images)
    folded = jactus.fold(small)
    assert jactus.size(folded).stored < jactus.size(model).stored
    # two factors instead of three in float32: some ε per layer
    torch.testing.assert_close(training.logits(folded, images), expected, rtol=1e-3, atol=1e-4)


def test_the_vit_is_pretrained_once_and_leaves_the_generator_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JACTUS_CACHE", str(tmp_path / "cache"))
    for setting, small in (("WIDTH", 64), ("LAYERS", 1), ("EPOCHS", 1)):
        monkeypatch.setattr(vision, setting, small)
    write_idx(tmp_path / "data", "train", *pictures(1100))
    write_idx(tmp_path / "data", "t10k", *pictures(50, seed=1))
    torch.manual_seed(3)
    first = vision.fashion_vit(4, data=tmp_path / "data")
    assert "test accuracy" in capsys.readouterr().err
    torch.manual_seed(3)
    second = vision.fashion_vit(4)
    assert "pretrain" not in capsys.readouterr().err
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    batch = {**tiny_images(8).batch(range(8)), "labels": torch.arange(8) % 4}
    assert first(**batch).logits.shape == (8, 4)
    assert first(**batch).loss.item() > 0
    own = vision.fashion_vit(source=next((tmp_path / "cache").glob("*epochs")))
    assert own.config.id2label[9] == "Boot"
    assert not own.training
    assert torch.equal(own.vit.embeddings.cls_token, first.vit.embeddings.cls_token)

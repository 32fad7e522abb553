"""Models whose weights accelerate keeps on the disk or the CPU: the result is that of the model in memory."""

import functools
from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch.multiprocessing.reductions import StorageWeakRef

import jactus
from jactus import JactusError
from jactus.model.offload import light_graph
from tests.models import BERT, BY_NAME, GPT2, LLAMA, SMALL
from tests.test_resume import interrupted
from tests.unchanged import state

SEEN = SMALL.replace(union_share=0.0, trainable_extras=())


def on_disk(model, folder):
    disk_offload(model, folder / "weights", execution_device=torch.device("cpu"))
    return model


def in_part(model, folder):
    """The first block in memory, all else on the disk, as `from_pretrained(device_map=…)` has it."""
    blocks = [name for name, _ in model.named_children() if not hasattr(getattr(model, name), "layers")]
    devices = {**dict.fromkeys(blocks, "disk"), **{f"model.{n}": "disk" for n, _ in model.model.named_children()}}
    devices.pop("model.layers")
    devices |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    return dispatch_model(model, devices, main_device="cpu", offload_dir=folder / "weights", force_hooks=True)


def on_cpu(model, folder):
    return cpu_offload(model, torch.device("cpu"))


@functools.cache
def adapted(name):
    """In memory."""
    return jactus.adapt(BY_NAME[name].model(), BY_NAME[name].batches(), 0.6, SEEN, verify=False, progress=False)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family, way, options",
    [
        (LLAMA, on_disk, {"memory_limit": 5_000, "verify": False}),
        (LLAMA, in_part, {}),
        (LLAMA, on_cpu, {"verify": False}),
        (GPT2, on_disk, {"verify": False}),
    ],
)
def test_an_offloaded_model_is_adapted_folded_and_saved_as_one_in_memory(family, way, options, tmp_path):
    wanted, model, batch = adapted(family.name), way(family.model(), tmp_path), family.batch()
    assert any(p.is_meta for p in model.parameters())
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        jactus.adapt(
            model,
            interrupted(family.batches(), 2),
            0.6,
            SEEN,
            resume=tmp_path / "run",
            resume_every=0,
            progress=False,
            **options,
        )
    assert_unchanged(before, state(model))
    jactus.adapt(model, family.batches(), 0.6, SEEN, resume=tmp_path / "run", progress=False, **options)
    theirs = jactus.model.lowrank.core_layers(wanted)
    layers = jactus.model.lowrank.core_layers(model)
    assert layers.keys() == theirs.keys()
    for name, layer in layers.items():
        assert_close(dict(layer.named_parameters()), dict(theirs[name].named_parameters()))
    assert_close(model(**batch).logits, wanted(**batch).logits)
    jactus.fold(model)
    jactus.save_pretrained(model, tmp_path / "saved")
    again = family.auto.from_pretrained(tmp_path / "saved")
    assert not any(p.is_meta for p in again.parameters())
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def assert_unchanged(before, after):
    """As `assert_same`, where weights are: accelerate puts a new `meta` in the place of the old at every call."""
    assert before[1] == after[1]
    for name, (_, requires, _, value) in before[2].items():
        assert after[2][name][1] == requires
        assert value.is_meta == after[2][name][3].is_meta


def test_autograd_keeps_no_offloaded_weight_and_gives_the_same_gradients(tmp_path, monkeypatch):
    linear, used = torch.nn.functional.linear, []

    def noted(x, weight, bias=None):
        used.append(StorageWeakRef(weight.untyped_storage()))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    model = on_disk(LLAMA.model().requires_grad_(False), tmp_path)
    gradients, held = [], []
    for graph in (nullcontext(), light_graph(model)):
        x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with graph:
            loss = model(inputs_embeds=x, labels=torch.ones(1, 5, dtype=torch.long)).loss
        held.append(sum(not storage.expired() for storage in used))
        gradients += torch.autograd.grad(loss, x)
        used.clear()
    assert held == [15, 0]  # seven layers a block, and the output embedding
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_head_that_is_to_train_and_is_offloaded_is_refused_by_name(tmp_path):
    model = on_disk(BERT.model(), tmp_path)
    before = state(model)
    with pytest.raises(JactusError, match=r"classifier\.weight \(3, 16\) is to train .*offloaded.*device_map"):
        jactus.adapt(model, BERT.batches(), 0.6, SEEN.replace(trainable_extras=("head",)), progress=False)
    with pytest.raises(JactusError, match=r"classifier\.weight .*offloaded"):
        jactus.fit_head(model, BERT.batches(), progress=False)
    assert_unchanged(before, state(model))

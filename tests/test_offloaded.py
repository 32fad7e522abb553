"""Models whose weights accelerate keeps on the disk or the CPU: the result is that of the model in memory."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

import jactus
from jactus import JactusError
from jactus.model.offload import light_graph
from tests.models import BERT, GPT2, LLAMA, SMALL
from tests.unchanged import assert_same, state

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


WAYS = {"disk": on_disk, "part": in_part, "cpu": on_cpu}


def meta(model):
    return [name for name, p in model.named_parameters() if p.is_meta]


@pytest.mark.parametrize("limit", [None, 5_000], ids=["at once", "by part"])
@pytest.mark.parametrize("family, way", [(LLAMA, "disk"), (LLAMA, "part"), (LLAMA, "cpu"), (GPT2, "disk")])
def test_an_offloaded_model_is_adapted_folded_and_saved_as_one_in_memory(family, way, limit, tmp_path):
    if family is GPT2 and limit:
        limit = 25_000
    options = {"memory_limit": limit, "progress": False}
    wanted = jactus.adapt(family.model(), family.batches(), 0.6, SEEN, **options)
    model = WAYS[way](family.model(), tmp_path)
    assert meta(model)
    jactus.adapt(model, family.batches(), 0.6, SEEN, **options)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, jactus.CoreLinear)}
    theirs = dict(wanted.named_parameters())
    assert len(layers) == sum(isinstance(m, jactus.CoreLinear) for m in wanted.modules())
    for name, layer in layers.items():
        for key, p in layer.named_parameters():
            torch.testing.assert_close(p, theirs[f"{name}.{key}"], rtol=1e-4, atol=1e-4, msg=f"{name}.{key}")
    batch = family.batch()
    torch.testing.assert_close(model(**batch).logits, wanted(**batch).logits, rtol=1e-4, atol=1e-4)
    jactus.fold(model)
    jactus.save_pretrained(model, tmp_path / "saved")
    again = family.auto.from_pretrained(tmp_path / "saved")
    assert not meta(again)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)

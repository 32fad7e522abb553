"""A compressed model under DeepSpeed's ZeRO-3, which no other test needs and which takes a while to import."""

import os

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import jactus
from jactus import JactusError
from tests.models import BERT, EVERY, LLAMA, compressed
from tests.ranks import together
from tests.test_distributed_training import alone, batches, fresh

pytestmark = pytest.mark.slow
SETTINGS = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 1e9,  # it clips at 1 unless it is told
}


def _spread(model):
    import deepspeed

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3, momentum=0.9)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)[0]


def _trained(rank, folder, whole):
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun does
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = fresh()
    engine = _spread(model)
    for batch in batches(rank, dist.get_world_size()):
        engine.backward(engine(**batch).loss)
        engine.step()
    empty = sum(p.numel() == 0 for p in model.parameters())
    refused = {}
    for name, call in {"fold": jactus.fold, "save_cores": lambda m: jactus.save_cores(m, f"{folder}/cores")}.items():
        try:
            call(model.eval())
        except JactusError as e:
            refused[name] = str(e)
    assert jactus.size(model) == whole
    refused["export"] = jactus.can_export(model, "torch").reason
    jactus.save_pretrained(model, f"{folder}/saved")
    tied = compressed(LLAMA, EVERY)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    _spread(tied)
    jactus.save_pretrained(tied, f"{folder}/tied")
    return empty, refused


def test_training_under_zero3_is_that_of_one_process_and_saves_the_whole_model(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for empty, refused in together(_trained, 2, tmp_path, str(tmp_path), jactus.size(fresh()), timeout=300):
        assert empty > 20, "its parameters were spread"
        assert refused.keys() == {"fold", "save_cores", "export"}
        assert all("spread over processes" in said for said in refused.values())
    gradients, state = alone(EVERY)
    saved = BERT.auto.from_pretrained(tmp_path / "saved").state_dict()
    before = fresh().state_dict()
    assert saved.keys() == state.keys()
    for name, t in state.items():
        assert torch.allclose(saved[name], t, rtol=1e-4, atol=1e-5), name
        assert name in gradients or torch.equal(saved[name], before[name]), f"{name} is frozen"
    assert max(float((state[name] - before[name]).abs().max()) for name in gradients) > 1e-2
    right = compressed(LLAMA, EVERY).state_dict()
    again = LLAMA.auto.from_pretrained(tmp_path / "tied").state_dict()
    assert again.keys() == right.keys()
    assert all(torch.equal(again[name], t) for name, t in right.items())
    kept = load_file(tmp_path / "tied/model.safetensors")
    assert ("lm_head.weight" in kept) + ("model.embed_tokens.weight" in kept) == 1, "a tied weight is written once"

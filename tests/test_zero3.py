"""A compressed model under DeepSpeed's ZeRO-3, which no other test needs and which takes a while to import."""

import os

import pytest
import torch
import torch.distributed as dist

import jactus
from jactus import JactusError
from tests.models import BERT, EVERY
from tests.ranks import together
from tests.test_distributed_training import alone, batches, fresh

pytestmark = pytest.mark.slow
SETTINGS = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 1e9,  # it clips at 1 unless it is told
}


def _trained(rank, folder):
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun does
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = fresh()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)
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
    jactus.save_pretrained(model, f"{folder}/saved")
    return empty, refused


def test_training_under_zero3_is_that_of_one_process_and_saves_the_whole_model(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for empty, refused in together(_trained, 2, tmp_path, str(tmp_path), timeout=300):
        assert empty > 20, "its parameters were spread"
        assert refused.keys() == {"fold", "save_cores"}
        assert all("ZeRO-3" in said for said in refused.values())
    gradients, state = alone(EVERY)
    saved = BERT.auto.from_pretrained(tmp_path / "saved").state_dict()
    before = fresh().state_dict()
    assert saved.keys() == state.keys()
    for name, t in state.items():
        assert torch.allclose(saved[name], t, rtol=1e-4, atol=1e-5), name
        assert name in gradients or torch.equal(saved[name], before[name]), f"{name} is frozen"
    assert max(float((state[name] - before[name]).abs().max()) for name in gradients) > 1e-2

"""On a GPU only: the whole method there gives what it gives on the CPU, and a model made on one runs on the other."""

import pytest
import torch

import jactus
from jactus.model.lowrank import compressed_layers
from jactus_kernels import use
from tests.models import BERT, EVERY, FAMILIES, FULL, LLAMA, WIDE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
configs = pytest.mark.parametrize("config", [EVERY, WIDE, FULL], ids=["square", "wide", "full rank"])


def relative(found, right):
    found, right = found.detach().double().cpu(), right.detach().double().cpu()
    return ((found - right).norm() / right.norm()).item()


def on_gpu(batch):
    return {name: value.cuda() for name, value in batch.items()}


def made(family, config, device, dtype=torch.float32, **options):
    """Statistics, plan and compressed model, every step on `device`."""
    model = family.model(dtype=dtype).to(device)
    statistics = jactus.calibrate(model, family.batches(), config, progress=False, **options)
    plan = jactus.plan(model, statistics, config, progress=False)
    return statistics, plan, jactus.compress(model, plan)


@BACKENDS
@families
@configs
def test_every_step_agrees_with_the_cpu(backend, family, config):
    here = made(family, config, "cpu")
    with use(backend=backend):
        there = made(family, config, "cuda")
        assert all(p.is_cuda for p in there[2].parameters())
        for name in here[0].layers:
            # float32 sums over a few dozen tokens, of activations that were rounded on the way
            assert relative(there[0].input_covariance(name), here[0].input_covariance(name)) < 1e-5
            assert relative(there[0].output_covariance(name), here[0].output_covariance(name)) < 1e-4
        for name, layer in here[1].layers.items():
            assert relative(there[1].layers[name].energies, layer.energies) < 1e-3
        # Signs and turns of singular vectors are free, so what is compared is what the layers compute.
        plan = here[1]
        same = jactus.compress(family.model().cuda(), plan)
        batch = family.batch(seed=9)
        cpu, gpu = here[2](**batch), same(**on_gpu(batch))
        assert relative(gpu.logits, cpu.logits) < 1e-4
        cpu.loss.backward(), gpu.loss.backward()
        for name, layer in compressed_layers(here[2]).items():
            assert relative(same.get_submodule(name).core.grad, layer.core.grad) < 1e-3
        folded = jactus.fold(same.eval())
        with torch.no_grad():
            assert relative(folded(**on_gpu(batch)).logits, cpu.logits) < 1e-4


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_and_autocast_train(backend, dtype):
    with use(backend=backend):
        _, _, model = made(LLAMA, EVERY, "cuda")
        batch = on_gpu(LLAMA.batch(seed=9))
        full = model(**batch).loss
        with torch.autocast("cuda", dtype):
            loss = model(**batch).loss
        loss.backward()
        assert relative(loss, full) < 0.02
        assert all(layer.core.grad.isfinite().all() for layer in compressed_layers(model).values())
        _, _, narrow = made(LLAMA, EVERY, "cuda", torch.bfloat16)
        assert all(p.dtype == torch.bfloat16 for p in narrow.parameters() if not p.requires_grad)
        assert all(layer.core.dtype == torch.float32 for layer in compressed_layers(narrow).values())
        assert relative(narrow(**batch).loss, full) < 0.1


def test_sums_can_be_kept_on_the_cpu():
    statistics, _, _ = made(BERT, EVERY, "cuda", statistics_device="cpu")
    beside, _, _ = made(BERT, EVERY, "cuda")
    for name in statistics.layers:
        found = statistics.input_covariance(name)
        assert not found.is_cuda
        assert relative(found, beside.input_covariance(name)) < 1e-5


def test_a_budget_of_time_is_measured_on_the_gpu():
    model = LLAMA.model().cuda()
    statistics = jactus.calibrate(model, LLAMA.batches(), EVERY, progress=False)
    config = EVERY.replace(budget_unit="latency", budget=1.0)
    plan = jactus.plan(model, statistics, config, progress=False)
    assert plan.predicted_time > 0


@BACKENDS
def test_saved_on_the_gpu_and_loaded_on_the_cpu(backend, tmp_path):
    with use(backend=backend):
        _, _, model = made(BERT, EVERY, "cuda")
        jactus.save_pretrained(model, tmp_path)
        loaded = BERT.auto.from_pretrained(tmp_path).eval()
        batch = BERT.batch(seed=9)
        with torch.no_grad():
            assert relative(model(**on_gpu(batch)).logits, loaded(**batch).logits) < 1e-4


def test_the_model_compiles():
    _, _, model = made(BERT, EVERY, "cuda")
    batch = on_gpu(BERT.batch(seed=9))
    with torch.no_grad():
        right = model(**batch).logits
        assert relative(torch.compile(model)(**batch).logits, right) < 1e-4

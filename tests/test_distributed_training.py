"""A compressed model trained in several processes, under DDP, FSDP2 and FSDP1, is the one that a single process trains."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import jactus
from jactus import JactusError
from jactus.model.lowrank import core_layers
from jactus.model.sharded import whole_state
from tests.models import BERT, EVERY, compressed
from tests.ranks import together

HALF = EVERY.replace(trainable_extras=("head",))
BLOCK = EVERY.replace(trainable_rank=2)


def fresh(config=EVERY, dtype=torch.float32):
    model = compressed(BERT, config, dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batches(rank=0, ranks=1):
    return [{k: v[rank::ranks] for k, v in batch.items()} for batch in BERT.batches(3, rows=8)]


def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def trained(model, shard):
    """Gradients of the first step, by name; the model has made all."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3, momentum=0.9)
    first = {}
    for batch in shard:
        model(**batch).loss.backward()
        first = first or {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return first


def sharded(model, by_layer=False, **options):
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in core_layers(model).values() if by_layer else ():
        fully_shard(layer, mesh=mesh, **options)
    for block in model.bert.encoder.layer:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _trained(rank, folder):
    shard = batches(rank, dist.get_world_size())
    found = {}
    for how, config in (("DDP", EVERY), ("FSDP1", EVERY), ("FSDP2", EVERY), ("FSDP2, each layer", BLOCK)):
        model = fresh(config)
        if how == "DDP":
            wrapped = nn.parallel.DistributedDataParallel(model)
        elif how == "FSDP1":
            policy = ModuleWrapPolicy({type(model.bert.encoder.layer[0])})
            cpu = torch.device("cpu")
            wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
        else:
            wrapped = sharded(model, how.endswith("layer"))
        gradients = trained(wrapped, shard)
        if how == "FSDP1":  # of which each rank has a flat part
            gradients = {}
            with FullyShardedDataParallel.summon_full_params(wrapped):
                state = {name: whole(t) for name, t in model.state_dict().items()}
        else:
            state = whole_state(wrapped)
        found[how] = gradients, state
        if how.startswith("FSDP2"):
            jactus.save_pretrained(model, f"{folder}/{how}")
    checkpoint.save(get_model_state_dict(model), checkpoint_id=f"{folder}/parts")
    return found


@functools.cache
def alone(config):
    model = fresh(config)
    return trained(model, batches()), model.state_dict()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, together(_trained, 2, folder, str(folder))[0]


@pytest.mark.parametrize("how", ["DDP", "FSDP1", "FSDP2", "FSDP2, each layer"])
def test_gradients_and_what_is_trained_are_those_of_one_process(how, found):
    right, state = alone(BLOCK if how == "FSDP2, each layer" else EVERY)
    before = fresh(BLOCK if how == "FSDP2, each layer" else EVERY).state_dict()
    gradients, trained_state = found[1][how]
    size = max(float(g.abs().max()) for g in right.values())
    if gradients:
        assert {name.removeprefix("module.") for name in gradients} == right.keys()
        for name, g in gradients.items():
            assert torch.allclose(g, right[name.removeprefix("module.")], rtol=1e-4, atol=1e-5 * size), name
    assert trained_state.keys() == state.keys()
    for name, t in state.items():
        assert torch.allclose(trained_state[name], t, rtol=1e-4, atol=1e-5), name
        assert name in right or torch.equal(trained_state[name], before[name]), f"{name} is frozen"
    moved = max(float((state[name] - before[name]).abs().max()) for name in right)
    assert moved > 1e-2, "what is compared was trained"


@pytest.mark.parametrize("how", ["FSDP2", "FSDP2, each layer"])
def test_what_is_saved_under_fsdp2_reloads_whole(how, found):
    folder, states = found
    again = BERT.auto.from_pretrained(folder / how)
    state = again.state_dict()
    assert state.keys() == states[how][1].keys()
    assert all(torch.equal(t, states[how][1][name]) for name, t in state.items())
    assert again.config.architectures == ["BertForSequenceClassification"]
    jactus.fold(again.eval())


def _later(rank, folder):
    """A distributed checkpoint goes into another model under FSDP2; what needs whole parameters is refused there."""
    model = sharded(fresh(BLOCK))
    state = get_model_state_dict(model)
    checkpoint.load(state, checkpoint_id=f"{folder}/parts")
    set_model_state_dict(model, state)
    refused = {}
    for step, call in {
        "fold": lambda: jactus.fold(model.eval()),
        "merge": lambda: jactus.merge(model),
        "save_cores": lambda: jactus.save_cores(model, f"{folder}/cores"),
        "calibrate": lambda: jactus.calibrate(sharded(BERT.model()), BERT.batches(1), progress=False),
    }.items():
        with pytest.raises(JactusError) as e:
            call()
        refused[step] = str(e.value)
    half = sharded(fresh(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    loss = float(half(**BERT.batch(rows=8)).loss.detach())
    # cores in float32 and a head in bfloat16: of what trains in one group torch wants one dtype
    gradients = trained(sharded(fresh(HALF, torch.bfloat16), by_layer=True), batches(rank, 2)[:1])
    return whole_state(model), refused, loss, gradients


def test_a_distributed_checkpoint_reloads_and_what_needs_whole_parameters_is_refused(found, later):
    state, refused, _, _ = later
    assert all(torch.equal(t, found[1]["FSDP2, each layer"][1][name]) for name, t in state.items())
    assert all("spread over processes" in message for message in refused.values())


def test_bfloat16_under_fsdp2(later):
    _, _, loss, gradients = later
    assert abs(loss - float(fresh()(**BERT.batch(rows=8)).loss.detach())) < 0.05, "bfloat16 rounds to 2⁻⁸"
    right = trained(fresh(HALF, torch.bfloat16), batches()[:1])
    assert {g.dtype for g in gradients.values()} == {torch.float32, torch.bfloat16}
    errors = sum(float((gradients[name] - g).double().square().sum()) for name, g in right.items())
    assert errors < 0.03**2 * sum(float(g.double().square().sum()) for g in right.values()), "a few roundings of 2⁻⁸"


@pytest.fixture(scope="module")
def later(found, tmp_path_factory):
    return together(_later, 2, tmp_path_factory.mktemp("later"), str(found[0]))[0]

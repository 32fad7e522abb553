"""The models whose cost is measured, as the methods make them ready, and batches for them of any size."""

import copy
import functools
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import jactus
from jactus.model.targets import find_targets
from jactus.planning.latency import measured
from jactus.planning.plans import Plan, PlannedLayer
from jactus.planning.subspace import Directions, Side

from ..accuracy.peers import METHODS, Context
from ..accuracy.tasks import TASKS, calibrated, prepared

Batch = dict[str, Tensor]
REAL = {"minilm": "sarcasm", "smollm2": "wikipedia"}  # calibrated on that task
SHAPED = ("vit-b", "llama-7b")  # random weights: the times do not depend on them
MODELS = (*REAL, *SHAPED)
UNIFORM = jactus.JactusConfig().replace(allocation="uniform", metric="identity", union=("weight",))


def dense(name: str) -> nn.Module:
    """The model as its makers left it, float32, in evaluation mode; vit-b has two of its blocks, llama-7b one."""
    torch.manual_seed(0)
    if name in REAL:
        return prepared(TASKS[REAL[name]], "fitted", 0).model
    if name == "vit-b":
        return ViTForImageClassification(ViTConfig(num_hidden_layers=2, num_labels=10)).eval()
    config = LlamaConfig(
        vocab_size=512, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32
    )
    return LlamaForCausalLM(config).eval()


def ready(name: str, method: str, budget: float = 1.0) -> nn.Module:
    """The model made ready to train: 'jactus' at a budget, or a method of bench.accuracy at its whole size."""
    if method == "jactus":
        return copy.deepcopy(_compressed(name, budget))
    return METHODS[method](dense(name), Context(None, []), budget)


@functools.cache
def _compressed(name: str, budget: float) -> nn.Module:
    return jactus.compress(dense(name), planned(name).at(budget))


@functools.cache
def planned(name: str) -> Plan:
    """With the package's defaults: of calibrated statistics for the real models, of random spectra for the shaped."""
    model = dense(name)
    if name in SHAPED:
        return random_plan(model)
    task = TASKS[REAL[name]]
    statistics = calibrated(task, prepared(task, "fitted", 0), task.calibration, 0, "fitted", None)
    return jactus.plan(model, statistics, jactus.JactusConfig(), progress=False)


def timed(name: str, dtype: str, device: str) -> Plan:
    """The same spectra with budgets of time: what decoding takes on these threads with weights of `dtype`, measured now."""
    plan = planned(name)
    config = plan.config.replace(budget_unit="latency")
    model = dense(name).to(device, getattr(torch, dtype))
    times = measured(find_targets(model, config), config)
    return replace(plan, config=config, layers={n: replace(layer, times=times[n]) for n, layer in plan.layers.items()})


def random_plan(model: nn.Module) -> Plan:
    """A plan of uniform ranks whose factors are random: right in shape, made without factoring anything."""
    layers = {}
    generator = torch.Generator().manual_seed(0)
    for name, t in find_targets(model, UNIFORM).items():
        most = min(t.m, t.n)
        sides = [torch.randn(d, most, generator=generator) / d**0.5 for d in (t.m, t.n)]
        empty = [Side(side, side[:, :0], side.new_zeros(most, 0), side.new_zeros(0, 0)) for side in sides]
        sigma = torch.linspace(1, 0.5, min(t.m, t.n), dtype=torch.float64)
        found = Directions(*empty, sigma, sigma.new_zeros(0, 0))
        layers[name] = PlannedLayer(name, t.m, t.n, t.fingerprint, found, 1, (4, 4, 4))
    others = sum(p.numel() for p in model.parameters()) - sum(p.m * p.n for p in layers.values())
    return Plan(layers, UNIFORM, dict.fromkeys(layers), others).at(0.8)


def folded(model: nn.Module) -> nn.Module:
    """A folded copy."""
    return jactus.fold(copy.deepcopy(model).eval())


def batch(name: str, rows: int, length: int, device: str = "cpu") -> Batch:
    """Random examples of `length` tokens each (197 patches whatever is asked, for vit-b), with labels."""
    generator = torch.Generator().manual_seed(0)

    def drawn(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    if name == "vit-b":
        found = {"pixel_values": torch.randn(rows, 3, 224, 224, generator=generator), "labels": drawn(10, rows)}
    else:
        ids = drawn(500, rows, length)
        labels = drawn(2, rows) if name == "minilm" else ids
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: value.to(device) for key, value in found.items()}


def unlabelled(examples: Batch) -> Batch:
    """For a forward pass alone."""
    return {key: value for key, value in examples.items() if key != "labels"}

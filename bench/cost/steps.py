"""A training step, and the memory it takes: JACTUS against PEFT's LoRA and DoRA, and full fine-tuning."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import memory, runner
from ..report import versions
from . import checks, flops, subjects
from .race import captured, race, ratio
from .store import Memory, Row, Setting, compared

BUDGETS = (0.8, 0.5)
PEERS = ("lora", "full", "dora")
LEARNING_RATE = 1e-6  # times do not depend on it, and nothing diverges

BASIC = (Setting("minilm", rows=32, length=32), Setting("vit-b", rows=4, length=197),
         Setting("smollm2", rows=2, length=128), Setting("llama-7b", rows=2, length=128))  # fmt: skip
SETTINGS = (
    *(replace(s, threads=2) for s in BASIC),
    *(replace(s, threads=2, dtype="bfloat16") for s in BASIC),
    *(replace(s, threads=1) for s in BASIC[:2]),
    replace(BASIC[1], threads=2, rows=64),  # 12,608 tokens, as a vision transformer is trained
    *(replace(BASIC[0], threads=2, rows=rows, length=length) for rows, length in ((8, 32), (8, 128), (32, 128))),
)
# A GPU is filled by thousands of tokens; the smaller batches show what launching costs.
ON_GPU = (
    Setting("vit-b", "bfloat16", 1, 64, 197),
    Setting("vit-b", "float32", 1, 64, 197),
    Setting("vit-b", "bfloat16", 1, 4, 197),
    Setting("llama-7b", "bfloat16", 1, 4, 2048),
    Setting("minilm", "bfloat16", 1, 32, 32),
)


def training(settings: tuple[Setting, ...] = SETTINGS) -> Iterator[Row]:
    """Forward, backward and AdamW; on a GPU eagerly and as one CUDA graph, whose replay does not wait for the host."""
    for at in settings:
        torch.set_num_threads(at.threads)
        batch = subjects.batch(at.model, at.rows, at.length, at.device)
        ours = {f"jactus {b:.0%}": subjects.ready(at.model, "jactus", b).to(at.device) for b in BUDGETS}
        models = {**ours, **{peer: subjects.ready(at.model, peer).to(at.device) for peer in PEERS}}
        errors = {name: checks.layers(model, at.dtype) for name, model in ours.items()}
        work = {name: flops.training(model, batch) for name, model in models.items()}
        runs = {name: step(model, batch, at) for name, model in models.items()}
        measures = {"training step": runs}
        if at.device == "cuda":
            measures["training step, captured"] = {name: captured(run) for name, run in runs.items()}
        for measure, contenders in measures.items():
            times = race(contenders, device=at.device)
            for budget, name in zip(BUDGETS, ours):
                for peer in PEERS:
                    floor = None if peer == "dora" else work[name] / work[peer]  # DoRA's norms are not linear layers
                    found = ratio(times[name], times[peer])
                    yield compared(measure, at, budget, peer, found, floor, errors[name], versions())


def step(model: nn.Module, batch: dict[str, Tensor], at: Setting) -> Callable[[], Any]:
    """One training step of it, as a function."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    on_gpu = at.device == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True, capturable=on_gpu)

    def run() -> None:
        with at.autocast():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


MEMORY_SETTINGS = tuple(replace(s, threads=2) for s in (*BASIC, replace(BASIC[0], length=128)))


def memory_rows(settings: tuple[Setting, ...] = MEMORY_SETTINGS) -> Iterator[Memory]:
    """Each method in a process of its own, which is the only way to know its peak."""
    for at in settings:
        for method, budget in (*(("jactus", b) for b in BUDGETS), *((peer, 1.0) for peer in PEERS)):
            yield runner.alone(measure_memory, at, method, budget).result()


def measure_memory(at: Setting, method: str, budget: float) -> Memory:
    """Of this process: call it in a fresh one."""
    torch.set_num_threads(at.threads)
    subjects.planned(at.model)  # for every method alike: libraries loaded, thread pools made
    memory.forget_peak(at.device)
    before = memory.used(at.device)
    model = subjects.ready(at.model, method, budget).to(at.device)
    batch = subjects.batch(at.model, at.rows, at.length, at.device)
    run = step(model, batch, at)
    run()  # the optimizer's state is there from now on
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    activations = saved_bytes(model, batch, at)
    memory.forget_peak(at.device)
    run()
    run()
    after = memory.peak(at.device)
    peak = None if after is None or before is None else after - before
    return Memory(
        at.model, at.dtype, at.rows, at.length, method, budget, weights, gradients, 2 * gradients, activations, peak,
        at.device, versions(),
    )  # fmt: skip


def saved_bytes(model: nn.Module, batch: dict[str, Tensor], at: Setting) -> int:
    """Bytes that the forward keeps for the backward, each storage once, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with at.autocast():
            loss = model(**batch).loss
        total = sum(kept.values())  # while the graph lives, no storage is counted twice under one address
    del loss
    return total

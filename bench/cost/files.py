"""Importing, saving and loading, against the least that anyone must do for the same."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import jactus
from jactus_kernels import JactusError

from ..report import versions
from . import subjects
from .race import race, ratio
from .store import Row, Setting, compared

Tensors = dict[str, torch.Tensor]


def imports() -> Iterator[Row]:
    """A fresh interpreter that imports jactus, against one that imports what a user of it has imported anyway."""

    def fresh(what: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {what}"], check=True)

    bare = "torch, transformers"
    model = "torch; from transformers import AutoModelForCausalLM, Trainer"
    times = race({"jactus": fresh("jactus"), bare: fresh(bare), model: fresh(model)}, rounds=(9, 9))
    for against in (bare, model):
        found = ratio(times["jactus"], times[against])
        yield compared("import jactus", Setting("–", "–", 1), 1.0, f"import {against}", found, 1.0, None, versions())


def files() -> Iterator[Row]:
    """Compressed models and a plan, against safetensors' own copy of the same bytes, on the same disk."""
    torch.set_num_threads(1)
    plan = subjects.planned("smollm2")
    for name in ("smollm2", "llama-7b"):
        model = subjects.ready(name, "jactus", 0.8)
        with tempfile.TemporaryDirectory() as folder:
            yield from _model_files(Setting(name, "float32", 1), model, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        yield from _plan_files(Setting("smollm2", "float32", 1), plan, Path(folder))


def _model_files(at: Setting, model: Any, folder: Path) -> Iterator[Row]:
    jactus.save_pretrained(model, folder / "ours")
    stored = {k: v for file in (folder / "ours").glob("*.safetensors") for k, v in load_file(file).items()}
    loaded = AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=torch.float32)
    for key, value in model.state_dict().items():
        if not torch.equal(value, loaded.state_dict()[key]):
            raise JactusError(f"{key} came back changed")
    yield from _against_copy(
        "model", at, 0.8, stored, folder,
        lambda: jactus.save_pretrained(model, folder / "ours"),
        lambda: AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=torch.float32),
    )  # fmt: skip


def _plan_files(at: Setting, plan: jactus.Plan, folder: Path) -> Iterator[Row]:
    plan.save(folder / "plan")
    yield from _against_copy(
        "plan", at, 1.0, load_file(folder / "plan"), folder,
        lambda: plan.save(folder / "plan"),
        lambda: jactus.Plan.load(folder / "plan"),
    )  # fmt: skip


def _against_copy(
    what: str,
    at: Setting,
    budget: float,
    stored: Tensors,
    folder: Path,
    save: Callable[[], Any],
    load: Callable[[], Any],
) -> Iterator[Row]:
    """Rows for our `save` and `load`, against safetensors' of the same tensors. Ours is on the disk when it returns."""
    copy = folder / "copy.safetensors"

    def synced() -> None:
        save_file(stored, copy)
        with copy.open("rb") as file:
            os.fsync(file.fileno())

    copies: dict[tuple[str, str], Callable[[], Any]] = {
        ("save", "safetensors"): lambda: save_file(stored, copy),
        ("save", "safetensors and fsync"): synced,
        ("load", "safetensors"): lambda: _touched(load_file(copy)),
    }
    times = race({"save": save, "load": load} | {" ".join(key): run for key, run in copies.items()}, rounds=(5, 9))
    for way, against in copies:
        found = ratio(times[way], times[f"{way} {against}"])
        yield compared(f"{way} {what}", at, budget, against, found, 1.0, 0.0, versions())


def _touched(tensors: Tensors) -> Tensors:
    """Copies: a mapped file is not read before it is."""
    return {key: value.clone() for key, value in tensors.items()}

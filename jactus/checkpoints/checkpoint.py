"""Save a compressed model so that `from_pretrained` reloads it, and swap the cores of one task for another's."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from jactus_kernels import JactusError

from ..model.families import head_parameters
from ..model.lowrank import compressed_layers, core_layers
from ..model.offload import state_dict
from ..model.sharded import is_sharded, refuse_sharded, whole_state
from ..model.targets import fingerprint
from . import storage
from .quantizer import file_digest, names, own_name, record
from .reload import check_files
from .writing import together

logger = logging.getLogger("jactus")


def save_pretrained(model: PreTrainedModel, directory: str | os.PathLike, **kwargs) -> None:
    """Write config.json and safetensors to `directory`, to be reloaded by `AutoModelFor….from_pretrained(directory)`.

    All is written beside the directory's files first and moved in at the end, so a failure (a full disk) leaves an old
    checkpoint whole; files of yours in the directory stay. kwargs go to the model's own `save_pretrained`; with
    is_main_process=False nothing is written. Of a model under `fully_shard` or ZeRO-3 all ranks must call it, and rank 0 writes it
    whole.

    Raises JactusError for a model that is not a transformers one, or when the disk refuses.
    """
    if not isinstance(model, PreTrainedModel):
        raise JactusError(
            f"save_pretrained needs a transformers PreTrainedModel, got {type(model).__name__}; for a plain module save "
            "model.state_dict(), and load it into a model compressed with the same plan"
        )
    state = kwargs.pop("state_dict", None)
    writes = kwargs.pop("is_main_process", True)
    if is_sharded(model):
        state = whole_state(model) if state is None else state
        writes = writes and dist.get_rank() == 0
    if not writes:
        return  # in a loop on several processes the first one writes
    state = state_dict(model) if state is None else state
    directory = Path(directory)
    record(model)
    state = _with_tripwires(model, state)
    with together(directory, sum(t.nbytes for t in state.values())) as partial:
        model.save_pretrained(partial, state_dict=state, **kwargs)
        check_files(model, partial)
        _add_digests(partial)


def _with_tripwires(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict with an empty `weight` for each low-rank layer: without `import jactus`, transformers then stops at
    its shape, where it would otherwise make up dense weights and only warn."""
    return {**state, **{f"{name}.weight": torch.empty(0) for name in compressed_layers(model)}}


def _add_digests(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        weights = sorted(directory.glob("*.safetensors"))
        config["quantization_config"]["files"] = {file.name: file_digest(file) for file in weights}
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_cores(model: nn.Module, path: str | os.PathLike) -> None:
    """Write what trains (cores, head, …) and what training changes besides (running statistics) to one file: a task on top of
    shared bases. A model frozen since is written whole.

    Raises JactusError when the model has no three-factor layer, or the disk refuses.
    """
    tensors = task_of(model)
    storage.write(path, "cores", tensors, {"bases": _bases(model), "state": sorted(_state(model))})


def task_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own tensors that are written: what trains, the head, and what training changes besides.

    Raises JactusError when the model has no three-factor layer.
    """
    _refuse_coreless(model)
    names = _task_names(model) | set(head_parameters(model))
    return {name: p.detach() for name, p in model.named_parameters() if name in names} | _state(model)


def load_cores(model: nn.Module, path: str | os.PathLike) -> None:
    """Put another task's cores (and head, …) into a model with the same bases, in place.

    Nothing is changed unless all of it fits. Raises JactusError when the file is of other bases or of other shapes, or
    lacks something that trains in this model.
    """
    put_task(model, read_cores(model, path))


@torch.no_grad()
def put_task(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a task's tensors into the model's own of those names."""
    own: dict[str, torch.Tensor] = dict(model.named_parameters()) | _state(model)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def read_cores(model: nn.Module, path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """What `save_cores` wrote, by name, once it is sure to fit the model. Raises JactusError as `load_cores` does."""
    bases = _bases(model)
    tensors, meta = storage.read(path, "cores")
    with storage.parsed(path, "cores"):
        held = {**meta["bases"]}
    for name in sorted(set(bases) | set(held)):
        if bases.get(name) != held.get(name):
            raise JactusError(
                f"{path} does not fit: its cores belong to other bases than this model has in {name}; load it into the "
                "model it was saved from, or one compressed with the same plan by this version"
            )
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters()) | _state(model)
    if _state(model) and "state" not in meta:
        logger.warning(
            "%s was written before running statistics were kept with cores: those of %s stay as they are",
            path, next(iter(_state(model))),
        )  # fmt: skip
    for name, tensor in tensors.items():
        mine = parameters.get(name)
        if mine is None or mine.shape != tensor.shape or mine.is_floating_point() != tensor.is_floating_point():
            there = "nothing" if mine is None else f"{tuple(mine.shape)} of {mine.dtype}"
            raise JactusError(
                f"{path} does not fit: {name} is {tuple(tensor.shape)} of {tensor.dtype} there and {there} in this model"
            )
    missing = sorted((_task_names(model) | (set(_state(model)) if "state" in meta else set())) - set(tensors))
    if missing:
        raise JactusError(
            f"{path} does not fit: it has no {missing[0]} (nor {len(missing) - 1} others), which would stay another task's; "
            "load it into a model compressed with the same trainable_rank, in which the same extras train"
        )
    return tensors


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes and is no parameter: the running statistics of normalisations, and whatever else is saved (where the
    pivots of bases are does not change)."""
    saved = model.state_dict().keys() - {
        f"{n}.{key}" for n, x in core_layers(model).items() for key, _ in x.named_buffers()
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _task_names(model: nn.Module) -> set[str]:
    """Cores, what trains now, and what was chosen to train before the model was frozen."""
    recorded = getattr(getattr(model, "config", None), "quantization_config", None)
    known = names(model)
    chosen = {own_name(model, name, known) for name in getattr(recorded, "trainable", ())}
    trains = {name for name, p in model.named_parameters() if p.requires_grad or name in chosen}
    return trains | _core_names(model)


def _core_names(model: nn.Module) -> set[str]:
    """Parameters that make up the cores, whether they train at the moment or not."""
    layers = core_layers(model).items()
    return {
        f"{name}.{key}" for name, layer in layers for key, _ in layer.named_parameters() if key in ("core", "block")
    }


def _bases(model: nn.Module) -> dict[str, list[str]]:
    _refuse_coreless(model)
    held = {name: (layer.U, layer.V, layer.rows, layer.columns) for name, layer in core_layers(model).items()}
    return {name: [fingerprint(t) for t in parts if t is not None] for name, parts in held.items()}


def _refuse_coreless(model: nn.Module) -> None:
    refuse_sharded("cores are saved, loaded and swapped", model)
    if not core_layers(model):
        raise JactusError(f"{type(model).__name__} has no three-factor layer, hence no cores to swap")

"""Whether and how a model goes out: as a folder of its own for each form, complete or not at all."""

import copy
import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from jactus_kernels import JactusError

from ..checkpoints.checkpoint import save_pretrained
from ..checkpoints.writing import atomic, together
from ..compression.surgery import fold, merge
from ..model.lowrank import compressed_layers, core_layers
from ..model.sharded import is_sharded
from . import graphs, load_model

FORMS = {
    "torch": "a folded checkpoint and load_model.py, which loads it with torch and transformers alone",
    "onnx": "model.onnx, float32, batch and sequence open",
    "torch.export": "model.pt2, for torch.export.load",
    "dense": "an ordinary checkpoint of the merged model, for tools that read those",
}


@dataclass(frozen=True)
class Answer:
    """True where it can be done; else `reason` says what is in the way, and what to do."""

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


def can_export(model: nn.Module, to: str, example: Mapping[str, Tensor] | None = None) -> Answer:
    """Whether `export_model` takes this model to the form `to`: what can be known without tracing it.

    Raises JactusError for a form that is not known.
    """
    if to not in FORMS:
        raise JactusError(f"to={to!r} is no form to export to; take one of {', '.join(map(repr, FORMS))}")
    return Answer(_obstacle(model, to, example))


def _obstacle(model: nn.Module, to: str, example: Mapping[str, Tensor] | None) -> str:
    kind = type(model).__name__
    if model.training:
        return f"{kind} is in training mode, with its dropout; call model.eval() first"
    if is_sharded(model):
        return f"the parameters of {kind} are spread over processes; write it with jactus.save_pretrained, and export what is reloaded"
    for name, layer in core_layers(model).items():
        if not torch.isfinite(layer.effective_core).all():
            return f"{name} ({layer}) has a core that is not finite: training diverged; load an older checkpoint"
    if to in ("torch", "dense"):
        if not isinstance(model, PreTrainedModel):
            return f'{kind} is no transformers model, and has no config.json to write; take to="torch.export" or "onnx"'
        if not compressed_layers(model):
            return f"{kind} has no low-rank layer: it is dense already, and its own save_pretrained writes it"
        if to == "torch" and getattr(transformers, kind, None) is not type(model):
            return (
                f'{kind} is a class of your own, which load_model.py could not find; take to="dense" or "torch.export"'
            )
        return ""
    if to == "onnx":
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if dtypes != {torch.float32}:
            return (
                f"{kind} has weights in {_list(dtypes)}, and ONNX is written and checked in float32: pass model.float()"
            )
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            return f"writing and checking ONNX needs {_list(missing)}: pip install 'jactus-kernels[export]'"
    found = graphs.example_for(model) if example is None else example
    if found is None:
        return f"it is not known what {kind} takes: pass example=, a batch of what the served model will be given"
    odd = [name for name, value in found.items() if not isinstance(value, Tensor) or value.dim() == 0]
    if odd or not found:
        return f"example= must hold tensors by name, the batch along their first axis; {_list(odd) or 'nothing'} is not such"
    if "labels" in found:
        return "example= has labels, which the served model will not be given; leave them out"
    return ""


def export_model(
    model: nn.Module, directory: str | os.PathLike, to: str, example: Mapping[str, Tensor] | None = None
) -> Path:
    """Write `model` to `directory` in a form that needs no jactus, and leave the model as it is; returns the path to load.

    Cores are folded first, on a copy. A graph is run on two shapes and compared with the model before it is written.

    Args:
        model: in eval mode; with low-rank layers, for "torch" and "dense".
        directory: files of yours in it stay.
        to: "torch", "onnx", "torch.export" or "dense".
        example: a batch by argument name for the two graphs, (batch, …); of integers the second axis is the sequence, and
            both stay open. None: made from the config, for text and images.

    Raises:
        JactusError: what `can_export` answers, where torch cannot trace the model, where the graph computes something else, and
            where the disk refuses. Nothing is written then.
    """
    if not (answer := can_export(model, to, example)):
        raise JactusError(f"cannot export to {to!r}: {answer.reason}")
    directory = Path(directory)
    if to == "dense":
        save_pretrained(merge(copy.deepcopy(model)), directory)  # type: ignore[arg-type]
        return directory
    folded = fold(copy.deepcopy(model)) if core_layers(model) else model
    if to == "torch":
        save_pretrained(folded, directory)  # type: ignore[arg-type]
        with atomic(directory / "load_model.py") as partial:
            shutil.copyfile(load_model.__file__, partial)
        return directory
    if any(p.device.type != "cpu" for p in folded.parameters()):  # elsewhere layers are operators of jactus
        folded = (folded if folded is not model else copy.deepcopy(model)).cpu()
    found = {name: t.cpu() for name, t in (example or graphs.example_for(folded) or {}).items()}
    found = {
        name: t if len(t) > 1 else t.expand(2, *t.shape[1:]) for name, t in found.items()
    }  # one would be fixed at one
    name, write = {"onnx": ("model.onnx", graphs.write_onnx), "torch.export": ("model.pt2", graphs.write_program)}[to]
    with together(directory) as partial:
        write(folded, found, partial / name)
    return directory / name


def _list(things) -> str:
    return ", ".join(sorted(map(str, things)))

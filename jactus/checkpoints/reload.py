"""Can it be read back? What a reload will ask for, by name and shape, compared with what was written."""

import copy
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from jactus_kernels import JactusError

from ..model.lowrank import compressed_layers
from .quantizer import KEPT, describe, put


def check_files(model: PreTrainedModel, folder: Path) -> None:
    """Raise JactusError where a reload from `folder` would ask for another tensor than the weight files hold."""
    wanted = wanted_shapes(model)
    if wanted is None:
        return
    found: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            raise _unreadable(
                model, folder, f"{name} is {tuple(found[name])} in it, and a reload asks for {tuple(shape)}"
            )
    layers = compressed_layers(model)
    parts = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict()}
    missing = sorted((set(wanted) & parts) - set(found))
    if missing:
        raise _unreadable(
            model, folder, f"it has no {missing[0]} (nor {len(missing) - 1} others), which a reload asks for"
        )


def wanted_shapes(model: PreTrainedModel) -> dict[str, list[int]] | None:
    """Names and shapes of the tensors that `from_pretrained` will look for; None where the class cannot be made from its config
    alone."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            empty = type(model)(config)
    except Exception:  # a class of the user's own, with arguments of its own
        return None
    layers = describe(model).layers
    if layers:
        put(empty, layers)
    state = {name: t.to("meta") for name, t in empty.state_dict().items()}
    if layers and KEPT in vars(model):
        return {name: list(t.shape) for name, t in state.items()}
    vars(empty)["_weight_conversions"] = getattr(model, "_weight_conversions", None)
    return {name: list(t.shape) for name, t in revert_weight_conversion(empty, state).items()}


def _unreadable(model: nn.Module, folder: Path, why: str) -> JactusError:
    return JactusError(
        f"{type(model).__name__} would not be read back from {folder.parent}: {why}. The model is no longer what its config says "
        "(layers resized or replaced?); set the config right, or save model.state_dict(). What was there before is untouched"
    )

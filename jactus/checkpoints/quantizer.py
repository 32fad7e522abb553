"""Reload through `AutoModelFor….from_pretrained(dir)` after `import jactus`: no edited model file, no remote code.

The route is transformers' registered quantisers: config.json carries which layers are low-rank and of what shape, and a
quantiser puts such layers into the empty model before its weights are read. Afterwards the model is an ordinary one.
"""

import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from jactus_kernels import JactusError

from ..model.lowrank import CoreLinear, FoldedLinear, LowRankLinear, compressed_layers, replace_module
from ..model.pivots import is_order
from ..model.sharded import whole_shape
from ..model.targets import looks_linear
from .checks import check_claims, check_places, check_record
from .writing import unfinished

logger = logging.getLogger("jactus")
METHOD = "jactus"
FORMAT = 2  # 1: bases row by row, pairs of factors with their pivots


@register_quantization_config(METHOD)
class JactusQuantizationConfig(QuantizationConfigMixin):
    """What config.json says of a compressed model.

    layers: name → form ('core' or 'folded') and shape; trainable: names of the parameters that require grad;
    files: digests of the weight files, where `jactus.save_pretrained` wrote them.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        trainable: list[str] | None = None,
        files: dict[str, str] | None = None,
        format: int = FORMAT,
        **unknown: Any,
    ) -> None:
        if not isinstance(format, int) or format > FORMAT:
            raise JactusError(f"the checkpoint has format {format}, newer than {FORMAT}: upgrade jactus-kernels")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.layers, self.trainable, self.format = layers or {}, trainable or [], format  # checked when they are used
        if files:
            self.files = files


def describe(model: nn.Module) -> JactusQuantizationConfig:
    """The record of a model's low-rank layers as they are now."""
    layers = {name: _describe_layer(layer, model) for name, layer in compressed_layers(model).items()}
    return JactusQuantizationConfig(layers, [name for name, p in model.named_parameters() if p.requires_grad])


def _describe_layer(layer: LowRankLinear, model: nn.Module) -> dict[str, Any]:
    core = isinstance(layer, CoreLinear)
    bases = layer.U if isinstance(layer, CoreLinear) else layer.left
    kept: dict[str, Any] = {
        "form": "core" if core else "folded",
        "m": layer.out_features,
        "n": layer.in_features,
        "rank": layer.rank,
        "bias": layer.bias is not None,
        "transposed": layer.transposed,
    }
    # Only a dtype that differs from the model's is fixed; the others follow from_pretrained(dtype=…).
    for key, tensor in (("dtype", bases), ("bias_dtype", layer.bias)):
        if tensor is not None and tensor.dtype != getattr(model, "dtype", tensor.dtype):
            kept[key] = str(tensor.dtype).removeprefix("torch.")
    if layer.pivoted:
        kept["pivoted"] = True
    if isinstance(layer, CoreLinear):
        if layer.width != layer.rank:
            kept["width"] = layer.width
        if math.isfinite(layer.reach):
            kept["reach"] = layer.reach
        kept["trainable_rank"] = None if layer.block is None else whole_shape(layer.block)[0]
        # always: a model loaded in bfloat16 still trains its cores as they were stored
        kept["core_dtype"] = str(layer.core.dtype).removeprefix("torch.")
    return kept


def record(model: nn.Module) -> None:
    """Write into the model's config what it takes to reload it, so that its own `save_pretrained` (and so Trainer's
    checkpoints) can be reloaded; or take that away once the model is dense."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return
    if compressed_layers(model):
        config.quantization_config = describe(model)
        _save_names_as_they_are(model)
    elif getattr(getattr(config, "quantization_config", None), "quant_method", None) == METHOD:
        del config.quantization_config
        if KEPT in vars(model):
            model._weight_conversions = vars(model).pop(KEPT)


def refuse_quantized(model: nn.Module) -> None:
    """Raise JactusError where the model's config says that another tool quantised it: it cannot say both."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if found is not None and method != METHOD:
        raise JactusError(
            f"{type(model).__name__} is quantised ({getattr(method, 'value', method)}), and its config could not say so and that it "
            "is compressed; load the model unquantised"
        )


KEPT = "_jactus_weight_conversions"


def _save_names_as_they_are(model: nn.Module) -> None:
    """Some families are saved with layers fused (q, k and v to one weight), which factors of different ranks cannot be: their
    files then have a name for each layer, as the model in memory has. A dense model is saved as ever."""
    if KEPT in vars(model) or not isinstance(model, PreTrainedModel):
        return
    found = getattr(model, "_weight_conversions", None)
    conversions = get_model_conversion_mapping(model, add_legacy=False) if found is None else found
    if any(isinstance(c, WeightConverter) for c in conversions):
        vars(model)[KEPT] = found
        vars(model)["_weight_conversions"] = []


@register_quantizer(METHOD)
class JactusQuantizer(HfQuantizer):
    """Puts the low-rank layers in place before the weights are read; quantises nothing."""

    quantization_config: JactusQuantizationConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        paths = kwargs.get("checkpoint_files") or []
        folder = str(getattr(model.config, "name_or_path", "") or "")
        check_record(self.quantization_config, folder)
        check_places(paths, folder)
        self._check_files(paths)
        saved = getattr(model.config, "architectures", None) or []
        put(model, self.quantization_config.layers, partly=type(model).__name__ not in saved)
        check_claims(model, self.quantization_config.layers, paths)
        tripwires = "|".join(re.escape(name) for name in compressed_layers(model))
        ignored = model._keys_to_ignore_on_load_unexpected
        kind = set if isinstance(ignored, set) else list  # in older transformers a list, or None
        model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), rf"^({tripwires})\.weight$"])

    def _check_files(self, paths: list[str]) -> None:
        """Compare weight files with their digests, when the checkpoint has any."""
        digests = getattr(self.quantization_config, "files", {})
        for path in paths:
            name = os.path.basename(path)
            if digests and digests.get(name) != file_digest(path):
                left = unfinished(Path(path).parent)
                raise JactusError(
                    f"{path} is truncated, corrupted or of another checkpoint: it does not match the digest in config.json"
                    + (f"; {left}" if left else "")
                )
        if digests:
            del self.quantization_config.files  # they describe the files just read, not what is saved next

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _refuse_missing(model)
        known = names(model)
        trainable = {own_name(model, name, known) for name in self.quantization_config.trainable}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
        record(model)
        # From here on it is an ordinary model: .half(), .to(dtype) and Trainer treat it as one.
        model.is_quantized = False
        del model.hf_quantizer, model.quantization_method
        for module in model.modules():
            if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
                module.config._is_quantized = False
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def put(model: nn.Module, layers: dict[str, dict[str, Any]], partly: bool = False) -> None:
    """Put empty low-rank layers where a record has them. `partly`: what the model has no place for (another head's pooler, the
    decoder of an encoder) is left out, as transformers leaves out weights. Raises JactusError where a layer has no place, or one
    of another kind."""
    known = names(model)
    places = {name: own_name(model, name, known) for name in layers}
    for name, kept in layers.items():
        own = places[name]
        old = model.get_submodule(own) if own is not None else None
        m, n = kept["m"], kept["n"]
        expected = [n, m] if kept["transposed"] else [m, n]
        other = old is not None and (not looks_linear(old) or list(old.weight.shape) != expected)  # type: ignore[arg-type]
        if other or (own is None and not (partly and any(places.values()))):
            raise JactusError(
                f"the checkpoint is of another model: it has a low-rank layer {name} ({m}×{n}), and "
                f"{type(model).__name__} has {'none of that name' if old is None else old} there"
            )
    for name, kept in layers.items():
        if (own := places[name]) is not None:
            replace_module(model, own, skeleton(kept))
    if left_out := [name for name, own in places.items() if own is None]:
        logger.warning(
            "%s has no place for %d of %d low-rank layers of the checkpoint, e.g. %s: they are left out",
            type(model).__name__, len(left_out), len(layers), left_out[0],
        )  # fmt: skip


def _refuse_missing(model: nn.Module) -> None:
    """transformers warns of weights that a checkpoint lacks and makes some up; a made-up factor is never wanted."""
    for name, layer in compressed_layers(model).items():
        for key, p in layer.named_parameters():
            if p.device.type != "meta" and not getattr(p, "_is_hf_initialized", False):
                raise JactusError(
                    f"{name} ({layer}) has no {key} in the weight files: they are not the ones that belong to config.json; "
                    "put those back, or save the model again"
                )
        for key, order in layer.named_buffers():
            if order.device.type != "meta" and not is_order(order):
                raise JactusError(
                    f"{name} ({layer}) has no {key} in the weight files, which says where the pivots of its basis are, or one "
                    "that is no order of its rows: they are not the files that belong to config.json; put those back, or "
                    "save the model again"
                )


def names(model: nn.Module) -> set[str]:
    """The names of a model's modules and parameters."""
    return {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}


def own_name(model: nn.Module, name: str, known: set[str]) -> str | None:
    """The name in `model` of a module or parameter called `name` in the checkpoint: a base model's may lack the head's
    prefix, and the other way round. None if there is none."""
    prefix = getattr(model, "base_model_prefix", "")
    options = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((option for option in options if option in known), None)


def skeleton(kept: dict[str, Any]) -> LowRankLinear:
    """An empty low-rank layer as a record describes it."""
    dtype, bias_dtype, core_dtype = (
        getattr(torch, kept[key]) if kept.get(key) else None for key in ("dtype", "bias_dtype", "core_dtype")
    )
    shape = (kept["m"], kept["n"], kept["rank"], kept["bias"], kept["transposed"])
    layer: LowRankLinear
    if kept["form"] == "folded":
        layer = FoldedLinear(*shape, dtype=dtype, pivoted=kept.get("pivoted", False))
    else:
        layer = CoreLinear(
            *shape,
            trainable_rank=kept["trainable_rank"],
            dtype=dtype,
            core_dtype=core_dtype,
            width=kept.get("width"),
            reach=kept.get("reach", math.nan),
            pivoted=kept.get("pivoted", False),
        )
    if layer.bias is not None:  # of what the replaced layer had, whatever the bases are stored in
        layer.bias = nn.Parameter(torch.empty(layer.out_features, dtype=bias_dtype), requires_grad=False)
    return layer


def file_digest(path: str | os.PathLike) -> str:
    """xxh3 of a file's bytes."""
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            hasher.update(chunk)
    return hasher.hexdigest()

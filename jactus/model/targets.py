"""Which layers: name patterns as PEFT users know them, and a refusal by name of what cannot be compressed."""

import difflib
import logging
import re
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from jactus_kernels import JactusError

from ..config import JactusConfig
from .families import outside_base
from .lowrank import refuse_compressed
from .offload import device_of, present
from .sharded import refuse_sharded

logger = logging.getLogger("jactus")


@dataclass(frozen=True)
class Target:
    """One layer to replace, y = W x + b, W (m, n)."""

    name: str
    module: nn.Module
    m: int
    n: int
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """W as (m, n), fetched where it is offloaded; GPT-2's Conv1D keeps it the other way round."""
        with present(self.module):
            weight = self.module.get_parameter("weight").detach()
        return weight.T if self.transposed else weight

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return device_of(self.module, self.module.get_parameter("weight"))

    @property
    def fingerprint(self) -> str:
        """A digest of shape, dtype and up to 4,096 evenly spaced weights: tells models apart at no cost."""
        return fingerprint(self.weight)

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__} {self.m}×{self.n})"


def fingerprint(weight: Tensor) -> str:
    """A digest of a tensor's shape and of up to 4,096 evenly spaced values."""
    flat = weight.detach().reshape(-1)
    # At most 4,096 positions, chosen without ever looping over the rest.
    index = torch.linspace(0, flat.numel() - 1, min(flat.numel(), 4096), dtype=torch.float64).long()
    sample = flat[index.to(flat.device)].double().cpu().numpy()
    return xxhash.xxh3_64_hexdigest(f"{tuple(weight.shape)}".encode() + sample.tobytes())


def find_targets(model: nn.Module, config: JactusConfig) -> dict[str, Target]:
    """The layers that `config` selects in `model`, by name, in the model's order.

    Raises JactusError when nothing matches, and for a selected layer that is quantised, wrapped by an adapter,
    tied to another weight, parametrised or a fused three-dimensional tensor of experts: each by its name.
    """
    refuse_compressed(model)
    refuse_sharded("find_targets", model)
    _refuse_wrapper(model)
    for name, module in model.named_modules():
        if any(isinstance(p, nn.UninitializedParameter) for p in module._parameters.values()):
            raise JactusError(
                f"{name} ({type(module).__name__}) has no weight yet: run the model once on a batch first"
            )
    head = outside_base(model)
    twice = _reachable_twice(model)
    tied = _tied_weights(model)
    everything = config.target_modules == "all-linear"
    if not everything:
        _refuse_idle(model, "target_modules", config.target_modules)
    _refuse_idle(model, "exclude_modules", config.exclude_modules)
    targets: dict[str, Target] = {}
    for name, module in model.named_modules():
        if not name or _is_excluded(name, config.exclude_modules):
            continue
        if everything:
            _refuse_experts(name, module)
            if name in head or not _claims_to_be_linear(module) or min(getattr(module.weight, "shape", (2,))) < 2:
                continue
            if id(module.weight) in tied:
                logger.info("%s stays as it is: its weight is tied to another module's", name)
                continue
        elif not _matches(name, config.target_modules):
            continue
        _refuse_unsuitable(name, module, tied)
        if id(module) in twice:
            raise JactusError(
                f"{name} is also reachable as {twice[id(module)]}: replacing it under one name would leave it dense under the "
                "other; add it to exclude_modules"
            )
        targets[name] = _target(name, module)
    if not targets:
        linear = [n for n, m in model.named_modules() if looks_linear(m)]
        raise JactusError(
            f"no module of {type(model).__name__} matches target_modules={config.target_modules!r} without "
            f"exclude_modules={config.exclude_modules!r}; its linear layers are {linear[:4]}… ({len(linear)} in all)"
        )
    return targets


def refuse_absent(targets: dict[str, Target]) -> None:
    """Raise JactusError for a layer whose weight is on the meta device and cannot be fetched: it was never loaded, or something
    else than a hook of its own brings it."""
    for target in targets.values():
        if target.device.type == "meta":
            how = "its own hook does not bring it" if hasattr(target.module, "_hf_hook") else "it was never loaded"
            raise JactusError(
                f"{target} has no weight in memory ({how}); load the model whole, on the CPU if need be, or let accelerate dispatch it "
                "without preload_module_classes (memory_limit and statistics_device='cpu' spare memory)"
            )


def _target(name: str, module: nn.Module) -> Target:
    transposed = isinstance(module, Conv1D)
    rows, columns = module.get_parameter("weight").shape
    m, n = (columns, rows) if transposed else (rows, columns)
    return Target(name, module, m, n, transposed)


def looks_linear(module: nn.Module) -> bool:
    """Whether a module is a Linear or a Conv1D, or derived from one."""
    return isinstance(module, nn.Linear | Conv1D)


def _claims_to_be_linear(module: nn.Module) -> bool:
    """Also true of quantised and adapter-wrapped layers, so that they are refused and not passed over."""
    foreign = "linear" in type(module).__name__.lower() and hasattr(module, "in_features") and hasattr(module, "weight")
    return looks_linear(module) or foreign


def _refuse_wrapper(model: nn.Module) -> None:
    inner = getattr(model, "_orig_mod", None)
    if inner is None and type(model).__name__ in (
        "DistributedDataParallel",
        "DataParallel",
        "FullyShardedDataParallel",
    ):
        inner = model.module
    if isinstance(inner, nn.Module):
        raise JactusError(
            f"the model is wrapped by {type(model).__name__}; pass the {type(inner).__name__} inside it, and wrap it again "
            "once its layers are replaced"
        )


def _reachable_twice(model: nn.Module) -> dict[int, str]:
    """id → second name of every module that is an attribute under two names."""
    seen: set[int] = set()
    twice: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in seen:
            twice.setdefault(id(module), name)
        seen.add(id(module))
    return twice


def _is_excluded(name: str, patterns: str | tuple[str, ...]) -> bool:
    """Whether a pattern names the module or, in a list, one that it is inside of."""
    if isinstance(patterns, str):
        return _matches(name, patterns)
    parts = name.split(".")
    return any(_matches(".".join(parts[: i + 1]), patterns) for i in range(len(parts)))


def _refuse_idle(model: nn.Module, option: str, patterns: str | tuple[str, ...]) -> None:
    """Raise JactusError for a pattern that names no module: a misspelt one would change nothing, and say nothing."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if not pattern or any(_matches(name, pattern if isinstance(patterns, str) else (pattern,)) for name in names):
            continue
        endings = {name: name.rpartition(".")[2] for name in names}
        near = difflib.get_close_matches(pattern.rpartition(".")[2], list(dict.fromkeys(endings.values())), 3)
        if isinstance(patterns, str):
            how = f"a string is a regular expression for the whole name; name endings come in a list: [{pattern!r}]"
        else:
            how = "an element of a list is a whole name, or its ending after a dot"
        like = (
            f"; do you mean {' or '.join(near)}?"
            if near
            else f"; modules are called {list(dict.fromkeys(endings.values()))[:6]}…"
        )
        raise JactusError(
            f"{option}={patterns!r}: {pattern!r} matches no module of {type(model).__name__} ({how}){like}"
        )


def _matches(name: str, patterns: str | tuple[str, ...]) -> bool:
    if isinstance(patterns, str):
        try:
            return bool(patterns) and re.fullmatch(patterns, name) is not None
        except re.error as e:
            raise JactusError(f"pattern {patterns!r} is not a regular expression ({e}); or pass a list of names") from e
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def _tied_weights(model: nn.Module) -> set[int]:
    """ids of parameters that more than one module holds."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def _refuse_experts(name: str, module: nn.Module) -> None:
    fused = [k for k, p in module.named_parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1]
    if fused and "expert" in f"{name} {type(module).__name__}".lower():
        raise JactusError(
            f"{name} ({type(module).__name__}) holds fused expert weights {fused} of shape "
            f"{tuple(getattr(module, fused[0]).shape)}, which are not linear layers and would stay at full size; add it "
            "to exclude_modules to compress the rest"
        )


def _refuse_unsuitable(name: str, module: Any, tied: set[int]) -> None:
    kind = type(module).__name__
    if hasattr(module, "base_layer"):
        raise JactusError(f"{name} is wrapped by an adapter ({kind}); merge it first (peft: model.merge_and_unload())")
    if hasattr(module, "parametrizations"):
        raise JactusError(f"{name} is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first")
    if any(p.dim() == 3 for p in module.parameters(recurse=False)):
        raise JactusError(f"{name} ({kind}) holds a three-dimensional weight; add it to exclude_modules")
    weight = getattr(module, "weight", None)
    if looks_linear(module) and "weight" not in module._parameters:
        made_by = next((type(h).__name__ for h in module._forward_pre_hooks.values()), "a hook")
        raise JactusError(
            f"{name} ({kind}) has no weight of its own: {made_by} makes it anew before each forward (torch.nn.utils.prune, "
            "weight_norm or spectral_norm); make it permanent first (prune.remove, remove_weight_norm, remove_spectral_norm)"
        )
    plain = looks_linear(module) and type(module).forward in (nn.Linear.forward, Conv1D.forward)
    if not plain or not module.weight.is_floating_point() or module.weight.element_size() < 2:
        dtype = getattr(weight, "dtype", None)
        raise JactusError(
            f"{name} is a {type(module).__module__}.{kind} with weight dtype {dtype}, not a plain Linear or Conv1D: load "
            "the model unquantised, or add it to exclude_modules"
        )
    if id(module.weight) in tied:
        raise JactusError(f"{name} shares its weight with another module; compressing one would untie them: exclude it")
    if min(module.weight.shape) < 2:
        raise JactusError(
            f"{name} has weight {tuple(module.weight.shape)}: nothing to factor; add it to exclude_modules"
        )

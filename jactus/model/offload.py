"""Weights that accelerate keeps on the CPU or the disk between forwards, where the model has `meta` in their place.

They are had through accelerate's own `align_module_device`, a module at a time, and let go again.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own weights come when it is called and go afterwards."""
    if "_hf_hook" not in vars(module):
        return False
    from accelerate.utils import has_offloaded_params  # here: only a model that it dispatched needs it

    return has_offloaded_params(module)


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """The module's own weights are there inside the block; they are let go at its end, but for those that something still holds."""
    with ExitStack() as stack:
        if is_offloaded(module):
            from accelerate.utils import align_module_device

            stack.enter_context(align_module_device(module))
        yield


def device_of(module: nn.Module, weight: Tensor) -> torch.device:
    """Where the module computes with this weight of its own."""
    hook: Any = vars(module).get("_hf_hook")
    return torch.device(hook.execution_device) if weight.is_meta and is_offloaded(module) else weight.device


def first_device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: the device of its first weight."""
    for module in model.modules():
        for p in module.parameters(recurse=False):
            return device_of(module, p)
    return torch.device("cpu")


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers by name, each once, those of a module present while they are looked at."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        ids = {name: id(t) for name, t in _own(module)}  # of the parameter itself, not of what is loaded for it
        with present(module):
            for name, t in _own(module):
                if ids[name] not in seen:
                    yield f"{path}.{name}".lstrip("."), t
        seen |= set(ids.values())


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


@contextmanager
def light_graph(model: nn.Module) -> Iterator[None]:
    """Inside the block autograd keeps no offloaded weight from a forward for its backward: it fetches it once more."""
    inside: list[nn.Module] = []
    handles: list[Any] = []

    def keep(t: Tensor) -> Any:
        for name, p in inside[-1].named_parameters(recurse=False) if inside else ():
            if not p.is_meta and p.untyped_storage().data_ptr() == t.untyped_storage().data_ptr():
                return inside[-1], name, t.size(), t.stride(), t.storage_offset()
        return t

    def fetch(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        module, name, *form = kept
        with present(module):
            return module.get_parameter(name).detach().as_strided(*form)

    modules = [m for m in model.modules() if is_offloaded(m)]
    with ExitStack() as stack:
        for module in modules:
            handles.append(module.register_forward_pre_hook(lambda m, args: inside.append(m), prepend=True))
            handles.append(module.register_forward_hook(lambda m, args, out: inside.clear(), always_call=True))
            stack.callback(handles[-2].remove)
            stack.callback(handles[-1].remove)
        if modules:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, fetch))
        yield


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's, with what is offloaded fetched, but for what transformers fetches itself when it saves."""
    found = model.state_dict()
    own = {"cpu", "disk"}.intersection(map(str, getattr(model, "hf_device_map", {}).values()))
    for name in [] if own else [name for name, t in found.items() if t.is_meta]:
        path, _, key = name.rpartition(".")
        with present(module := model.get_submodule(path)):
            found[name] = getattr(module, key).detach()
    return found

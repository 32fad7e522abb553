"""Look at a model without changing it: what its forward writes into parameters and buffers is taken back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class _Keeping(TorchDispatchMode):
    """Copies a known tensor just before the first operation that writes into it."""

    def __init__(self, known: dict[int, Tensor]) -> None:
        super().__init__()
        self.known = known  # address of the memory → the tensor that it belongs to
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if schema.is_mutable:
            for argument, value in zip(schema.arguments, args):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                    self._keep(value)
        return func(*args, **kwargs)

    def _keep(self, written: Tensor) -> None:
        address = written.untyped_storage().data_ptr()
        tensor = self.known.get(address)
        if tensor is not None and address not in self.kept:
            self.kept[address] = (tensor, tensor.detach().clone())


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards every parameter and buffer is the one it was, with the values it had; and so are random generators of modules."""
    held = [(m._parameters, dict(m._parameters), m._buffers, dict(m._buffers)) for m in model.modules()]
    tensors = [
        t for _, parameters, _, buffers in held for t in (*parameters.values(), *buffers.values()) if t is not None
    ]
    known = {t.untyped_storage().data_ptr(): t for t in tensors if t.device.type != "meta"}
    generators = [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Generator)]
    states = [g.get_state() for g in generators]
    mode = _Keeping(known)
    try:
        with mode:
            yield
    finally:
        for own_parameters, parameters, own_buffers, buffers in held:
            own_parameters.clear()
            own_parameters.update(parameters)
            own_buffers.clear()
            own_buffers.update(buffers)
        with torch.no_grad():
            for tensor, values in mode.kept.values():
                tensor.copy_(values)
        for generator, state in zip(generators, states):
            generator.set_state(state)

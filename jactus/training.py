"""What trains: the cores and the chosen extras, nothing else."""

from collections.abc import Sequence

from torch import nn

from jactus_kernels import JactusError

from .layers import CoreLinear, compressed_layers
from .loader import record
from .targets import output_embedding, outside_base


def mark_trainable(model: nn.Module, extras: str | Sequence[str] = ("head",)) -> list[str]:
    """Let only cores and `extras` require gradients; returns the names of the parameters that do.

    extras: 'head' (modules outside the base model, the output embedding of a language model excepted), 'bias' (of the
    compressed layers), or endings of module names. Raises JactusError for an ending that no module has.
    """
    extras = (extras,) if isinstance(extras, str) else tuple(extras)
    chosen = {id(p) for layer in compressed_layers(model).values() for p in _core_parameters(layer, "bias" in extras)}
    heads = head_parameters(model) if "head" in extras else {}
    endings = tuple(e for e in extras if e not in ("head", "bias"))
    modules = [name for name, _ in model.named_modules()]
    for e in endings:
        if not any(module == e or module.endswith(f".{e}") for module in modules):
            raise JactusError(
                f"trainable_extras names {e!r}, and no module of {type(model).__name__} ends in that name"
            )
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        named = any(module == e or module.endswith(f".{e}") for e in endings)
        parameter.requires_grad_(id(parameter) in chosen or name in heads or named)
    record(model)  # a reloaded model trains the same
    return [name for name, p in model.named_parameters() if p.requires_grad]


def _core_parameters(layer: nn.Module, bias: bool) -> list[nn.Parameter]:
    trained = [layer.core if layer.block is None else layer.block] if isinstance(layer, CoreLinear) else []
    if bias and isinstance(layer, CoreLinear) and layer.bias is not None:
        trained.append(layer.bias)
    return trained


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a Hugging Face model's task head, by name; none for a bare or a language model."""
    outside = outside_base(model)
    embedding = output_embedding(model)
    kept = set() if embedding is None else {id(p) for p in embedding.parameters()}
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in outside and id(p) not in kept}

"""What trains: the cores and the chosen extras, nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from jactus_kernels import JactusError

from ..checkpoints.quantizer import record
from ..model.families import head_parameters
from ..model.lowrank import compressed_layers, core_layers


def mark_trainable(model: nn.Module, extras: str | Sequence[str] = ("head",)) -> list[str]:
    """Let only cores and `extras` require gradients; returns the names of the parameters that do.

    extras: 'head' (modules outside the base model, the output embedding of a language model excepted), 'bias' (of the
    compressed layers), or endings of module names, whose own parameters are meant. Raises JactusError for an ending that
    no module with parameters has.
    """
    extras = (extras,) if isinstance(extras, str) else tuple(extras)
    chosen = {id(layer.core if layer.block is None else layer.block) for layer in core_layers(model).values()}
    chosen |= {id(p) for extra in extras for p in extra_parameters(model, extra).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    record(model)  # a reloaded model trains the same
    return [name for name, p in model.named_parameters() if p.requires_grad]


def parameter_groups(model: nn.Module, lr: float, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """What requires gradients, as groups for any torch optimizer: `rates` for some extras, `lr` for the rest.

    Cores want five to forty times the learning rate of weights as they were pretrained, so embeddings or norms that train
    beside them want a rate of their own: `AdamW(parameter_groups(model, learning_rate(model), {"word_embeddings": 2e-4}))`.

    Args:
        model: after `compress` or `mark_trainable`; any other model whose parameters to train require gradients will do.
        lr: of the cores, and of every extra that `rates` does not name.
        rates: learning rates by the words of `mark_trainable`'s extras.

    Raises:
        JactusError: a word that names nothing that trains, or two words that name the same parameter.
    """
    groups: list[dict[str, Any]] = []
    grouped: set[int] = set()
    for extra, rate in rates.items():
        found = {id(p): name for name, p in extra_parameters(model, extra).items() if p.requires_grad}
        twice = grouped.intersection(found)
        if not found or twice:
            why = f"{found[twice.pop()]}, which another of them names" if twice else "nothing that requires gradients"
            raise JactusError(
                f"parameter_groups: rates names by {extra!r} {why}; what trains is chosen by "
                "JactusConfig(trainable_extras=…) or jactus.mark_trainable(model, extras)"
            )
        groups.append({"params": [p for p in model.parameters() if id(p) in found], "lr": rate})  # a tied one once
        grouped |= set(found)
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in grouped]
    return [{"params": rest, "lr": lr}, *groups] if rest else groups


def refuse_extras(model: nn.Module, extras: Sequence[str]) -> None:
    """Raise JactusError for a word of `trainable_extras` that names nothing, or what is not in memory to be trained."""
    for extra in extras:
        for name, p in extra_parameters(model, extra).items():
            if p.is_meta:
                raise JactusError(
                    f"{name} {tuple(p.shape)} is to train ({extra!r} in trainable_extras) and is offloaded: training would change "
                    "nothing of it; give its module a device in device_map, or leave it out of trainable_extras"
                )


def extra_parameters(model: nn.Module, extra: str) -> dict[str, nn.Parameter]:
    """The parameters that a word of `trainable_extras` means, by name."""
    if extra == "head":
        return head_parameters(model)
    if extra == "bias":
        return {f"{name}.bias": x.bias for name, x in core_layers(model).items() if x.bias is not None}
    modules = {name for name, _ in model.named_modules() if name == extra or name.endswith(f".{extra}")}
    low_rank = compressed_layers(model)  # of these cores train, and bases never do
    everything = model.named_parameters(remove_duplicate=False)  # a tied weight has the name that was asked for, too
    found = {name: p for name, p in everything if (of := name.rpartition(".")[0]) in modules and of not in low_rank}
    if not found:
        why = "no module at all"
        if modules:
            why = "no module with parameters of its own that is not compressed; name those inside it, or others"
        raise JactusError(
            f"{extra!r} is to train or to have a rate, and of that ending {type(model).__name__} has {why}"
        )
    return found

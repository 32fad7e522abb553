"""The methods JACTUS is compared with in the demos: all weights trained, and PEFT's LoRA. More are in bench.accuracy."""

from collections.abc import Iterable
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from jactus import JactusConfig
from jactus.model.families import head_parameters
from jactus.model.targets import find_targets


def full_fine_tuning(model: nn.Module) -> nn.Module:
    """Let every parameter require gradients, embeddings included; the same model."""
    return model.requires_grad_(True)


def lora(model: nn.Module, rank: int = 16, targets: Iterable[str] | None = None, **options: Any) -> PeftModel:
    """Add LoRA factors to every linear layer but the head, and train the head too. Arguments as in `lora_config`."""
    return get_peft_model(model, lora_config(model, rank, targets, **options))


def lora_config(model: nn.Module, rank: int = 16, targets: Iterable[str] | None = None, **options: Any) -> LoraConfig:
    """PEFT's configuration for the layers that JACTUS would replace.

    The scale α/r is 2, the common choice; no dropout and no biases. A task head is trained whole, on from its present
    weights.

    Args:
        model: the model to adapt, not yet wrapped.
        rank: of every adapter.
        targets: full names of the layers to adapt; None: those of `jactus.JactusConfig()`.
        options: further fields of `peft.LoraConfig`, or other values for these.
    """
    names = list(find_targets(model, JactusConfig()) if targets is None else targets)
    heads = sorted({name.split(".")[0] for name in head_parameters(model)})
    fields = {"lora_alpha": 2 * rank, "target_modules": names, "modules_to_save": heads or None, **options}
    return LoraConfig(r=rank, **fields)


def trainable_parameters(model: nn.Module) -> int:
    """How many parameters require gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def optimizer_bytes(model: nn.Module) -> int:
    """What AdamW keeps: two float32 moments, 8 bytes, for each trainable parameter."""
    return 8 * trainable_parameters(model)

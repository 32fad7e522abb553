"""The methods JACTUS is compared with: all weights trained, and PEFT's LoRA."""

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

HEADS = ("classifier", "score")  # trained whole, whatever the method
OUTPUTS = ("lm_head",)  # tied to the embeddings in small language models: never adapted


def full_fine_tuning(model: nn.Module) -> nn.Module:
    """Let every parameter require gradients, embeddings included; the same model."""
    return model.requires_grad_(True)


def lora(model: nn.Module, rank: int = 16) -> PeftModel:
    """Add LoRA factors to every linear layer but the head, and train the head too.

    The scale α/r is 2, the common choice; no dropout and no biases. The head goes on from its present weights.
    """
    heads = [name for name in HEADS if hasattr(model, name)]
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] not in (*HEADS, *OUTPUTS)
    ]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=heads or None)
    return get_peft_model(model, config)


def trainable_parameters(model: nn.Module) -> int:
    """How many parameters require gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def optimizer_bytes(model: nn.Module) -> int:
    """What AdamW keeps: two float32 moments, 8 bytes, for each trainable parameter."""
    return 8 * trainable_parameters(model)

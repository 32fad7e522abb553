"""What a Hugging Face model says of itself, for the model or any inside a wrapper: its base, heads, embeddings and loss."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# What transformers calls the top-level heads of models that have no base model apart.
HEADS = ("classifier", "score", "qa_outputs", "projector")


def inner_models(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The outermost transformers models by name: the model itself (""), or those inside a module of the user's own."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(f"{n}.") or not n for n in found):
            found[name] = module
    return found


def outside_base(model: nn.Module) -> set[str]:
    """Names of all modules outside the base model (the heads; around models inside a wrapper, its own modules too), and of
    the output embedding."""
    inner = inner_models(model)
    inside: set[int] = set()
    names: set[str] = set()
    for own in inner.values():
        base = own.base_model
        if base is not own:
            inside |= {id(m) for m in base.modules()}
            continue
        # a model that is its own base, such as CLIPForImageClassification
        heads = {id(m) for name, m in own.named_modules() if name.split(".")[0] in HEADS}
        inside |= {id(m) for m in own.modules()} - heads
    if not inner:
        names = {name for name, _ in model.named_modules() if name.split(".")[0] in HEADS}
    else:
        around = {
            id(m) for name, m in model.named_modules() if any(n.startswith(f"{name}.") or not name for n in inner)
        }
        names = {name for name, m in model.named_modules() if name and id(m) not in inside and id(m) not in around}
    embedding = output_embedding(model)
    return names | {name for name, m in model.named_modules() if m is embedding and m is not None}


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer from hidden states to the vocabulary; None for a model without one."""
    for own in inner_models(model).values():
        if (found := own.get_output_embeddings()) is not None:
            return found
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model's task head, by name; none for a bare or a language model."""
    outside = outside_base(model)
    embedding = output_embedding(model)
    kept = set() if embedding is None else {id(p) for p in embedding.parameters()}
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in outside and id(p) not in kept}


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model, or one inside a wrapper, is an encoder–decoder."""
    return any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) for m in model.modules())


def shifts_labels(model: nn.Module) -> bool:
    """Whether such a model's own loss usually predicts labels[1:]: causal language models, and classes derived from them."""
    return any(_shifts(own) for own in inner_models(model).values())


def _shifts(model: nn.Module) -> bool:
    names = {base.__name__ for base in type(model).__mro__}
    causal = not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    by_loss = getattr(model, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")
    return causal or (by_loss and not is_encoder_decoder(model))


def config_values(model: nn.Module, name: str) -> list[Any]:
    """What the configs of a model's parts say under a name."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [value for c in configs.values() if (value := getattr(c, name, None)) is not None]

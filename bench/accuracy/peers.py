"""What one would use instead of JACTUS, ready to train: adapters on the whole model, and compression followed by LoRA.

Every method is `make(model, context, budget) -> model`: it works on a float32 model in place, adapts the layers JACTUS would
replace, trains the task head whole, and leaves everything else frozen ('full' excepted). Adapters keep the whole model: they
take no notice of the budget, which is the deployed size of the targeted weights, Σ r(m+n) over Σ mn.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from eigentune import EigenTuneConfig, EigenTuneLinear, get_eigentune_model
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import prepare_model_inputs_fn_language_modeling
from torch import Tensor, nn

import jactus
from bench.baselines import full_fine_tuning, lora, lora_config
from jactus import JactusConfig, JactusError, Statistics
from jactus.model.families import head_parameters
from jactus.model.targets import find_targets
from jactus.report import Size

from . import compressors
from .compressors import COMPRESSORS

Batch = dict[str, Tensor]
EVA_PASSES = 50


@dataclass(frozen=True)
class Context:
    """What methods may look at: `statistics` and `batches` of the calibration rows, a seed, and the adapters' rank.

    batches: right- or left-padded, with or without labels, as the model takes them. rank: of every adapter; EVA
    redistributes it.
    """

    statistics: Statistics | None
    batches: Sequence[Batch]
    seed: int = 0
    rank: int = 16


Method = Callable[[nn.Module, Context, float], nn.Module]


def full(model: nn.Module, context: Context, budget: float = 1.0) -> nn.Module:
    """Full fine-tuning."""
    return full_fine_tuning(model)


def linears(model: nn.Module, context: Context, budget: float = 1.0) -> nn.Module:
    """Full fine-tuning of nothing but what JACTUS would replace, and the head: no embeddings, norms or biases."""
    model.requires_grad_(False)
    chosen = [target.module.get_parameter("weight") for target in find_targets(model, JactusConfig()).values()]
    for parameter in (*chosen, *head_parameters(model).values()):
        parameter.requires_grad_(True)
    return model


def plain_lora(model: nn.Module, context: Context, budget: float = 1.0) -> PeftModel:
    """LoRA, α = 2r."""
    return _seeded_lora(model, context)


def dora(model: nn.Module, context: Context, budget: float = 1.0) -> PeftModel:
    """DoRA, α = 2r: LoRA with the norm of every row of the weight trained apart."""
    return _seeded_lora(model, context, use_dora=True)


def rslora(model: nn.Module, context: Context, budget: float = 1.0) -> PeftModel:
    """rsLoRA, α = 2r as the others: LoRA whose scale is α/√r."""
    return _seeded_lora(model, context, use_rslora=True)


def hira(model: nn.Module, context: Context, budget: float = 1.0) -> PeftModel:
    """HiRA: the low-rank update multiplies the weight element by element, and so has its rank."""
    torch.manual_seed(context.seed)
    usual = lora_config(model, context.rank)
    return get_peft_model(
        model, HiraConfig(r=context.rank, target_modules=usual.target_modules, modules_to_save=usual.modules_to_save)
    )


def pissa(model: nn.Module, context: Context, budget: float = 1.0) -> PeftModel:
    """PiSSA, α = r as its authors and PEFT's example have it: the leading singular triplets train, the rest is frozen."""
    return _seeded_lora(model, context, init_lora_weights="pissa", lora_alpha=context.rank)


def corda(model: nn.Module, context: Context, budget: float = 1.0) -> PeftModel:
    """CorDA in instruction-previewed mode, α = r as in PEFT's example: the leading directions of W·Cov(x) train.

    PEFT's hook takes one sequence at a time and knows no mask, so each row goes in alone and unpadded. It scales each
    sequence's activations by their largest one, so sequences weigh differently.

    Raises JactusError for a layer that sees one token a row (a pooler): PEFT's hook cannot take it.
    """
    config = lora_config(
        model,
        context.rank,
        init_lora_weights="corda",
        lora_alpha=context.rank,
        corda_config=CordaConfig(corda_method="ipm"),
    )

    def run() -> None:
        for row in unpadded_rows(context.batches, next(model.parameters()).device):
            model(**row)

    try:
        preprocess_corda(model, config, run_model=run)
    except IndexError as e:  # squeezing (1, n) made the covariance a number
        raise JactusError(
            "corda: PEFT cannot adapt a layer that sees one token a row; use a model without pooler"
        ) from e
    return get_peft_model(model, config)


def eva(model: nn.Module, context: Context, budget: float = 1.0) -> PeftModel:
    """EVA, α = 2r and PEFT's defaults (ρ = 2): A is the principal components of the inputs, ranks are redistributed.

    Raises JactusError when the components have not settled after 50 passes over the batches: PEFT itself would go on for ever.
    A layer that sees fewer than ρ·r tokens a batch (a pooler under small batches) never settles.
    """
    torch.manual_seed(context.seed)
    config = lora_config(model, context.rank, init_lora_weights="eva", eva_config=EvaConfig())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*eva initialization used with low_cpu_mem_usage")
        adapted = get_peft_model(model, config)
    device = next(model.parameters()).device
    batches = [_inputs(batch, device) for batch in context.batches]
    left = EVA_PASSES * len(batches)

    def forward(model: nn.Module, inputs: Batch) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise JactusError(
                f"eva: components have not settled after {EVA_PASSES} passes over {len(batches)} batches; give larger "
                f"batches (at least {2 * context.rank} rows if a layer sees one token a row)"
            )
        return model(**inputs)

    initialize_lora_eva_weights(
        adapted,
        batches,
        forward_fn=forward,
        prepare_model_inputs_fn=_kept_positions,
        prepare_layer_inputs_fn=_kept_tokens,
        show_progress_bar=False,
    )
    return adapted


def eigentune(model: nn.Module, context: Context, budget: float = 1.0) -> nn.Module:
    """eigentune's spectral core: an r×r matrix between the leading singular vectors of each weight, beside the weight.

    Four times the adapters' rank (64, the most its kernels take): at 16 it would train a fiftieth of what LoRA does.
    """
    names, head = list(find_targets(model, JactusConfig())), head_parameters(model)
    get_eigentune_model(
        model,
        EigenTuneConfig(rank=4 * context.rank, method="spectral_core", target_modules=names, exclude_modules=[]),
    )
    for parameter in head.values():
        parameter.requires_grad_(True)
    return model


def then_lora(compressor: str) -> Method:
    """Compress to the budget, then put LoRA (α = 2r) on both layers of every pair.

    SVD-LLM adapts one of the two after the other; here they train together, which takes one run and not two.
    """

    def make(model: nn.Module, context: Context, budget: float) -> PeftModel:
        pairs = compressors.pair_names(model)
        return _seeded_lora(COMPRESSORS[compressor](model, context.statistics, budget), context, targets=pairs)

    return make


def cersa(model: nn.Module, context: Context, budget: float) -> nn.Module:
    """CERSA: `compressors.cersa`."""
    return compressors.cersa(model, context.statistics, budget)


METHODS: dict[str, Method] = {
    "full": full,
    "full[linears]": linears,
    "lora": plain_lora,
    "dora": dora,
    "rslora": rslora,
    "hira": hira,
    "pissa": pissa,
    "corda": corda,
    "eva": eva,
    "eigentune": eigentune,
    **{f"{name}+lora": then_lora(name) for name in COMPRESSORS},
    "cersa": cersa,
}


def sizes(model: nn.Module) -> Size:
    """Parameters of the whole model as any of the methods, or JACTUS, made it.

    stored: all that is there while it trains, eigentune's bases (buffers) and PEFT's frozen copy of the head included.
    folded: what is deployed, adapters merged into what they adapt: a dense layer stays dense and a pair a pair, which leaves its
    pivots out where its ranks are chosen so.
    optimizer_bytes: of AdamW, 8 for each trainable float32.
    """
    bases = [b for m in model.modules() if isinstance(m, EigenTuneLinear) for b in (m.U, m.Vh, m.S)]
    cores = {id(m.trainable()) for m in model.modules() if isinstance(m, EigenTuneLinear)}
    gone = sum(p.numel() for name, p in model.named_parameters() if _merges(name) or id(p) in cores)
    gone += sum(m[0].out_features ** 2 for m in model.modules() if isinstance(m, compressors.CompactPair))
    size = jactus.size(model)
    return replace(
        size,
        stored=size.stored + sum(b.numel() for b in bases),
        folded=size.folded - gone,
        stored_bytes=size.stored_bytes + sum(b.numel() * b.element_size() for b in bases),
    )


def _merges(name: str) -> bool:
    """Whether a parameter is PEFT's own: a part of an adapter, or the head as it was before training."""
    return any(part.startswith(("lora_", "hira_")) or part == "original_module" for part in name.split("."))


def _seeded_lora(model: nn.Module, context: Context, **options: Any) -> PeftModel:
    torch.manual_seed(context.seed)  # LoRA's A is random
    return lora(model, context.rank, **options)


def unpadded_rows(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """Every row as a batch of one (1, T), without its masked tokens and without labels."""
    for batch in (_inputs(batch, device) for batch in batches):
        mask = batch.get("attention_mask")
        for i in range(len(next(iter(batch.values())))):
            row = {key: value[i : i + 1] for key, value in batch.items()}
            if mask is not None:
                kept = mask[i].bool()
                row = {key: value[:, kept] if value.shape[1:] == kept.shape else value for key, value in row.items()}
            yield row


def _inputs(batch: Batch, device: torch.device) -> Batch:
    """A batch on `device` without labels: EVA would take a classifier's for a token mask."""
    return {key: value.to(device) for key, value in batch.items() if key != "labels"}


def _kept_positions(batch: Batch, config: LoraConfig) -> Tensor | None:
    """Where the tokens are that are not padding, (kept, 2); None where nothing is padded, as for images."""
    return prepare_model_inputs_fn_language_modeling(batch, config) if "input_ids" in batch else None


def _kept_tokens(inputs: tuple[Tensor, ...] | Tensor, positions: Tensor | None, name: str) -> Tensor:
    """A layer's inputs (kept, n); those of a pooler, one a row and never padded, as they are."""
    states = inputs if isinstance(inputs, Tensor) else inputs[0]
    if states.dim() == 2 or positions is None:
        return states.reshape(-1, states.shape[-1]).contiguous()  # PEFT hashes a view of it
    return states[positions.T.unbind()]

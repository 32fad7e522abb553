"""Methods by name. `jactus[union_share=0,metric=input]` is JACTUS with other settings than its defaults: an ablation;
`lora+embeddings` is LoRA with the word embeddings trained beside it, at a tenth of its learning rate."""

import ast
import re
from dataclasses import dataclass, fields

import torch
from torch import nn

import jactus
from jactus.config import FLAT
from jactus_kernels import JactusError

from .compressors import COMPRESSORS
from .peers import METHODS, Context

# Budgets are of the *deployed* size, r(m+n−r) a layer: the package's own default.
CONFIG = jactus.JactusConfig()

# Each method's grid for text classification, of equal size, around what its literature advises, and for ours what jactus.learning_rate does.
RATES = {
    "jactus": (5e-4, 1e-3, 2e-3),
    "full": (1e-4, 2e-4, 4e-4),
    "pissa": (5e-4, 1e-3, 2e-3),
    "corda": (5e-4, 1e-3, 2e-3),
}
OTHER_RATES = (1e-3, 2e-3, 4e-3)

EMBEDDINGS = "+embeddings"
EMBEDDING_SHARE = 0.1  # of the rate: what adapters and cores take is some ten times full fine-tuning's

OWN = ("calibration", "head", "cores")  # settings of a Variant that are not fields of JactusConfig


@dataclass(frozen=True)
class Variant:
    """JACTUS with `changes` of its configuration; `calibration` examples (None: the task's own number); `head` 'fitted'
    before calibration or 'random'; `cores`: 'uniform' takes, instead of the budget, as many core parameters as uniform
    ranks have at it."""

    changes: dict
    calibration: int | None = None
    head: str = "fitted"
    cores: str = ""

    def __post_init__(self) -> None:
        if self.head not in ("fitted", "random") or self.cores not in ("", "uniform"):
            raise JactusError(
                f"head={self.head!r}, cores={self.cores!r}: head is 'fitted' or 'random', cores 'uniform'"
            )

    @property
    def config(self) -> jactus.JactusConfig:
        return CONFIG.replace(**self.changes)


def variant(method: str) -> Variant | None:
    """The settings in a name like `jactus[damping=0.1,union=weight+covariance]`; None for a method that is not JACTUS."""
    found = re.fullmatch(r"jactus(?:\[(.*)\])?", method.removesuffix(EMBEDDINGS))
    if not found:
        return None
    known = {f.name: f.default for f in fields(jactus.JactusConfig)} | dict.fromkeys(FLAT)
    changes: dict = {}
    own: dict = {}
    for part in filter(None, (found[1] or "").split(",")):
        name, _, text = part.partition("=")
        if name in OWN:
            own[name] = int(text) if name == "calibration" else text
        elif name in known:
            changes[name] = _value(text, known[name])
        else:
            raise JactusError(f"{method}: {name!r} is no field of JactusConfig, nor one of {OWN}")
    return Variant(changes, **own)


def _value(text: str, default: object) -> object:
    if isinstance(default, tuple):
        return tuple(text.split("+"))
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a word
        return text


def rates(method: str) -> tuple[float, ...]:
    """The learning rates tried on validation rows."""
    return RATES.get(re.split(r"[\[+]", method)[0], OTHER_RATES)


def is_compressed(method: str) -> bool:
    """Whether the method has a budget, and so a score before training."""
    return variant(method) is not None or method.removesuffix("+lora") in (*COMPRESSORS, "cersa")


def needs_all(method: str) -> bool:
    """Whether a compressed method reads more of the sums than those of each layer's smaller side."""
    chosen = variant(method)
    return chosen is None or not chosen.config.smaller_sides


def own_rates(method: str, model: nn.Module, lr: float) -> dict[str, float]:
    """The learning rates of modules that the method trains at another than `lr`, by endings of their names."""
    if not method.endswith(EMBEDDINGS):
        return {}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return {next(name for name, m in model.named_modules() if m is embedding): EMBEDDING_SHARE * lr}


def build(method: str, model: nn.Module, context: Context, budget: float) -> nn.Module:
    """The model made ready to train by `method`, in place. Raises JactusError for an unknown name."""
    if method.endswith(EMBEDDINGS):
        built = build(method.removesuffix(EMBEDDINGS), model, context, budget)
        built.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]
        return built
    chosen = variant(method)
    if chosen is None:
        if method not in METHODS:
            raise JactusError(f"no method {method!r}; known are jactus, jactus[field=value,…], {', '.join(METHODS)}")
        return METHODS[method](model, context, budget)
    torch.manual_seed(context.seed)
    plan = jactus.plan(model, context.statistics, chosen.config.replace(budget=budget), progress=False)
    if chosen.cores == "uniform":
        plan = with_as_many_cores(plan, plan.with_config(allocation="uniform").core_parameters)
    return jactus.compress(model, plan)


def with_as_many_cores(plan: jactus.Plan, wanted: int) -> jactus.Plan:
    """The plan at the largest budget (from half of its own) whose cores have `wanted` parameters at most, to a thousandth."""
    low, high = plan.config.budget.fraction / 2, 1.0  # at 1 all stays dense
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if plan.at(middle).core_parameters <= wanted else (low, middle)
    found = plan.at(low)
    if not 0.98 * wanted < found.core_parameters <= wanted:
        raise JactusError(
            f"no budget gives cores of {wanted} parameters; the nearest found, {low:.3f}, {found.core_parameters}"
        )
    return found

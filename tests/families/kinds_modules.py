"""Modules that hide what they do: in place, by another name, by another path, twice."""

from collections import namedtuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jactus
from jactus import JactusError

from .check import Result, configs
from .inputs import RAGGED, Data, text
from .kinds import judged, kind, plain, plain_data, tiny
from .media import classes, image, image_size
from .steps import FULL_RANK, brief


class Sequence(nn.Module):
    """Layers one after the other, on {"x": (B, T, 16), "y": …}."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.layers(x)


@kind(
    "relu-inplace",
    "the gradient at the Linear's output is that before the ReLU which overwrites it, with three dimensions and a bias",
)
def relu_inplace() -> Any:
    model = plain(Sequence(nn.Linear(16, 24), nn.ReLU(inplace=True), nn.Linear(24, 16)))
    return model, plain_data(model, 16)


class AddInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.first(x)
        h += x
        return self.second(h)


@kind("add-inplace", "`y += x` on a Linear's output")
def add_inplace() -> Any:
    model = plain(AddInPlace())
    return model, plain_data(model, 16)


@kind("swinv2", "the table of the continuous position bias is no token: exact, or refused by name")
def swinv2() -> Any:
    model = tiny("IMAGE_CLASSIFICATION", "swinv2")
    return model, Data(classes(image(model, image_size(model.config))), [1] * 4)


@kind(
    "encoder-layer", "torch's encoder layer reads its weights past the modules in eval mode: exact, or refused by name"
)
def encoder_layer() -> Any:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = plain(Sequence(layer))
    return model, plain_data(model, 16)


@kind("mamba", "dt_proj's weight is read past the module: exact, or refused by name")
def mamba() -> Any:
    model = tiny("CAUSAL_LM", "mamba")
    return model, text("CAUSAL_LM", model, RAGGED)


def _refuses(model: nn.Module, wrap: Any) -> Result:
    """A Linear whose weight is computed from others: refused, or else what it computes must stay the same when it trains."""
    layer = model.layers[0]
    wrap(layer)
    data = plain_data(model, 16)
    config = configs()["statistics"]
    try:
        statistics = jactus.calibrate(
            model, data.alone, config, loss=data.loss, statistics_dtype="float64", progress=False
        )
        before = model(**data.together[0]).detach()
        jactus.compress(model, jactus.plan(model, statistics, configs()["full"], progress=False))
        after = model(**data.together[0]).detach()
    except JactusError as e:
        return judged("", model, [], str(e))
    except Exception as e:
        return judged("", model, [f"raised {brief(e)}"])
    off = float((after - before).norm() / before.norm())
    how = "computes the same" if off < FULL_RANK else f"is off by {off:.1e}"
    return judged("", model, [f"not refused: what makes the weight is thrown away (at full rank it {how})"])


@kind("pruned", "torch.nn.utils.prune makes the weight anew in every forward: refused by name")
def pruned() -> Result:
    from torch.nn.utils import prune

    return _refuses(
        plain(Sequence(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))),
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
    )


@kind("weight-norm", "the old weight_norm makes the weight anew in every forward: refused by name")
def weight_norm() -> Result:
    return _refuses(plain(Sequence(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))), torch.nn.utils.weight_norm)


@kind("spectral-norm", "the old spectral_norm makes the weight anew in every forward: refused by name")
def spectral_norm() -> Result:
    return _refuses(plain(Sequence(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))), torch.nn.utils.spectral_norm)


class Named(nn.Module):
    """A backbone whose inner layers have the names of heads."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("fc", "head", "out", "classifier", "score"):
            setattr(self, name, nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        for name in ("fc", "head", "out", "classifier", "score"):
            x = torch.tanh(getattr(self, name)(x))
        return x


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Named()])

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.blocks[0](x)


@kind("inner-names", "inner layers called fc, head, out, classifier and score are layers like any other")
def inner_names() -> Any:
    model = plain(Backbone())
    data = plain_data(model, 16)
    statistics = jactus.calibrate(
        model, data.alone, configs()["statistics"], loss=data.loss, statistics_dtype="float64", progress=False
    )
    missing = [n for n in ("fc", "head", "out", "classifier", "score") if f"blocks.0.{n}" not in statistics.layers]
    if missing:
        return judged("", model, [f"{missing} are taken for heads"])
    return model, data


@kind("top-names", "a plain backbone's own layers fc, head and out: a head is only what was said to be one; or refused")
def top_names() -> Any:
    class Top(Named):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return super().forward(x)

    model = plain(Top())
    data = plain_data(model, 16)
    try:
        statistics = jactus.calibrate(
            model, data.alone, configs()["statistics"], loss=data.loss, statistics_dtype="float64", progress=False
        )
    except JactusError as e:
        return judged("", model, [], str(e))
    missing = [n for n in ("fc", "head", "out", "classifier", "score") if n not in statistics.layers]
    if missing:
        return judged(
            "", model, [f"{missing} are passed over without a word: a module of no library has no head by name"]
        )
    return model, data


Pair = namedtuple("Pair", "x y")


@kind("namedtuple", "a batch that is a namedtuple arrives as one")
def named_tuple() -> Any:
    model = plain(Sequence(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)))

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        return (model(batch.x) - batch.y).square().mean((1, 2))

    alone = [Pair(e["x"], e["y"]) for e in plain_data(model, 16).alone]
    return model, Data(
        alone,
        [1] * 4,
        together=[Pair(*map(torch.cat, zip(*alone)))],
        loss=loss,
        summed=lambda m, b, terms: loss(m, b).sum(),
        forward=lambda m, b: m(b.x),
    )


@kind("tuple-output", "return_dict=False: the loss comes first in a tuple; exact, or refused by name")
def tuple_output() -> Any:
    model = tiny("SEQUENCE_CLASSIFICATION", "bert")
    model.config.return_dict = False
    data = text("SEQUENCE_CLASSIFICATION", model, RAGGED)
    return model, Data(data.alone, data.terms, ragged=True, summed=lambda m, b, terms: m(**b)[0] * terms)


@kind("batch-encoding", "a BatchEncoding is a batch like a dict")
def batch_encoding() -> Any:
    from transformers import BatchEncoding

    model = tiny("SEQUENCE_CLASSIFICATION", "bert")
    data = text("SEQUENCE_CLASSIFICATION", model, RAGGED)
    return model, Data(
        [BatchEncoding(e) for e in data.alone], data.terms, together=[BatchEncoding(data.together[0])], ragged=True
    )


@kind("hf-hook", "a layer that carries accelerate's hook: exact, or refused by name")
def hf_hook() -> Any:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny("SEQUENCE_CLASSIFICATION", "bert")
    add_hook_to_module(model.bert.encoder.layer[0].output.dense, AlignDevicesHook(io_same_device=True))
    return model, text("SEQUENCE_CLASSIFICATION", model, RAGGED)


@kind("hf-hook-scaling", "a hook that changes what the layer gives is not thrown away without a word")
def hf_hook_scaling() -> Result:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubles(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model = plain(Sequence(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)))
    add_hook_to_module(model.layers[0], Doubles())
    return model, plain_data(model, 16)


@kind("called-twice", "a layer called twice in a forward: both calls count")
def called_twice() -> Any:
    class Twice(AddInPlace):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.second(F.gelu(self.first(F.gelu(self.first(x)))))

    model = plain(Twice())
    return model, plain_data(model, 16)


@kind("weight-also-read", "a weight that the model also multiplies by itself: D is of both uses, or refused by name")
def weight_also_read() -> Any:
    class Reads(AddInPlace):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.second(F.gelu(self.first(x)) @ self.first.weight)

    model = plain(Reads())
    return model, plain_data(model, 16)

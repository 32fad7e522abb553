"""A model as a graph of plain operators over named tensors, with the batch and the sequence left open.

    torch.export of the model with symbols for those axes  →  model.pt2, or through torch.onnx  →  model.onnx

Every graph is run on three shapes before it is handed out, and compared with the model.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from jactus_kernels import JactusError

Tensors = dict[str, Tensor]
OPEN_TEXT = ("input_ids", "attention_mask", "token_type_ids")


class NamedTensors(nn.Module):
    """A model from named tensors to a dictionary of tensors: no cache, no output class that a reader would need transformers for.

    `forward` has an argument for each input, by name or in their order, since torch.export cannot leave axes of **inputs open.
    """

    def __init__(self, model: nn.Module, inputs: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        takes = inspect.signature(model.forward).parameters
        options = {key: value for key, value in (("use_cache", False), ("return_dict", True)) if key in takes}
        names = list(inputs)

        def forward(*args: Tensor, **kwargs: Tensor) -> Tensors:
            return tensors_of(self.model(**dict(zip(names, args)), **kwargs, **options))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        self.forward = forward


def tensors_of(outputs: Any) -> Tensors:
    """What a model returns, as tensors by name; what is no tensor (hidden states, a cache) is left out."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if not isinstance(outputs, Mapping):
        outputs = {f"output_{i}": value for i, value in enumerate(outputs)}
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def example_for(model: nn.Module) -> Tensors | None:
    """Tensors such as a tokenizer or an image processor gives for `model`; None where its config does not say what it takes."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    takes = inspect.signature(model.forward).parameters
    if getattr(config, "is_encoder_decoder", False):
        return None
    if main == "input_ids":
        names = [name for name in OPEN_TEXT if name in takes]
        if not getattr(config, "type_vocab_size", 0) > 1:  # or its tokenizer has none
            names = [name for name in names if name != "token_type_ids"]
        made = {name: torch.ones(2, 8, dtype=torch.int64) for name in names}
        if "token_type_ids" in made:
            made["token_type_ids"] = torch.zeros(2, 8, dtype=torch.int64)
        return made
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if main == "pixel_values" and isinstance(channels, int) and size:
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.linspace(-1, 1, 2 * channels * height * width).view(2, channels, height, width)}
    return None


def open_axes(example: Tensors) -> dict[str, dict[int, str]]:
    """Which axes of each input are open, by name: the batch, and of token numbers and masks the sequence."""
    axes = {}
    for name, tensor in example.items():
        axes[name] = {0: "batch"}
        if tensor.dim() == 2 and not tensor.is_floating_point():
            axes[name][1] = "decoder_sequence" if name.startswith("decoder_") else "sequence"
    return axes


def trace(model: nn.Module, example: Tensors) -> ExportedProgram:
    """The exported program of `model`, with the axes of `open_axes` left open.

    Raises JactusError where torch cannot trace the model, or fixes an axis in the course of it.
    """
    axes = open_axes(example)
    try:
        with torch.no_grad():
            shapes = {name: dict.fromkeys(of, Dim.AUTO) for name, of in axes.items()}
            program = torch.export.export(NamedTensors(model, example), (), example, dynamic_shapes=shapes)
    except Exception as e:  # of many types, none of them torch.export's own
        raise JactusError(
            f"torch.export cannot trace {type(model).__name__} on {_shapes(example)}: {_begin(e)}. Pass another example=, or take "
            'to="torch" or to="dense"'
        ) from e
    for node in program.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "jactus":
            raise JactusError(
                f"{type(model).__name__} has {node.target} in its graph, an operator of jactus: move it to the CPU"
            )
        for axis, called in axes.get(node.target, {}).items() if node.op == "placeholder" else ():
            if isinstance(node.meta["val"].shape[axis], int):
                raise JactusError(
                    f"{type(model).__name__} can be traced only for a {called} of {example[node.target].shape[axis]}: pass example= "
                    'of the one shape that you serve, or take to="torch" or to="dense"'
                )
    return program


def write_program(model: nn.Module, example: Tensors, path: Path) -> None:
    """Write `model` as an ExportedProgram, which `torch.export.load(path).module()` runs on the inputs by name."""
    program = trace(model, example)
    runs = program.module()
    _check(model, example, lambda inputs: runs(**inputs), "exported program")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor")  # of tied weights, which are saved once and read as two
        torch.export.save(program, path)


def write_onnx(model: nn.Module, example: Tensors, path: Path) -> None:
    """Write `model` as ONNX: one file, or above 2 GB one and its weights beside it."""
    import onnxruntime

    program = trace(model, example)
    onnx: Any
    outputs = list(tensors_of(program.module()(**example)))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*axis name", UserWarning)  # two inputs that share an axis
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            onnx = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(example),
                output_names=outputs,
                dynamic_shapes=open_axes(example),
                verbose=False,
            )
    except Exception as e:
        raise JactusError(f"{type(model).__name__} cannot be written as ONNX: {_begin(e)}; take another form") from e
    onnx.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Tensors) -> Tensors:
        found = session.run(outputs, {name: t.numpy() for name, t in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(outputs, found)}

    _check(model, example, run, "ONNX graph")


def _other_shapes(example: Tensors) -> list[Tensors]:
    """The example, one more example than it has, and one alone that is shorter by one."""
    axes = open_axes(example)
    more = {name: torch.cat([t, t[:1]]) for name, t in example.items()}
    short = {name: t[:1, : t.shape[1] - 1] if 1 in axes[name] else t[:1] for name, t in example.items()}
    return [example, more, short]


@torch.no_grad()
def _check(model: nn.Module, example: Tensors, run: Callable[[Tensors], Tensors], form: str) -> None:
    """Compare on three shapes, to half of the dtype's digits: a wrong graph is off by far more, rounding by far less."""
    bound = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()) ** 0.5
    for inputs in _other_shapes(example):
        try:
            found = run(inputs)
        except Exception as e:
            raise JactusError(
                f"the {form} of {type(model).__name__} does not run on {_shapes(inputs)}, though it was made on {_shapes(example)}: "
                f"{_begin(e)}; nothing was written. Take another form"
            ) from e
        for name, right in NamedTensors(model, inputs)(**inputs).items():
            got, right = found[name].double(), right.double()
            off = float((got - right).norm() / right.norm()) if got.shape == right.shape else math.inf
            if not off <= bound:
                raise JactusError(
                    f"the {form} of {type(model).__name__} gives another {name} than the model on {_shapes(inputs)}: off by "
                    f"{off:.1e}, {tuple(got.shape)} for {tuple(right.shape)}; nothing was written. Take another form"
                )


def _shapes(example: Tensors) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in example.items())


def _begin(e: Exception) -> str:
    return " ".join(str(e).split())[:300]

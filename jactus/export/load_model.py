"""Load the compressed model of a folder with torch and transformers alone:

    from load_model import load
    model = load("folder")

The weights stay as small as they are stored, r(m+n−r) numbers a layer of rank r. This file belongs to the folder: copy it along.
"""

import math
import os
import re
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


class CompactLinear(nn.Module):
    """y = x Wᵀ + b for W (m, n) of rank r, of which r rows (m ≤ n) or columns span the others and stand first in `order`.

    m ≤ n: right (r, n) is those rows, left (m − r, r) makes the others of them. Else left (m, r) is those columns, right
    (n − r, r) makes the others. Without an order W is left right, (m, r) and (r, n).
    """

    def __init__(self, kept: dict[str, Any]) -> None:
        super().__init__()
        m, n, r = kept["m"], kept["n"], kept["rank"]
        self.out_features, self.in_features, self.transposed = m, n, kept["transposed"]
        pivoted = kept.get("pivoted", False)
        dtype, bias_dtype = (getattr(torch, kept[key]) if kept.get(key) else None for key in ("dtype", "bias_dtype"))
        self.left = nn.Parameter(torch.empty(m - r if pivoted and m <= n else m, r, dtype=dtype), requires_grad=False)
        right = (n - r, r) if pivoted and m > n else (r, n)
        self.right = nn.Parameter(torch.empty(right, dtype=dtype), requires_grad=False)
        self.order: Tensor | None
        self.register_buffer("order", torch.zeros(2, min(m, n), dtype=torch.int64) if pivoted else None)
        self.bias = nn.Parameter(torch.empty(m, dtype=bias_dtype), requires_grad=False) if kept["bias"] else None

    def forward(self, input: Tensor) -> Tensor:
        left, right, bias = (None if t is None else t.to(input.dtype) for t in (self.left, self.right, self.bias))
        assert left is not None
        assert right is not None
        if self.order is None:
            return nn.functional.linear(nn.functional.linear(input, right), left, bias)
        r = left.shape[1]
        if self.out_features <= self.in_features:
            z = nn.functional.linear(input, right)
            y = torch.cat([z, nn.functional.linear(z, left)], dim=-1).index_select(-1, self.order[1])
            return y if bias is None else y + bias
        x = input.index_select(-1, self.order[0])
        return nn.functional.linear(x[..., :r] + x[..., r:] @ right, left, bias)

    @property
    def weight(self) -> Tensor:
        """Right in shape, dtype and device, which some models ask for; its values are NaN, since W is not stored."""
        shape = (self.out_features, self.in_features)
        stand_in = self.left.new_full((), float("nan")).expand(shape[::-1] if self.transposed else shape)
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        return stand_in


def load(folder: str | os.PathLike, **kwargs: Any) -> transformers.PreTrainedModel:
    """The model of `folder`, in eval mode; kwargs are those of `from_pretrained` (dtype, device_map, …).

    Raises ValueError, before anything is allocated, where config.json claims layers that the model or the weight files do not have.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    layers = vars(config).pop("quantization_config")["layers"]
    if os.path.isdir(folder):
        check(layers, Path(folder))
    model_class = getattr(transformers, config.architectures[0])

    class Compact(model_class):  # type: ignore[misc, valid-type]
        _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
            *(model_class._keys_to_ignore_on_load_unexpected or ()),
            *(
                rf"^{re.escape(name)}\.weight$" for name in layers
            ),  # empty, to stop readers that know nothing of these layers
        ]

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            places = dict(self.named_modules())
            for name, kept in layers.items():
                shape = (kept["m"], kept["n"])
                found = getattr(places.get(name), "weight", None)
                if found is None or tuple(found.shape) != (shape[::-1] if kept["transposed"] else shape):
                    raise ValueError(f"{folder}/config.json: {name} is no layer of {shape[0]}×{shape[1]} in this model")
                self.set_submodule(name, CompactLinear(kept))

    Compact.__name__ = model_class.__name__  # by which transformers knows what is special about it
    model = Compact.from_pretrained(folder, config=config, **kwargs)
    model.__class__ = model_class
    return model


def check(layers: Any, folder: Path) -> None:
    """Raise ValueError where a record of layers is none that was ever written, or they are of more numbers than the files hold."""
    held = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                held += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} is truncated or corrupted ({e}); copy it again") from e
    for name, kept in layers.items():
        m, n, rank = (kept.get(key) for key in ("m", "n", "rank"))
        if not all(type(count) is int for count in (m, n, rank)) or not 0 < rank <= min(m, n) <= max(m, n) <= held:
            raise ValueError(f"{folder}/config.json claims of {name} what cannot be or is not there: {kept}")
    with torch.device("meta"):
        claimed = sum(t.numel() for kept in layers.values() for t in CompactLinear(kept).state_dict().values())
    if claimed > held:
        raise ValueError(
            f"{folder}/config.json claims layers of {claimed:,} numbers, and the weight files hold {held:,}: they do not belong "
            "together; copy the folder again"
        )

"""What a checkpoint's record says, checked before anything is made or read as it says."""

import math
import os
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from jactus_kernels import JactusError

from ..model.lowrank import compressed_layers
from ..options import is_floating, number, whole

DTYPES = ("dtype", "bias_dtype", "core_dtype")
FACTORS = ({"U", "V"}, {"left", "right"})


def check_record(record: Any, where: str) -> None:
    """Raise JactusError naming the layer where the record of low-rank layers (`JactusQuantizationConfig`) in the config.json at
    `where` is none that was ever written."""
    layers, trainable, files = record.layers, record.trainable, getattr(record, "files", {})
    wrong = ""
    if not isinstance(layers, dict) or not isinstance(trainable, list) or not isinstance(files, dict):
        wrong = "layers, trainable or files are not what they should be"
    elif odd := [each for each in (*trainable, *files, *files.values()) if not isinstance(each, str)]:
        wrong = f"{odd[0]!r} is no name"
    else:
        wrong = next((f"of {name} it says {kept}" for name, kept in layers.items() if not _is_layer(kept)), "")
    if wrong:
        raise JactusError(
            f"{where}/config.json is corrupted: {wrong:.300}; put the right one back, or save the model again"
        )


def _is_layer(kept: Any) -> bool:
    if not isinstance(kept, dict):
        return False
    m, n, rank = (kept.get(key, 0) for key in ("m", "n", "rank"))
    if not (_count(m) and _count(n) and _count(rank) and rank <= min(m, n)):
        return False
    width, block = kept.get("width"), kept.get("trainable_rank")
    return (
        kept.get("form") in ("core", "folded")
        and all(isinstance(kept.get(key, False), bool) for key in ("bias", "transposed", "pivoted"))
        and kept.keys() >= {"bias", "transposed"}
        and (kept["form"] == "folded" or "trainable_rank" in kept)
        and all(kept.get(key) is None or (isinstance(kept[key], str) and is_floating(kept[key])) for key in DTYPES)
        and (width is None or (_count(width) and rank <= width <= max(m, n)))
        and (block is None or (_count(block) and block <= rank))
        and number(kept.get("reach", 1.0))
    )


def _count(value: Any) -> bool:
    return whole(value) and value > 0


def check_places(paths: list[str], folder: str) -> None:
    """Raise JactusError where a weight file is none of safetensors, or lies outside the checkpoint's folder."""
    for path in paths:
        if not path.endswith(".safetensors"):
            raise JactusError(
                f"{path} is not safetensors, which jactus writes alone: it reads no pickles, whose reading can run code; save "
                "the model again"
            )
        local = os.path.isdir(folder)
        home = roots(Path(folder) if local else Path(path).parent)
        inside = any(root in Path(path).resolve().parents for root in home) and (local or ".." not in Path(path).parts)
        if not inside:
            raise JactusError(
                f"{path} lies outside the checkpoint's folder {folder}, by its name in the index or by a link: it is not read; "
                "copy the file into the folder"
            )


def roots(folder: Path) -> list[Path]:
    """Where a checkpoint's files may lie: in its folder and, in the cache of a hub, in the blobs that its folder links to."""
    here = folder.resolve()
    return [here, *(each.parent.parent / "blobs" for each in (here, *here.parents) if each.parent.name == "snapshots")]


def check_claims(model: nn.Module, recorded: Collection[str], paths: list[str]) -> None:
    """Raise JactusError where a weight file cannot be read, the files hold factors of more layers than are `recorded`, or the
    low-rank layers of the empty `model` are of more numbers than the files hold: nothing is allocated for what is not there, nor
    made up for what is."""
    held, parts = 0, defaultdict[str, set[str]](set)
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    held += math.prod(file.get_slice(name).get_shape())
                    layer, _, part = name.rpartition(".")
                    parts[layer].add(part)
        except (SafetensorError, OSError) as e:
            raise JactusError(
                f"{path} is truncated or corrupted ({e}); put the right one back, or save the model again"
            ) from e
    # counted, since some families have other names in their files
    factored = [name for name, its in parts.items() if any(pair <= its for pair in FACTORS)]
    if len(factored) > len(recorded):
        raise JactusError(
            f"{os.path.dirname(paths[0])}/config.json says of {len(recorded)} layers that they are low-rank, and the weight files hold "
            f"factors of {len(factored)}, e.g. {factored[0]}: they do not belong together; put the right ones back"
        )
    layers = compressed_layers(model)
    claimed = {name: sum(t.numel() for t in layer.state_dict().values()) for name, layer in layers.items()}
    if paths and sum(claimed.values()) > held:
        largest = max(claimed, key=lambda name: claimed[name])
        raise JactusError(
            f"config.json claims low-rank layers of {sum(claimed.values()):,} numbers, the most in {largest} ({layers[largest]}), and "
            f"the weight files in {os.path.dirname(paths[0])} hold {held:,}: they do not belong together; put the right ones back"
        )

"""What a run would do and what it takes, from the data and the model's shapes alone; nothing is written or computed."""

from pathlib import Path
from typing import Any

from ..calibration.passes import partition, sum_bytes
from ..calibration.summing import Summing
from ..model.targets import find_targets
from . import subject
from .encoding import encode
from .fitting import told
from .settings import Settings
from .training import steps
from .work import check_output


def cost(settings: Settings, verb: str = "fit") -> dict[str, Any]:
    """Counts by name, of a run from the start. Raises JactusError as the run would before it begins."""
    check_output(Path(settings.output))
    data = told(settings)
    encoded = encode(data, settings)
    model = subject.empty(settings, data)
    config = settings.config()
    targets = find_targets(model, config)
    limit = None if settings.memory_limit is None else int(settings.memory_limit)
    sums = Summing.checked(memory_limit=limit)
    passes = [sum(sum_bytes(t, config, sums) for t in part) for part in partition(targets, config, sums)]
    targeted = sum(t.m * t.n for t in targets.values())
    plan = 8 * targeted  # directions in float32 up to the full rank of each layer: twice the weights
    if verb == "calibrate":  # in passes, the sums of each and then all of them in one file
        files = sum(passes) * (1 if limit is None else 2)
    else:  # by part, the sums of one, and directions apart before they are in one file
        files = sum(passes) + plan if limit is None else max(passes) + 2 * plan
    parameters = sum(p.numel() for p in model.parameters())
    calibration, held_out = encoded.calibration(settings.calibration_rows), encoded.held_out()
    tokens = None if data.found.task == "images" else sum(len(row["input_ids"]) for row in encoded.train)
    return {
        "task": data.found.task,
        "because": data.found.why,
        "rows to train": len(data.train),
        "rows to validate": len(data.validation),
        "tokens to train on, a pass": tokens,
        "parameters": parameters,
        "layers to compress": len(targets),
        "parameters to deploy": parameters - targeted + int(settings.budget * targeted),
        "batches to calibrate on (forward and backward)": len(calibration) * len(passes),
        "steps of training": steps(len(encoded.train), settings),
        "batches to validate, in all (forward)": len(held_out) * (5 + int(settings.epochs)),
        "bytes of weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "bytes of calibration sums at a time, at most": max(passes),
        "bytes of files in OUTPUT/.work, about": files,
    }

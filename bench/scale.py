"""What large models take, estimated from their configs, and the estimate held to the peak of real runs.

python -m bench.scale table > bench/results/scale.md
python -m bench.scale measure llama-2-7b > bench/results/scale-llama-2-7b.json
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import jactus
from jactus.app.estimate import estimate

from . import memory, report

RESULTS = Path(__file__).parent / "results"
LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
QWEN: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16"}
VIT: dict[str, Any] = {"architectures": ["ViTForImageClassification"], "model_type": "vit"}


def _shape(kind: dict[str, Any], width: int, inner: int, blocks: int, heads: int, **more: Any) -> dict[str, Any]:
    own = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads}
    return kind | own | more


# What of the published config.json files decides sizes.
CONFIGS = {
    "Llama-2-7B": _shape(LLAMA, 4096, 11008, 32, 32, vocab_size=32000),
    "Llama-2-70B": _shape(LLAMA, 8192, 28672, 80, 64, num_key_value_heads=8, vocab_size=32000),
    "Llama-3-8B": _shape(LLAMA, 4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256),
    "Qwen2.5-1.5B": _shape(
        QWEN, 1536, 8960, 28, 12, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True
    ),
    "Qwen2.5-7B": _shape(QWEN, 3584, 18944, 28, 28, num_key_value_heads=4, vocab_size=152064),
    "ViT-B": _shape(VIT, 768, 3072, 12, 12),
    "ViT-L": _shape(VIT, 1024, 4096, 24, 16),
    "ViT-H": _shape(VIT, 1280, 5120, 32, 16, patch_size=14),
}
# Two blocks with the shapes of Llama-2-7B's and its vocabulary, their sides divided. Whole, they take 40 minutes of one thread.
BLOCKS = {"llama-2-7b": 1, "llama-2-7b-half": 2, "llama-2-7b-quarter": 4}
SMOLLM2 = _shape(
    LLAMA, 576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, dtype="float32"
)
TOKENS = 128
BUDGET = 0.5
LIMIT = 600e6  # bytes of sums at a time for the whole sides: a third of what they sum


def table() -> str:
    """A row a model: GB by stage, and the sums with directions for the task, which need covariances whole."""
    rows = []
    for name, config in CONFIGS.items():
        print(name, file=sys.stderr, flush=True)
        plain = estimate(config)
        task = estimate(config, jactus.JactusConfig(union_share=0.1))
        rows.append(
            (
                name,
                f"{plain.parameters / 1e9:.2f}",
                plain.dtype,
                *(_gb(b) for b in (plain.weights, plain.sums, task.sums, plain.plan, plain.planning, plain.training)),
                _gb(plain.deployed),
                f"{plain.flops / 1e15:.1f}",
            )
        )
    head = ("model", "10⁹ parameters", "dtype", "weights", "sums", "sums, with task directions", "plan")
    return report.table((*head, "peak of planning", "training", "deployed", "PFLOP of calibration"), rows)


def h100() -> str:
    """A row a model and a number of GPUs of 80 GB: GB on each of them, weights and sums spread evenly, or the weights offloaded."""
    rows = []
    for name in ("Llama-2-7B", "Llama-2-70B"):
        weights = estimate(CONFIGS[name]).weights
        e = estimate(CONFIGS[name], memory_limit=weights // 4)
        for count in (1, 8):
            sums = e.at_a_time / count
            adapting = e.weights / count + max(sums + e.working + e.directions, e.making)
            away = e.by_part - e.weights
            alone = _fits(away) if count == 1 else "–"
            rows.append(
                (name, str(count), str(e.passes), _fits(adapting), alone, _fits(e.training / count), _gb(e.on_disk))
            )
    head = ("model", "GPUs", "passes", "adapting, each", "adapting, weights offloaded", "training, each", "on the disk")
    return report.table(head, rows)


def _fits(size: float) -> str:
    return _gb(size) if size < 80e9 else f"{_gb(size)}, too much"


def checked() -> str:
    """A row a run: the estimate of its peak beside the peak."""
    rows = []
    for name, run in _runs().items():
        e = estimate(SMOLLM2) if name == "smollm2" else estimate(
            _blocks(BLOCKS[name]), jactus.JactusConfig(budget=run["budget"]), memory_limit=run["memory_limit"]
        )  # fmt: skip
        if name == "smollm2":
            held, expected, peak = (e.weights, e.sums, e.plan, e.working), e.planning, run["peak"]
        else:
            working = e.by_part - e.weights - e.at_a_time
            held, expected, peak = (e.weights, e.at_a_time, 0, working), e.by_part, run["peaks"]["adapt"]
        sizes = ["–" if b == 0 else _gb(b) for b in held]
        rows.append((_named(name), *sizes, _gb(expected), _gb(peak), f"{expected / peak:.2f}"))
    head = ("model", "weights", "sums at a time", "plan", "one layer", "estimate", "peak", "estimate / peak")
    return report.table(head, rows)


def stages() -> str:
    """A row a run that went all the way: the peak of each stage, and minutes in all."""
    rows = []
    for name, run in _runs().items():
        if "peaks" in run:
            peaks = [_gb(run["peaks"][stage]) for stage in ("adapt", "fold", "save", "reload")]
            same = "yes" if run["same logits"] else "no"
            rows.append((_named(name), *peaks, same, f"{sum(run['seconds'].values()) / 60:.0f}"))
    return report.table(("model", "adapt", "fold", "save", "reload", "same logits", "minutes"), rows)


def _runs() -> dict[str, Any]:
    files = {name: RESULTS / f"scale-{name}.json" for name in ("smollm2", *BLOCKS)}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def _named(name: str) -> str:
    if name == "smollm2":
        return "SmolLM2-135M, planned at once"
    divided = f", sides ÷ {BLOCKS[name]}" if BLOCKS[name] > 1 else ""
    return f"two blocks of Llama-2-7B{divided}, by part"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2f}"


def measure(name: str) -> dict[str, Any]:
    """The most memory in use, beyond what the process had before it made the model, on so few tokens that activations are little."""
    return {**(_planned() if name == "smollm2" else _all_the_way(BLOCKS[name])), "versions": report.versions()}


def _planned() -> dict[str, Any]:
    """Calibrated and planned, all in memory."""
    from .models import smollm2

    memory.forget_peak()
    before, started = memory.used() or 0, time.perf_counter()
    model, config = smollm2()[0], jactus.JactusConfig()
    ids = _ids(1)
    statistics = jactus.calibrate(model, ids, config, verify=False, progress=False)
    memory.forget_peak()  # what the activations took goes back to the system
    with _Peak() as peak:
        jactus.plan(model, statistics, config, progress=True)
    return {"peak": peak.most - before, "seconds": time.perf_counter() - started}


def _all_the_way(divided: int) -> dict[str, Any]:
    """Adapted by part, folded, saved and loaded again."""
    limit = int(LIMIT / divided**2)
    memory.forget_peak()
    before, peaks, seconds = memory.used() or 0, {}, {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        memory.forget_peak()
        started = time.perf_counter()
        with _Peak() as peak:
            yield
        peaks[name], seconds[name] = peak.most - before, time.perf_counter() - started
        print(name, peaks[name], round(seconds[name]), file=sys.stderr, flush=True)

    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**_blocks(divided)), dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        with stage("adapt"):
            jactus.adapt(model, _ids(2), BUDGET, memory_limit=limit, verify=False, progress=True)
        with stage("fold"):
            jactus.fold(model)
        with torch.no_grad():
            wanted = model(**_ids(1)[0]).logits
        with stage("save"):
            jactus.save_pretrained(model, folder)
        del model
        with stage("reload"):
            model = LlamaForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            same = torch.equal(model(**_ids(1)[0]).logits, wanted)
    return {"memory_limit": limit, "budget": BUDGET, "peaks": peaks, "seconds": seconds, "same logits": same}


def _blocks(divided: int) -> dict[str, Any]:
    return CONFIGS["Llama-2-7B"] | {
        "hidden_size": 4096 // divided,
        "intermediate_size": 11008 // divided,
        "num_hidden_layers": 2,
        "dtype": "float32",
    }


def _ids(count: int) -> list[dict[str, torch.Tensor]]:
    drawn = torch.randint(5, 500, (count, 1, TOKENS), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


class _Peak:
    """The most memory in use inside the block, looked at ten times a second."""

    def __init__(self) -> None:
        self.most = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.done.wait(0.1):
            self.most = max(self.most, memory.used() or 0)

    def __enter__(self) -> "_Peak":
        self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.done.set()
        self.thread.join()


def main(argv: list[str]) -> None:
    if argv[0] == "measure":
        print(json.dumps(measure(argv[1]), indent=1))
    else:
        print("\n\n".join((table(), h100(), checked(), stages())))


if __name__ == "__main__":
    main(sys.argv[1:])

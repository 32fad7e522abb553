"""Tables in Markdown, a demo's rows in them and as JSON, and what a reader needs to repeat a measurement."""

import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("jactus-kernels", "torch", "transformers", "peft", "numpy")


@dataclass(frozen=True)
class Row:
    """One method: its score before and after training, and what it costs. Parameters are of the whole model."""

    method: str
    untrained: float | None
    trained: float | None
    stored: int
    folded: int
    trainable: int
    optimizer_bytes: int
    train_seconds: float | None
    learning_rate: float | None = None


def environment(seed: int) -> dict[str, Any]:
    """Seed, versions and machine."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "seed": seed,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}",
        **gpu,
    }


def named(method: str, budget: float) -> str:
    """A method with its budget, if it has one."""
    return method if budget == 1 else f"{method} {budget:.0%}"


def versions(*more: str) -> str:
    """Versions, machine and what else is given, in one line."""
    return "; ".join([*(f"{name} {value}" for name, value in environment(0).items() if name != "seed"), *more])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Its name, and which vector instructions torch uses: without AVX512 a product in bfloat16 is far slower than in float32."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def show(text: str) -> None:
    """Print, to a reader who may have seen enough (`… table | head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed into nothing


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads as plain text too; all but the first column to the right."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [str(c).rjust(w) if i else str(c).ljust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def methods_table(rows: Sequence[Row], score: str, form: str) -> str:
    """The rows with their score (`form` as in format()), sizes in millions, optimizer state in MB."""

    def shown(value: float | None) -> str:
        return "–" if value is None else format(value, form)

    sizes = ("stored", "folded", "trainable", "optimizer")
    header = ("method", f"{score}, untrained", "trained", *sizes, "training", "lr")
    cells = [
        (
            row.method,
            shown(row.untrained),
            shown(row.trained),
            f"{row.stored / 1e6:.2f}M",
            f"{row.folded / 1e6:.2f}M",
            f"{row.trainable / 1e6:.3f}M",
            f"{row.optimizer_bytes / 1e6:.1f} MB",
            "–" if row.train_seconds is None else f"{row.train_seconds:.0f} s",
            "–" if row.learning_rate is None else f"{row.learning_rate:.2g}",
        )
        for row in rows
    ]
    return table(header, cells)


def write_json(path: Path, rows: Sequence[Row], **more: Any) -> None:
    """Everything printed, for machines."""
    result = {**more, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

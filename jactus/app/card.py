"""The model card: OUTPUT/README.md, made from the record of a run and from nothing else."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .record import Run

TEMPLATE = Path(__file__).parent / "card.md"
PIPELINES = {"classification": "text-classification", "pairs": "text-classification", "images": "image-classification"}
WORDS = {
    "classification": "classification of texts",
    "pairs": "classification of pairs of texts",
    "images": "classification of images",
    "language": "language modelling",
    "instructions": "answering, with the loss on the answers alone",
}


def write(run: Run, folder: Path, model_class: str) -> None:
    """Write the card of the model in `folder`, a transformers `model_class`."""
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            base_model=None if Path(run.base).exists() else run.base,
            pipeline_tag=PIPELINES.get(run.task, "text-generation"),
            tags=["jactus", "compressed"],
            metrics=[run.metric],
        ),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        **_filled(run, folder, model_class),
    )
    card.save(folder / "README.md")


def _filled(run: Run, folder: Path, model_class: str) -> dict[str, Any]:
    dense, _, deployed = run.sizes
    ranks = [layer for layer in run.layers if layer.rank is not None]
    shares = sorted(layer.rank / min(layer.m, layer.n) for layer in ranks if layer.rank is not None)
    full = sum(share == 1 for share in shares)
    loader = "AutoImageProcessor" if run.task == "images" else "AutoTokenizer"
    auto = {"text-classification": "SequenceClassification", "image-classification": "ImageClassification"}
    return {
        "run": run,
        "name": Path(run.base).name,
        "what": WORDS[run.task],
        "auto": f"AutoModelFor{auto.get(PIPELINES.get(run.task, ''), 'CausalLM')}",
        "loader": loader,
        "folder": folder.name,
        "model_class": model_class,
        "dense": dense,
        "deployed": deployed,
        "layers": len(ranks),
        "full": full,
        "least": shares[0] if shares else 1.0,
        "median": shares[len(shares) // 2] if shares else 1.0,
        "budget": run.config["budget"],
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True).strip(),
        "shown": _shown(run.metric),
        "columns": ", ".join(f"`{c}`" for c in [*run.data["columns"]["text"], run.data["columns"]["label"]] if c),
    }


def _shown(metric: str) -> Any:
    return (lambda value: f"{value:.2f}") if metric == "perplexity" else (lambda value: f"{value:.4f}")

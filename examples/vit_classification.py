"""The paper's vision setting: a ViT, compressed and adapted to image data sets one after the other. A script to copy.

    python examples/vit_classification.py --model google/vit-base-patch16-224-in21k --data data/pets data/dtd --output vit

MODEL is a local folder or a hub name. A data set is a folder with train/<class>/*.jpg and test/<class>/*.jpg or, where
the `datasets` library is installed, its hub name. docs/reproduce-paper.md says where each default comes from.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import jactus
from jactus import JactusConfig, JactusError
from jactus.calibration.passes import partition, sum_bytes
from jactus.calibration.summing import Summing
from jactus.model.targets import find_targets

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEAST = {"max_train": 1, "max_test": 1, "head_rows": 1, "calibration_rows": 1, "batch_size": 1, "memory_limit": 1}
LEAST |= dict.fromkeys(("epochs", "learning_rate", "warmup", "workers", "seed"), 0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, nargs="+", help="folders, or names for the `datasets` library")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--label-column", default="label", help="of a hub data set; CIFAR-100 has fine_label")
    parser.add_argument("--test-split", default="test", help="of a data set: its folder's or split's name")
    parser.add_argument("--max-train", type=int, help="training images a data set, drawn by --seed; all by default")
    parser.add_argument("--max-test", type=int)
    parser.add_argument("--budget", type=float, default=0.8, help="what to keep of the linear layers, in (0, 1]")
    parser.add_argument(
        "--accounting",
        choices=["compact", "folded", "three_factor"],
        default="compact",
        help="what a rank counts: as it is deployed, as a pair of factors, or with its core as the paper counts",
    )
    parser.add_argument("--union", nargs="+", default=["weight", "gradient"], help="weight, covariance, gradient")
    parser.add_argument("--union-share", type=float, default=0.0, help="what part of each rank the union's others have")
    parser.add_argument("--head-rows", type=int, default=5000, help="images that the fresh head is fitted to")
    parser.add_argument("--calibration-rows", type=int, default=1024)
    parser.add_argument("--memory-limit", type=float, help="bytes of sums at a time, e.g. 40e9; more takes more passes")
    parser.add_argument("--statistics-device", help="where the sums are kept, e.g. cpu; the model's by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16 while training")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument(
        "--learning-rate", type=float, help="of the cores and the head; by default jactus.learning_rate's"
    )
    parser.add_argument("--warmup", type=float, default=0.06, help="a part of all steps; from 1 on, a number")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> JactusConfig:
    """Refuse what cannot work before anything is loaded; returns the settings of the method, which check themselves."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise JactusError(f"--{name.replace('_', '-')} is {value}; it must be {least} or more")
    names = [Path(data).name for data in args.data]
    if len(set(names)) < len(names):
        raise JactusError(f"--data has two data sets of one name among {names}; results go by name: rename a folder")
    if (args.output / "results.json").exists():
        raise JactusError(f"{args.output / 'results.json'} exists; choose another --output, or move it away")
    if DEVICE == "cpu" and str(args.statistics_device).startswith("cuda"):
        raise JactusError(f"--statistics-device is {args.statistics_device}, and torch finds no GPU; use cpu")
    if DEVICE == "cuda" and args.bf16 and not torch.cuda.is_bf16_supported():
        raise JactusError(f"--bf16: {torch.cuda.get_device_name()} has no bfloat16; leave the option out")
    return JactusConfig().replace(
        budget=args.budget,
        accounting=args.accounting,
        union=args.union,
        union_share=args.union_share,
    )


def summing(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `jactus.calibrate` that steer its sums."""
    limit = None if args.memory_limit is None else int(args.memory_limit)
    return {
        "statistics_dtype": "float32",
        "statistics_device": args.statistics_device,
        "loss_scale": 1.0,
        "memory_limit": limit,
    }


def prepare(args: argparse.Namespace, config: JactusConfig) -> Any:
    """Print what calibration will hold beside what there is, and refuse what can never fit; returns the image processor.

    No weight is loaded yet.
    """
    try:
        processor, model_config = AutoImageProcessor.from_pretrained(args.model), AutoConfig.from_pretrained(args.model)
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(model_config)
    except (OSError, ValueError) as e:
        raise JactusError(f"--model {args.model} is neither a folder nor a hub name of an image model: {e}") from e
    sums = Summing.checked(*summing(args).values())
    parts = partition(find_targets(model, config), config, sums)
    passes = [sum(sum_bytes(t, config, sums) for t in part) for part in parts]
    weights = sum(p.numel() for p in model.parameters()) * getattr(torch, args.dtype).itemsize
    place = (sums.device or torch.device(DEVICE)).type
    there = torch.cuda.get_device_properties(0).total_memory if place == "cuda" else psutil.virtual_memory().total
    needed = max(passes) + (weights if place == DEVICE else 0)
    held = f"at most {max(passes) / 1e9:.4g} GB of sums at a time, {sum(passes) / 1e9:.4g} GB in {len(passes)} pass(es)"
    print(f"weights {weights / 1e9:.4g} GB on {DEVICE}; {held}; {place} has {there / 1e9:.4g} GB")
    if needed > there:
        raise JactusError(
            f"calibration needs {needed / 1e9:.4g} GB on {place}, which has {there / 1e9:.4g} GB; give a smaller "
            "--memory-limit, --statistics-device cpu, or --union-share 0 (no directions for the task)"
        )
    return processor


@dataclass
class Images(Dataset):
    """A split: where each image is (a file, or a row of `table`) and its label; opened and resized when asked for."""

    rows: list[tuple[Path | int, int]]
    processor: Any
    table: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        source, label = self.rows[i]
        try:
            image = Image.open(source) if isinstance(source, Path) else self.table[source]
            pixels = self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        except OSError as e:
            raise JactusError(f"{source} is not an image that Pillow reads ({e}); replace it or take it away") from e
        return {"pixel_values": pixels, "labels": label}


def load(data: str, args: argparse.Namespace, processor: Any) -> tuple[Images, Images, list[str]]:
    """The training and test images of a data set, shuffled by the seed, and the names of its classes."""
    names = ("train", args.test_split)
    classes, splits = from_folder(Path(data), names) if Path(data).is_dir() else from_hub(data, names, args)
    for images, most in zip(splits, (args.max_train, args.max_test)):
        random.Random(args.seed).shuffle(images.rows)
        images.rows, images.processor = images.rows[:most], processor
    if len(classes) < 2:
        raise JactusError(f"{data} has the classes {classes}; at least two are needed")
    print(f"{Path(data).name}: {len(splits[0])} training and {len(splits[1])} test images, {len(classes)} classes")
    return splits[0], splits[1], classes


def from_folder(root: Path, names: Sequence[str]) -> tuple[list[str], list[Images]]:
    files = [sorted(f for f in (root / name).glob("*/*") if f.suffix.lower() in SUFFIXES) for name in names]
    for name, found in zip(names, files):
        if not found:
            raise JactusError(f"{root / name} holds no image; expected <class>/<image> in it, ending in {SUFFIXES}")
    classes = sorted({f.parent.name for f in files[0]})
    unknown = sorted({f.parent.name for f in files[1]} - set(classes))
    if unknown:
        raise JactusError(f"{root / names[1]} has the classes {unknown}, of which {root / names[0]} has no image")
    return classes, [Images([(f, classes.index(f.parent.name)) for f in found], None) for found in files]


def from_hub(data: str, names: Sequence[str], args: argparse.Namespace) -> tuple[list[str], list[Images]]:
    try:
        import datasets

        tables = [datasets.load_dataset(data, split=name) for name in names]
    except ImportError as e:
        raise JactusError(f"--data {data} is not a folder; check the path, or pip install datasets to fetch it") from e
    except (OSError, ValueError) as e:
        raise JactusError(f"--data {data} is neither a folder nor a data set with the splits {names}: {e}") from e
    features = tables[0].features
    columns = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if not columns or not isinstance(features.get(args.label_column), datasets.ClassLabel):
        raise JactusError(f"{data} has {features}; it needs an image and classes in --label-column {args.label_column}")
    splits = [Images(list(enumerate(table[args.label_column])), None, table[columns[0]]) for table in tables]
    return features[args.label_column].names, splits


def batches(images: Images, rows: int, args: argparse.Namespace) -> DataLoader:
    """The first rows in a fixed order, so that calibration can go over them again and resume."""
    chosen = Subset(images, range(min(rows, len(images))))
    return DataLoader(chosen, args.batch_size, collate_fn=default_data_collator, num_workers=args.workers)


@torch.no_grad()
def predict(model: torch.nn.Module, images: Images, args: argparse.Namespace) -> list[int]:
    model.eval()
    loader = tqdm(batches(images, len(images), args), "evaluating", unit="batch")
    return [int(i) for batch in loader for i in model(batch["pixel_values"].to(model.device)).logits.argmax(-1)]


def adapt(
    train: Images, test: Images, classes: list[str], folder: Path, args: argparse.Namespace, config: JactusConfig
) -> dict[str, Any]:
    """One data set, from the pretrained model to the deployed one; returns what is to be known of it."""
    set_seed(args.seed)
    started = time.perf_counter()
    model = AutoModelForImageClassification.from_pretrained(
        args.model,
        dtype=args.dtype,
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
        ignore_mismatched_sizes=True,  # a checkpoint fine-tuned on other classes
    ).to(DEVICE)
    accuracy, sizes = {}, {}

    def note(stage: str) -> list[int]:
        predictions = predict(model, test, args)
        accuracy[stage] = sum(p == label for p, (_, label) in zip(predictions, test.rows)) / len(test)
        sizes[stage] = asdict(jactus.size(model))
        print(f"{folder.name}, {stage}: accuracy {accuracy[stage]:.4f}, {sizes[stage]['stored']:,} parameters")
        return predictions

    jactus.fit_head(model, batches(train, args.head_rows, args))
    note("dense")
    rows = batches(train, args.calibration_rows, args)
    statistics = jactus.calibrate(model, rows, config, resume=folder / "calibration.safetensors", **summing(args))
    plan = jactus.plan(model, statistics, config)
    plan.save(folder / "plan.safetensors")
    jactus.compress(model, plan)
    rate = jactus.learning_rate(model) if args.learning_rate is None else args.learning_rate
    print(f"learning rate {rate:.2g}")
    note("compressed")
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=args.epochs,
        learning_rate=rate,
        warmup_steps=args.warmup,
        per_device_train_batch_size=args.batch_size,
        bf16=args.bf16,
        gradient_checkpointing=args.gradient_checkpointing,
        dataloader_num_workers=args.workers,
        use_cpu=DEVICE == "cpu",
        seed=args.seed,
        logging_steps=0.05,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=train, data_collator=default_data_collator)
    trainer.train()
    jactus.save_pretrained(model.eval(), folder / "trained")  # goes on training after a reload
    jactus.save_pretrained(jactus.fold(model), folder / "folded")  # two factors a layer, to deploy
    train.processor.save_pretrained(folder / "folded")
    predictions = note("folded")
    (folder / "predictions.json").write_text(json.dumps(predictions) + "\n")  # for paired tests of two methods
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    rows = {"train": len(train), "test": len(test), "classes": len(classes)}
    how = {"learning_rate": rate, "loss": losses, "seconds": time.perf_counter() - started}
    return {"accuracy": accuracy, "size": sizes, "rows": rows, **how}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    config = check(args)
    processor = prepare(args, config)
    found = {Path(data).name: load(data, args, processor) for data in args.data}
    versions = {module.__name__: module.__version__ for module in (jactus, torch, transformers)}
    results: dict[str, Any] = {"settings": vars(args), "config": config.to_dict(), "versions": versions, "datasets": {}}
    for name, (train, test, classes) in found.items():
        results["datasets"][name] = adapt(train, test, classes, args.output / name, args, config)
        each = [result["accuracy"] for result in results["datasets"].values()]
        results["average"] = {stage: sum(accuracy[stage] for accuracy in each) / len(each) for stage in each[0]}
        (args.output / "results.json").write_text(json.dumps(results, indent=2, default=str) + "\n")
    print(f"average of {len(found)}: {results['average']}; all in {args.output / 'results.json'}")
    return results


if __name__ == "__main__":
    try:
        main()
    except JactusError as e:
        sys.exit(f"vit_classification: {e}")

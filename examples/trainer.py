"""Compress and adapt a text classifier with transformers' own Trainer: a script to copy.

    python examples/trainer.py --model MODEL --data rows.jsonl --output small --budget 0.8

MODEL is a local folder or a hub name; rows.jsonl holds one {"text": …, "label": 0} a line.
"""

import argparse
import json
from pathlib import Path

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import jactus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=0.8)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--lr", type=float, help="by default what jactus.learning_rate says of the model")
    parser.add_argument("--calibration-rows", type=int, default=2000)
    args = parser.parse_args()

    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encoded = [{**tokenizer(row["text"], truncation=True), "labels": row["label"]} for row in rows]
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1 + max(r["label"] for r in rows))

    collate = DataCollatorWithPadding(tokenizer)
    calibration = [collate(encoded[i : i + 32]) for i in range(0, min(len(encoded), args.calibration_rows), 32)]
    jactus.adapt(model, calibration, args.budget, fit_head=True)
    print(jactus.size(model))

    arguments = TrainingArguments(
        output_dir=str(args.output / "trainer"),
        num_train_epochs=args.epochs,
        learning_rate=args.lr or jactus.learning_rate(model),
        per_device_train_batch_size=32,
        warmup_steps=0.06,
        save_strategy="no",
        report_to="none",
    )
    Trainer(model=model, args=arguments, train_dataset=encoded, data_collator=collate).train()

    jactus.save_pretrained(model.eval(), args.output / "trained")  # goes on training after a reload
    jactus.save_pretrained(jactus.fold(model), args.output / "folded")  # two factors a layer, to deploy
    tokenizer.save_pretrained(args.output / "folded")


if __name__ == "__main__":
    main()

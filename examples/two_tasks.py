"""Two text classifiers on one set of bases: train a set of cores for each, and serve both from one model.

    python examples/two_tasks.py --model MODEL --data mood.jsonl topic.jsonl --output two

MODEL is a local folder or a hub name; each file holds one {"text": …, "label": 0} a line, and is the task of its name.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import jactus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=0.8)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = {f.stem: [json.loads(line) for line in f.read_text(encoding="utf-8").splitlines()] for f in args.data}
    classes = 1 + max(row["label"] for task in rows.values() for row in task)  # one head layout for all of them
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=classes)

    def batches(task: str) -> list[dict[str, torch.Tensor]]:
        made = []
        for i in range(0, len(rows[task]), 32):
            some = rows[task][i : i + 32]
            encoded = tokenizer([r["text"] for r in some], padding=True, truncation=True, return_tensors="pt")
            made.append({**encoded, "labels": torch.tensor([r["label"] for r in some])})
        return made

    # Bases that serve every task: found from batches of all of them.
    jactus.adapt(model, [batch for task in rows for batch in batches(task)], args.budget)
    jactus.save_pretrained(model, args.output / "base")

    tasks = jactus.Tasks(model, "untrained")
    for task in rows:
        tasks.set_active("untrained")
        tasks.add(task)
        tasks.set_active(task)
        train(model, batches(task), args.epochs)
        jactus.save_cores(model, args.output / f"{task}.safetensors")

    model.eval()
    base = jactus.size(model).stored_bytes
    print(f"one model: {base / 1e6:.1f} MB; each further task: {tasks.size('untrained') / 1e6:.1f} MB")
    for task in rows:  # a request says which task it is of
        tasks.set_active(task)
        right = total = 0
        for batch in batches(task):
            with torch.no_grad():
                right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
            total += len(batch["labels"])
        print(f"{task}: {right} of {total} training rows right")


def train(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]], epochs: int) -> None:
    """Any loop would do."""
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, jactus.learning_rate(model), weight_decay=0.0)
    model.train()
    for _ in range(epochs):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()

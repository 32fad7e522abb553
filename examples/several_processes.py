"""Compress and adapt a text classifier in several processes, each with its own part of the rows: a script to copy.

    torchrun --nproc-per-node 2 examples/several_processes.py --model MODEL --data rows.jsonl --output small

On GPUs the same, with a process for each GPU (`accelerate launch` does as well, and knows of several machines); with one process,
or none launched, it does what it does alone. MODEL is a local folder or a hub name; rows.jsonl holds one
{"text": …, "label": 0} a line.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import jactus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=0.8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--calibration-rows", type=int, default=2000)
    args = parser.parse_args()

    # It makes the process group, if processes were launched; on a CPU only when told that it is one.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    rank, ranks = accelerator.process_index, accelerator.num_processes
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encoded = [{**tokenizer(row["text"], truncation=True), "labels": row["label"]} for row in rows]
    collate = DataCollatorWithPadding(tokenizer)

    torch.manual_seed(0)  # the fresh head is to be the same on every rank
    classes = 1 + max(row["label"] for row in rows)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=classes).to(accelerator.device)

    # Every row on one rank; a sampler that makes shards even would count some of them twice.
    own = encoded[: args.calibration_rows][rank::ranks]
    calibration = [collate(own[i : i + 32]) for i in range(0, len(own), 32)]
    jactus.adapt(model, calibration, args.budget, fit_head=True, group=torch.distributed.group.WORLD)
    accelerator.print(jactus.size(model))

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], jactus.learning_rate(model), weight_decay=0.0
    )
    loader = DataLoader(encoded, batch_size=32, shuffle=True, collate_fn=collate)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # DDP, and batches of each rank's own
    wrapped.train()
    for _ in range(args.epochs):
        for batch in loader:
            accelerator.backward(wrapped(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    main = accelerator.is_main_process
    jactus.save_pretrained(model, args.output / "trained", is_main_process=main)  # goes on training after a reload
    jactus.save_pretrained(jactus.fold(model), args.output / "folded", is_main_process=main)  # to deploy
    if main:
        tokenizer.save_pretrained(args.output / "folded")
    accelerator.end_training()


if __name__ == "__main__":
    main()

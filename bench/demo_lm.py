"""The second, shorter demo: SmolLM2 gets smaller and goes on learning from Wikipedia; perplexity on held-out paragraphs.

`make demo-lm`, or `python -m bench.demo_lm --help`. The same steps as the main demo, with PEFT's LoRA as the peer; each
JACTUS model is folded, saved, and reloaded in a fresh process to the same perplexity.
"""

import argparse
import copy
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import jactus

from .baselines import lora, optimizer_bytes, trainable_parameters
from .data import wikipedia_lines
from .models import smollm2
from .report import Row, environment, methods_table, write_json
from .training import batches, faster_dtype, perplexity, token_blocks, train

LENGTH = 128
HELD_OUT_LINES = 50
CALIBRATION_BLOCKS = 48
LORA_RATE = 4e-3  # best on validation rows in bench/results/accuracy.csv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo-lm"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training-blocks", type=int, default=96, help=f"blocks of {LENGTH} tokens")
    parser.add_argument("--predict", type=Path, help=argparse.SUPPRESS)  # the fresh process's part
    parser.add_argument("--bfloat16", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    held_out_lines, training_lines = wikipedia_lines()[:HELD_OUT_LINES], wikipedia_lines()[HELD_OUT_LINES:]
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    model, tokenizer = smollm2()
    held_out = token_blocks(tokenizer, held_out_lines, LENGTH)
    autocast = faster_dtype() if args.predict is None else (torch.bfloat16 if args.bfloat16 else None)

    def score(candidate: nn.Module) -> float:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return perplexity(candidate, held_out)

    if args.predict:
        print(repr(score(AutoModelForCausalLM.from_pretrained(args.predict))))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    training = token_blocks(tokenizer, training_lines, LENGTH)[: args.training_blocks]
    print(f"Wikipedia: {len(training)} training and {len(held_out)} held-out blocks of {LENGTH} tokens")

    def fit(candidate: nn.Module, lr: float) -> float:
        return train(candidate, training, lr, epochs=1, batch_size=8, seed=args.seed, autocast=autocast).seconds

    dense = jactus.size(model).stored
    before = score(model)
    rows = [Row("dense", before, None, dense, dense, 0, 0, None)]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        statistics = jactus.calibrate(model, batches(training[:CALIBRATION_BLOCKS], 8, seed=args.seed))
    plan = jactus.plan(model, statistics)
    jactus.rank_map(plan, args.out / "ranks.png")
    jactus.spectra(plan, args.out / "spectra.png")

    print("PEFT LoRA r=16:")
    peer = lora(copy.deepcopy(model))
    seconds = fit(peer, LORA_RATE)
    stored = sum(p.numel() for p in peer.parameters())
    counts = trainable_parameters(peer), optimizer_bytes(peer)
    rows.append(Row("PEFT LoRA r=16", before, score(peer), stored, dense, *counts, seconds, LORA_RATE))
    for budget in (0.8, 0.5):
        name = f"JACTUS {budget:.0%} of the linear layers"
        print(f"{name}:")
        small = jactus.compress(copy.deepcopy(model), plan.at(budget))
        size, untrained, lr = jactus.size(small), score(small), jactus.learning_rate(small)
        seconds = fit(small, lr)
        counts = size.trainable, size.optimizer_bytes
        rows.append(Row(name, untrained, score(small), size.stored, size.folded, *counts, seconds, lr))
        deploy(small, args.out / f"smollm2-{budget:.0%}".replace("%", ""), score, autocast is not None)
    print(f"\n{methods_table(rows, 'perplexity', '.2f')}\n\n{time.perf_counter() - started:.0f} s in all")
    facts = environment(args.seed)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    write_json(args.out / "result.json", rows, environment=facts)


def deploy(model: nn.Module, folder: Path, score, bfloat16: bool) -> None:
    """Fold the model, save it, reload it in a fresh process, and insist on the same perplexity to the last digit."""
    jactus.save_pretrained(jactus.fold(model), folder)
    command = [sys.executable, "-m", "bench.demo_lm", "--predict", str(folder), *(["--bfloat16"] if bfloat16 else [])]
    found = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
    expected = score(model)
    if found != expected:
        raise SystemExit(f"the reloaded model differs: perplexity {found!r} against {expected!r}")
    print(f"  folded, saved, and reloaded by from_pretrained in a fresh process: perplexity {found:.4f}, identical")


if __name__ == "__main__":
    main()

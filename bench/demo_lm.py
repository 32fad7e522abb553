"""The second, shorter demo: SmolLM2 gets smaller and goes on learning from Wikipedia; perplexity on held-out paragraphs.

`make demo-lm`, or `python -m bench.demo_lm --help`.
"""

import argparse
import copy
import time
from pathlib import Path

import torch

import jactus

from .data import wikipedia_lines
from .demo import faster_dtype
from .models import smollm2
from .report import Row, environment, methods_table, write_json
from .training import Encoded, batches, perplexity, token_blocks, train

LENGTH = 128
HELD_OUT_LINES = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo-lm"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration-blocks", type=int, default=96, help=f"blocks of {LENGTH} tokens")
    parser.add_argument("--training-blocks", type=int, default=384)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    model, tokenizer = smollm2()
    lines = wikipedia_lines()
    held_out = token_blocks(tokenizer, lines[:HELD_OUT_LINES], LENGTH)
    training = token_blocks(tokenizer, lines[HELD_OUT_LINES:], LENGTH)[: args.training_blocks]
    autocast = faster_dtype()
    print(f"Wikipedia: {len(training)} training and {len(held_out)} held-out blocks of {LENGTH} tokens")

    def score(candidate: torch.nn.Module) -> float:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return perplexity(candidate, held_out)

    dense = jactus.size(model).stored
    rows = [Row("dense", score(model), None, dense, dense, 0, 0, None)]
    calibration: Encoded = training[: args.calibration_blocks]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        statistics = jactus.calibrate(model, batches(calibration, 8, seed=args.seed))
    plan = jactus.plan(model, statistics)
    jactus.rank_map(plan, args.out / "ranks.png")
    jactus.spectra(plan, args.out / "spectra.png")
    for budget in (0.8, 0.5):
        small = jactus.compress(copy.deepcopy(model), plan.at(budget))
        size, untrained = jactus.size(small), score(small)
        seconds = train(small, training, args.lr, epochs=1, batch_size=8, seed=args.seed, autocast=autocast).seconds
        name = f"JACTUS {budget:.0%} of the linear layers"
        rows.append(
            Row(
                name,
                untrained,
                score(small),
                size.stored,
                size.folded,
                size.trainable,
                size.optimizer_bytes,
                seconds,
                args.lr,
            )
        )
        jactus.save_pretrained(jactus.fold(small), args.out / f"smollm2-{budget:.0%}".replace("%", ""))
    print(f"\n{methods_table(rows, 'perplexity', '.2f')}\n\n{time.perf_counter() - started:.0f} s in all")
    facts = environment(args.seed)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    write_json(args.out / "result.json", rows, environment=facts)


if __name__ == "__main__":
    main()

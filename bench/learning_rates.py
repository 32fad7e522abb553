"""Which learning rate is each method's best on the demo's validation rows; `python -m bench.learning_rates`, an hour or two.

The test rows are not looked at. The demo's rates are the winners of this grid.
"""

import argparse
import copy

import torch

import jactus

from .baselines import full_fine_tuning, lora
from .data import sarcasm
from .demo import CALIBRATION_ROWS
from .models import minilm
from .training import accuracy, batches, encode, faster_dtype, train

GRID = {
    "full": (1e-4, 2e-4, 4e-4),
    "lora": (5e-4, 1e-3, 2e-3, 4e-3),
    "jactus": (2e-3, 4e-3, 6e-3, 8e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=GRID, action="append", help="only this method; may be repeated")
    parser.add_argument("--budget", type=float, default=0.8, help="of JACTUS")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    task, (model, tokenizer) = sarcasm(), minilm(2)
    training, validation = encode(tokenizer, task.train), encode(tokenizer, task.validation)
    jactus.fit_head(model, batches(training, 64))
    plan = jactus.plan(model, jactus.calibrate(model, batches(training[:CALIBRATION_ROWS], 32, seed=args.seed)))
    make = {"full": full_fine_tuning, "lora": lora, "jactus": lambda m: jactus.compress(m, plan.at(args.budget))}
    autocast = faster_dtype()
    for method in args.method or GRID:
        for lr in GRID[method]:
            candidate = make[method](copy.deepcopy(model))
            done = train(candidate, training, lr, epochs=2, seed=args.seed, autocast=autocast)
            print(
                f"{method} lr {lr:g}: validation accuracy {accuracy(candidate, validation):.4f}, last loss {done.loss:.3f}"
            )


if __name__ == "__main__":
    main()

"""The main job, on real weights and real data: MiniLM becomes smaller and learns to tell sarcastic headlines.

`make demo`, or `python -m bench.demo --help`. Fetches MiniLM and the headlines, fits the head, calibrates, plans 80% and
50%, compresses, trains the cores, folds, saves, reloads in a fresh process, and compares with what one would do instead:
a linear probe, full fine-tuning and PEFT's LoRA, on the same data in the same order for the same number of epochs.
"""

import argparse
import copy
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import jactus

from .baselines import full_fine_tuning, lora, optimizer_bytes, trainable_parameters
from .data import sarcasm
from .models import MeanPooledClassifier, minilm
from .report import Row, environment, methods_table, table, write_json
from .training import Encoded, accuracy, batches, encode, faster_dtype, latency, logits, share_right, train

LEARNING_RATES = {"full": 2e-4, "lora": 2e-3}  # best on validation rows in bench/results/accuracy.csv
BUDGETS = (0.8, 0.5)
CALIBRATION_ROWS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for result.json, pictures, checkpoints"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", type=int, default=None, help="use only so many training rows (a quick look)")
    parser.add_argument("--predict", type=Path, help=argparse.SUPPRESS)  # the fresh process's part
    args = parser.parse_args()
    task = sarcasm()
    if args.predict:
        model = MeanPooledClassifier.from_pretrained(args.predict)
        test = encode(minilm(2)[1], task.test)
        save_file({"logits": logits(model, test)}, args.predict / "predicted.safetensors")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    model, tokenizer = minilm(2)
    training, test = encode(tokenizer, task.train)[: args.rows], encode(tokenizer, task.test)
    autocast = faster_dtype()
    speed = "bfloat16 autocast" if autocast else "float32"
    print(f"{task.name}: {len(training)} training and {len(test)} test headlines; training in {speed}")

    def fit(candidate: nn.Module, lr: float) -> float:
        return train(candidate, training, lr, epochs=args.epochs, seed=args.seed, autocast=autocast).seconds

    jactus.fit_head(model, batches(training, 64))
    dense = jactus.size(model).stored
    probe = accuracy(model, test)
    rows = [
        Row(
            "dense, linear probe",
            probe,
            None,
            dense,
            dense,
            sum(p.numel() for p in model.classifier.parameters()),
            0,
            None,
        )
    ]

    statistics = jactus.calibrate(model, batches(training[:CALIBRATION_ROWS], 32, seed=args.seed))
    plan = jactus.plan(model, statistics)
    jactus.rank_map(plan, args.out / "ranks.png")
    jactus.spectra(plan, args.out / "spectra.png")
    plan.save(args.out / "plan.safetensors")

    for method, make in (("full fine-tuning", full_fine_tuning), ("PEFT LoRA r=16", lora)):
        lr = LEARNING_RATES["lora" if "LoRA" in method else "full"]
        peer = make(copy.deepcopy(model))
        print(f"{method}:")
        seconds = fit(peer, lr)
        stored = sum(p.numel() for p in peer.parameters())
        score = accuracy(peer, test)
        rows.append(
            Row(method, None, score, stored, dense, trainable_parameters(peer), optimizer_bytes(peer), seconds, lr)
        )

    timings = []
    for budget in BUDGETS:
        print(f"JACTUS {budget:.0%}:")
        small = jactus.compress(copy.deepcopy(model), plan.at(budget))
        untrained, size, lr = accuracy(small, test), jactus.size(small), jactus.learning_rate(small)
        seconds = fit(small, lr)
        trained = logits(small, test)
        score = share_right(trained, torch.tensor(test.labels))
        name = f"JACTUS {budget:.0%}"
        rows.append(
            Row(name, untrained, score, size.stored, size.folded, size.trainable, size.optimizer_bytes, seconds, lr)
        )
        folder = args.out / f"minilm-sarcasm-{budget:.0%}".replace("%", "")
        folded = deploy(small, trained, folder, test)
        timings.append(time_forms(name, model, small, folded, test))

    header = ("forward pass of 64 headlines, ms", "dense", "three factors", "two factors (folded)")
    latencies = table(header, timings)
    print(f"\n{methods_table(rows, 'accuracy', '.4f')}\n\n{latencies}\n")
    print(f"{time.perf_counter() - started:.0f} s in all; pictures, checkpoints and result.json are in {args.out}")
    facts = environment(args.seed)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    write_json(args.out / "result.json", rows, latency={"header": header, "rows": timings}, environment=facts)


def deploy(model: nn.Module, unfolded: Tensor, folder: Path, test: Encoded) -> nn.Module:
    """Fold a copy, save it, reload it in a fresh process, and insist on identical predictions; returns the copy.

    unfolded: the model's logits on the test rows, to compare the folded ones with.
    """
    folded = jactus.fold(copy.deepcopy(model))
    jactus.save_pretrained(folded, folder)
    expected = logits(folded, test)
    subprocess.run([sys.executable, "-m", "bench.demo", "--predict", str(folder)], check=True)
    found = load_file(folder / "predicted.safetensors")["logits"]
    if not torch.equal(found, expected):
        raise SystemExit(f"the reloaded model differs: by {(found - expected).abs().max():.3g} in a logit")
    agree = (expected.argmax(1) == unfolded.argmax(1)).double().mean()
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    print(
        f"  folded and saved ({megabytes:.1f} MB), reloaded by from_pretrained in a fresh process: all {len(test)} logits "
        f"identical; folding changed a logit by {(expected - unfolded).abs().max():.1e} at most and {agree:.2%} of the "
        "predicted labels agree"
    )
    return folded


def time_forms(name: str, dense: nn.Module, small: nn.Module, folded: nn.Module, test: Encoded) -> tuple[str, ...]:
    """Median milliseconds of one forward pass in each form, interleaved on the same batch."""
    batch = next(iter(batches(test, 64, seed=0)))
    forms = (dense, small, folded)
    rounds = [[latency(form, batch, repeats=5, warmup=1) for form in forms] for _ in range(5)]
    medians = [sorted(times)[2] for times in zip(*rounds)]
    return (name, *(f"{1e3 * t:.0f} ({medians[0] / t:.2f}×)" for t in medians))


if __name__ == "__main__":
    main()

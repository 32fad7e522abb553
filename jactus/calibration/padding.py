"""Which places of a batch are padding: what a mask says, and what can be taken away without changing the loss."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from jactus_kernels import JactusError

from ..model.families import is_encoder_decoder
from .examples import Where, mapped, size, take, tensors
from .probes import IGNORED

Masks = dict[Where, Tensor]  # where it is in the batch → (B, T) bool, True for tokens
DECODER = ("labels, as the decoder's input",)  # the key of a mask that is made of labels
MASK = re.compile(r"(^|_)((attention|padding|pixel|input)_)?mask(_|$)")
OTHER_MASKS = re.compile(r"global_|perm_|head_mask|special_|bool_masked|cross_attention|causal_|time_indices")


def masks_of(model: nn.Module, batch: Any, index: int) -> Masks:
    """The masks of a batch that leave something out: those called one; and, in an encoder–decoder that is given no mask for its
    decoder, what comes after an example's last label.

    A mask of three dimensions (multiple choice) is one of (B · choices, T). Raises JactusError for an attention mask of another
    kind, which says for pairs of tokens who sees whom.
    """
    found: Masks = {}
    for path, t in tensors(batch):
        name = path[-1] if path else ""
        if not MASK.search(name) or OTHER_MASKS.search(name):
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
        counts = labels != IGNORED
        found[DECODER] = counts.flip(1).cumsum(1).flip(1) > 0
    return {path: mask for path, mask in found.items() if not bool(mask.all())}


def suspects(batch: Any, known: Masks) -> list[tuple[Where, bool, Tensor]]:
    """What may be a mask though it is not called one: each tensor of zeros and ones, (B, T), and its negative."""
    found = []
    for path, t in tensors(batch):
        name = path[-1] if path else ""
        if path in known or name.endswith(("label", "labels")) or (mask := as_mask("", t)) is None:
            continue
        if mask.shape[-1] == 1:  # one number an example
            continue
        if bool(mask.all()) or not bool(mask.any()):
            continue
        found += [(path, negated, m) for negated, m in ((False, mask), (True, ~mask)) if bool(m.any(-1).all())]
    return found


def as_mask(name: str, t: Tensor) -> Tensor | None:
    """(B, T) bool of a tensor of zeros and ones; None of anything else. A bool `…padding_mask` is torch's: True is padding."""
    square = t.dim() == 3 and t.shape[1] == t.shape[2]  # of pairs of tokens, unless it is of images
    if t.dim() not in (2, 3) or (square and "pixel" not in name):
        return None
    if t.dtype != torch.bool and not bool(((t == 0) | (t == 1)).all()):
        return None
    mask = t.bool().flatten(0, -2)
    return ~mask if "padding" in name and t.dtype == torch.bool else mask


def cut(batch: Any, masks: Masks, row: int, model: nn.Module, drop: int = 0) -> Any:
    """One example with its padding taken away, wherever a tensor has a place for it; and `drop` more of its last tokens."""
    whole = size(batch) or 1
    alone = take(batch, [row])
    keep: dict[Where, Tensor] = {}
    for path, mask in masks.items():
        own = mask.view(whole, -1, mask.shape[-1])[row].any(0).nonzero()[:, 0]
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
    beside = [m for m in masks if m != DECODER and m[:-1] == path[:-1]]
    kin = [m for m in beside if (affix := _affix(m[-1])) and affix in name]
    plain = [m for m in beside if not _affix(m[-1])]
    only = (plain or (beside if len(beside) == 1 else [])) or [None]  # type: ignore[list-item]
    return max(kin, key=lambda m: len(_affix(m[-1])), default=only[0])


def _affix(name: str) -> str:
    """What tells a mask from others of its kind: 'chosen' of attention_mask_chosen; '' of one with no such word."""
    return re.sub(r"(attention|key|padding|input)_|mask", "", name).strip("_") if "mask" in name else ""

"""Ranks that the hardware likes: padded once in storage, so that rows keep their 16-byte alignment."""

from torch import Tensor
from torch.nn.functional import pad

from .errors import JactusError


def padded_rank(r: int, multiple: int = 16) -> int:
    """The smallest multiple of `multiple` that holds r."""
    if multiple < 1:
        raise JactusError(f"padded_rank: multiple={multiple} must be at least 1")
    return -(-r // multiple) * multiple


def pad_rank(U: Tensor, C: Tensor, V: Tensor, multiple: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), C (r, r), V (n, r) with zeros up to the next multiple of the rank; the layer computes the same.

    The padding stays zero in training: the core's gradient there is qᵀ h with zero columns of q and of h. A rank of
    262 in bfloat16 has rows of 524 bytes, which neither vector loads nor the tensor memory engine can read.

    Raises JactusError where the three do not share a rank.
    """
    r = C.shape[0]
    if C.shape != (r, r) or U.shape[1] != r or V.shape[1] != r:
        raise JactusError(f"pad_rank: U {tuple(U.shape)}, C {tuple(C.shape)}, V {tuple(V.shape)} do not share a rank")
    more = padded_rank(r, multiple) - r
    return pad(U, (0, more)), pad(C, (0, more, 0, more)), pad(V, (0, more))

"""A basis with its pivot rows left out: x Π [I; B] and z (Π [I; B])ᵀ, each other's gradients.

A basis of d rows and r columns has r rows that span the others; in their coordinates these are the identity, which is neither
stored nor multiplied by: r (d − r) numbers and multiply-adds in the place of r d. (Pivoting factorisation; PIFA, ICML 2025.)
Plain PyTorch, and a kernel where the policy expects one to be faster: it writes z and z Bᵀ into their places in one launch,
which no library call does.
"""

from typing import Any

import torch
from torch import Tensor

from . import cpu, cuda, reference
from .errors import JactusError
from .ops import working_dtype


class _WithoutPivots(torch.autograd.Function):
    """`narrow`, or `widen` where `widens`: each is the other's gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, B: Tensor, order: Tensor, widens: bool) -> Tensor:
        of = _of(x)
        return of.widen(x, B, order) if widens else of.narrow(x, B, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, B, order, ctx.widens = inputs
        ctx.save_for_backward(B, order)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return _WithoutPivots.apply(g, *ctx.saved_tensors, not ctx.widens), None, None, None


def _of(x: Tensor) -> Any:
    if torch.compiler.is_compiling():
        return reference  # plain products, which a compiler fuses with what is around them
    return {"cpu": cpu, "cuda": cuda}.get(x.device.type, reference)


def narrow(x: Tensor, B: Tensor, order: Tensor) -> Tensor:
    """z = x Π [I; B]: the pivots among x's columns, and B's combinations of the other columns added.

    x: (..., d); B: (d − r, r), frozen; order: (2, d) integers, order[0] the pivots and then the others, order[1] the inverse;
    z: (..., r). Dtypes as `core_linear`. The gradient of x is `widen` of z's; nothing but B is kept for it.

    Raises JactusError for shapes or dtypes that do not fit, and for a B that requires grad.
    """
    dtype = _checked("narrow", x, x.shape[-1], B, order)
    return _WithoutPivots.apply(x.to(dtype), B.to(dtype), order, False)


def widen(z: Tensor, B: Tensor, order: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = z (Π [I; B])ᵀ + b: z in the places of the pivots, z Bᵀ in those of the others.

    z: (..., r); B: (d − r, r), frozen; order as in `narrow`; bias: (d,) or None; y: (..., d). Dtypes as `core_linear`.
    The gradient of z is `narrow` of y's.

    Raises JactusError for shapes or dtypes that do not fit, and for a B that requires grad.
    """
    dtype = _checked("widen", z, sum(B.shape), B, order, bias)
    y = _WithoutPivots.apply(z.to(dtype), B.to(dtype), order, True)
    return y if bias is None else y + bias.to(dtype)


def _checked(op: str, x: Tensor, d: int, B: Tensor, order: Tensor, bias: Tensor | None = None) -> torch.dtype:
    """The dtype to compute in."""
    fits = (
        B.dim() == 2
        and order.shape == (2, d)
        and sum(B.shape) == d
        and x.shape[-1] == (d if op == "narrow" else B.shape[1])
    )
    if not fits or (bias is not None and bias.shape != (d,)):
        raise JactusError(
            f"{op}: {tuple(x.shape)}, B {tuple(B.shape)}, order {tuple(order.shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)} do not fit; need B (d − r, r), order (2, d), bias (d,) and "
            f"{'x (..., d)' if op == 'narrow' else 'z (..., r)'}"
        )
    if order.is_floating_point() or order.dtype == torch.bool:
        raise JactusError(f"{op}: order has dtype {order.dtype}; it holds row numbers, int64 or int32")
    if B.requires_grad and torch.is_grad_enabled():
        raise JactusError(f"{op}: B requires grad, and it is not trained: its pivots would no longer be the identity")
    return working_dtype(op, x, B, bias)

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

    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor, order: Tensor, widens: bool) -> Tensor:
        ctx.save_for_backward(B, order)
        ctx.widens = widens
        of = _of(x)
        return of.widen(x, B, order) if widens else of.narrow(x, B, order)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        B, order = ctx.saved_tensors
        return _without_pivots(g, B, order, not ctx.widens), None, None, None


def _without_pivots(x: Tensor, B: Tensor, order: Tensor, widens: bool) -> Tensor:
    if _of(x) is reference:
        return reference.widen(x, B, order) if widens else reference.narrow(x, B, order)
    return _WithoutPivots.apply(x, B, order, widens)


class _CoreWiden(torch.autograd.Function):
    """`widen` of z Cᵀ in one call, which keeps z alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, C: Tensor, B: Tensor, order: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, C, B, order)
        return cpu.core_widen(z, C, B, order, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, C, B, order = ctx.saved_tensors
        need_z, need_C, _, _, need_bias = ctx.needs_input_grad
        of = reference if torch.is_grad_enabled() else cpu  # the former can be differentiated once more
        g_z, g_C = of.core_widen_backward(g, z, C, B, order, need_z, need_C)
        return g_z, g_C, None, None, g.reshape(-1, g.shape[-1]).sum(0) if need_bias else None


def _of(x: Tensor) -> Any:
    """Where the operators of x's device are."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # plain products, which a compiler fuses with what is around them, and which any transform knows
        return reference
    return {"cpu": cpu, "cuda": cuda}.get(x.device.type, reference)


def narrow(x: Tensor, B: Tensor, order: Tensor) -> Tensor:
    """z = x Π [I; B]: the pivots among x's columns, and B's combinations of the other columns added.

    x: (..., d); B: (d − r, r), frozen; order: (2, d) integers, order[0] the pivots and then the others, order[1] the inverse;
    z: (..., r). Dtypes as `core_linear`. The gradient of x is `widen` of z's; nothing but B is kept for it.

    Raises JactusError for shapes or dtypes that do not fit, and for a B that requires grad.
    """
    dtype = _checked("narrow", x, x.shape[-1], B, order)
    return _without_pivots(x.to(dtype), B.to(dtype), order, False)


def widen(z: Tensor, B: Tensor, order: Tensor, bias: Tensor | None = None, core: Tensor | None = None) -> Tensor:
    """y = z (Π [I; B])ᵀ + b: z in the places of the pivots, z Bᵀ in those of the others; with a `core` C, of z Cᵀ.

    z: (..., r); B: (d − r, r), frozen; order as in `narrow`; bias: (d,) or None; y: (..., d). core: (r, q) or None, and with it
    z: (..., q), which is all that its gradient keeps. Dtypes as `core_linear`. The gradient of z is `narrow` of y's.

    Raises JactusError for shapes or dtypes that do not fit, and for a B that requires grad.
    """
    dtype = _checked("widen", z, sum(B.shape), B, order, bias, core)
    z, B, bias = z.to(dtype), B.to(dtype), None if bias is None else bias.to(dtype)
    if core is not None:
        core = core.to(dtype)
        if _of(z) is cpu:
            return _CoreWiden.apply(z, core, B, order, bias)
        z = torch.nn.functional.linear(z, core)
    y = _without_pivots(z, B, order, True)
    return y if bias is None else y + bias


def _checked(
    op: str, x: Tensor, d: int, B: Tensor, order: Tensor, bias: Tensor | None = None, core: Tensor | None = None
) -> torch.dtype:
    """The dtype to compute in."""
    if core is not None and (core.dim() != 2 or core.shape[0] != B.shape[-1]):
        raise JactusError(
            f"{op}: core {tuple(core.shape)} does not fit B {tuple(B.shape)}; need (r, q) for B (d − r, r)"
        )
    fits = (
        B.dim() == 2
        and order.shape == (2, d)
        and sum(B.shape) == d
        and x.shape[-1] == (d if op == "narrow" else B.shape[1] if core is None else core.shape[1])
    )
    if not fits or (bias is not None and bias.shape != (d,)):
        raise JactusError(
            f"{op}: {tuple(x.shape)}, B {tuple(B.shape)}, order {tuple(order.shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)} do not fit; need B (d − r, r), order (2, d), bias (d,) and "
            f"{'x (..., d)' if op == 'narrow' else 'z (..., r)' if core is None else 'z (..., q) for core (r, q)'}"
        )
    if order.is_floating_point() or order.dtype == torch.bool:
        raise JactusError(f"{op}: order has dtype {order.dtype}; it holds row numbers, int64 or int32")
    if B.requires_grad and torch.is_grad_enabled():
        raise JactusError(f"{op}: B requires grad, and it is not trained: its pivots would no longer be the identity")
    return working_dtype(op, x, B, bias, core)

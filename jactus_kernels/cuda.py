"""The CUDA (and ROCm) side of every operator: ask the policy, then run the kernels or plain torch.

No host synchronisation and no data-dependent allocation on either way, so every call can be captured in a CUDA graph.
Triton is imported at the first call that needs it.
"""

import torch
from torch import Tensor

from . import policy, reference
from .launches import Shape


def uses_triton(op: str, device: torch.device, dtype: torch.dtype, shape: Shape) -> bool:
    """What the policy says of an operator there."""
    index = torch.cuda.current_device() if device.index is None else device.index
    captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return policy.for_device(op, shape, dtype, index, captured).backend == "triton"


def _uses_triton(op: str, x: Tensor, m: int, n: int, r: int) -> bool:
    return uses_triton(op, x.device, x.dtype, Shape(x.shape[0], m, n, r, x.element_size()))


def covariance_update_(S: Tensor, X: Tensor, mask: Tensor | None = None, alpha: float = 1.0) -> None:
    """S += α · Xᵀ diag(mask) X on the lower triangle of S; the strict upper triangle is left undefined."""
    n = X.shape[1]
    if S.dtype == torch.float32 and S.is_contiguous() and _uses_triton("covariance_update", X, n, n, 0):
        from .covariance import covariance_update_ as kernel

        return kernel(S, X, mask, alpha)
    if mask is not None:
        # a fill, where indexing by the mask would wait for the device to count its rows
        X = X.masked_fill(~mask[:, None], 0)
    if X.element_size() == 2 and S.dtype == torch.float32 and _mm_has_out_dtype():
        S.add_(torch.mm(X.T, X, out_dtype=torch.float32), alpha=alpha)
    else:
        reference.covariance_update_(S, X, None, alpha)
    return None


def wide_product(X: Tensor, Y: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.wide_product`, of 2-byte values on the units for them."""
    if X.dtype == Y.dtype and X.element_size() == 2 and dtype == torch.float32 and _mm_has_out_dtype():
        return torch.mm(X, Y, out_dtype=torch.float32)
    return reference.wide_product(X, Y, dtype)


def core_linear(x: Tensor, U: Tensor, C: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
    """y = x (U C Vᵀ)ᵀ + b; x (T, n)."""
    return _layers("core_linear", x, U.shape[0], V).core_linear(x, U, C, V, bias)


def core_linear_train(x: Tensor, U: Tensor, C: Tensor, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`core_linear` and h = x V."""
    return _layers("core_linear_train", x, U.shape[0], V).core_linear_train(x, U, C, V, bias)


def core_linear_backward(
    g: Tensor, h: Tensor, U: Tensor, C: Tensor, V: Tensor, need_x: bool, need_C: bool
) -> tuple[Tensor, Tensor]:
    """g_x and g_C; one that is not needed comes back with no elements."""
    ours = _layers("core_linear_backward", g, U.shape[0], V)
    return ours.core_linear_backward(g, h, U, C, V, need_x, need_C)


def folded_linear(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """y = x (left right)ᵀ + b; x (T, n)."""
    return _layers("folded_linear", x, left.shape[0], right.T).folded_linear(x, left, right, bias)


def narrow(x: Tensor, B: Tensor, order: Tensor) -> Tensor:
    """z = x Π [I; B]; x (..., d)."""
    z = _scattered("narrow", x, B).narrow(x.reshape(-1, x.shape[-1]), B, order)
    return _in_shape(z, [*x.shape[:-1], B.shape[1]])


def widen(z: Tensor, B: Tensor, order: Tensor) -> Tensor:
    """y = z (Π [I; B])ᵀ; z (..., r)."""
    y = _scattered("widen", z, B).widen(z.reshape(-1, z.shape[-1]), B, order)
    return _in_shape(y, [*z.shape[:-1], order.shape[1]])


def _in_shape(x: Tensor, shape: list[int]) -> Tensor:
    """x in another shape, and no view: autograd lets no view out of a function be changed in place."""
    return torch.ops.aten._unsafe_view(x, shape)


def _layers(op: str, x: Tensor, m: int, V: Tensor):
    n, r = V.shape
    if not _uses_triton(op, x, m, n, r):
        return reference
    from . import fused

    return fused


def _scattered(op: str, x: Tensor, B: Tensor):
    """Where these run, for x (..., ·) and B (d − r, r)."""
    d, r = sum(B.shape), B.shape[1]
    T = x.numel() // x.shape[-1]
    m, n = (d, r) if op == "widen" else (r, d)
    if not uses_triton(op, x.device, x.dtype, Shape(T, m, n, r, x.element_size())):
        return reference
    from . import scatter

    return scatter


def _mm_has_out_dtype() -> bool:
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)

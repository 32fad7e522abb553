"""The public operators: torch.library custom ops with fake and autograd registrations.

Each op's default implementation is the reference; a device's own is registered on top of it. So on a GPU `torch.compile`,
`torch.export` and `opcheck` see one opaque, well-described operator. Where no kernel would run, a layer called as it is
(eagerly) is the reference itself: an operator's dispatch costs the host more than the two or three products do.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import cpu, cuda, reference
from .errors import JactusError
from .launches import Shape


@torch.library.custom_op("jactus::covariance_update", mutates_args={"S"})
def _covariance_update(S: Tensor, X: Tensor, mask: Tensor | None, alpha: float) -> None:
    reference.covariance_update_(S, X, mask, alpha)


_covariance_update.register_kernel("cpu")(cpu.covariance_update_)
_covariance_update.register_kernel("cuda")(cuda.covariance_update_)
_covariance_update.register_fake(lambda S, X, mask, alpha: None)


@torch.library.custom_op("jactus::core_linear", mutates_args=())
def _core_linear(x: Tensor, U: Tensor, C: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
    return reference.core_linear(x, U, C, V, bias)


_core_linear.register_kernel("cuda")(cuda.core_linear)


@_core_linear.register_fake
def _(x, U, C, V, bias):
    return x.new_empty(x.shape[0], U.shape[0])


@torch.library.custom_op("jactus::core_linear_train", mutates_args=())
def _core_linear_train(x: Tensor, U: Tensor, C: Tensor, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return reference.core_linear_train(x, U, C, V, bias)


_core_linear_train.register_kernel("cuda")(cuda.core_linear_train)


@_core_linear_train.register_fake
def _(x, U, C, V, bias):
    return x.new_empty(x.shape[0], U.shape[0]), x.new_empty(x.shape[0], V.shape[1])


@torch.library.custom_op("jactus::core_linear_backward", mutates_args=())
def _core_linear_backward(
    g: Tensor, h: Tensor, U: Tensor, C: Tensor, V: Tensor, need_x: bool, need_C: bool
) -> tuple[Tensor, Tensor]:
    return reference.core_linear_backward(g, h, U, C, V, need_x, need_C)


_core_linear_backward.register_kernel("cuda")(cuda.core_linear_backward)


@_core_linear_backward.register_fake
def _(g, h, U, C, V, need_x, need_C):
    return (
        g.new_empty((g.shape[0], V.shape[0]) if need_x else (0,)),
        g.new_empty(tuple(C.shape) if need_C else (0,)),
    )


def _save_for_backward(ctx, inputs, output) -> None:
    _, U, C, V, _ = inputs
    ctx.save_for_backward(output[1], U, C, V)


def _backward(ctx, g: Tensor, _g_h: Tensor):
    h, U, C, V = ctx.saved_tensors
    need_x, _, need_C, _, need_bias = ctx.needs_input_grad
    g_x = g_C = None
    if need_x or need_C:
        g_x, g_C = _core_linear_backward(g, h, U, C, V, need_x, need_C)
    return g_x if need_x else None, None, g_C if need_C else None, None, g.sum(0) if need_bias else None


_core_linear_train.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("jactus::folded_linear", mutates_args=())
def _folded_linear(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return reference.folded_linear(x, left, right, bias)


_folded_linear.register_kernel("cuda")(cuda.folded_linear)


@_folded_linear.register_fake
def _(x, left, right, bias):
    return x.new_empty(x.shape[0], left.shape[0])


def _over_tokens(op):
    """A vmap rule: a batch of x alone is more tokens; anything else runs one item at a time."""

    def rule(info, in_dims, x, *rest):
        if all(dim is None for dim in in_dims[1:]):
            batched = x.movedim(in_dims[0], 0)
            out = op(batched.flatten(0, 1), *rest)
            unflatten = lambda y: y.unflatten(0, batched.shape[:2])  # noqa: E731
            return (tuple(map(unflatten, out)), (0,) * len(out)) if isinstance(out, tuple) else (unflatten(out), 0)
        outs = [
            op(*(a if dim is None else a.select(dim, i) for a, dim in zip((x, *rest), in_dims)))
            for i in range(info.batch_size)
        ]
        if isinstance(outs[0], tuple):
            return tuple(torch.stack(column) for column in zip(*outs)), (0,) * len(outs[0])
        return torch.stack(outs), 0

    return rule


for _op in (_core_linear, _core_linear_train, _folded_linear):
    _op.register_vmap(_over_tokens(_op))


def covariance_update_(S: Tensor, X: Tensor, mask: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """S += α · Xᵀ diag(mask) X, in place, on the lower triangle of S; returns S.

    S: (n, n), float32 or float64, contiguous; its strict upper triangle is undefined until `symmetrize_(S)`.
    X: (T, n), any floating dtype and stride, T ≥ 0; mask: (T,) bool, True keeps a row. Sums are made in S's dtype.

    Raises JactusError for shapes, dtypes or devices that do not fit.
    """
    n = X.shape[-1]
    if X.dim() != 2 or S.shape != (n, n):
        raise JactusError(
            f"covariance_update_: S {tuple(S.shape)} and X {tuple(X.shape)} do not fit; "
            "pass X as (T, n) and S as (n, n) (flatten leading dimensions with X.flatten(0, -2))"
        )
    if S.dtype not in (torch.float32, torch.float64):
        raise JactusError(f"covariance_update_: S has dtype {S.dtype}; sums need float32 or float64")
    if S.device != X.device or not X.is_floating_point():
        raise JactusError(
            f"covariance_update_: S is on {S.device}, X is {X.dtype} on {X.device}; "
            "move both to one device and pass a floating X"
        )
    if mask is not None and (mask.shape != X.shape[:1] or mask.dtype != torch.bool):
        raise JactusError(
            f"covariance_update_: mask {tuple(mask.shape)} {mask.dtype} must be bool of shape ({X.shape[0]},)"
        )
    _covariance_update(S, X, mask, alpha)
    return S


def wide_product(X: Tensor, Y: Tensor, dtype: torch.dtype) -> Tensor:
    """X Y in `dtype`, under autocast too: the values are not rounded first, nor the sums in between.

    X: (T, n) and Y: (n, m), any floating dtypes and strides on one device; (T, m). For a calibration that wants a layer's product
    more exact than the layer makes it.
    """
    how = {"cpu": cpu, "cuda": cuda}.get(X.device.type, reference)
    with torch.no_grad(), torch.autocast(X.device.type, enabled=False):
        return how.wide_product(X, Y, dtype)


def core_linear(x: Tensor, U: Tensor, C: Tensor, V: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (U C Vᵀ)ᵀ + b, never forming the m×n weight, in the forward or in the backward.

    x: (..., n); U: (m, p); C: (p, q); V: (n, q); bias: (m,) or None; y: (..., m). Under autocast the products are made in
    its dtype, as `torch.nn.functional.linear` makes them; otherwise all must share one. Gradients flow to x, C and bias through
    a backward that keeps only h = x V. On a GPU, where the policy expects a kernel to be faster and the core is square, p = q,
    it is an operator; elsewhere it is plain autograd, which for frozen U and V keeps as little and multiplies as little, and
    spares a call the dispatch of an operator. If U or V require grad, plain autograd keeps more.

    Raises JactusError for shapes or dtypes that do not fit.
    """
    (m, p), (n, q) = U.shape, V.shape
    if x.shape[-1] != n or C.shape != (p, q) or (bias is not None and bias.shape != (m,)):
        raise JactusError(
            f"core_linear: x {tuple(x.shape)}, U {tuple(U.shape)}, C {tuple(C.shape)}, V {tuple(V.shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)} do not fit; need x (..., n), U (m, p), C (p, q), V (n, q)"
        )
    dtype = working_dtype("core_linear", x, U, C, V, bias)
    trained_bases = torch.is_grad_enabled() and (U.requires_grad or V.requires_grad)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, C, bias))
    passes = ("core_linear_train", "core_linear_backward") if trains else ("core_linear",)
    if trained_bases or p != q or not _is_operator(passes, x, dtype, m, n, p):
        return reference.core_linear(x, U, C, V, bias)
    x, U, C, V, bias = _cast(dtype, x, U, C, V, bias)
    flat = x.reshape(-1, n)
    y = _core_linear_train(flat, U, C, V, bias)[0] if trains else _core_linear(flat, U, C, V, bias)
    return y.reshape(*x.shape[:-1], m)


def folded_linear(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (left right)ᵀ + b, the deployed two-factor layer.

    x: (..., n); left: (m, r); right: (r, n); bias: (m,) or None; y: (..., m). Dtypes as `core_linear`.
    Where a gradient is wanted, and where no kernel is expected to be faster, this is plain PyTorch.

    Raises JactusError for shapes or dtypes that do not fit.
    """
    (m, r), n = left.shape, right.shape[1]
    if x.shape[-1] != n or right.shape[0] != r or (bias is not None and bias.shape != (m,)):
        raise JactusError(
            f"folded_linear: x {tuple(x.shape)}, left {tuple(left.shape)}, right {tuple(right.shape)} do not fit; "
            "need x (..., n), left (m, r), right (r, n)"
        )
    dtype = working_dtype("folded_linear", x, left, right, bias)
    tensors = (x, left, right, bias)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if trains or not _is_operator(("folded_linear",), x, dtype, m, n, r):
        return reference.folded_linear(x, left, right, bias)
    x, left, right, bias = _cast(dtype, x, left, right, bias)
    return _folded_linear(x.reshape(-1, n), left, right, bias).reshape(*x.shape[:-1], m)


def _is_operator(ops: tuple[str, ...], x: Tensor, dtype: torch.dtype, m: int, n: int, r: int) -> bool:
    """Whether one of these operators runs a kernel for x (..., n) in a dtype, or is traced, when its shape is not yet known."""
    if x.device.type != "cuda":
        return False
    return (
        torch.compiler.is_compiling()
        or isinstance(x, FakeTensor)
        or any(cuda.uses_triton(op, x.device, dtype, Shape(x.numel() // n, m, n, r, dtype.itemsize)) for op in ops)
    )


def working_dtype(op: str, x: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype that `torch.nn.functional.linear` would compute in: autocast's, or the one that all tensors share."""
    device = x.device.type
    wide = [t.dtype == torch.float64 for t in (x, *others) if t is not None]  # which autocast leaves as they are
    if torch.is_autocast_enabled(device) and not any(wide):
        return torch.get_autocast_dtype(device)
    if any(t is not None and t.dtype != x.dtype for t in others):
        dtypes = [x.dtype, *(t.dtype for t in others if t is not None)]
        raise JactusError(f"{op}: one dtype is needed, got {dtypes}; cast the layer or run under torch.autocast")
    return x.dtype


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple:
    """Before an operator, which registers one dtype only; plain products are cast by autocast itself, which is faster."""
    return tuple(None if t is None else t.to(dtype) for t in tensors)

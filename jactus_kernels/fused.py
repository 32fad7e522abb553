"""The three-factor and folded layers from the Triton kernels: which launches make which operator.

Same signatures as `reference`. Small ranks stay on chip; a product with nothing to fuse is the vendor library's, or
the tiled kernel's when the Triton backend was asked for by name. `launches.triton_launches` says the same without a GPU,
and a test holds the two together.
"""

import torch
from torch import Tensor

from . import settings
from .chain import chain
from .core_gradient import core_gradient, projected_gradients
from .decode import decode
from .launches import fits_chain, fits_decode, fits_pair
from .matmul import matmul as tiled


def core_linear(x: Tensor, U: Tensor, C: Tensor, V: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (U C Vᵀ)ᵀ + b; h = x V is not kept, nor even stored for ranks that fit on chip."""
    r, size = C.shape[0], x.element_size()
    if fits_decode(x.shape[0], r, size, core=True):
        return decode(x, V, C, U, bias)
    z = chain(x, V, C.T)[0] if fits_chain(r, size) else matmul(matmul(x, V), C.T)
    return matmul(z, U.T, bias)


def core_linear_train(x: Tensor, U: Tensor, C: Tensor, V: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`core_linear` that also returns h = x V."""
    if fits_chain(C.shape[0], x.element_size()):
        z, h = chain(x, V, C.T, keep=True)
    else:
        h = matmul(x, V)
        z = matmul(h, C.T)
    return matmul(z, U.T, bias), h


def core_linear_backward(
    g: Tensor, h: Tensor, U: Tensor, C: Tensor, V: Tensor, need_x: bool, need_C: bool
) -> tuple[Tensor, Tensor]:
    """q = g U, g_C = qᵀ h, g_x = (q C) Vᵀ; a gradient that is not needed comes back with no elements."""
    T, r, size = g.shape[0], C.shape[0], g.element_size()
    g_x, g_C = g.new_empty(0), g.new_empty(0)
    if need_x and need_C and fits_pair(T, r, size):
        p, g_C = projected_gradients(g, h, U, C)
        return matmul(p, V.T), g_C
    if need_x and fits_chain(r, size):
        p, q = chain(g, U, C, keep=need_C)
        g_x = matmul(p, V.T)
    else:
        q = matmul(g, U)
        if need_x:
            g_x = matmul(matmul(q, C), V.T)
    if need_C:
        g_C = core_gradient(q, h) if settings.current().backend == "triton" else q.T @ h
    return g_x, g_C


def folded_linear(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (left right)ᵀ + b; one launch for ranks that fit on chip."""
    r, size = left.shape[1], x.element_size()
    if fits_decode(x.shape[0], r, size, core=False):
        return decode(x, right.T, None, left, bias)
    if fits_chain(r, size):
        return chain(x, right.T, left.T, bias)[0]
    return matmul(matmul(x, right.T), left.T, bias)


def matmul(A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """A B + bias on every row, by the library or by the tiled kernel."""
    if settings.current().backend == "triton":
        return tiled(A, B, bias)
    return A @ B if bias is None else torch.addmm(bias, A, B)

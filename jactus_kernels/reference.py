"""The definition of right: every operator in plain PyTorch, with the signatures of the fast ones.

Letters: T tokens, m outputs, n inputs, r rank. A layer's weight is W = U C Vᵀ with U (m, r), C (r, r), V (n, r). A basis with d
rows of which r *pivots* are the identity is Π [I; B], B (d − r, r); `order` (2, d) says where its rows are: order[0] has the
pivots and then the others, order[1] is the inverse of that permutation.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def covariance_update_(S: Tensor, X: Tensor, mask: Tensor | None = None, alpha: float = 1.0) -> None:
    """S += α · Xᵀ diag(mask) X, in place.

    Only the lower triangle of S is defined; call `symmetrize_` once, at the end. (This one fills both.)

    S: (n, n), float32 or float64; X: (T, n), any floating dtype, summed in S's dtype; mask: (T,) bool, True keeps.
    """
    if mask is not None:
        X = X[mask]
    X = X.to(S.dtype)
    S.addmm_(X.T, X, alpha=alpha)


def wide_product(X: Tensor, Y: Tensor, dtype: torch.dtype) -> Tensor:
    """X Y in `dtype`, of the values as they are: no narrower dtype rounds a product or a sum. X (T, n), Y (n, m); (T, m)."""
    return X.to(dtype) @ Y.to(dtype)


def symmetrize_(S: Tensor) -> Tensor:
    """Copy the lower triangle of S (n, n) onto the upper one, in place; returns S."""
    n = S.shape[0]
    # By strips, so that a large S never has a second copy beside it.
    for i in range(0, n, 1024):
        j = min(i + 1024, n)
        block = S[i:j, i:j]
        block.copy_(block.tril() + block.tril(-1).T)
        S[i:j, j:] = S[j:, i:j].T
    return S


def core_linear(x: Tensor, U: Tensor, C: Tensor, V: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (U C Vᵀ)ᵀ + b for x (..., n), U (m, r), C (r, r), V (n, r), bias (m,); y (..., m) in x's dtype."""
    return linear(linear(x @ V, C), U, bias)


def core_linear_train(x: Tensor, U: Tensor, C: Tensor, V: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`core_linear` that also returns h = x V (T, r), the only activation its backward needs."""
    h = x @ V
    return linear(linear(h, C), U, bias), h


def core_linear_backward(
    g: Tensor, h: Tensor, U: Tensor, C: Tensor, V: Tensor, need_x: bool, need_C: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `core_linear` for frozen U and V: q = g U, g_C = qᵀ h, g_x = (q C) Vᵀ; no m×n matrix is formed.

    g: (T, m); h: (T, r). Returns (g_x (T, n), g_C (r, r)); one that is not needed comes back with no elements.
    """
    q = g @ U
    g_x = (q @ C) @ V.T if need_x else g.new_empty(0)
    g_C = q.T @ h if need_C else g.new_empty(0)
    return g_x, g_C


def folded_linear(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (left right)ᵀ + b for x (..., n), left (m, r), right (r, n), bias (m,); y (..., m) in x's dtype."""
    return linear(linear(x, right), left, bias)


def narrow(x: Tensor, B: Tensor, order: Tensor) -> Tensor:
    """z = x Π [I; B]: the pivots among x's columns, and B's combinations of the others added. x (..., d); z (..., r)."""
    r = B.shape[1]
    x = x.index_select(-1, order[0])
    return x[..., :r] + x[..., r:] @ B


def widen(z: Tensor, B: Tensor, order: Tensor) -> Tensor:
    """y = z (Π [I; B])ᵀ: z in the places of the pivots, z Bᵀ in the others'. z (..., r); y (..., d)."""
    return torch.cat([z, z @ B.T], dim=-1).index_select(-1, order[1])


def core_widen(z: Tensor, C: Tensor, B: Tensor, order: Tensor, bias: Tensor | None) -> Tensor:
    """y = z Cᵀ (Π [I; B])ᵀ + b: `widen` of z Cᵀ. z (..., q); C (p, q); B (d − p, p); y (..., d)."""
    y = widen(linear(z, C), B, order)
    return y if bias is None else y + bias


def core_widen_backward(
    g: Tensor, z: Tensor, C: Tensor, B: Tensor, order: Tensor, need_z: bool, need_C: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `core_widen` for a frozen B: with s = g Π [I; B], g_z = s C and g_C = sᵀ z; None where not needed.

    g (..., d); z (..., q).
    """
    s = narrow(g, B, order)
    g_C = s.reshape(-1, s.shape[-1]).T @ z.reshape(-1, z.shape[-1]) if need_C else None
    return s @ C if need_z else None, g_C

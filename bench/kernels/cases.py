"""The shapes to time, and who computes them: the kernels, and torch at equal accuracy."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

import jactus_kernels as jk
from jactus_kernels import reference

# outputs × inputs of the distinct linear layers
MODELS = {
    "ViT-B": [(768, 768), (3072, 768), (768, 3072)],
    "ViT-L": [(1024, 1024), (4096, 1024), (1024, 4096)],
    "Llama-2-7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "Llama-3-8B": [(1024, 4096), (14336, 4096), (4096, 14336)],
    "Llama-3-70B": [(8192, 8192), (28672, 8192), (8192, 28672)],
}
TOKENS = (1, 16, 256, 2048, 16384)
RETAINED = (0.8, 0.3)  # the lower one has ranks that the fused kernels keep on chip
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@dataclass(frozen=True)
class Case:
    model: str
    T: int
    m: int
    n: int
    r: int


def rank(m: int, n: int, retained: float) -> int:
    """The largest multiple of 16 with r(m + n) + r² ≤ retained · m n (at least 16)."""
    root = (((m + n) ** 2 + 4 * retained * m * n) ** 0.5 - (m + n)) / 2
    return max(16, int(root) // 16 * 16)


def cases() -> list[Case]:
    """Every layer at every number of tokens; on CPU a toy layer, so that the suites are run and cannot rot."""
    if not ON_GPU:
        return [Case("toy", T, 96, 64, rank(96, 64, 0.8)) for T in (1, 16, 40)]
    layers = [(name, m, n) for name, shapes in MODELS.items() for m, n in shapes]
    return [Case(name, T, m, n, rank(m, n, kept)) for name, m, n in layers for kept in RETAINED for T in TOKENS]


def widths() -> list[Case]:
    """One covariance per distinct width and number of tokens."""
    if not ON_GPU:
        return [Case("toy", T, 80, 80, 0) for T in (16, 40)]
    found = sorted({side for shapes in MODELS.values() for shape in shapes for side in shape})
    return [Case("width", T, n, n, 0) for n in found for T in TOKENS if T >= 256]


def made(*shape: int, scale: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator, device=DEVICE) * scale).to(dtype)


def layer(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, U, C, V and bias, scaled so that y is of order one."""
    T, m, n, r = case.T, case.m, case.n, case.r
    return (
        made(T, n, scale=1, dtype=dtype),
        made(m, r, scale=r**-0.5, dtype=dtype),
        made(r, r, scale=r**-0.5, dtype=dtype, seed=1),
        made(n, r, scale=n**-0.5, dtype=dtype, seed=2),
        made(m, scale=1, dtype=dtype),
    )


def forward(case: Case, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Inference of one layer, by provider; the first is what the others' results are compared with."""
    x, U, C, V, b = layer(case, dtype)
    W, left, right = U @ C @ V.T, U @ C, V.T.contiguous()
    return {
        "three products": lambda: reference.core_linear(x, U, C, V, b),
        "jactus": lambda: jk.core_linear(x, U, C, V, b),
        "dense": lambda: linear(x, W, b),
        "two products": lambda: reference.folded_linear(x, left, right, b),
        "jactus folded": lambda: jk.folded_linear(x, left, right, b),
    }


def training(case: Case, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of one layer; returns the gradient of the input."""
    x, U, C, V, b = layer(case, dtype)
    x.requires_grad_(), C.requires_grad_()
    W = (U @ C @ V.T).detach().requires_grad_()
    g = made(case.T, case.m, scale=1, dtype=dtype, seed=3)

    def step(compute: Callable, weight: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(compute(), (x, weight), g)[0]

    return {
        "three products": step(lambda: reference.core_linear(x, U, C, V, b), C),
        "jactus": step(lambda: jk.core_linear(x, U, C, V, b), C),
        "dense": step(lambda: linear(x, W, b), W),
    }


def covariance(case: Case, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """One update of a float32 covariance; the providers sum in float32."""
    X = made(case.T, case.n, scale=1, dtype=dtype)
    S = torch.zeros(case.n, case.n, device=DEVICE)

    def upcast() -> Tensor:
        wide = X.float()
        return S.addmm_(wide.T, wide)

    providers = {"addmm_ of float32 copy": upcast, "jactus": lambda: jk.covariance_update_(S, X)}
    if ON_GPU and dtype != torch.float32:
        providers["mm out_dtype"] = lambda: S.add_(torch.mm(X.T, X, out_dtype=torch.float32))
    return providers

"""The shapes to time, and who computes them: the kernels, and torch at equal accuracy."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

import jactus_kernels as jk
from jactus_kernels import reference
from jactus_kernels.device import family
from jactus_kernels.tiles import has_tile

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
IN_FLOAT32 = ("ViT-B", "Llama-2-7B", "toy")  # the others run in bfloat16 only, as they are used
BEYOND_CACHE = 160 << 20  # bytes of weights that calls in turns go over: more than the L2 cache of any device
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


def copies(case: Case, dtype: torch.dtype) -> int:
    """How many layers of that size a model must have for their factors not to fit in a cache; at most 64."""
    if not ON_GPU or case.T > 256:  # there a layer's own activations fill the cache
        return 1
    size = case.r * (case.m + case.n + case.r) * dtype.itemsize
    return max(1, min(64, -(-BEYOND_CACHE // size)))


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


def forward(case: Case, dtype: torch.dtype, provider: str) -> Callable[[int], Tensor]:
    """Inference of a layer by a provider: a function of which of the `copies` of its weights to use.

    "three products" is what the others' results are compared with.
    """
    x, U, C, V, b = layer(case, dtype)
    count = copies(case, dtype)

    def repeated(*weights: Tensor) -> list[tuple[Tensor, ...]]:
        return [weights, *(tuple(w.clone() for w in weights) for _ in range(count - 1))]

    if provider in ("three products", "jactus"):
        core, cores = reference.core_linear if provider == "three products" else jk.core_linear, repeated(U, C, V)
        return lambda i: core(x, *cores[i % count], b)
    if provider == "dense":
        dense = repeated(U @ C @ V.T)
        return lambda i: linear(x, *dense[i % count], b)
    pair, pairs = (
        reference.folded_linear if provider == "two products" else jk.folded_linear,
        repeated(U @ C, V.T.contiguous()),
    )
    return lambda i: pair(x, *pairs[i % count], b)


def training(case: Case, dtype: torch.dtype, provider: str) -> Callable[[int], Tensor]:
    """Forward and backward of one layer; returns the gradient of the input."""
    x, U, C, V, b = layer(case, dtype)
    x.requires_grad_(), C.requires_grad_()
    g = made(case.T, case.m, scale=1, dtype=dtype, seed=3)
    if provider == "dense":
        W = (U @ C @ V.T).detach().requires_grad_()
        return lambda i: torch.autograd.grad(linear(x, W, b), (x, W), g)[0]
    core = reference.core_linear if provider == "three products" else jk.core_linear
    return lambda i: torch.autograd.grad(core(x, U, C, V, b), (x, C), g)[0]


def covariance(case: Case, dtype: torch.dtype) -> dict[str, Callable[[int], Tensor]]:
    """One update of a float32 covariance; the providers sum in float32."""
    X = made(case.T, case.n, scale=1, dtype=dtype)
    S = torch.zeros(case.n, case.n, device=DEVICE)

    def upcast(i: int) -> Tensor:
        wide = X.float()
        return S.addmm_(wide.T, wide)

    def wide_update_(i: int) -> Tensor:
        from jactus_kernels.covariance import covariance_update_  # wants Triton, which a CPU does without

        covariance_update_(S, X, kernel="covariance wide")
        return S

    providers = {"addmm_ of float32 copy": upcast, "jactus": lambda i: jk.covariance_update_(S, X)}
    if ON_GPU and dtype != torch.float32:
        if has_tile("covariance wide", family(X), dtype.itemsize):
            providers["jactus wide"] = wide_update_
        providers["mm out_dtype"] = lambda i: S.add_(torch.mm(X.T, X, out_dtype=torch.float32))
    return providers

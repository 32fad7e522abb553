"""The two layers that stand where a Linear or Conv1D stood: three factors to train, two to deploy."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import jactus_kernels as kernels
from jactus_kernels import JactusError


class LowRankLinear(nn.Module, ABC):
    """What both have in common: shapes, whether a Conv1D stood here, and a stand-in for `.weight`."""

    def __init__(self, m: int, n: int, rank: int, transposed: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.transposed = n, m, rank, transposed
        self.bias: nn.Parameter | None

    @property
    def weight(self) -> Tensor:
        """Right in dtype, device and shape, which is all that some models ask of `layer.weight`; its values are NaN.

        The dense weight is not stored. `dense_weight()` computes it; a model that multiplies by `.weight` itself gets
        NaN, never a wrong number.
        """
        some = next(self.parameters())
        m, n = self.out_features, self.in_features
        stand_in = some.new_full((), float("nan")).expand((n, m) if self.transposed else (m, n))
        # GPT-2 initialises `c_proj.weight` by hand when a model is loaded, unless the tensor says it is.
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        return stand_in

    @abstractmethod
    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (m, n), multiplied out in float64, in `dtype` (None: that of the factors)."""

    def dense(self, model_dtype: torch.dtype | None = None) -> nn.Module:
        """The Linear (or Conv1D) that computes the same function.

        Unlike this layer it does not cast, so it takes the dtype of what is around it: the bias's, which is the replaced
        layer's, or else the model's unless the factors are wider (as T5 keeps some layers of a half-precision model).
        """
        layer: Any
        with torch.device("meta"):
            if self.transposed:
                layer = Conv1D(self.out_features, self.in_features)
            else:
                layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        factors = next(self.parameters()).dtype
        around = factors if model_dtype is None or model_dtype.itemsize < factors.itemsize else model_dtype
        dtype = around if self.bias is None else self.bias.dtype
        weight = self.dense_weight(dtype)
        layer.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight, requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class CoreLinear(LowRankLinear):
    """y = x (U C Vᵀ)ᵀ + b, with U (m, r) and V (n, r) frozen and the core C (r, r) trainable.

    With a `width` p > r the side with fewer rows has p columns and the core is (p, r) or (r, p): more to train for the same
    folded layer; at r = min(m, n) it is the other side, since that one has every direction. With many tokens C is then
    multiplied into the wide side first, p·r multiply-adds a row and call; with few, all three products are of tokens. Fold
    before generating.
    With `trainable_rank` k < r only the leading k×k block of C is trained, as an offset `block` (k, k) to it.
    `reach` is how far a step of ±1 in all of the core moves the layer, as a part of it: what `learning_rate` goes by.
    The core may be stored wider than the bases (float32 beside bfloat16): all compute in the input's dtype.
    """

    def __init__(
        self,
        m: int,
        n: int,
        rank: int,
        bias: bool = True,
        transposed: bool = False,
        trainable_rank: int | None = None,
        dtype: torch.dtype | None = None,
        core_dtype: torch.dtype | None = None,
        width: int | None = None,
        reach: float = math.nan,
    ) -> None:
        super().__init__(m, n, rank, transposed)
        self.reach = reach
        width = width or rank
        if width < rank or (width > rank and trainable_rank is not None):
            raise JactusError(
                f"CoreLinear({m}, {n}, rank={rank}): width={width} must be at least the rank, and without trainable_rank "
                f"(got {trainable_rank}) if it is more"
            )
        p, q = core_shape(m, n, rank, width)
        self.U = nn.Parameter(torch.empty(m, p, dtype=dtype), requires_grad=False)
        self.V = nn.Parameter(torch.empty(n, q, dtype=dtype), requires_grad=False)
        self.core = nn.Parameter(torch.empty(p, q, dtype=core_dtype or dtype))
        self.block: nn.Parameter | None = None
        if trainable_rank is not None and trainable_rank < rank:
            self.core.requires_grad_(False)
            self.block = nn.Parameter(torch.zeros(trainable_rank, trainable_rank, dtype=core_dtype or dtype))
        self.bias = nn.Parameter(torch.empty(m, dtype=dtype), requires_grad=False) if bias else None

    @property
    def effective_core(self) -> Tensor:
        """C with the trained leading block added."""
        if self.block is None:
            return self.core
        rest = self.rank - self.block.shape[0]
        return self.core + nn.functional.pad(self.block, (0, rest, 0, rest))

    def forward(self, input: Tensor) -> Tensor:
        U, C, V, bias = in_dtype_of(input, self.U, self.effective_core, self.V, self.bias)
        p, q = C.shape
        rows = self.out_features if p > q else self.in_features  # of the side that the core would be multiplied into
        if p == q or input.numel() // self.in_features * (p * q + abs(p - q) * rows) <= p * q * rows:
            return kernels.core_linear(input, U, C, V, bias)
        left, right = (U @ C, V.T) if p > q else (U, C @ V.T)
        return kernels.folded_linear(input, left, right, bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", width={self.width}" if self.width > self.rank else "")

    @property
    def width(self) -> int:
        """The longer side of the core."""
        return max(self.core.shape)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        core = self.effective_core.detach().double()
        return (self.U.double() @ core @ self.V.double().T).to(dtype or self.U.dtype)

    def folded(self) -> "FoldedLinear":
        """The two-factor layer: C multiplied, in float64, into the side with fewer rows."""
        layer = FoldedLinear(self.out_features, self.in_features, self.rank, transposed=self.transposed)
        core = self.effective_core.detach().double()
        left, right = self.U.detach().double(), self.V.detach().double().T
        if self.out_features <= self.in_features:
            left = left @ core
        else:
            right = core @ right
        layer.left = nn.Parameter(left.to(self.U.dtype), requires_grad=False)
        layer.right = nn.Parameter(right.to(self.V.dtype).contiguous(), requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)


class FoldedLinear(LowRankLinear):
    """y = x (left right)ᵀ + b, with left (m, r) and right (r, n): the deployed form, not for training."""

    def __init__(
        self,
        m: int,
        n: int,
        rank: int,
        bias: bool = True,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(m, n, rank, transposed)
        self.left = nn.Parameter(torch.empty(m, rank, dtype=dtype), requires_grad=False)
        self.right = nn.Parameter(torch.empty(rank, n, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(m, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return kernels.folded_linear(input, *in_dtype_of(input, self.left, self.right, self.bias))

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return (self.left.double() @ self.right.double()).to(dtype or self.left.dtype)


def core_shape(m: int, n: int, rank: int, width: int) -> tuple[int, int]:
    """(p, q) of a core in an (m, n) layer: the side with fewer rows has `width` columns and the other `rank`; at full rank,
    where that side has every direction, the other way round."""
    return (width, rank) if (m <= n) != (rank == min(m, n)) else (rank, width)


def in_dtype_of(input: Tensor, *tensors: Tensor | None) -> tuple:
    """The tensors in the input's dtype; as they are under autocast, which casts them itself."""
    if torch.is_autocast_enabled(input.device.type):
        return tensors
    dtype = input.dtype
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors)


def compressed_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The low-rank layers of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


def core_layers(model: nn.Module) -> dict[str, CoreLinear]:
    """Those of them that are three factors, with a core to train."""
    return {name: m for name, m in compressed_layers(model).items() if isinstance(m, CoreLinear)}


def refuse_compressed(model: nn.Module) -> None:
    """Raise JactusError when the model has low-rank layers already."""
    layers = compressed_layers(model)
    if layers:
        name, layer = next(iter(layers.items()))
        raise JactusError(
            f"{type(model).__name__} is compressed already ({len(layers)} layers, the first {name}: {layer}); "
            "call jactus.merge(model) to make it dense again, or start from the original model"
        )


HOOKS = [key for key in vars(nn.Module()) if "hook" in key and "state_dict" not in key]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module `name` was, with the hooks that other tools have on it."""
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    old = getattr(holder, child)
    for key in HOOKS:
        vars(new)[key] = vars(old)[key]  # the very dictionaries, so that their owners' handles still remove them
    if (hook := vars(old).get("_hf_hook")) is not None:  # accelerate's, which is no hook of torch's
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)
    setattr(holder, child, new)

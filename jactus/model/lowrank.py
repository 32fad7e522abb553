"""The two layers that stand where a Linear or Conv1D stood: three factors to train, two to deploy."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import jactus_kernels as kernels
from jactus_kernels import JactusError

from .offload import is_offloaded
from .pivots import pivots
from .rounding import by_stored, damped, is_narrow, rounded
from .sharded import whole_shape


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
    """y = x (U C Vᵀ)ᵀ + b, with bases U (m, r) and V (n, r) frozen and the core C (r, r) trainable.

    A basis has r pivot rows that span the others (`pivots`), so it is stored as these, T (r, r), over the others' coefficients
    B (m − r, r), and a step multiplies by T C Tᵀ, made once a call, between products that leave the pivots out: no more
    multiply-adds a token than the layer has once folded, r(m+n−r); of few tokens T multiplies these instead. `rows` (2, m) and `columns` (2, n) say where the rows are; a
    basis with as many columns as rows has none. Without `pivoted`, as layers of 0.1.0 are, the bases are stored row by row.

    With a `width` p > r the side with fewer rows has p columns and the core is (p, r) or (r, p): more to train for the same
    folded layer. With `trainable_rank` k < r only the leading k×k block of C is trained, as an offset `block` (k, k) to it.
    `reach` is how far a step of ±1 in all of the core moves the layer, as a part of it: what `learning_rate` goes by.
    The core may be stored wider than the bases (float32 beside bfloat16): T C Tᵀ is made in its dtype, and all else is in the
    input's. Fold before generating.
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
        pivoted: bool = True,
    ) -> None:
        super().__init__(m, n, rank, transposed)
        self.reach, self.pivoted = reach, pivoted
        width = width or rank
        if width < rank or (width > rank and trainable_rank is not None):
            raise JactusError(
                f"CoreLinear({m}, {n}, rank={rank}): width={width} must be at least the rank, and without trainable_rank "
                f"(got {trainable_rank}) if it is more"
            )
        p, q = core_shape(m, n, rank, width)
        self.U = nn.Parameter(torch.empty(m, p, dtype=dtype), requires_grad=False)
        self.V = nn.Parameter(torch.empty(n, q, dtype=dtype), requires_grad=False)
        self.rows: Tensor | None
        self.columns: Tensor | None
        self.register_buffer("rows", _order(m) if pivoted and p < m else None)
        self.register_buffer("columns", _order(n) if pivoted and q < n else None)
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
        C, bias, U, V = self.effective_core, self.bias, _frozen(self.U), _frozen(self.V)
        p, q = C.shape
        if not self.pivoted:
            return kernels.core_linear(input, *in_dtype_of(input, U, C, V, bias))
        T_U, T_V = U[:p], V[:q]
        few = input.numel() // self.in_features * (p * p + q * q) < p * q * (p + q)
        if not few:
            with torch.autocast(input.device.type, enabled=False):
                C = T_U.to(C.dtype) @ C @ T_V.to(C.dtype).T
        B_U, C, B_V, T_U, T_V, bias = in_dtype_of(input, U[p:], C, V[q:], T_U, T_V, bias)
        h = input if self.columns is None else kernels.narrow(input, B_V, self.columns)
        if few:
            h, C = nn.functional.linear(h @ T_V, C), T_U
        if self.rows is None:
            return nn.functional.linear(h, C, bias)
        return kernels.widen(h, B_U, self.rows, bias, C)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", width={self.width}" if self.width > self.rank else "")

    @property
    def width(self) -> int:
        """The longer side of the core."""
        return max(whole_shape(self.core))

    @torch.no_grad()
    def hold(self, U: Tensor, C: Tensor, V: Tensor, dtype: torch.dtype, core_dtype: torch.dtype) -> None:
        """Take over U (m, p), C (p, q) and V (n, q), float64: stored on the CPU, the bases as pivots and coefficients. Between bases in a
        narrow dtype the core is the best one for what became of them."""
        for name, basis, index, core, other in (("U", U, "rows", C, V), ("V", V, "columns", C.T, U)):
            if len(basis) > basis.shape[1]:
                order, B = pivots(basis)
                T = basis[order[0, : basis.shape[1]]]
                if is_narrow(dtype):  # what B is off by reaches the weight times the rest of the product
                    rest = T @ core @ other.T
                    B = rounded(B, damped(rest @ rest.T), dtype)
                basis = torch.cat([T, B])
                setattr(self, index, order.cpu())
            setattr(self, name, nn.Parameter(basis.to("cpu", dtype).contiguous(), requires_grad=False))
        if is_narrow(dtype):
            left, right = (by_stored(s.to(b.device), b, dtype) for s, b in zip(self.bases(), (U, V)))
            C = left @ C @ right.T
        trains = self.core.requires_grad
        self.core = nn.Parameter(C.to("cpu", core_dtype).contiguous(), requires_grad=trains)
        if self.block is not None:
            self.block = nn.Parameter(torch.zeros(self.block.shape, dtype=core_dtype))

    @torch.no_grad()
    def bases(self) -> tuple[Tensor, Tensor]:
        """U (m, p) and V (n, q), row by row, float64."""
        return _row_by_row(self.U, self.rows), _row_by_row(self.V, self.columns)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        U, V = self.bases()
        return (U @ self.effective_core.detach().double() @ V.T).to(dtype or self.U.dtype)

    def folded(self) -> "FoldedLinear":
        """The layer to deploy, the side with fewer rows without its pivots. Made in float64."""
        layer = FoldedLinear(self.out_features, self.in_features, self.rank, transposed=self.transposed)
        core, (near, far) = self.effective_core.detach().double(), self.bases()
        stored, order = self.U, self.rows
        if self.out_features > self.in_features:  # W' = V C' U'
            core, near, far, stored, order = core.T, far, near, self.V, self.columns
        if near.shape[1] > self.rank:
            near = near @ core
        else:
            far = far @ core.T
        if order is None or near.shape[1] < stored.shape[1]:
            order, B = pivots(near)
        else:
            B = stored[self.rank :]  # as it is, so that folding rounds it no further
        layer.hold(order, B, far @ near[order[0, : self.rank]].T, self.U.dtype)
        layer.bias = self.bias
        return layer.train(self.training)


class FoldedLinear(LowRankLinear):
    """y = x (left right)ᵀ + b of rank r: the deployed form, not for training.

    The side with fewer rows is stored without its r pivots, r(m+n−r) numbers in all: for m ≤ n left is (m − r, r), what the other
    outputs are of the pivots', and right (r, n); else left is (m, r) and right (n − r, r), what the pivots among the inputs get
    from the others. `order` (2, min(m, n)) says where these are. Without `pivoted`, as layers of 0.1.0 are, left is (m, r)
    and right (r, n).
    """

    def __init__(
        self,
        m: int,
        n: int,
        rank: int,
        bias: bool = True,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
        pivoted: bool = True,
    ) -> None:
        super().__init__(m, n, rank, transposed)
        self.pivoted = pivoted
        left = m - rank if pivoted and m <= n else m
        right = (n - rank, rank) if pivoted and m > n else (rank, n)
        self.left = nn.Parameter(torch.empty(left, rank, dtype=dtype), requires_grad=False)
        self.right = nn.Parameter(torch.empty(right, dtype=dtype), requires_grad=False)
        self.order: Tensor | None
        self.register_buffer("order", _order(min(m, n)) if pivoted else None)
        self.bias = nn.Parameter(torch.empty(m, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        left, right, bias = in_dtype_of(input, self.left, self.right, self.bias)
        if self.order is None:
            return kernels.folded_linear(input, left, right, bias)
        if self.out_features <= self.in_features:
            return kernels.widen(input, left, self.order, bias, right)
        return nn.functional.linear(kernels.narrow(input, right, self.order), left, bias)

    @torch.no_grad()
    def hold(self, order: Tensor, B: Tensor, far: Tensor, dtype: torch.dtype) -> None:
        """Take over W = Π [I; B] farᵀ for m ≤ n, else W = far (Π [I; B])ᵀ; far (max(m, n), r)."""
        B = B.to(dtype)
        if is_narrow(dtype):
            far = rounded(far, damped(B.double().T @ B.double(), 1.0), dtype)
        far = far.to(dtype)
        left, right = (B, far.T) if self.out_features <= self.in_features else (far, B)
        self.order = order
        self.left = nn.Parameter(left.contiguous(), requires_grad=False)
        self.right = nn.Parameter(right.contiguous(), requires_grad=False)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        left, right = self.left.double(), self.right.double()
        if self.order is None:
            W = left @ right
        elif self.out_features <= self.in_features:
            W = torch.cat([right, left @ right])[self.order[1]]
        else:
            W = torch.cat([left, left @ right.T], dim=1)[:, self.order[1]]
        return W.to(dtype or self.left.dtype)


def _frozen(basis: Tensor) -> Tensor:
    """A basis, which trains nowhere: as a part of one tensor that does, as FSDP1 makes it, it would be sent gradients."""
    return basis if isinstance(basis, nn.Parameter) else basis.detach()


def _order(d: int) -> Tensor:
    return torch.zeros(2, d, dtype=torch.int64)


def _row_by_row(basis: Tensor, order: Tensor | None) -> Tensor:
    """A basis stored as its pivots and the others' coefficients, float64."""
    basis = basis.double()
    if order is None:
        return basis
    T, B = basis[: basis.shape[1]], basis[basis.shape[1] :]
    return torch.cat([T, B @ T])[order[1]]


def core_shape(m: int, n: int, rank: int, width: int) -> tuple[int, int]:
    """(p, q) of a core in an (m, n) layer: the side with fewer rows has `width` columns and the other `rank`; beyond full rank,
    where that side has every direction (layers that 0.1.0 saved have more on the other), the other way round."""
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
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        if is_offloaded(old):  # the new layer stays where it computes: it is smaller, and trains
            hook = AlignDevicesHook(hook.execution_device, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys)
        add_hook_to_module(new, hook)
    setattr(holder, child, new)

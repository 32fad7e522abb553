"""What a launcher must know of the GPU it launches on: family, size, memory engine, precision of float32 products."""

from contextlib import AbstractContextManager
from functools import lru_cache

import torch
from torch import Tensor

from . import settings
from .errors import JactusError


@lru_cache(maxsize=64)
def _properties(index: int) -> tuple[str | None, int]:
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = found.gcnArchName.split(":")[0]
        return ("gfx942" if name == "gfx942" else None), found.multi_processor_count
    families = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100"}
    return families.get(torch.cuda.get_device_capability(index)), found.multi_processor_count


def _index(x: Tensor) -> int:
    return torch.cuda.current_device() if x.device.index is None else x.device.index


def find_family_of(index: int) -> str | None:
    """The GPU family the kernels are compiled and checked for, or None where there is no configuration."""
    return _properties(index)[0]


def family(x: Tensor) -> str:
    """`find_family_of` the tensor's device, raising JactusError where there is none."""
    found = find_family_of(_index(x))
    if found is None:
        raise JactusError(
            f"no kernel configuration for {torch.cuda.get_device_name(_index(x))}; leave JACTUS_BACKEND at auto or "
            "set it to torch"
        )
    return found


def multiprocessors(x: Tensor) -> int:
    """How many multiprocessors (compute units) the tensor's device has."""
    return _properties(_index(x))[1]


def precision(x: Tensor) -> str:
    """How float32 products of x are made; 16-bit inputs have one way only, and one name keeps them to one binary."""
    if x.element_size() != 4:
        return "ieee"
    return resolve_precision(settings.current().fp32, family(x))


def resolve_precision(asked: str, of_family: str) -> str:
    """The mode behind "auto"; raises JactusError for a TF32 mode on a family without it."""
    amd = of_family.startswith("gfx")
    if asked == "auto":
        return "ieee" if amd else "tf32x3"
    if amd and asked != "ieee":
        raise JactusError(f"fp32={asked!r}: {of_family} has no TF32; use auto or ieee")
    return asked


def tma_readable(x: Tensor) -> bool:
    """Whether a tensor descriptor can read the matrix x: rows contiguous, base and row pitch multiples of 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    if not (aligned and x.stride(1) == 1 and x.stride(0) >= x.shape[1]) or family(x) not in ("sm_90", "sm_100"):
        return False
    _provide_descriptor_memory()
    return True


def _provide_descriptor_memory() -> None:
    """Descriptors made inside a kernel need a few bytes of global memory, which Triton asks an allocator for."""
    import triton
    from triton.runtime import _allocation

    present = _allocation._allocator
    present = present.get() if hasattr(present, "get") else present
    if isinstance(present, _allocation.NullAllocator):  # never replace one the user has set
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


def guard(x: Tensor) -> AbstractContextManager:
    """Launch on the tensor's own device."""
    return torch.cuda.device(_index(x))


def unit_stride(x: Tensor) -> Tensor:
    """x itself where one of its two strides is 1, else a contiguous copy: no kernel reads scattered elements."""
    return x if 1 in x.stride() else x.contiguous()
